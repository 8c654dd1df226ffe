// Device helpers shared by the kernels: fp16 without cuda_fp16.h (the run-time compiler needs no CUDA headers), asynchronous
// copies, tensor-core instructions, the rotation of a row in shared memory.
#pragma once

#include <stdint.h>

#include "format.h"
#include "hadamard.h"
#include "params.h"
#include "softmax.h"

#define TQ_DEVICE __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

namespace tqext::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

TQ_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TQ_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TQ_DEVICE float half_to_float(uint16_t half) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(half));
  return y;
}
TQ_DEVICE uint16_t float_to_half(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
TQ_DEVICE float bfloat_to_float(uint16_t value) { return __uint_as_float(uint32_t(value) << 16); }
TQ_DEVICE uint16_t float_to_bfloat(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// low in the low half.
TQ_DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <int kType>
TQ_DEVICE uint32_t pack_16bit(float low, float high) {
  if constexpr (kType != kTypeBFloat16) return pack_halves(low, high);
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <int kType>
TQ_DEVICE float low_16bit(uint32_t x) {
  return kType == kTypeBFloat16 ? __uint_as_float(x << 16) : half_to_float(uint16_t(x));
}
template <int kType>
TQ_DEVICE float high_16bit(uint32_t x) {
  return kType == kTypeBFloat16 ? __uint_as_float(x & 0xffff0000u) : half_to_float(uint16_t(x >> 16));
}
TQ_DEVICE uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// a * b - c, rounded once.
TQ_DEVICE uint32_t multiply_subtract_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c ^ 0x80008000u));
  return y;
}
// Of a normal float.
TQ_DEVICE float power_of_two(int e) { return __uint_as_float(uint32_t(127 + e) << 23); }
// NaN if either is.
TQ_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

template <int kType>
struct ElementOf {
  using Type = uint16_t;
};
template <>
struct ElementOf<kTypeFloat32> {
  using Type = float;
};
template <int kType>
using Element = typename ElementOf<kType>::Type;

template <int kType>
TQ_DEVICE float load_element(const void* data, int64_t i) {
  if constexpr (kType == kTypeFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return kType == kTypeFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}
template <int kType>
TQ_DEVICE void store_element(void* data, int64_t i, float x) {
  if constexpr (kType == kTypeFloat32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = kType == kTypeFloat16 ? float_to_half(x) : float_to_bfloat(x);
  }
}
TQ_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
TQ_DEVICE void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// bytes of 16 that exist; the rest is zero.
TQ_DEVICE void copy_async_part(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
TQ_DEVICE void copy_async_word(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
TQ_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
TQ_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

TQ_DEVICE void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Byte permutation by four selector nibbles below 8 (__byte_perm would mask them again).
TQ_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(select));
  return y;
}

// The bulk copy engine (compute capability 9.0 and later) and its barriers.
TQ_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
TQ_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
TQ_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
TQ_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Orders earlier ordinary accesses to shared memory before later ones of the copy engine.
TQ_DEVICE void copy_engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
TQ_DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}
TQ_DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 16 x 32 int8 times 32 x 8 int8.
TQ_DEVICE void multiply_int8(int (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
// 16 x 16 fp16 times 16 x 8 fp16.
TQ_DEVICE void multiply_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// 16 x 16 times 16 x 8, and 16 x 8 times 8 x 8, of fp16 or bf16.
template <int kType>
TQ_DEVICE void multiply_16bit(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kType == kTypeBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    multiply_half(c, a0, a1, a2, a3, b0, b1);
  }
}
template <int kType>
TQ_DEVICE void multiply_16bit_short(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kType == kTypeBFloat16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}
// Two 8 x 8 matrices of halves from shared memory, transposed; lanes 0 ... 15 give the addresses of their rows.
TQ_DEVICE void load_transposed(uint32_t& a, uint32_t& b, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}

// Four of them, as they lie; the lanes in order give the addresses of their rows.
TQ_DEVICE void load_matrices(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}
// 16 x 128 bits and 128 x 8 bits: how many are set in both.
TQ_DEVICE void multiply_bits(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5},{%6},{%7,%7,%7,%7};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(0));
}
// Meets the other threads of the barrier, a part of the block.
TQ_DEVICE void barrier_of_threads(int barrier, int n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(n_threads) : "memory");
}

