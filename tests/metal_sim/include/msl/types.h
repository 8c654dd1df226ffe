// clang-format off: tables of one-line macros
// Scalar and vector types of MSL. exec: class vec<>; strict: clang ext_vector_type (so that
// loads through address-space pointers stay builtin) .
#pragma once
#include "msl/scalars.h"
namespace metal {
template <int A>
struct ic {
  static constexpr int value = A;
};
template <class T, int N>
struct vec;
template <class T>
struct comps {
  static constexpr int n = 1;
};
template <class T, int N>
struct comps<vec<T, N>> {
  static constexpr int n = N;
};
template <class T, int N>
struct vstore {};
// r-value/l-value swizzle view on the components of a vec
template <class T, int SZ, int... I>
struct swz {
  T m[SZ];
  static constexpr int N = sizeof...(I);
  constexpr operator vec<T, N>() const { return vec<T, N>(m[I]...); }
  constexpr swz& operator=(const vec<T, N>& v) {
    int k = 0;
    ((m[I] = v[k++]), ...);
    return *this;
  }
  swz() = default;
  constexpr swz(const swz&) = default;
  constexpr swz& operator=(const swz& o) { return *this = vec<T, N>(o); }
#define MSL_SOP(op)                                                                 \
  friend constexpr vec<T, N> operator op(const swz& a, const vec<T, N>& b) {        \
    vec<T, N> r = a;                                                                \
    return r op b;                                                                  \
  }                                                                                 \
  friend constexpr vec<T, N> operator op(const vec<T, N>& a, const swz& b) {        \
    vec<T, N> r = b;                                                                \
    return a op r;                                                                  \
  }                                                                                 \
  template <int... J>                                                               \
  friend constexpr vec<T, N> operator op(const swz& a, const swz<T, SZ, J...>& b) { \
    vec<T, N> r = a, q = b;                                                         \
    return r op q;                                                                  \
  }                                                                                 \
  constexpr swz& operator op## = (const vec<T, N>& b) { return *this = *this op b; }
  MSL_SOP(+) MSL_SOP(-) MSL_SOP(*) MSL_SOP(/)
};
#define MSL_SWZ2(T) MSL_SW2(T, 2)
#define MSL_SWZ3(T) MSL_SW3(T)
#define MSL_SWZ4(T)              \
  MSL_SW3(T) swz<T, 4, 2, 3> zw; \
  swz<T, 4, 3, 2> wz;            \
  swz<T, 4, 0, 3> xw;            \
  swz<T, 4, 1, 3> yw;            \
  swz<T, 4, 1, 2, 3> yzw;        \
  swz<T, 4, 3, 2, 1, 0> wzyx;    \
  swz<T, 4, 0, 1, 2, 3> xyzw;
#define MSL_SW2(T, Z) \
  swz<T, Z, 0, 1> xy; \
  swz<T, Z, 1, 0> yx; \
  swz<T, Z, 0, 0> xx; \
  swz<T, Z, 1, 1> yy;
#define MSL_SW3(T)                  \
  MSL_SW2(T, 4) swz<T, 4, 1, 2> yz; \
  swz<T, 4, 0, 2> xz;               \
  swz<T, 4, 2, 1> zy;               \
  swz<T, 4, 2, 0> zx;               \
  swz<T, 4, 2, 1, 0> zyx;           \
  swz<T, 4, 0, 1, 2> xyz;
#define MSL_VEC(N, AL, F, S)                                                                            \
  template <class T>                                                                                    \
  struct alignas(sizeof(T) * AL) vec<T, N> {                                                            \
    union {                                                                                             \
      struct {                                                                                          \
        T F;                                                                                            \
      };                                                                                                \
      T s[AL];                                                                                          \
      S(T)                                                                                              \
    };                                                                                                  \
    vec() = default; /* as on a GPU, not zero */                                                        \
    constexpr vec(T v) : s{} {                                                                          \
      for (int i = 0; i < N; i++) s[i] = v;                                                             \
    }                                                                                                   \
    constexpr vec(const vec& o) : s{} {                                                                 \
      for (int i = 0; i < N; i++) s[i] = o.s[i];                                                        \
    }                                                                                                   \
    constexpr vec& operator=(const vec& o) {                                                            \
      for (int i = 0; i < N; i++) s[i] = o.s[i];                                                        \
      return *this;                                                                                     \
    }                                                                                                   \
    template <class U>                                                                                  \
    constexpr explicit vec(const vec<U, N>& o) : s{} {                                                  \
      for (int i = 0; i < N; i++) s[i] = T(o[i]);                                                       \
    }                                                                                                   \
    template <class A, class B, class... R>                                                             \
    constexpr vec(A a, B b, R... r) : s{} {                                                             \
      int k = 0;                                                                                        \
      put(k, a);                                                                                        \
      put(k, b);                                                                                        \
      (put(k, r), ...);                                                                                 \
      static_assert(comps<A>::n + comps<B>::n + (0 + ... + comps<R>::n) == N, "wrong component count"); \
    }                                                                                                   \
    constexpr T& operator[](int i) { return s[i]; }                                                     \
    constexpr const T& operator[](int i) const { return s[i]; }                                         \
                                                                                                        \
   private:                                                                                             \
    template <class A>                                                                                  \
    constexpr void put(int& k, const A& a) {                                                            \
      s[k++] = T(a);                                                                                    \
    }                                                                                                   \
    template <class U, int M>                                                                           \
    constexpr void put(int& k, const vec<U, M>& a) {                                                    \
      for (int i = 0; i < M; i++) s[k++] = T(a[i]);                                                     \
    }                                                                                                   \
  };
#define MSL_C ,
MSL_VEC(2, 2, x MSL_C y, MSL_SWZ2)
MSL_VEC(3, 4, x MSL_C y MSL_C z, MSL_SWZ3)
MSL_VEC(4, 4, x MSL_C y MSL_C z MSL_C w, MSL_SWZ4)
#define MSL_BIN(op)                                                    \
  template <class T, int N>                                            \
  constexpr vec<T, N> operator op(vec<T, N> a, const vec<T, N>& b) {   \
    for (int i = 0; i < N; i++) a[i] = T(a[i] op b[i]);                \
    return a;                                                          \
  }                                                                    \
  template <class T, int N>                                            \
  constexpr vec<T, N> operator op(vec<T, N> a, type_identity_t<T> b) { \
    for (int i = 0; i < N; i++) a[i] = T(a[i] op b);                   \
    return a;                                                          \
  }                                                                    \
  template <class T, int N>                                            \
  constexpr vec<T, N> operator op(type_identity_t<T> a, vec<T, N> b) { \
    for (int i = 0; i < N; i++) b[i] = T(a op b[i]);                   \
    return b;                                                          \
  }                                                                    \
  template <class T, int N, class B>                                   \
  constexpr vec<T, N>& operator op## = (vec<T, N> & a, const B& b) {   \
    a = a op b;                                                        \
    return a;                                                          \
  }
