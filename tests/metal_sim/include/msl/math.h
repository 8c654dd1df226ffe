// clang-format off: tables of one-line macros
// metal:: / metal::fast:: / metal::precise:: math
#pragma once
// Builds with MSL_COUNTING count some operations (mode `count` of metal_simulator.py).
#ifdef MSL_COUNTING
extern "C" {
__attribute__((visibility("default"))) unsigned long msl_counter_fma, msl_counter_exp2;
}
#define MSL_COUNT(name) msl_counter_##name++
#else
#define MSL_COUNT(name) (void)0
#endif
namespace msl_m {  // scalar float kernels; 'fast' ones follow the GPU's reduced forms (exp via
                   // exp2, sin/cos plain)
#define MSL_B1(n) \
  inline float n(float x) { return __builtin_##n##f(x); }
MSL_B1(exp)
inline float exp2(float x) {
  MSL_COUNT(exp2);
  return __builtin_exp2f(x);
}
MSL_B1(log)
MSL_B1(log2)
MSL_B1(log10)
MSL_B1(sqrt)
MSL_B1(sin) MSL_B1(cos) MSL_B1(tan) MSL_B1(asin) MSL_B1(acos) MSL_B1(atan) MSL_B1(sinh) MSL_B1(cosh) MSL_B1(tanh) MSL_B1(asinh)
    MSL_B1(acosh) MSL_B1(atanh) MSL_B1(floor) MSL_B1(ceil) MSL_B1(rint) MSL_B1(round) MSL_B1(trunc)
        MSL_B1(fabs) inline float exp10(float x) {
  return __builtin_powf(10.f, x);
}
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float fract(float x) { return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f); }
inline float sinpi(float x) { return __builtin_sin(3.14159265358979323846 * x); }
inline float cospi(float x) { return __builtin_cos(3.14159265358979323846 * x); }
inline float tanpi(float x) { return __builtin_tan(3.14159265358979323846 * x); }
inline float fast_exp(float x) { return __builtin_exp2f(x * 1.44269504088896340736f); }
inline float fast_log(float x) { return __builtin_log2f(x) * 0.693147180559945309417f; }
}  // namespace msl_m
namespace metal {
#define MSL_F1_(n, f)                                 \
  inline float n(float x) { return f(x); }            \
  inline half n(half x) { return half(f(float(x))); } \
  template <class T, int N>                           \
  inline vec<T, N> n(vec<T, N> a) {                   \
    for (int i = 0; i < N; i++) a[i] = n(a[i]);       \
    return a;                                         \
  }
#define MSL_F1(n) MSL_F1_(n, msl_m::n)
#define MSL_ALL1                                                                                                    \
  MSL_F1(exp2)                                                                                                      \
  MSL_F1(log2)                                                                                                      \
  MSL_F1(log10)                                                                                                     \
  MSL_F1(sqrt)                                                                                                      \
  MSL_F1(rsqrt)                                                                                                     \
  MSL_F1(sin) MSL_F1(cos) MSL_F1(tan) MSL_F1(asin) MSL_F1(acos) MSL_F1(atan) MSL_F1(sinh) MSL_F1(cosh) MSL_F1(tanh) \
      MSL_F1(asinh) MSL_F1(acosh) MSL_F1(atanh) MSL_F1(floor) MSL_F1(ceil) MSL_F1(rint) MSL_F1(round) MSL_F1(trunc) \
          MSL_F1(fabs) MSL_F1(exp10) MSL_F1(fract) MSL_F1(sinpi) MSL_F1(cospi) MSL_F1(tanpi)
#define MSL_F2_(n, f)                                                   \
  inline float n(float a, float b) { return f(a, b); }                  \
  inline half n(half a, half b) { return half(f(float(a), float(b))); } \
  template <class T, int N>                                             \
  inline vec<T, N> n(vec<T, N> a, type_identity_t<vec<T, N>> b) {       \
    for (int i = 0; i < N; i++) a[i] = n(a[i], b[i]);                   \
    return a;                                                           \
  }
#define MSL_ALL2                   \
  MSL_F2_(pow, __builtin_powf)     \
  MSL_F2_(powr, __builtin_powf)    \
  MSL_F2_(atan2, __builtin_atan2f) \
  MSL_F2_(fmod, __builtin_fmodf)   \
  MSL_F2_(fmin, __builtin_fminf) MSL_F2_(fmax, __builtin_fmaxf) MSL_F2_(divide, msl_div) MSL_F2_(copysign, __builtin_copysignf)
inline float msl_div(float a, float b) { return a / b; }
MSL_ALL1 MSL_ALL2 MSL_F1(exp) MSL_F1(log) namespace precise { MSL_ALL1 MSL_ALL2 MSL_F1(exp) MSL_F1(log) }
namespace fast {
MSL_ALL1 MSL_ALL2 MSL_F1_(exp, msl_m::fast_exp) MSL_F1_(log, msl_m::fast_log)
}
#define MSL_INT(T)                                                                                              \
  inline T min(T a, T b) { return b < a ? b : a; }                                                              \
  inline T max(T a, T b) { return a < b ? b : a; }                                                              \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                                               \
  inline T popcount(T x) { return T(__builtin_popcountll((unsigned long)x & (~0ul >> (64 - 8 * sizeof(T))))); } \
  inline T clz(T x) {                                                                                           \
    unsigned long u = (unsigned long)x & (~0ul >> (64 - 8 * sizeof(T)));                                        \
    return T(u ? __builtin_clzll(u) - (64 - 8 * (int)sizeof(T)) : 8 * (int)sizeof(T));                          \
  }                                                                                                             \
  inline T ctz(T x) { return T(x ? __builtin_ctzll((unsigned long)x) : 8 * (int)sizeof(T)); }                   \
  inline T extract_bits(T x, uint o, uint b) {                                                                  \
    return b == 0 ? T(0) : T(T(x << (8 * sizeof(T) - o - b)) >> (8 * sizeof(T) - b));                           \
  }                                                                                                             \
  inline T reverse_bits(T x) {                                                                                  \
    T r = 0;                                                                                                    \
    for (unsigned i = 0; i < 8 * sizeof(T); i++)                                                                \
      if ((x >> i) & 1) r |= T(T(1) << (8 * sizeof(T) - 1 - i));                                                \
    return r;                                                                                                   \
  }
MSL_INT(char)
MSL_INT(schar)
MSL_INT(uchar) MSL_INT(short) MSL_INT(ushort) MSL_INT(int) MSL_INT(uint) MSL_INT(long) MSL_INT(ulong) inline int abs(int x) {
  return x < 0 ? -x : x;
}
inline short abs(short x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline schar abs(schar x) { return x < 0 ? -x : x; }
inline char abs(char x) { return x < 0 ? -x : x; }
inline uint abs(uint x) { return x; }
inline ushort abs(ushort x) { return x; }
inline uchar abs(uchar x) { return x; }
inline ulong abs(ulong x) { return x; }
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
inline int mulhi(int a, int b) { return int((long(a) * b) >> 32); }
inline uint rotate(uint v, uint s) {
  s &= 31;
  return s ? (v << s) | (v >> (32 - s)) : v;
}
#define MSL_FLT                                                               \
  inline float min(float a, float b) { return __builtin_fminf(a, b); }        \
  inline float max(float a, float b) { return __builtin_fmaxf(a, b); }        \
  inline half min(half a, half b) { return half(__builtin_fminf(a, b)); }     \
  inline half max(half a, half b) { return half(__builtin_fmaxf(a, b)); }     \
  inline float abs(float x) { return __builtin_fabsf(x); }                    \
  inline half abs(half x) { return half(__builtin_fabsf(x)); }                \
  inline float clamp(float x, float a, float b) { return min(max(x, a), b); } \
  inline half clamp(half x, half a, half b) { return min(max(x, a), b); }     \
  inline float saturate(float x) { return clamp(x, 0.f, 1.f); }               \
  inline float mix(float a, float b, float t) { return a + (b - a) * t; }     \
  inline float sign(float x) { return x > 0 ? 1.f : x < 0 ? -1.f : 0.f; }     \
  inline float fma(float a, float b, float c) {                               \
    MSL_COUNT(fma);                                                           \
    return __builtin_fmaf(a, b, c);                                           \
  }                                                                           \
  inline half fma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
MSL_FLT
namespace fast {
MSL_FLT
}
namespace precise {
MSL_FLT
}
#define MSL_V2(n)                                                 \
  template <class T, int N>                                       \
  inline vec<T, N> n(vec<T, N> a, type_identity_t<vec<T, N>> b) { \
    for (int i = 0; i < N; i++) a[i] = n(a[i], b[i]);             \
    return a;                                                     \
  }
MSL_V2(min)
MSL_V2(max)
template <class T, int N>
inline vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = abs(a[i]);
  return a;
}
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> a, type_identity_t<vec<T, N>> l, type_identity_t<vec<T, N>> h) {
  for (int i = 0; i < N; i++) a[i] = clamp(a[i], l[i], h[i]);
  return a;
}
template <class T, int N>
inline vec<T, N> fma(vec<T, N> a, type_identity_t<vec<T, N>> b, type_identity_t<vec<T, N>> c) {
  for (int i = 0; i < N; i++) a[i] = fma(a[i], b[i], c[i]);
  return a;
}
template <class T, int N>
inline T dot(const vec<T, N>& a, const type_identity_t<vec<T, N>>& b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r = T(r + a[i] * b[i]);
  return r;
}
template <class T, int N>
inline T length(const vec<T, N>& a) {
  return sqrt(dot(a, a));
}
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnan(half x) { return isnan(float(x)); }
inline bool isinf(half x) { return isinf(float(x)); }
inline bool isnan(bfloat x) { return isnan(float(x)); }
inline bool isinf(bfloat x) { return isinf(float(x)); }
inline bool isfinite(half x) { return isfinite(float(x)); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline half ldexp(half x, int k) { return half(__builtin_ldexpf(x, k)); }
inline float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }
inline float modf(float x, float& i) { return __builtin_modff(x, &i); }
inline float nextafter(float a, float b) { return __builtin_nextafterf(a, b); }
template <class T>
constexpr T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
constexpr vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++)
    if (c[i]) a[i] = b[i];
  return a;
}
template <int N>
inline bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= a[i];
  return r;
}
template <int N>
inline bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= a[i];
  return r;
}
inline float4 unpack_unorm4x8_to_float(uint u) {
  return float4(float(u & 255), float((u >> 8) & 255), float((u >> 16) & 255), float(u >> 24)) / 255.0f;
}
}  // namespace metal
// Apple-internal intrinsics that MLX's bf16_math.h calls directly
#define MSL_I1(n) \
  inline float __metal_##n(float x, int) { return msl_m::n(x); }
