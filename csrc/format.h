// Packed format, version 2. The only place where a number decides a byte.
//
// One token of one KV head. Arrays are [batch, n_kv_heads, n_tokens, ...], token axis at -2, little-endian uint32 words
// and fp16 parameters. dim is the head dimension padded to a multiple of 32 (kUnit).
//
// Block: kBlockTokens consecutive coded tokens, counted from the first coded one.
//   means    float16[n_blocks, head_dim], not rotated: the mean of the block's own keys, rounded before it is subtracted
//   balance  float32[n_kv_heads, head_dim] of a layer: queries are divided by it, keys multiplied; absent = 1
// Keys: rotate((k - mean) * balance), padded with zeros to dim, is coded as norm * codebook[code] / 127
//   norm     |x|^2 / <x, level / 127> of the coded vector x: the score of a key with itself has no bias
//   score    scale * (<q, mean of the block> + <rotate(q / balance), coded key>); exact tokens: scale * <q, k>
//   codes  uint32[dim * bits / 32], norms float16[1]; dimensions in units of 32; nibble n of a word is bits 4n .. 4n+3
//   2 bits  word i of 2, nibble n: low two bits = dimension 8i + n, high two bits = dimension 16 + 8i + n
//   3 bits  word i of 3, nibble n: low three bits = dimension 8i + n; bit 4n + 3 of word i = bit i of dimension 24 + n
//   4 bits  word i of 4, nibble n = dimension 8i + n
// Residual signs of the keys (optional): uint32[dim / 32], dimension 32i + b at bit b of word i, 1 = not negative;
//   residual_norms float16[1]; the score gains sqrt(pi/2) / sqrt(dim) * residual_norm * <rotate'(q), sign>
// Values, in the rotated space, in one of two codings:
//   groups  2 or 4 bits: v = scale * code + bias
//           codes uint32[dim * bits / 32], params float16[2 * dim / 32]: scale and bias of each group of 32, interleaved
//           W = dim * bits / 32 words; word w, bits [bits * s, bits * s + bits) = dimension W * s + w
//   lloyd   2, 3 or 4 bits: v = norm * codebook[code] / 127
//           codes laid out as those of keys; params float16[1]: the norm, <v, c> / <c, c> with c = level / 127
// Rotation: rotate(x) = H (s * x) / sqrt(dim), s = random signs (sign_word), H = Walsh-Hadamard matrix of Sylvester, or
//   H_m (x) Sylvester with m = 12, 20, 28; a dense orthogonal matrix where neither exists, or where it is asked for.
// Dense matrix: entry j of row i is a sum of four 16-bit numbers less 131070, the halves of
//   sign_word(TQ_ROTATION_SEED ^ dim, 2 * (i * dim + j)) and of the next word; the rows are then made orthonormal in order
//   (Gram-Schmidt in float64, two passes) and rounded to fp32.
// 1-bit weights, Q1_0 in groups of 128 along a row: weight uint32[rows, cols / 32], scales float16[rows, cols / 128];
//   column 32i + b of a row = bit b of word i, 1 = +scale, 0 = -scale. The words of ggml's block_q1_0 and of MLX's affine
//   1-bit weights are the same.
// Ternary weights in groups of 128 along a row: weight uint32[rows, cols / 16], scales float16[rows, cols / 128];
//   column 16i + j of a row = bits 2j, 2j + 1 of word i; codes 0, 1, 2, 3 = -scale, 0, +scale, 2 * scale. The words of PQ2_0
//   blocks (PrismML) and of MLX's affine 2-bit weights are the same.
// Random signs: splitmix64 (Steele, Lea, Flood 2014), see sign_word; the same for all heads and layers.
#pragma once

#if defined(__METAL_VERSION__)
#define TQ_FN constexpr inline
#define TQ_TABLE constant constexpr
#elif defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define TQ_FN __host__ __device__ constexpr inline
#define TQ_TABLE constexpr
#else
#include <stdint.h>
#define TQ_FN constexpr inline
#define TQ_TABLE constexpr
#endif

