// What the CUDA compiler knows by itself of what the kernels use: for clang-tidy, which has no CUDA headers
// (.ci/tidy_commands). Declarations only; vectors without operators.
#pragma once

#define __CUDACC_RTC__  // as the headers of csrc ask
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__ __attribute__((grid_constant))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))

#include <__clang_cuda_builtin_vars.h>  // threadIdx and the like

struct dim3 {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
#pragma clang force_cuda_host_device begin
uint2 make_uint2(unsigned, unsigned);
uint4 make_uint4(unsigned, unsigned, unsigned, unsigned);
float2 make_float2(float, float);
float4 make_float4(float, float, float, float);

int min(int, int);
unsigned min(unsigned, unsigned);
long long min(long long, long long);
int max(int, int);
unsigned max(unsigned, unsigned);
long long max(long long, long long);
float exp2f(float);
float fabsf(float);
float fmaf(float, float, float);
float fmaxf(float, float);
float fminf(float, float);
int ilogbf(float);
float ldexpf(float, int);
float log2f(float);
float rintf(float);
float rsqrtf(float);
float sqrtf(float);
unsigned __umulhi(unsigned, unsigned);

int __float2int_rn(float);
unsigned __float_as_uint(float);
float __int_as_float(int);
float __uint_as_float(unsigned);

int __all_sync(unsigned, int);
int __any_sync(unsigned, int);
unsigned __ballot_sync(unsigned, int);
unsigned __reduce_add_sync(unsigned, unsigned);
unsigned __reduce_max_sync(unsigned, unsigned);
template <class T>
T __shfl_sync(unsigned, T, int, int = 32);
template <class T>
T __shfl_xor_sync(unsigned, T, int, int = 32);
int __syncthreads_and(int);
void __syncwarp(unsigned = ~0u);

template <class T>
T __ldcg(const T*);
template <class T>
T __ldg(const T*);
int atomicAdd(int*, int);
unsigned atomicAdd(unsigned*, unsigned);
float atomicAdd(float*, float);
unsigned atomicExch(unsigned*, unsigned);
unsigned long __cvta_generic_to_shared(const void*);
void __threadfence();
#pragma clang force_cuda_host_device end