MSL_BIN(+)
MSL_BIN(-)
MSL_BIN(*)
MSL_BIN(/)
MSL_BIN(%)
MSL_BIN(&) MSL_BIN(|) MSL_BIN(^) MSL_BIN(<<) MSL_BIN(>>)
#define MSL_CMP(op)                                                              \
  template <class T, int N>                                                      \
  constexpr vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {   \
    vec<bool, N> r;                                                              \
    for (int i = 0; i < N; i++) r[i] = a[i] op b[i];                             \
    return r;                                                                    \
  }                                                                              \
  template <class T, int N>                                                      \
  constexpr vec<bool, N> operator op(const vec<T, N>& a, type_identity_t<T> b) { \
    vec<bool, N> r;                                                              \
    for (int i = 0; i < N; i++) r[i] = a[i] op b;                                \
    return r;                                                                    \
  }
    MSL_CMP(==) MSL_CMP(!=) MSL_CMP(<) MSL_CMP(<=) MSL_CMP(>) MSL_CMP(>=) MSL_CMP(&&) MSL_CMP(||) template <class T, int N>
    constexpr vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = -a[i];
  return a;
}
template <class T, int N>
constexpr vec<T, N> operator~(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = ~a[i];
  return a;
}
template <int N>
constexpr vec<bool, N> operator!(vec<bool, N> a) {
  for (int i = 0; i < N; i++) a[i] = !a[i];
  return a;
}
#define MSL_TY(t)         \
  typedef vec<t, 2> t##2; \
  typedef vec<t, 3> t##3; \
  typedef vec<t, 4> t##4;
MSL_TY(bool)
MSL_TY(char)
MSL_TY(uchar)
MSL_TY(short)
MSL_TY(ushort)
MSL_TY(int) MSL_TY(uint) MSL_TY(long) MSL_TY(ulong) MSL_TY(half) MSL_TY(bfloat) MSL_TY(float) template <class T, int N>
struct packed_vec {
  T s[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& v) {
    for (int i = 0; i < N; i++) s[i] = v[i];
  }
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = s[i];
    return r;
  }
  T& operator[](int i) { return s[i]; }
  const T& operator[](int i) const { return s[i]; }
};
#define MSL_PK(t)                         \
  typedef packed_vec<t, 2> packed_##t##2; \
  typedef packed_vec<t, 3> packed_##t##3; \
  typedef packed_vec<t, 4> packed_##t##4;
MSL_PK(char)
MSL_PK(uchar)
MSL_PK(short)
MSL_PK(ushort)
MSL_PK(int)
MSL_PK(uint) MSL_PK(half) MSL_PK(float) template <class To, class From>
inline To as_type_impl(const From& f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To t;
  __builtin_memcpy((void*)&t, (const void*)&f, sizeof(To));
  return t;
}
template <class T>
struct uniform {
  T v;
  constexpr uniform() = default;
  constexpr uniform(T x) : v(x) {}
  constexpr operator T() const { return v; }
};
template <class T>
constexpr uniform<T> make_uniform(T x) {
  return uniform<T>(x);
}
#define MSL_UNI(op)                                              \
  template <class T>                                             \
  constexpr uniform<T> operator op(uniform<T> a, uniform<T> b) { \
    return uniform<T>(a.v op b.v);                               \
  }
MSL_UNI(+) MSL_UNI(-) MSL_UNI(*) MSL_UNI(/) MSL_UNI(%)
}  // namespace metal
template <class To, class From>
inline To as_type(const From& f) {
  return metal::as_type_impl<To>(f);
}
using namespace metal;
