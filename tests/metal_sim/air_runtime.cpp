// The functions that AIR modules call (`air.*`), by the functions of our metal_* headers. Arguments and result travel by
// memory. The list holds what test_apple_kernels.py runs; a module that calls another function does not link.
#include "msl/runtime.h"

namespace {
template <class T>
const T& of(const void* p) {
  return *(const T*)p;
}
template <class T>
void set(void* r, T v) {
  *(T*)r = v;
}
}  // namespace

// The function NAME: `r` is the result, `a`, `b` and `c` are the arguments, `at` the number of the call.
#define AIR(id, name, ...)                                                                                      \
  extern "C" void air_##id(void* r, const void* a, const void* b, const void* c, uint at) asm("msl.air." name); \
  void air_##id(void* r, const void* a, const void* b, const void* c, uint at) { __VA_ARGS__; }
#define AIR1(id, name, T, f) AIR(id, name, set<T>(r, f(of<T>(a))))
#define AIR2(id, name, T, f) AIR(id, name, set<T>(r, f(of<T>(a), of<T>(b))))
#define OVER_LANES(id, name, T, f) AIR(id, name, set<T>(r, f(of<T>(a), at, "air")))
#define FROM_LANE(id, name, T, f) AIR(id, name, set<T>(r, f(of<T>(a), of<ushort>(b), at, "air")))

OVER_LANES(sum_f32, "simd_sum.f32", float, metal::simd_sum)
OVER_LANES(sum_f16, "simd_sum.f16", half, metal::simd_sum)
OVER_LANES(max_f32, "simd_max.f32", float, metal::simd_max)
OVER_LANES(max_f16, "simd_max.f16", half, metal::simd_max)
OVER_LANES(min_f32, "simd_min.f32", float, metal::simd_min)
OVER_LANES(prefix_f32, "simd_prefix_inclusive_sum.f32", float, metal::simd_prefix_inclusive_sum)
OVER_LANES(any, "simd_any", bool, metal::simd_any)
OVER_LANES(all, "simd_all", bool, metal::simd_all)
FROM_LANE(shuffle_f32, "simd_shuffle.f32", float, metal::simd_shuffle)
FROM_LANE(xor_f32, "simd_shuffle_xor.f32", float, metal::simd_shuffle_xor)

// The first argument says which memory, the second is the scope of the threads.
AIR(barrier, "wg.barrier", metal::threadgroup_barrier(metal::mem_flags(of<int>(a)), at, "air"))
AIR(lanes, "simdgroup.barrier", metal::simdgroup_barrier(metal::mem_flags(of<int>(a)), at, "air"))

namespace {
template <class A, class B>
void multiply_accumulate(void* r, const void* a, const void* b, const void* c, uint at) {
  using Sum = metal::simdgroup_matrix<float, 8, 8>;
  Sum d;
  metal::simdgroup_multiply_accumulate(d, of<metal::simdgroup_matrix<A, 8, 8>>(a), of<metal::simdgroup_matrix<B, 8, 8>>(b),
                                       of<Sum>(c), at, "air");
  set(r, d.thread_elements());
}
}  // namespace
#define PRODUCT "simdgroup_matrix_8x8_multiply_accumulate"
AIR(product_f32, PRODUCT ".v64f32.v64f32.v64f32.v64f32", (multiply_accumulate<float, float>(r, a, b, c, at)))
AIR(product_f16, PRODUCT ".v64f32.v64f16.v64f16.v64f32", (multiply_accumulate<half, half>(r, a, b, c, at)))
AIR(product_mixed, PRODUCT ".v64f32.v64f32.v64f16.v64f32", (multiply_accumulate<float, half>(r, a, b, c, at)))

AIR1(exp, "fast_exp.f32", float, metal::fast::exp)
AIR1(exp2, "fast_exp2.f32", float, metal::fast::exp2)
AIR1(log2, "log2.f32", float, metal::log2)
AIR1(rsqrt, "rsqrt.f32", float, metal::rsqrt)
AIR1(rint, "rint.f16", half, metal::rint)
AIR2(fmax, "fmax.f32", float, metal::fmax)
AIR2(imax, "max.s.i32", int, metal::max)
AIR2(imin, "min.s.i32", int, metal::min)
AIR(to_float, "convert.f.f32.u.i32", set<float>(r, float(of<uint>(a))))
AIR(predicate, "normalize_function_constant_predicate.i8", set<uchar>(r, of<uchar>(a) != 0))
