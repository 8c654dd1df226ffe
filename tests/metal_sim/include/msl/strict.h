// clang-format off: tables of one-line macros
// Strict mode: address spaces are real types (clang address_space attribute), vectors are
// ext_vector_type. Only declarations: used with -fsyntax-only.
#pragma once
#include "msl/scalars.h"
#define MSL_AS0
#define MSL_AS1 __attribute__((address_space(1)))
#ifndef MSL_MODE_GPU
#define MSL_AS2 const __attribute__((address_space(2)))
#endif
#define MSL_AS3 __attribute__((address_space(3)))
namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define MSL_TY(t)                  \
  typedef vec<t, 2> t##2;          \
  typedef vec<t, 3> t##3;          \
  typedef vec<t, 4> t##4;          \
  typedef vec<t, 2> packed_##t##2; \
  typedef vec<t, 3> packed_##t##3; \
  typedef vec<t, 4> packed_##t##4;
MSL_TY(char)
MSL_TY(uchar)
MSL_TY(short)
MSL_TY(ushort) MSL_TY(int) MSL_TY(uint) MSL_TY(long) MSL_TY(ulong) MSL_TY(half) MSL_TY(bfloat) MSL_TY(float) typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;
template <class T>
struct uniform {
  T v;
  uniform(T);
  operator T() const;
};
template <class T>
uniform<T> make_uniform(T);
#define MSL_UNI(op)  \
  template <class T> \
  uniform<T> operator op(uniform<T> a, uniform<T> b);
MSL_UNI(+)
MSL_UNI(-)
MSL_UNI(*)
MSL_UNI(/)
MSL_UNI(%)
#define F1(n)               \
  float n(float);           \
  half n(half);             \
  template <class T, int N> \
  vec<T, N> n(vec<T, N>);
#define F2(n)               \
  float n(float, float);    \
  half n(half, half);       \
  template <class T, int N> \
  vec<T, N> n(vec<T, N>, type_identity_t<vec<T, N>>);
#define FALL                                                                                                              \
  F1(exp)                                                                                                                 \
  F1(exp2)                                                                                                                \
  F1(exp10)                                                                                                               \
  F1(log)                                                                                                                 \
  F1(log2)                                                                                                                \
  F1(log10) F1(sqrt) F1(rsqrt) F1(sin) F1(cos) F1(tan) F1(asin) F1(acos) F1(atan) F1(sinh) F1(cosh) F1(tanh) F1(asinh)    \
      F1(acosh) F1(atanh) F1(floor) F1(ceil) F1(rint) F1(round) F1(trunc) F1(fabs) F1(fract) F1(sinpi) F1(cospi) F1(sign) \
          F1(saturate) F2(pow) F2(powr) F2(atan2) F2(fmod) F2(fmin) F2(fmax) F2(divide) F2(copysign) float                \
          fma(float, float, float);                                                                                       \
  half fma(half, half, half);                                                                                             \
  float mix(float, float, float);
FALL namespace fast { FALL }
namespace precise {
FALL
}
#define I3(T)       \
  T min(T, T);      \
  T max(T, T);      \
  T clamp(T, T, T); \
  T abs(T);
I3(float)
I3(half)
I3(char)
I3(schar)
I3(uchar)
I3(short) I3(ushort) I3(int) I3(uint) I3(long) I3(ulong)
#define IN(T)                    \
  T popcount(T);                 \
  T clz(T);                      \
  T ctz(T);                      \
  T extract_bits(T, uint, uint); \
  T reverse_bits(T);
    IN(schar) IN(uchar) IN(short) IN(ushort) IN(int) IN(uint) IN(long) IN(ulong) template <class T, int N>
    vec<T, N> min(vec<T, N>, type_identity_t<vec<T, N>>);
template <class T, int N>
vec<T, N> max(vec<T, N>, type_identity_t<vec<T, N>>);
template <class T, int N>
T dot(vec<T, N>, type_identity_t<vec<T, N>>);
template <class T>
T select(T, T, bool);
template <class T, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<int, N>);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool isnan(half);
bool isinf(half);
float ldexp(float, int);
float frexp(float, int&);
float nextafter(float, float);
bool any(bool4);
bool all(bool4);
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
#define S1(n)        \
  template <class T> \
  T simd_##n(T);
