// One token's codes to numbers and back, in plain fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "codebook.h"
#include "core_api.h"
#include "format.h"
#include "half.h"

namespace tqext::cpu {

inline uint32_t key_code(const uint32_t* words, int bits, int d) {
  const uint32_t* unit = words + d / kUnit * bits;
  const int i = d % kUnit;
  if (bits == 2) return key_code_2(unit[0], unit[1], i);
  if (bits == 3) return key_code_3(unit[0], unit[1], unit[2], i);
  return key_code_4(unit[0], unit[1], unit[2], unit[3], i);
}

// Levels of one key, as integers; times norm / 127 they are the key in the rotated space.
inline void decode_levels(const uint32_t* words, int dim, int bits, const int8_t* codebook, float* levels) {
  for (int d = 0; d < dim; d++) levels[d] = codebook[key_code(words, bits, d)];
}

inline void decode_values(const uint32_t* words, const uint16_t* params, int dim, int bits, float* values) {
  const uint32_t mask = (1u << bits) - 1;
  for (int group = 0; group < dim / kGroup; group++) {
    const float scale = half_to_float(params[2 * group]), bias = half_to_float(params[2 * group + 1]);
    for (int d = group * kGroup; d < (group + 1) * kGroup; d++) {
      values[d] = scale * float((words[value_word(dim, bits, d)] >> value_shift(dim, bits, d)) & mask) + bias;
    }
  }
}

// Sum of x with the signs of one token's residual.
inline float signed_sum(const uint32_t* signs, const float* x, int dim) {
  float sum = 0;
  for (int d = 0; d < dim; d++) sum += (signs[d / 32] >> (d % 32) & 1) ? x[d] : -x[d];
  return sum;
}

// rotate(x) or its inverse, in place, with the signs of the seed; dim a power of two times hadamard_factor(dim).
TQ_CORE void rotate_row(float* x, int dim, uint32_t seed, bool inverse);

// x: one key in the rotated space. Writes code_words() words, the norm and the chosen levels.
TQ_CORE void encode_key(const float* x, int dim, const Codebook& book, uint32_t* words, uint16_t* norm, float* levels);
// residual: x minus the decoded key; overwritten. Writes the sign words and the residual's norm.
TQ_CORE void encode_residual(float* residual, int dim, uint32_t* signs, uint16_t* norm);
// x: one value in the rotated space. kValueGroups: scale and bias of each group; kValueLloyd: the norm.
TQ_CORE void encode_value_groups(const float* x, int dim, int bits, uint32_t* words, uint16_t* params);
TQ_CORE void encode_value_lloyd(const float* x, int dim, const Codebook& book, uint32_t* words, uint16_t* norm);

}  // namespace tqext::cpu
