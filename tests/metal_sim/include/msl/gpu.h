// Definitions behind strict.h for a build for AMD's gfx1030: it shows how many registers a kernel takes and what it keeps in
// memory, not what it computes. 32 lanes a simdgroup, as on Apple's GPUs.
#pragma once
#define MSL_AS2 const __attribute__((address_space(4)))
#include "msl/strict.h"
#define MSL_GPU inline __attribute__((always_inline))

namespace gpu {
MSL_GPU unsigned lane() { return __builtin_amdgcn_mbcnt_lo(~0u, 0u); }
template <class T>
MSL_GPU T from_lane(T x, unsigned from) {
  return __builtin_bit_cast(T, __builtin_amdgcn_ds_bpermute(int(from) << 2, __builtin_bit_cast(int, x)));
}
template <class T, class F>
MSL_GPU T reduce(T x, F f) {
  for (unsigned h = 16; h >= 1; h /= 2) x = f(x, from_lane(x, lane() ^ h));
  return x;
}
MSL_GPU void fence() { __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "workgroup"); }
}  // namespace gpu

namespace metal {
#define MSL_GPU_MATH                                                \
  MSL_GPU float exp2(float x) { return __builtin_amdgcn_exp2f(x); } \
  MSL_GPU float sqrt(float x) { return __builtin_amdgcn_sqrtf(x); } \
  MSL_GPU float rint(float x) { return __builtin_rintf(x); }        \
  MSL_GPU float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_GPU_MATH
namespace fast {
MSL_GPU_MATH
}
namespace precise {
MSL_GPU_MATH
}
MSL_GPU float min(float a, float b) { return __builtin_fminf(a, b); }
MSL_GPU float max(float a, float b) { return __builtin_fmaxf(a, b); }
MSL_GPU float clamp(float x, float a, float b) { return min(max(x, a), b); }
MSL_GPU float abs(float x) { return __builtin_fabsf(x); }
#define MSL_GPU_INT(T)                              \
  MSL_GPU T min(T a, T b) { return b < a ? b : a; } \
  MSL_GPU T max(T a, T b) { return a < b ? b : a; } \
  MSL_GPU T clamp(T x, T a, T b) { return min(max(x, a), b); }
MSL_GPU_INT(int)
MSL_GPU_INT(uint)
template <class T, int N>
MSL_GPU vec<T, N> max(vec<T, N> a, type_identity_t<vec<T, N>> b) {
  for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]);
  return a;
}
MSL_GPU bool isnan(float x) { return __builtin_isnan(x); }
MSL_GPU bool isinf(float x) { return __builtin_isinf(x); }
MSL_GPU void threadgroup_barrier(mem_flags) {
  gpu::fence();
  __builtin_amdgcn_s_barrier();
  gpu::fence();
}
MSL_GPU void simdgroup_barrier(mem_flags) {
  gpu::fence();
  __builtin_amdgcn_wave_barrier();
  gpu::fence();
}
template <class T>
MSL_GPU T simd_sum(T x) {
  return gpu::reduce(x, [](T a, T b) { return a + b; });
}
template <class T>
MSL_GPU T simd_max(T x) {
  return gpu::reduce(x, [](T a, T b) { return max(a, b); });
}
template <class T>
MSL_GPU T simd_min(T x) {
  return gpu::reduce(x, [](T a, T b) { return min(a, b); });
}
template <class T>
MSL_GPU T simd_or(T x) {
  return gpu::reduce(x, [](T a, T b) { return T(a | b); });
}
template <class T>
MSL_GPU T simd_shuffle(T x, ushort from) {
  return gpu::from_lane(x, from);
}
template <class T>
MSL_GPU T simd_shuffle_xor(T x, ushort mask) {
  return gpu::from_lane(x, gpu::lane() ^ mask);
}
MSL_GPU bool simd_any(bool x) { return __builtin_amdgcn_ballot_w32(x) != 0; }
MSL_GPU bool simd_all(bool x) { return __builtin_amdgcn_ballot_w32(!x) == 0; }
// One instruction on two registers of each operand.
template <class D, class A, class B, class C>
MSL_GPU void simdgroup_multiply_accumulate(D& d, A a, B b, C c) {
  float x = c.e.x, y = c.e.y;
  asm("v_matrix %0 %1 %2 %3 %4 %5" : "+v"(x), "+v"(y) : "v"(a.e.x), "v"(a.e.y), "v"(b.e.x), "v"(b.e.y));
  d.e.x = x;
  d.e.y = y;
}
}  // namespace metal

template <class V>
struct msl_element;
template <class T, int N>
struct msl_element<metal::vec<T, N>> {
  typedef T type;
};
namespace gpu {
template <class V, class T>
MSL_GPU void put(V& v, int& at, T x) {
  v[at++] = typename msl_element<V>::type(x);
}
template <class V, class T, int N>
MSL_GPU void put(V& v, int& at, metal::vec<T, N> x) {
  for (int i = 0; i < N; i++) v[at++] = typename msl_element<V>::type(x[i]);
}
}  // namespace gpu
// V(a, b, ...), V(scalar) or V(vector of another type).
template <class V, class... A>
MSL_GPU V msl_mk(A... a) {
  V v;
  int at = 0;
  if constexpr ((0 + ... + msl_n<A>::n) == 1) {
    for (int i = 0; i < msl_n<V>::n; i++) (gpu::put(v, at, a), ...);
  } else {
    (gpu::put(v, at, a), ...);
  }
  return v;
}

// Kernels: built-in indices are the last arguments but the threadgroup's.
namespace gpu {
template <class T>
MSL_GPU T argument(T x, int) {
  return x;
}
template <>
MSL_GPU unsigned argument<unsigned>(unsigned x, int nth) {
  const unsigned tid = __builtin_amdgcn_workitem_id_x();
  return nth == 0 ? tid : nth == 1 ? __builtin_amdgcn_readfirstlane(tid / 32) : nth == 2 ? tid % 32 : x;
}
template <class... A>
constexpr int uints_before(int n) {
  const bool is_uint[] = {__is_same(A, unsigned)...};
  int count = 0;
  for (int i = 0; i < n; i++) count += is_uint[i];
  return count;
}
template <class T, T... I>
struct Sequence {};
template <auto F, class... A, int... I>
MSL_GPU void call(Sequence<int, I...>, A... a) {
  F(argument<A>(a, uints_before<A...>(I))...);
}
template <auto F, class S>
struct Kernel;
template <auto F, class... A>
struct Kernel<F, void(A...)> {
  __attribute__((amdgpu_kernel)) static void run(A... a) {
    call<F, A...>(__make_integer_seq<Sequence, int, sizeof...(A)>{}, a...);
  }
};
}  // namespace gpu