#define S2(n)        \
  template <class T> \
  T simd_##n(T, ushort);
#define S3(n)        \
  template <class T> \
  T simd_##n(T, type_identity_t<T>, ushort);
S1(sum)
S1(product)
S1(max)
S1(min)
S1(and)
S1(or) S1(xor) S1(prefix_inclusive_sum) S1(prefix_exclusive_sum) S1(prefix_inclusive_product) S1(prefix_exclusive_product)
    S1(broadcast_first) S2(broadcast) S2(shuffle) S2(shuffle_up) S2(shuffle_down) S2(shuffle_xor) S2(shuffle_rotate_up)
        S2(shuffle_rotate_down) S3(shuffle_and_fill_up) S3(shuffle_and_fill_down) bool simd_any(bool);
bool simd_all(bool);
template <class T>
T quad_sum(T);
template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
enum memory_order { memory_order_relaxed };
template <class T>
T atomic_fetch_add_explicit(volatile MSL_AS1 atomic<T>*, type_identity_t<T>, memory_order);
template <class T>
T atomic_fetch_add_explicit(volatile MSL_AS3 atomic<T>*, type_identity_t<T>, memory_order);
}  // namespace metal
template <class T>
struct msl_n {
  static constexpr int n = 1;
};
template <class T, int N>
struct msl_n<metal::vec<T, N>> {
  static constexpr int n = N;
};
#ifndef MSL_MODE_GPU
template <class V, class... A>
V msl_mk(A... a) {
  static_assert(sizeof...(A) == 1 || (0 + ... + msl_n<A>::n) == msl_n<V>::n,
                "wrong number of components in vector constructor");
  return V{};
}
#endif
template <class To, class From>
To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, f);
}
using namespace metal;
#define M1(n) float __metal_##n(float, int);
M1(exp)
M1(exp2)
M1(log)
M1(log2)
M1(log10)
M1(sqrt) M1(sin) M1(cos) M1(tan) M1(asin) M1(acos) M1(atan) M1(sinh) M1(cosh) M1(tanh) M1(asinh) M1(acosh) M1(atanh) M1(floor)
    M1(ceil) M1(rint) M1(round) M1(trunc) M1(fabs) M1(rsqrt) M1(exp10) M1(fract) M1(sinpi) M1(cospi) M1(tanpi)
#define M2(n) float __metal_##n(float, float, int);
        M2(atan2) M2(pow) M2(powr) M2(fmod) M2(fmin) M2(fmax) M2(divide) float __metal_fma(float, float, float);
float __metal_fmax3(float, float, float, int);
float __metal_fmin3(float, float, float, int);
float __metal_fmedian3(float, float, float, int);
float __metal_ldexp(float, int, int);
float __metal_frexp(float, int*, int = 0);
float __metal_nextafter(float, float, int = 0);
ushort __metal_get_simdgroup_size(ushort);
#define MS(n)            \
  template <class T>     \
  T __metal_simd_##n(T); \
  template <class T>     \
  T __metal_simd_##n(T, ushort);
MS(sum)
MS(product)
MS(max)
MS(min)
MS(xor) MS(prefix_inclusive_sum) MS(prefix_exclusive_sum) MS(prefix_inclusive_product) MS(prefix_exclusive_product)
    MS(broadcast) MS(shuffle) MS(shuffle_up) MS(shuffle_down) MS(shuffle_xor) MS(shuffle_rotate_up)
        MS(shuffle_rotate_down) template <class T>
        T __metal_simd_shuffle_and_fill_up(T, T, ushort, ushort);
template <class T>
T __metal_simd_shuffle_and_fill_down(T, T, ushort, ushort);

namespace metal {
template <class T, int R, int C>
struct strict_sgm {
  vec<T, 2> e;
  vec<T, 2>& thread_elements() { return e; }
};
typedef strict_sgm<float, 8, 8> simdgroup_float8x8;
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(D&, A, B, C);
template <class M, class P>
void simdgroup_load(M&, P, ulong = 8);
template <class M, class P>
void simdgroup_store(M, P, ulong = 8);
}  // namespace metal
