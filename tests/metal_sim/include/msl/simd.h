// clang-format off: tables of one-line macros
// barriers, simdgroup / quadgroup operations, atomics, simdgroup_matrix
#pragma once
#define MSL_SITE uint line = __builtin_LINE(), const char *file = __builtin_FILE()
#define MSL_NOSAN __attribute__((disable_sanitizer_instrumentation, noinline))
namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum class thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
inline void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_rt_barrier(int(f), line, file); }
inline void simdgroup_barrier(mem_flags f, MSL_SITE) {
  msl::Post p{nullptr, nullptr, nullptr, uint(f), line, file, "simdgroup_barrier"};
  msl_rt_simd(&p);
}
}  // namespace metal
namespace msl {
template <class T>
struct IO {
  T v, fill;
};
// generic exchange: every active lane posts (v, fill, arg); F fills out[] for all active lanes
template <class T, class F>
struct Op {
  MSL_NOSAN static void run(Post** p, uint mask) {
    T in[32], fill[32], out[32];
    uint arg[32];
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) {
        in[l] = ((const IO<T>*)p[l]->in)->v;
        fill[l] = ((const IO<T>*)p[l]->in)->fill;
        arg[l] = p[l]->arg;
      } else {
        __builtin_memset((void*)&in[l], 0xFF, sizeof(T));
        fill[l] = in[l];
        arg[l] = 0;
      }
    F::f(in, fill, arg, out, mask);
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) *(T*)p[l]->out = out[l];
  }
};
template <class F, class T>
inline T exch(T v, T fill, uint arg, const char* name, uint line, const char* file) {
  IO<T> io{v, fill};
  T out;
  Post p{&Op<T, F>::run, &io, &out, arg, line, file, name};
  msl_rt_simd(&p);
  return out;
}
#define MSL_RED(Name, EXPR)                           \
  struct Name {                                       \
    template <class T>                                \
    static void f(T* in, T*, uint*, T* out, uint m) { \
      T t[32];                                        \
      bool has[32];                                   \
      for (int l = 0; l < 32; l++) {                  \
        t[l] = in[l];                                 \
        has[l] = m >> l & 1;                          \
      }                                               \
      for (int d = 16; d; d >>= 1)                    \
        for (int l = 0; l < d; l++) {                 \
          if (has[l] && has[l + d]) {                 \
            T a = t[l], b = t[l + d];                 \
            t[l] = T(EXPR);                           \
          } else if (has[l + d]) {                    \
            t[l] = t[l + d];                          \
            has[l] = true;                            \
          }                                           \
        }                                             \
      for (int l = 0; l < 32; l++) out[l] = t[0];     \
    }                                                 \
  };
MSL_RED(RSum, a + b)
MSL_RED(RMul, a* b)
MSL_RED(RMax, (a < b || a != a) ? b : a)
MSL_RED(RMin, (b < a || a != a) ? b : a) MSL_RED(RAnd, a& b) MSL_RED(ROr, a | b) MSL_RED(RXor, a ^ b) struct ShDown {
  template <class T>
  static void f(T* in, T* fl, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) {
      uint s = l + a[l];
      out[l] = s < 32 ? in[s] : in[l];
    }
  }
};
struct ShUp {
  template <class T>
  static void f(T* in, T* fl, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) {
      int s = l - int(a[l]);
      out[l] = s >= 0 ? in[s] : in[l];
    }
  }
};
struct FillUp {
  template <class T>
  static void f(T* in, T* fl, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) {
      int s = l - int(a[l]);
      out[l] = s >= 0 ? in[s] : fl[(s + 32) & 31];
    }
  }
};
struct FillDown {
  template <class T>
  static void f(T* in, T* fl, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) {
      uint s = l + a[l];
      out[l] = s < 32 ? in[s] : fl[s & 31];
    }
  }
};
struct ShXor {
  template <class T>
  static void f(T* in, T*, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) out[l] = in[(l ^ a[l]) & 31];
  }
};
struct ShIdx {
  template <class T>
  static void f(T* in, T*, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) out[l] = in[a[l] & 31];
  }
};
struct RotDown {
  template <class T>
  static void f(T* in, T*, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) out[l] = in[(l + a[l]) & 31];
  }
};
struct RotUp {
  template <class T>
  static void f(T* in, T*, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) out[l] = in[(l - a[l]) & 31];
  }
};
struct First {
  template <class T>
  static void f(T* in, T*, uint*, T* out, uint m) {
    for (int l = 0; l < 32; l++) out[l] = in[__builtin_ctz(m)];
  }
};
#define MSL_SCAN(Name, INC, OPX, ID)                  \
  struct Name {                                       \
    template <class T>                                \
    static void f(T* in, T*, uint*, T* out, uint m) { \
      T acc = T(ID);                                  \
      for (int l = 0; l < 32; l++)                    \
        if (m >> l & 1) {                             \
          T a = acc, b = in[l];                       \
          T n = T(OPX);                               \
          out[l] = INC ? n : acc;                     \
          acc = n;                                    \
        }                                             \
    }                                                 \
  };