// The codes of a unit's 32 dimensions, eight to a word: the low three bits of each nibble of select, the fourth bit in top.
template <int kBits>
TQ_DEVICE void split_codes(const uint32_t* w, uint32_t (&select)[4], uint32_t (&top)[4]) {
#pragma unroll
  for (int s = 0; s < 4; s++) top[s] = 0;
  if constexpr (kBits == 4) {
#pragma unroll
    for (int s = 0; s < 4; s++) select[s] = w[s] & 0x77777777u, top[s] = w[s] >> 3 & 0x11111111u;
  } else if constexpr (kBits == 3) {
    select[0] = w[0] & 0x77777777u;
    select[1] = w[1] & 0x77777777u;
    select[2] = w[2] & 0x77777777u;
    select[3] = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
  } else {
    select[0] = w[0] & 0x33333333u;
    select[1] = w[1] & 0x33333333u;
    select[2] = w[0] >> 2 & 0x33333333u;
    select[3] = w[1] >> 2 & 0x33333333u;
  }
}

// Rotation of a row of kDim floats by one warp (format.h), with the same order of sums as on the CPU. Slot k of a lane is
// dimension 32 k + lane. scratch: kDim floats of shared memory of this warp, used where the matrix is no power of two.
template <int kDim>
struct Hadamard {
  static constexpr bool is_power(int n) { return n > 0 && (n & (n - 1)) == 0; }
  static constexpr int kFactor = is_power(kDim)                          ? 1
                                 : kDim % 12 == 0 && is_power(kDim / 12) ? 12
                                 : kDim % 20 == 0 && is_power(kDim / 20) ? 20
                                 : kDim % 28 == 0 && is_power(kDim / 28) ? 28
                                                                         : 0;
  static constexpr int kSize = kFactor ? kDim / kFactor : 1;  // of the Sylvester part
  static constexpr int kSlots = kDim / 32;

  static TQ_DEVICE void sylvester(float (&x)[kSlots], int lane) {
#pragma unroll
    for (int half = 1; half < kSize; half *= 2) {
      if (half < 32) {
#pragma unroll
        for (int k = 0; k < kSlots; k++) {
          const float other = __shfl_xor_sync(kAllLanes, x[k], half);
          x[k] = (lane & half) ? other - x[k] : x[k] + other;
        }
      } else {
#pragma unroll
        for (int k = 0; k < kSlots; k++) {
          const int step = half / 32;
          if (!(k & step)) {
            const float a = x[k], b = x[(k + step) % kSlots];
            x[k] = a + b;
            x[(k + step) % kSlots] = a - b;
          }
        }
      }
    }
  }

  static TQ_DEVICE uint32_t row_bits(int row) {
    return kFactor == 12 ? kHadamard12[row] : kFactor == 20 ? kHadamard20[row] : kHadamard28[row];
  }

  // By the matrix of order 12, 20 or 28, over the kFactor runs of kSize.
  static TQ_DEVICE void factor(float (&x)[kSlots], int lane, float* scratch, bool transposed) {
    if constexpr (kFactor > 1) {
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kSlots; k++) scratch[32 * k + lane] = x[k];
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kSlots; k++) {
        const int e = lane + 32 * k, i = e / kSize, column = e % kSize;
        float sum = 0;
        for (int t = 0; t < kFactor; t++) {
          const uint32_t negative = transposed ? row_bits(t) >> i : row_bits(i) >> t;
          const float v = scratch[t * kSize + column];
          sum += (negative & 1) ? -v : v;
        }
        x[k] = sum;
      }
      __syncwarp();
    }
  }

  template <uint32_t kSeed>
  static TQ_DEVICE void signs(float (&x)[kSlots], int lane) {
    const float scale = 1.0f / sqrtf(float(kDim));
#pragma unroll
    for (int k = 0; k < kSlots; k++) x[k] *= (sign_word(kSeed, k) >> lane & 1) ? -scale : scale;
  }

  template <uint32_t kSeed>
  static TQ_DEVICE void rotate(float (&x)[kSlots], int lane, float* scratch) {
    signs<kSeed>(x, lane);
    sylvester(x, lane);
    factor(x, lane, scratch, false);
  }
  template <uint32_t kSeed>
  static TQ_DEVICE void rotate_back(float (&x)[kSlots], int lane, float* scratch) {
    factor(x, lane, scratch, true);
    sylvester(x, lane);
    signs<kSeed>(x, lane);
  }
};

}  // namespace tqext::cuda
