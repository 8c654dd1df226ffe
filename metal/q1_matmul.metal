// Q1_0 and ternary weights (format.h): x W^T for a few rows of x and for many, packing and unpacking.
//
// matvec  1 to 8 rows of x. The weight's bytes, 1.125 bits per weight, are read once for all rows. A weight costs an AND and
//         an FMA per row of x: 2 lane operations for one row, against 2.1 that an M4 Max has per weight at full bandwidth
//         (128 lanes x 40 cores x 1.6 GHz over 546 GB/s): both limits are near. Not measured on a GPU.
//         Bits are used in place: a weight byte is loaded as it is, and byte & (1 << j), read as half, is the subnormal
//         2^(j - 24); x is held as x 2^(12 - j), and the sum is multiplied by 2^12 once. Codes of two bits are used in the same
//         way: byte & (3 << 2 j) is code 2^(2 j - 24), so that a ternary weight costs no more operations than a sign bit. Many
//         rows of x are MLX's own product; a graph compiled without shapes brings them here, eight at a time.
// matmul  8x8 matrices: the threadgroup's rows of x are staged per group of 128 columns, +-scale is put straight into the
//         operand's registers. The multiplications are the limit (18 cycles each; 4 per decoded operand).
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

#include "format.h"
#include "q1_params.h"

using namespace metal;

constant constexpr int kVecRows = 4;  // rows of the weight per simdgroup; 8 leave too few simdgroups for 4096 rows
constant constexpr int kVecSimdgroups = 4;
constant constexpr int kMatSimdgroups = 8, kMatInputs = 32,
                       kMatRows = 16;  // rows of x per threadgroup, of the weight per simdgroup
constant constexpr int kPackSimdgroups = 4;

// Partial sum of the codes of one byte: sum of code x 2^-12; x is scaled as above.
template <int BITS>
inline float masked_sum(uchar byte, thread const float* x, float sum) {
  const ushort bits = ushort(byte), mask = ushort((1 << BITS) - 1);
#pragma clang loop unroll(full)
  for (int j = 0; j < 8 / BITS; j++) sum = fma(x[j], float(as_type<half>(ushort(bits & ushort(mask << BITS * j)))), sum);
  return sum;
}