MSL_SCAN(IncSum, true, a + b, 0)
MSL_SCAN(ExcSum, false, a + b, 0) MSL_SCAN(IncMul, true, a* b, 1) MSL_SCAN(ExcMul, false, a* b, 1) struct Ballot {
  static void f(uint* in, uint*, uint*, uint* out, uint m) {
    uint r = 0;
    for (int l = 0; l < 32; l++)
      if ((m >> l & 1) && in[l]) r |= 1u << l;
    for (int l = 0; l < 32; l++) out[l] = r;
  }
};
struct QShXor {
  template <class T>
  static void f(T* in, T*, uint* a, T* out, uint) {
    for (int l = 0; l < 32; l++) out[l] = in[(l & ~3) | ((l ^ a[l]) & 3)];
  }
};
struct QSum {
  template <class T>
  static void f(T* in, T*, uint*, T* out, uint) {
    for (int l = 0; l < 32; l++) {
      int q = l & ~3;
      out[l] = T(T(in[q] + in[q + 1]) + T(in[q + 2] + in[q + 3]));
    }
  }
};
struct QMax {
  template <class T>
  static void f(T* in, T*, uint*, T* out, uint) {
    for (int l = 0; l < 32; l++) {
      int q = l & ~3;
      T r = in[q];
      for (int i = 1; i < 4; i++) r = r < in[q + i] ? in[q + i] : r;
      out[l] = r;
    }
  }
};
}  // namespace msl
#define MSL_S1(n, F)                                   \
  template <class T>                                   \
  inline T n(T v, MSL_SITE) {                          \
    return msl::exch<msl::F>(v, v, 0, #n, line, file); \
  }
#define MSL_S2(n, F)                                   \
  template <class T>                                   \
  inline T n(T v, ushort a, MSL_SITE) {                \
    return msl::exch<msl::F>(v, v, a, #n, line, file); \
  }
#define MSL_S3(n, F)                                           \
  template <class T>                                           \
  inline T n(T v, type_identity_t<T> fl, ushort a, MSL_SITE) { \
    return msl::exch<msl::F>(v, T(fl), a, #n, line, file);     \
  }
#define MSL_SIMD(P)                                                                                                         \
  MSL_S1(P##sum, RSum)                                                                                                      \
  MSL_S1(P##product, RMul)                                                                                                  \
  MSL_S1(P##max, RMax)                                                                                                      \
  MSL_S1(P##min, RMin)                                                                                                      \
  MSL_S1(P##and, RAnd)                                                                                                      \
  MSL_S1(P## or, ROr) MSL_S1(P## xor, RXor) MSL_S1(P##prefix_inclusive_sum, IncSum) MSL_S1(P##prefix_exclusive_sum, ExcSum) \
      MSL_S1(P##prefix_inclusive_product, IncMul) MSL_S1(P##prefix_exclusive_product, ExcMul)                               \
          MSL_S1(P##broadcast_first, First) MSL_S2(P##shuffle_down, ShDown) MSL_S2(P##shuffle_up, ShUp)                     \
              MSL_S2(P##shuffle_xor, ShXor) MSL_S2(P##shuffle, ShIdx) MSL_S2(P##broadcast, ShIdx)                           \
                  MSL_S2(P##shuffle_rotate_down, RotDown) MSL_S2(P##shuffle_rotate_up, RotUp)                               \
                      MSL_S3(P##shuffle_and_fill_up, FillUp) MSL_S3(P##shuffle_and_fill_down, FillDown)
namespace metal {
MSL_SIMD(simd_)
MSL_S1(quad_sum, QSum) MSL_S1(quad_max, QMax) MSL_S2(quad_shuffle_xor, QShXor) struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  explicit simd_vote(vote_t x) : v(x) {}
  explicit operator vote_t() const { return v; }
  bool any() const { return v; }
  bool all() const { return v == 0xffffffffu; }
};
inline simd_vote simd_ballot(bool b, MSL_SITE) {
  return simd_vote(msl::exch<msl::Ballot>(uint(b), uint(b), 0, "simd_ballot", line, file));
}
inline bool simd_any(bool b, MSL_SITE) { return msl::exch<msl::ROr>(uint(b), 0u, 0, "simd_any", line, file); }
inline bool simd_all(bool b, MSL_SITE) { return msl::exch<msl::RAnd>(uint(b), 0u, 0, "simd_all", line, file); }
inline bool simd_is_first(MSL_SITE) { return msl_rt_lane() == 0; }
// --- atomics: relaxed, sequential in the simulator; still bounds-checked and marked in the shadow
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
#define MSL_AT(n, EX)                                                                               \
  template <class T>                                                                                \
  inline T atomic_fetch_##n##_explicit(volatile atomic<T>* p, type_identity_t<T> b, memory_order) { \
    return msl::at_rmw(p, [=](T a) { return T(EX); });                                              \
  }
}  // namespace metal
namespace msl {
template <class T, class F>
MSL_NOSAN T at_rmw(volatile metal::atomic<T>* p, F f) {
  msl_rt_atomic((void*)p, sizeof(T));
  T o = p->v;
  p->v = f(o);
  return o;
}
}  // namespace msl
namespace metal {
MSL_AT(add, a + b)
MSL_AT(sub, a - b)
MSL_AT(max, a < b ? b : a)
MSL_AT(min, b < a ? b : a)
MSL_AT(or, a | b)
MSL_AT(and, a& b) MSL_AT(xor, a ^ b) template <class T>
inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  return msl::at_rmw((volatile atomic<T>*)p, [](T a) { return a; });
}
template <class T>
inline void atomic_store_explicit(volatile atomic<T>* p, type_identity_t<T> v, memory_order) {
  msl::at_rmw(p, [=](T) { return v; });
}
template <class T>
inline T atomic_exchange_explicit(volatile atomic<T>* p, type_identity_t<T> v, memory_order) {
  return msl::at_rmw(p, [=](T) { return v; });
}
template <class T>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* e, type_identity_t<T> v, memory_order,
                                                  memory_order) {
  T x = *e;
  T o = msl::at_rmw(p, [=](T a) { return __builtin_memcmp(&a, &x, sizeof(T)) ? a : v; });
  bool ok = !__builtin_memcmp(&o, &x, sizeof(T));
  *e = o;
  return ok;
}
// --- 8x8 matrices: lane -> (row, col..col+1) map as used by MLX steel (BaseMMAFrag::get_coord)
template <class T, int R, int C>
struct simdgroup_matrix {
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T d) {
    int r, c;
    coord(r, c);
    e[0] = r == c ? d : T(0);
    e[1] = r == c + 1 ? d : T(0);
  }
  vec<T, 2>& thread_elements() { return e; }
  const vec<T, 2>& thread_elements() const { return e; }
  static void coord(int& r, int& c) {
    int l = msl_rt_lane(), q = l / 4;
    r = (q & 4) + (l / 2) % 4;
    c = (q & 2) * 2 + (l % 2) * 2;
  }
};
template <class T>
simdgroup_matrix<T, 8, 8> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, 8, 8> m;
  m.e = vec<T, 2>(v);
  return m;
}
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class D, class A, class B, class C>
struct Mma {
  const simdgroup_matrix<A, 8, 8>* a;
  const simdgroup_matrix<B, 8, 8>* b;
  const simdgroup_matrix<C, 8, 8>* c;
};
template <class D, class A, class B, class C>
MSL_NOSAN void mma_run(msl::Post** p, uint mask) {
  float a[64], b[64];
  for (int l = 0; l < 32; l++) {
    auto* m = (const Mma<D, A, B, C>*)p[l]->in;
    int q = l / 4, r = (q & 4) + (l / 2) % 4, c = (q & 2) * 2 + (l % 2) * 2;
    for (int k = 0; k < 2; k++) {
      a[r * 8 + c + k] = float(m->a->e[k]);
      b[r * 8 + c + k] = float(m->b->e[k]);
    }
  }
  for (int l = 0; l < 32; l++) {
    auto* m = (const Mma<D, A, B, C>*)p[l]->in;
    int q = l / 4, r = (q & 4) + (l / 2) % 4, c = (q & 2) * 2 + (l % 2) * 2;
    for (int k = 0; k < 2; k++) {
      float s = m->c ? float(m->c->e[k]) : 0.f;
      for (int i = 0; i < 8; i++) s += a[r * 8 + i] * b[i * 8 + c + k];
      ((vec<D, 2>*)p[l]->out)->s[k] = D(s);
    }
  }
}
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, MSL_SITE) {
  Mma<D, A, B, C> m{&a, &b, &c};
  vec<D, 2> out;
  msl::Post p{&mma_run<D, A, B, C>, &m, &out, 1, line, file, "simdgroup_multiply_accumulate"};
  msl_rt_simd(&p);
  d.e = out;
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
  Mma<D, A, B, D> m{&a, &b, nullptr};
  vec<D, 2> out;
  msl::Post p{&mma_run<D, A, B, D>, &m, &out, 1, line, file, "simdgroup_multiply"};
  msl_rt_simd(&p);
  d.e = out;
}
template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P src, ulong ld = 8, ulong2 o = ulong2(0), bool tr = false, MSL_SITE) {
  int r, c;
  m.coord(r, c);
  for (int k = 0; k < 2; k++) m.e[k] = T(tr ? src[(o.x + c + k) * ld + o.y + r] : src[(o.y + r) * ld + o.x + c + k]);
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, P dst, ulong ld = 8, ulong2 o = ulong2(0), bool tr = false,
                            MSL_SITE) {
  int r, c;
  m.coord(r, c);
  for (int k = 0; k < 2; k++) (tr ? dst[(o.x + c + k) * ld + o.y + r] : dst[(o.y + r) * ld + o.x + c + k]) = m.e[k];
}
}  // namespace metal
#define MSL_MI(n)                            \
  template <class T>                         \
  inline T __metal_simd_##n(T v, MSL_SITE) { \
    return metal::simd_##n(v, line, file);   \
  }
MSL_MI(sum)
MSL_MI(product)
MSL_MI(max)
MSL_MI(min)
MSL_MI(prefix_inclusive_sum)
MSL_MI(prefix_exclusive_sum) MSL_MI(prefix_inclusive_product)
    MSL_MI(prefix_exclusive_product) inline float __metal_simd_xor(float v) {
  return v;
}
#define MSL_MI2(n)                                     \
  template <class T>                                   \
  inline T __metal_simd_##n(T v, ushort a, MSL_SITE) { \
    return metal::simd_##n(v, a, line, file);          \
  }
MSL_MI2(broadcast)
MSL_MI2(shuffle)
MSL_MI2(shuffle_up)
MSL_MI2(shuffle_down)
MSL_MI2(shuffle_xor)
MSL_MI2(shuffle_rotate_up) MSL_MI2(shuffle_rotate_down) template <class T>
inline T __metal_simd_shuffle_and_fill_up(T v, T f, ushort d, ushort, MSL_SITE) {
  return metal::simd_shuffle_and_fill_up(v, f, d, line, file);
}
template <class T>
inline T __metal_simd_shuffle_and_fill_down(T v, T f, ushort d, ushort, MSL_SITE) {
  return metal::simd_shuffle_and_fill_down(v, f, d, line, file);
}