MSL_I1(exp)
MSL_I1(exp2)
MSL_I1(log)
MSL_I1(log2)
MSL_I1(log10)
MSL_I1(sqrt) MSL_I1(sin) MSL_I1(cos) MSL_I1(tan) MSL_I1(asin) MSL_I1(acos) MSL_I1(atan) MSL_I1(sinh) MSL_I1(cosh) MSL_I1(tanh)
    MSL_I1(asinh) MSL_I1(acosh) MSL_I1(atanh) MSL_I1(floor) MSL_I1(ceil) MSL_I1(rint) MSL_I1(round) MSL_I1(trunc) MSL_I1(fabs)
        MSL_I1(rsqrt) MSL_I1(exp10) MSL_I1(fract) MSL_I1(sinpi) MSL_I1(cospi) MSL_I1(tanpi)
#define MSL_I2(n, f) \
  inline float __metal_##n(float a, float b, int) { return f(a, b); }
            MSL_I2(atan2, __builtin_atan2f) MSL_I2(pow, __builtin_powf) MSL_I2(powr, __builtin_powf)
                MSL_I2(fmod, __builtin_fmodf) MSL_I2(fmin, __builtin_fminf) MSL_I2(fmax, __builtin_fmaxf)
                    MSL_I2(divide, metal::msl_div) inline float __metal_fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline float __metal_fmax3(float a, float b, float c, int) { return metal::max(a, metal::max(b, c)); }
inline float __metal_fmin3(float a, float b, float c, int) { return metal::min(a, metal::min(b, c)); }
inline float __metal_fmedian3(float a, float b, float c, int) {
  return metal::max(metal::min(a, b), metal::min(metal::max(a, b), c));
}
inline float __metal_ldexp(float a, int k, int) { return __builtin_ldexpf(a, k); }
inline float __metal_frexp(float a, int* k, int = 0) { return __builtin_frexpf(a, k); }
inline float __metal_nextafter(float a, float b, int = 0) { return __builtin_nextafterf(a, b); }
inline ushort __metal_get_simdgroup_size(ushort) { return 32; }
