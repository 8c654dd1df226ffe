#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>

#include <algorithm>

#include "q1_matmul_kernels.h"

#if defined(__clang__)
#define TQ_DOTPROD __attribute__((target("dotprod")))
#else
#define TQ_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

// Each group of an input is taken as 24-bit integers (relative to its largest value; about fp32's own precision) in
// three planes of signed bytes. tbl and tst widen 16 sign bits to 16 bytes of 0 or -1, sdot sums a plane under them.
// The sums are exact; the sum of the +-x is 2 * (sum under the bits) - (sum of all). Codes of two bits are factors of sdot
// themselves: the sum is (sum of code * x) - (sum of all).

namespace tqext::cpu {
namespace {

constexpr int kGroup = 128, kSteps = kGroup / 16, kPlanes = 3;
constexpr int kPanelTables = 64;       // inputs * groups split at a time: 24 KiB, L1 with room for weights
constexpr float kLargest = 8300000.f;  // its bytes are -128..127 in every plane: (127 << 16) - (1 << 15) is above it

struct SplitGroup {
  int8_t plane[kSteps][kPlanes][16];  // [step][plane][byte]
};

// The column of a byte: 16 columns in a row (sign bits), or the same two bits of 16 bytes.
template <int kBits>
constexpr int column_of(int step, int byte) {
  return kBits == 1 ? 16 * step + byte : step / 4 * 64 + 4 * byte + step % 4;
}

// Returns the value of a unit; NaN, and with it a NaN product, if the group holds NaN or infinity.
template <int kBits>
float split(const float* x, SplitGroup& out, int32_t& total) {
  float largest = 0;
  bool finite = true;
  for (int c = 0; c < kGroup; ++c) {
    largest = std::max(largest, fabsf(x[c]));
    finite &= isfinite(x[c]) != 0;
  }
  total = 0;
  // Below the second bound a unit would be subnormal: such a group is 0 beside anything of fp32's normal range.
  const bool usable = finite && largest > 1e-30f;
  const float unit = usable ? largest / kLargest : 0.f, inverse = usable ? kLargest / largest : 0.f;
  for (int i = 0; i < kGroup; ++i) {
    int32_t v = usable ? static_cast<int32_t>(lrintf(x[column_of<kBits>(i / 16, i % 16)] * inverse)) : 0;
    total += v;
    for (int p = 0; p < kPlanes; ++p) {
      const int8_t low = static_cast<int8_t>(v);
      out.plane[i / 16][p][i % 16] = low;
      v = (v - low) / 256;
    }
  }
  return finite ? unit : NAN;
}

inline float half_to_float(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }

template <int kBits, int n_inputs>
TQ_DOTPROD void run(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int row_begin, int row_end, float* out,
                    ptrdiff_t out_stride) {
  constexpr int kWords = kGroup * kBits / 32, kPanelGroups = kPanelTables / n_inputs;
  SplitGroup planes[kPanelGroups][n_inputs];
  float units[kPanelGroups][n_inputs];
  int32_t totals[kPanelGroups][n_inputs];
  static const uint8_t kSpread[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  static const uint8_t kBit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t spread = vld1q_u8(kSpread), bit = vld1q_u8(kBit);

  for (int panel = 0; panel < m.n_groups; panel += kPanelGroups) {
    const int n_groups = std::min(kPanelGroups, m.n_groups - panel);
    for (int g = 0; g < n_groups; ++g)
      for (int i = 0; i < n_inputs; ++i)
        units[g][i] = split<kBits>(x + i * x_stride + (panel + g) * kGroup, planes[g][i], totals[g][i]);
    for (int r = row_begin; r < row_end; ++r) {
      const uint32_t* const weight = m.weight + r * m.weight_stride + panel * kWords;
      const uint16_t* const scales = m.scales + r * m.scale_stride + panel;
      float acc[n_inputs] = {};
      for (int g = 0; g < n_groups; ++g) {
        uint8x16_t words = vreinterpretq_u8_u32(vld1q_u32(weight + g * kWords));
        int32x4_t sum[n_inputs][kPlanes];
        for (int i = 0; i < n_inputs; ++i)
          for (int p = 0; p < kPlanes; ++p) sum[i][p] = vdupq_n_s32(0);
        uint8x16_t index = spread;
        for (int s = 0; s < kSteps; ++s) {
          int8x16_t factor;
          if constexpr (kBits == 1) {
            factor = vreinterpretq_s8_u8(vtstq_u8(vqtbl1q_u8(words, index), bit));  // -1 under a set bit
            index = vaddq_u8(index, vdupq_n_u8(2));
          } else {
            if (s == kSteps / 2) words = vreinterpretq_u8_u32(vld1q_u32(weight + g * kWords + kWords / 2));
            factor = vreinterpretq_s8_u8(vandq_u8(words, vdupq_n_u8(3)));
            words = vshrq_n_u8(words, 2);
          }
          for (int i = 0; i < n_inputs; ++i)
            for (int p = 0; p < kPlanes; ++p) sum[i][p] = vdotq_s32(sum[i][p], factor, vld1q_s8(planes[g][i].plane[s][p]));
        }
        const float scale = half_to_float(scales[g]);
        for (int i = 0; i < n_inputs; ++i) {
          // Unsigned, so that it may wrap before the total brings it back.
          const int32x4_t under = vaddq_s32(sum[i][0], vaddq_s32(vshlq_n_s32(sum[i][1], 8), vshlq_n_s32(sum[i][2], 16)));
          const uint32_t signed_sum =
              (kBits == 1 ? -2u : 1u) * static_cast<uint32_t>(vaddvq_s32(under)) - static_cast<uint32_t>(totals[g][i]);
          acc[i] += scale * units[g][i] * static_cast<float>(static_cast<int32_t>(signed_sum));
        }
      }
      for (int i = 0; i < n_inputs; ++i) {
        float* const y = out + i * out_stride + r;
        *y = panel == 0 ? acc[i] : *y + acc[i];
      }
    }
  }
}

// Four inputs' twelve sums fit the registers; eight inputs read the weights, then in L1 or L2, twice.
template <int kBits>
void run_any(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end, float* out,
             ptrdiff_t out_stride) {
  for (; n_inputs > 4; n_inputs -= 4, x += 4 * x_stride, out += 4 * out_stride)
    run<kBits, 4>(m, x, x_stride, row_begin, row_end, out, out_stride);
  with_inputs<4>(n_inputs, [&]<int n>() { run<kBits, n>(m, x, x_stride, row_begin, row_end, out, out_stride); });
}

}  // namespace

void q1_matmul_neon_dotprod(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin, int row_end,
                            float* out, ptrdiff_t out_stride) {
  run_any<1>(m, x, x_stride, n_inputs, row_begin, row_end, out, out_stride);
}

void ternary_matmul_neon_dotprod(const Q1Matrix& m, const float* x, ptrdiff_t x_stride, int n_inputs, int row_begin,
                                 int row_end, float* out, ptrdiff_t out_stride) {
  run_any<2>(m, x, x_stride, n_inputs, row_begin, row_end, out, out_stride);
}

}  // namespace tqext::cpu

#endif
