// NEON: the fp32 tile kernel with four lanes.
#if defined(__aarch64__)

#include <arm_neon.h>

#include <cmath>
#include <cstdint>

#include "attention_kernels.h"
#include "fp32_attention.h"
#include "mean_scores.h"
#include "neon_exp2.h"
#include "softmax.h"

namespace tqext::cpu {
namespace {

struct Neon : NeonFloats {
  using I = uint32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kRows = 8;  // 16 sums of 32 registers; Apple's cores have a latency of 4 at four multiply-adds a cycle
  static constexpr int kPanelsOne = 8;
  static constexpr int kMeans = 4;

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static float sum(F v) { return vaddvq_f32(v); }
  static float max_lane(F v) { return vmaxnmvq_f32(v); }
  static F exp2(F x) { return exp2_neon(x); }

  static I load_int(const uint32_t* p) { return vld1q_u32(p); }
  static I set1_int(int x) { return vdupq_n_u32(uint32_t(x)); }
  static I bit_and(I a, I b) { return vandq_u32(a, b); }
  static I bit_or(I a, I b) { return vorrq_u32(a, b); }
  static I add_int(I a, I b) { return vaddq_u32(a, b); }
  template <int n>
  static I shift_right(I x) {
    return vshrq_n_u32(x, n);
  }
  static I shift_right_lanes(I x, I n) { return vshlq_u32(x, vnegq_s32(vreinterpretq_s32_u32(n))); }
  static F to_float(I x) { return vcvtq_f32_u32(x); }
  static I load_table(const int8_t* levels) { return vreinterpretq_u32_s8(vld1q_s8(levels)); }
  static I look_up(I table, I index) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(table), vreinterpretq_u8_u32(index)));
  }
  static constexpr int kPick = 0;
  static F pick(F table, I) { return table; }  // never called
  // Byte b of every lane, signed.
  template <int b>
  static F byte_to_float(I x) {
    if constexpr (b == 3) return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(x), 24));
    if constexpr (b < 3) return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_u32(x), 24 - 8 * b), 24));
  }
  // Four signed bytes.
  static F load_bytes(const int8_t* x) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, x, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes))))));
  }
  // A unit's bytes of the table, in the order of its dimensions; fourth: the last word, or of 3 bits the word of the last eight
  // dimensions. The nibbles' other bits do not matter: the table repeats.
  template <int kBits>
  static void look_up_unit(const int8_t table[16], const uint32_t* w, uint32_t fourth, int8_t to[32]) {
    const int8x16_t levels = vld1q_s8(table);
    uint32x4_t words;
    if constexpr (kBits == 4) {
      words = vld1q_u32(w);
    } else if constexpr (kBits == 3) {
      words = vcombine_u32(vld1_u32(w), vset_lane_u32(fourth, vdup_n_u32(w[2]), 1));
    } else {
      words = vcombine_u32(vld1_u32(w), vshr_n_u32(vld1_u32(w), 2));
    }
    const uint8x16_t x = vreinterpretq_u8_u32(words);
    const int8x16_t even = vqtbl1q_s8(levels, vandq_u8(x, vdupq_n_u8(15))), odd = vqtbl1q_s8(levels, vshrq_n_u8(x, 4));
    vst1q_s8(to, vzip1q_s8(even, odd));
    vst1q_s8(to + 16, vzip2q_s8(even, odd));
  }
  // Words of the last eight dimensions of two units with 3-bit codes: out[0] and out[3].
  static void last_words(const uint32_t w[6], uint32_t out[4]) {
    const uint32x4_t a = vshrq_n_u32(vld1q_u32(w), 3), b = vshrq_n_u32(vld1q_u32(w + 1), 2);
    const uint32x4_t c = vshrq_n_u32(vld1q_u32(w + 2), 1);
    vst1q_u32(out, vbslq_u32(vdupq_n_u32(0x44444444), c, vbslq_u32(vdupq_n_u32(0x11111111), a, b)));
  }
  static F sign_of_top_bit(I x) {  // bit 31 set: +1, else -1
    return vreinterpretq_f32_u32(veorq_u32(vdupq_n_u32(0xbf800000u), vandq_u32(x, vdupq_n_u32(0x80000000u))));
  }
  // Words 0 .. n_words - 1 of four tokens from t on, the token as the lane; tokens from n on read token n - 1.
  static void load_words(const uint32_t* words, ptrdiff_t stride, int t, int n, int n_words, I out[4]) {
    for (int c = 0; c < n_words; c++) {
      uint32_t lanes[4];
      for (int i = 0; i < 4; i++) lanes[i] = words[smaller(t + i, n - 1) * stride + c];
      out[c] = vld1q_u32(lanes);
    }
  }
  // rows[i][d + j] to to[j * stride + i].
  static void transpose_4x4(float* const rows[4], int d, float* to, ptrdiff_t stride) {
    const F r0 = load(rows[0] + d), r1 = load(rows[1] + d), r2 = load(rows[2] + d), r3 = load(rows[3] + d);
    const float32x4x2_t a = vtrnq_f32(r0, r1), b = vtrnq_f32(r2, r3);
    store(to + 0 * stride, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
    store(to + 1 * stride, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
    store(to + 2 * stride, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
    store(to + 3 * stride, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
  }
};

}  // namespace

void attend_coded_neon(const CodedHead& head, const CodecShape& shape, const QueryRows& rows, int begin, int end,
                       Partial* partials) {
  Fp32Attention<Neon>::attend_coded(head, shape, rows, begin, end, partials);
}

void attend_exact_neon(const ExactHead& head, const QueryRows& rows, int begin, int end, Partial* partials) {
  Fp32Attention<Neon>::attend_exact(head, rows, begin, end, partials);
}

void score_means_neon(const float* q, int n_rows, const BlockMeans& means, int first, int n, float* offset) {
  MeanScores<Neon>::score(q, n_rows, means, first, n, offset);
}

}  // namespace tqext::cpu

#endif  // __aarch64__