#if !defined(__METAL_VERSION__)
namespace tqext {
#endif

enum : int {
  kFormatVersion = 2,
  kBlockTokens = 64,  // coded tokens that share a mean
  kUnit = 32,         // dimensions whose key codes share whole words; head dimensions are padded to it
  kGroup = 32,        // dimensions that share a value scale and bias
  kMinDim = 32,
  kMaxDim = 512,  // padded
  kDimStep = 8,   // head dimensions must be multiples of it
  kMaxKeyLevels = 16,
  kCodebookTop = 127,   // the outermost level of every codebook
  kQ1Group = 128,       // weights that share a scale
  kQ1Words = 4,         // words of a group
  kTernaryGroup = 128,  // weights that share a scale
  kTernaryWords = 8,    // words of a group
};

// How values are coded.
enum ValueCoding : int { kValueGroups, kValueLloyd };

// Seeds of the random signs: of the rotation, and of the second rotation used by the residual signs.
#define TQ_ROTATION_SEED 0x74716578u
#define TQ_RESIDUAL_SEED 0x716a6c00u

// Largest finite fp16: norms, scales and biases are clipped to it so that no finite input gives an infinity.
#define TQ_HALF_MAX 65504.0f

TQ_FN int padded_dim(int dim) { return (dim + kUnit - 1) / kUnit * kUnit; }
TQ_FN int code_words(int dim, int bits) { return dim / 32 * bits; }
TQ_FN int sign_words(int dim) { return dim / 32; }
TQ_FN int value_params(int dim, int coding) { return coding == kValueLloyd ? 1 : 2 * (dim / kGroup); }
TQ_FN int n_blocks(int n_tokens) { return (n_tokens + kBlockTokens - 1) / kBlockTokens; }

// Share of the min-max range that the first quantisation of a value group spans, before the least-squares refit.
// 2 bits: 0.8 (DESIGN: within 2 % in KL of a search). 4 bits: 0.975 has the lowest squared error of 0.60 ... 1.00 on
// groups of 32 normal numbers (0.00564; 0.00574 at 1.0 and 0.00581 at 0.95).
TQ_FN float value_shrink(int bits) { return bits == 2 ? 0.8f : 0.975f; }

// Code of dimension i (0 .. 31) of a unit whose words are w0 ... (words beyond the bits are ignored).
TQ_FN uint32_t key_code_2(uint32_t w0, uint32_t w1, int i) {
  const uint32_t w = (i & 8) ? w1 : w0;
  return (w >> (4 * (i & 7) + ((i & 16) ? 2 : 0))) & 3u;
}
TQ_FN uint32_t key_code_3(uint32_t w0, uint32_t w1, uint32_t w2, int i) {
  const int n = 4 * (i & 7);
  if (i < 8) return (w0 >> n) & 7u;
  if (i < 16) return (w1 >> n) & 7u;
  if (i < 24) return (w2 >> n) & 7u;
  return ((w0 >> (n + 3)) & 1u) | (((w1 >> (n + 3)) & 1u) << 1) | (((w2 >> (n + 3)) & 1u) << 2);
}
TQ_FN uint32_t key_code_4(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, int i) {
  const uint32_t w = i < 8 ? w0 : i < 16 ? w1 : i < 24 ? w2 : w3;
  return (w >> (4 * (i & 7))) & 15u;
}

// Word and bit of the value code of dimension d in a vector of dim dimensions.
TQ_FN int value_word(int dim, int bits, int d) { return d % code_words(dim, bits); }
TQ_FN int value_shift(int dim, int bits, int d) { return bits * (d / code_words(dim, bits)); }

// Random signs of dimensions 32i .. 32i + 31; bit b = 1 negates dimension 32i + b.
TQ_FN uint32_t sign_word(uint32_t seed, int i) {
  uint64_t z = uint64_t(seed) + uint64_t(i + 1) * uint64_t(0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * uint64_t(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * uint64_t(0x94D049BB133111EB);
  return uint32_t((z ^ (z >> 31)) >> 32);
}

// Hadamard matrices that MLX's hadamard_transform multiplies a Sylvester matrix with; 0: no such factor.
TQ_FN int hadamard_factor(int dim) {
  if ((dim & (dim - 1)) == 0) return 1;
  for (int m = 12; m <= 28; m += 8) {
    const int p = dim / m;
    if (dim % m == 0 && (p & (p - 1)) == 0) return m;
  }
  return 0;
}

#if !defined(__METAL_VERSION__)
static_assert(kUnit == 32 && kGroup == 32, "a unit of key codes and a group of values are whole words");
static_assert(kQ1Words * 32 == kQ1Group, "a group of 1-bit weights is whole words");
static_assert(kTernaryWords * 16 == kTernaryGroup && kTernaryGroup == kQ1Group, "kernels take both");
}  // namespace tqext
#endif