// y[n, r] for NX rows of x and weights of BITS bits. A lane holds BYTES bytes of every weight row of its simdgroup and the
// columns of x under them.
template <typename T, int NX, int BYTES, int BITS>
[[kernel]] void q1_matvec(const device T* x [[buffer(kQ1X)]], const device uchar* weight [[buffer(kQ1Weight)]],
                          const device half* scales [[buffer(kQ1Scales)]], device T* out [[buffer(kQ1Out)]],
                          constant Q1MatmulParams& p [[buffer(kQ1Params)]], uint2 tg [[threadgroup_position_in_grid]],
                          uint sg [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const int row0 = (int(tg.x) * kVecSimdgroups + int(sg)) * kVecRows;
  constexpr int kColumns = 8 / BITS, kGroupBytes = kQ1Group / kColumns;
  const int n_bytes = kGroupBytes * p.n_groups;
  const int input0 = BITS == 1 ? 0 : int(tg.y) * NX, n_inputs = p.n_inputs - input0;
  float sum[NX][kVecRows];
  for (int n = 0; n < NX; n++) {
    for (int r = 0; r < kVecRows; r++) sum[n][r] = 0.0f;
  }
  for (int start = 0; start < n_bytes; start += 32 * BYTES) {
    const int byte = start + BYTES * int(lane);
    const bool mine = byte < n_bytes;
    float part[NX][kColumns * BYTES], total[NX];
#pragma clang loop unroll(full)
    for (int n = 0; n < NX; n++) {
      total[n] = 0.0f;
      for (int i = 0; i < kColumns * BYTES; i++) {
        const float value = mine && n < n_inputs ? float(x[long(input0 + n) * p.x_stride + kColumns * byte + i]) : 0.0f;
        total[n] += value;
        part[n][i] = value * as_type<float>(uint(127 + 12 - i % kColumns * BITS) << 23);
      }
    }
    for (int r = 0; r < kVecRows; r++) {
      if (row0 + r >= p.n_rows || !mine) continue;
      const device uchar* w = weight + 4 * (long(row0 + r) * p.weight_stride) + byte;
      const float scale = float(scales[long(row0 + r) * p.scale_stride + byte / kGroupBytes]);
      uchar bits[BYTES];
      if (BYTES == 4) {
        const uchar4 all = *reinterpret_cast<const device uchar4*>(w);
        for (int b = 0; b < BYTES; b++) bits[b] = all[b];
      } else if (BYTES == 2) {
        const uchar2 all = *reinterpret_cast<const device uchar2*>(w);
        for (int b = 0; b < BYTES; b++) bits[b] = all[b];
      } else {
        bits[0] = *w;
      }
#pragma clang loop unroll(full)
      for (int n = 0; n < NX; n++) {
        float ones = 0.0f;
        for (int b = 0; b < BYTES; b++) ones = masked_sum<BITS>(bits[b], part[n] + kColumns * b, ones);
        // +-1 is twice the bit less one: 2 * 2^12. A ternary weight is the code less one.
        sum[n][r] = fma(scale, fma(ones, BITS == 1 ? 8192.0f : 4096.0f, -total[n]), sum[n][r]);
      }
    }
  }
  for (int n = 0; n < NX; n++) {
    for (int r = 0; r < kVecRows; r++) {
      const float y = simd_sum(sum[n][r]);
      if (lane == 0 && n < n_inputs && row0 + r < p.n_rows) out[long(input0 + n) * p.n_rows + row0 + r] = T(y);
    }
  }
}

inline void put(thread simdgroup_float8x8& a, float2 v) { reinterpret_cast<thread float2&>(a.thread_elements()) = v; }
inline float2 get(thread simdgroup_float8x8& a) { return reinterpret_cast<thread float2&>(a.thread_elements()); }

template <typename T>
[[kernel]] void q1_matmul(const device T* x [[buffer(kQ1X)]], const device uint* weight [[buffer(kQ1Weight)]],
                          const device half* scales [[buffer(kQ1Scales)]], device T* out [[buffer(kQ1Out)]],
                          constant Q1MatmulParams& p [[buffer(kQ1Params)]], uint2 tg [[threadgroup_position_in_grid]],
                          uint tid [[thread_index_in_threadgroup]], uint sg [[simdgroup_index_in_threadgroup]],
                          uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float tile[kMatInputs * kQ1Group];  // x [row][column] of one group
  const int input0 = int(tg.y) * kMatInputs, row0 = (int(tg.x) * kMatSimdgroups + int(sg)) * kMatRows;
  const int row = int(lane / 4 & 4u) + int(lane / 2 & 3u), column = int(lane / 4 & 2u) * 2 + int(lane & 1u) * 2;
  simdgroup_float8x8 acc[kMatInputs / 8][kMatRows / 8];
  for (int i = 0; i < kMatInputs / 8; i++) {
    for (int j = 0; j < kMatRows / 8; j++) put(acc[i][j], float2(0.0f));
  }
  for (int g = 0; g < p.n_groups; g++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = int(tid); i < kMatInputs * kQ1Group; i += 32 * kMatSimdgroups) {
      const int n = input0 + i / kQ1Group;
      tile[i] = n < p.n_inputs ? float(x[long(n) * p.x_stride + g * kQ1Group + i % kQ1Group]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Words and scale of the two weight rows of this lane's operand columns, per matrix.
    uint words[kMatRows / 8][2][kQ1Words];
    float scale[kMatRows / 8][2];
    for (int j = 0; j < kMatRows / 8; j++) {
      for (int k = 0; k < 2; k++) {
        const int r = row0 + 8 * j + column + k;
        scale[j][k] = r < p.n_rows ? float(scales[long(r) * p.scale_stride + g]) : 0.0f;
        for (int w = 0; w < kQ1Words; w++) {
          words[j][k][w] = r < p.n_rows ? weight[long(r) * p.weight_stride + kQ1Words * g + w] : 0u;
        }
      }
    }
#pragma clang loop unroll(full)
    for (int step = 0; step < kQ1Group / 8; step++) {
      const uint mask = 1u << uint(8 * (step % 4) + row);
      simdgroup_float8x8 a[kMatInputs / 8], b;
      for (int i = 0; i < kMatInputs / 8; i++) {
        put(a[i], *reinterpret_cast<threadgroup const float2*>(tile + (8 * i + row) * kQ1Group + 8 * step + column));
      }
      for (int j = 0; j < kMatRows / 8; j++) {
        put(b, float2((words[j][0][step / 4] & mask) ? scale[j][0] : -scale[j][0],
                      (words[j][1][step / 4] & mask) ? scale[j][1] : -scale[j][1]));
        for (int i = 0; i < kMatInputs / 8; i++) simdgroup_multiply_accumulate(acc[i][j], a[i], b, acc[i][j]);
      }
    }
  }
  for (int i = 0; i < kMatInputs / 8; i++) {
    for (int j = 0; j < kMatRows / 8; j++) {
      const float2 y = get(acc[i][j]);
      const int n = input0 + 8 * i + row, r = row0 + 8 * j + column;
      if (n < p.n_inputs && r < p.n_rows) out[long(n) * p.n_rows + r] = T(y.x);
      if (n < p.n_inputs && r + 1 < p.n_rows) out[long(n) * p.n_rows + r + 1] = T(y.y);
    }
  }
}

// Exact sum of two numbers as a rounded sum and its error (Knuth).
inline float2 add_exactly(float a, float b) {
#pragma clang fp contract(off) reassociate(off)
  const float sum = a + b, from_b = sum - a;
  return float2(sum, (a - (sum - from_b)) + (b - from_b));
}

// One simdgroup per group of 128 weights; bit = w >= 0, scale = mean |w|, summed as exactly as the CPU's double.
template <typename T>
[[kernel]] void q1_quantize(const device T* x [[buffer(kQ1X)]], device uint* words [[buffer(kQ1Weight)]],
                            device half* scales [[buffer(kQ1Scales)]], constant Q1MatmulParams& p [[buffer(kQ1Params)]],
                            uint tg [[threadgroup_position_in_grid]], uint sg [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  const int group = int(tg) * kPackSimdgroups + int(sg);
  if (group >= p.n_rows * p.n_groups) return;
  const device T* from = x + long(group / p.n_groups) * p.x_stride + group % p.n_groups * kQ1Group;
  float sum = 0.0f, error = 0.0f;
  for (int w = 0; w < kQ1Words; w++) {
    const float value = float(from[32 * w + int(lane)]);
    const uint word = simd_or(value >= 0.0f ? 1u << lane : 0u);
    if (lane == 0) words[long(group) * kQ1Words + w] = word;
    const float2 next = add_exactly(sum, abs(value));
    sum = next.x;
    error += next.y;
  }
  for (ushort h = 16; h >= 1; h /= 2) {
    const float2 next = add_exactly(sum, simd_shuffle_xor(sum, h));
    error = error + simd_shuffle_xor(error, h) + next.y;
    sum = next.x;
  }
  const float scale = (isinf(sum) ? sum : sum + error) / float(kQ1Group);
  if (lane == 0) scales[group] = half(scale > TQ_HALF_MAX ? TQ_HALF_MAX : scale);
}

// One simdgroup per group of 128 weights.
template <typename T>
[[kernel]] void q1_dequantize(const device uint* words [[buffer(kQ1Weight)]], const device half* scales [[buffer(kQ1Scales)]],
                              device T* out [[buffer(kQ1Out)]], constant Q1MatmulParams& p [[buffer(kQ1Params)]],
                              uint tg [[threadgroup_position_in_grid]], uint sg [[simdgroup_index_in_threadgroup]],
                              uint lane [[thread_index_in_simdgroup]]) {
  const int group = int(tg) * kPackSimdgroups + int(sg);
  if (group >= p.n_rows * p.n_groups) return;
  const int row = group / p.n_groups, g = group % p.n_groups;
  const float scale = float(scales[long(row) * p.scale_stride + g]);
  for (int w = 0; w < kQ1Words; w++) {
    const uint bits = words[long(row) * p.weight_stride + kQ1Words * g + w];
    out[long(group) * kQ1Group + 32 * w + int(lane)] = T((bits >> lane & 1u) ? scale : -scale);
  }
}

#define TQ_Q1_MATVEC(name, type, inputs, bytes) \
  template [[host_name(name)]] [[kernel]] decltype(q1_matvec<type, inputs, bytes, 1>) q1_matvec<type, inputs, bytes, 1>;
#define TQ_TERNARY_MATVEC(name, type, inputs, bytes) \
  template [[host_name(name)]] [[kernel]] decltype(q1_matvec<type, inputs, bytes, 2>) q1_matvec<type, inputs, bytes, 2>;
#define TQ_Q1_MATMUL(name, type) template [[host_name(name)]] [[kernel]] decltype(q1_matmul<type>) q1_matmul<type>;
#define TQ_Q1_QUANTIZE(name, type) template [[host_name(name)]] [[kernel]] decltype(q1_quantize<type>) q1_quantize<type>;
#define TQ_Q1_DEQUANTIZE(name, type) template [[host_name(name)]] [[kernel]] decltype(q1_dequantize<type>) q1_dequantize<type>;
