// Every attention kernel this machine can run against float64 attention over the same bytes; no MLX, no Python, so that it
// also runs cross-compiled under an emulator. Prints the worst relative errors; the exit status is the number of failures.
//   g++ -std=c++20 -O3 -I csrc tests/native/attention_kernels_check.cpp csrc/cpu/attention_kernels*.cpp csrc/cpu/codec.cpp
//       csrc/cpu/isa.cpp csrc/cpu/scratch.cpp -o check && ./check
// Arguments: [ISA name] [time] [N]: only that instruction set; time instead of test; every Nth case.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "codebook.h"
#include "cpu/attention_kernels.h"
#include "cpu/codec.h"
#include "cpu/half.h"
#include "cpu/isa.h"

using namespace tqext;
using namespace tqext::cpu;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int key_dim = 128, value_dim = 128, key_bits = 3, value_bits = 2, rows = 4, begin = 0, n = 100;
  bool half = false, signs = false, bias = false, ends = false, offset = false, poison = false;
  int padding = 0;     // extra elements between tokens
  float spread = 1;    // standard deviation of the scores, natural logarithm
  bool equal = false;  // all keys are one key, values lie around zero: the output is an average near zero
  int octaves = 0;     // by which value scales differ between tokens and groups
  bool lloyd = false;  // values are coded as keys
  bool same = false;   // all tokens are one token
};

std::string name(const Case& c) {
  char text[260];
  std::snprintf(
      text, sizeof(text),
      "D=%d/%d bits=%d/%d%s rows=%d [%d,%d) half=%d signs=%d bias=%d ends=%d offset=%d poison=%d padding=%d spread=%g "
      "equal=%d octaves=%d same=%d",
      c.key_dim, c.value_dim, c.key_bits, c.value_bits, c.lloyd ? " lloyd" : "", c.rows, c.begin, c.begin + c.n, c.half,
      c.signs, c.bias, c.ends, c.offset, c.poison, c.padding, c.spread, c.equal, c.octaves, c.same);
  return text;
}

// Tokens [0, begin + n), then exactly the end of the allocation: reading beyond it is for the address sanitizer to find.
struct Problem {
  Case c;
  CodecShape shape;
  CodedHead head;
  std::vector<uint32_t> key_codes, signs, value_codes;
  std::vector<uint16_t> norms, residual_norms, params;
  std::vector<float> q, residual_q, offset;
  std::vector<int> ends;
  std::vector<std::vector<float>> bias_store;
  std::vector<const float*> bias;
  QueryRows rows;

  Problem(const Case& c, unsigned seed) : c(c) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int total = c.begin + c.n, pad = c.padding;
    shape = {.key_dim = c.key_dim,
             .value_dim = c.value_dim,
             .key_bits = c.key_bits,
             .value_bits = c.value_bits,
             .value_coding = c.lloyd ? kValueLloyd : kValueGroups,
             .codebook = {},
             .value_codebook = {},
             .half_query = c.half};
    std::copy_n(codebook(c.key_bits, c.key_dim).levels, kMaxKeyLevels, shape.codebook);
    if (c.lloyd) std::copy_n(codebook(c.value_bits, c.value_dim).levels, kMaxKeyLevels, shape.value_codebook);
    const int kw = code_words(c.key_dim, c.key_bits), vw = code_words(c.value_dim, c.value_bits);
    const int np = value_params(c.value_dim, shape.value_coding);
    auto fill = [&](auto& v, int width, int stride, auto make) {
      v.assign(size_t(std::max(total - 1, 0)) * stride + (total ? width : 0), 0);
      for (auto& x : v) x = make();
    };
    fill(key_codes, kw, kw + pad, [&] { return uint32_t(random()); });
    fill(value_codes, vw, vw + pad, [&] { return uint32_t(random()); });
    fill(signs, c.key_dim / 32, c.key_dim / 32 + pad, [&] { return uint32_t(random()); });
    fill(norms, 1, 1 + pad, [&] { return float_to_half(2.1f * (0.8f + 0.4f * (random() % 1000) / 1000)); });
    fill(residual_norms, 1, 1 + pad,
         [&] { return float_to_half(std::sqrt(float(c.key_dim)) * 0.2f * (random() % 1000) / 1000); });
    bool scale = true;
    float last_scale = 0;
    fill(params, np, np + pad, [&] {
      float x;
      if (scale || c.lloyd) {
        x = (0.5f + (random() % 1000) / 1000.0f) * (random() % 16 ? 1 : -1);
        if (c.octaves) x *= std::exp2(-float(random() % (c.octaves + 1)));
        last_scale = x;
      } else if (c.equal || c.octaves) {
        x = -0.5f * ((1 << c.value_bits) - 1) * last_scale * (1 + 0.1f * normal(random));
      } else {
        x = -1.5f + 0.5f * normal(random);
      }
      scale = !scale;
      return float_to_half(x);
    });
    for (int t = 1; (c.equal || c.same) && t < total; t++) {
      std::copy_n(key_codes.begin(), kw, key_codes.begin() + size_t(t) * (kw + pad));
      norms[size_t(t) * (1 + pad)] = norms[0];
    }
    for (int t = 1; c.same && t < total; t++) {
      std::copy_n(value_codes.begin(), vw, value_codes.begin() + size_t(t) * (vw + pad));
      std::copy_n(params.begin(), np, params.begin() + size_t(t) * (np + pad));
    }
    for (int i = 0; i < c.rows * c.key_dim; i++) q.push_back(normal(random) * c.spread / std::sqrt(float(c.key_dim)) * 1.4427f);
    for (int i = 0; i < c.rows * c.key_dim; i++) residual_q.push_back(q[i] * std::sqrt(float(M_PI / 2) / c.key_dim));
    const int first_block = c.begin / kBlockTokens, n_offsets = n_blocks(total) - first_block;
    for (int r = 0; r < c.rows; r++) {
      for (int i = 0; i < n_offsets; i++) offset.push_back(normal(random) * 5);
      ends.push_back(c.ends ? std::max(0, total - 1 - int(random() % 70)) : total);
      std::vector<float> row(total);
      for (int t = 0; t < total; t++) row[t] = random() % 5 == 0 ? -kInf : normal(random);
      if (r == 1) std::fill(row.begin(), row.end(), -kInf);  // a row that attends to nothing
      bias_store.push_back(std::move(row));
    }
    for (auto& row : bias_store) bias.push_back(row.data());
    head = {key_codes.data(),
            norms.data(),
            c.signs ? signs.data() : nullptr,
            c.signs ? residual_norms.data() : nullptr,
            value_codes.data(),
            params.data(),
            kw + pad,
            1 + pad,
            c.key_dim / 32 + pad,
            1 + pad,
            vw + pad,
            np + pad};
    rows = {.n_rows = c.rows,
            .q = q.data(),
            .residual_q = c.signs ? residual_q.data() : nullptr,
            .offset = c.offset ? offset.data() : nullptr,
            .offset_stride = n_offsets,
            .first_block = first_block,
            .end = ends.data(),
            .bias = c.bias ? bias.data() : nullptr};
    if (c.poison && total > 2) {  // NaN in tokens that no row attends
      const int t = c.begin + c.n / 2;
      norms[t * (1 + pad)] = 0x7e00;
      params[t * (np + pad)] = 0x7e00;
      if (np > 1) params[t * (np + pad) + 1] = 0x7c00;
      for (auto& row : bias_store) row[t] = -kInf;
    }
  }
};

struct State {
  double max = -kInf, sum = 0;
  std::vector<double> out;
};

template <class Key, class Value, class Score>
std::vector<State> reference(const QueryRows& rows, int value_dim, int begin, int end, const Score& score, const Value& value) {
  std::vector<State> states(rows.n_rows);
  std::vector<double> v(value_dim);
  for (int r = 0; r < rows.n_rows; r++) {
    State& s = states[r];
    s.out.assign(value_dim, 0);
    std::vector<double> x(std::max(0, end - begin), -kInf);
    for (int t = begin; t < std::min(end, rows.end[r]); t++) {
      const float bias = rows.bias ? rows.bias[r][t] : 0;
      if (bias == -kInf) continue;
      x[t - begin] = score(r, t) + bias;
      if (rows.offset) x[t - begin] += rows.offset[r * rows.offset_stride + t / kBlockTokens - rows.first_block];
    }
    for (double y : x) s.max = std::max(s.max, y);
    for (int t = begin; t < end; t++) {
      const double w = x[t - begin] == -kInf ? 0 : std::exp2(x[t - begin] - s.max);
      if (w == 0) continue;
      s.sum += w;
      value(t, v.data());
      for (int d = 0; d < value_dim; d++) s.out[d] += w * v[d];
    }
  }
  return states;
}

std::vector<State> reference(const Problem& p) {
  const Case& c = p.c;
  return reference<int>(
      p.rows, c.value_dim, c.begin, c.begin + c.n,
      [&](int r, int t) {
        double s = 0;
        const uint32_t* w = p.head.key_codes + t * p.head.key_stride;
        for (int d = 0; d < c.key_dim; d++) s += double(p.q[r * c.key_dim + d]) * p.shape.codebook[key_code(w, c.key_bits, d)];
        s *= double(half_to_float(p.head.key_norms[t * p.head.norm_stride])) / int(kCodebookTop);
        if (c.signs) {
          double x = 0;
          const uint32_t* sw = p.head.key_signs + t * p.head.sign_stride;
          for (int d = 0; d < c.key_dim; d++)
            x += (sw[d / 32] >> (d % 32) & 1) ? p.residual_q[r * c.key_dim + d] : -p.residual_q[r * c.key_dim + d];
          s += x * half_to_float(p.head.residual_norms[t * p.head.residual_stride]);
        }
        return s;
      },
      [&](int t, double* v) {
        const uint32_t* w = p.head.value_codes + t * p.head.value_stride;
        const uint16_t* params = p.head.value_params + t * p.head.param_stride;
        for (int d = 0; d < c.value_dim && c.lloyd; d++) {
          v[d] = double(half_to_float(params[0])) * p.shape.value_codebook[key_code(w, c.value_bits, d)] / int(kCodebookTop);
        }
        for (int d = 0; d < c.value_dim && !c.lloyd; d++) {
          const int code = w[value_word(c.value_dim, c.value_bits, d)] >> value_shift(c.value_dim, c.value_bits, d) &
                           ((1 << c.value_bits) - 1);
          v[d] = double(half_to_float(params[d / kGroup * 2])) * code + half_to_float(params[d / kGroup * 2 + 1]);
        }
      });
}

// Largest difference of the normalised outputs relative to the largest output; also checks max and sum.
double difference(const std::vector<State>& want, const std::vector<Partial>& got, int value_dim) {
  double top = 0, worst = 0;
  for (size_t r = 0; r < want.size(); r++) {
    for (int d = 0; d < value_dim && want[r].sum > 0; d++) top = std::max(top, std::fabs(want[r].out[d] / want[r].sum));
  }
  for (size_t r = 0; r < want.size(); r++) {
    if (want[r].sum == 0) {
      if (got[r].max != -kInf || got[r].sum != 0) return kInf;
      for (int d = 0; d < value_dim; d++)
        if (got[r].out[d] != 0) return kInf;
      continue;
    }
    const double lse = want[r].max + std::log2(want[r].sum), lse_got = got[r].max + std::log2(double(got[r].sum));
    if (!(std::fabs(lse - lse_got) < 2e-3 * std::max(1.0, std::fabs(lse)))) return kInf;
    for (int d = 0; d < value_dim; d++) {
      const double e = std::fabs(got[r].out[d] / got[r].sum - want[r].out[d] / want[r].sum);
      worst = std::max(worst, e / top);
      if (!(e == e)) return kInf;
    }
  }
  return worst;
}

std::vector<Partial> partials(std::vector<float>& store, int rows, int value_dim) {
  store.assign(size_t(rows) * value_dim, kNaN);
  std::vector<Partial> p(rows);
  for (int r = 0; r < rows; r++) p[r] = {kNaN, kNaN, store.data() + size_t(r) * value_dim};
  return p;
}

struct Kernels {
  const char* name;
  AttentionKernels k;
};

int failures = 0;
void expect(bool ok, const char* isa, const std::string& what, double value = 0) {
  if (ok) return;
  failures++;
  if (failures < 50) std::printf("FAIL %s %s: %g\n", isa, what.c_str(), value);
}

void test_coded(const Kernels& isa, const Case& c, unsigned seed, double worst[2]) {
  Problem p(c, seed);
  std::vector<float> store;
  auto got = partials(store, c.rows, c.value_dim);
  isa.k.attend_coded(p.head, p.shape, p.rows, c.begin, c.begin + c.n, got.data());
  const double e = difference(reference(p), got, c.value_dim);
  worst[c.half] = std::max(worst[c.half], e);
  expect(e <= (c.half ? 5e-4 : 1e-5) * (c.spread > 4 ? 3 : 1), isa.name, name(c), e);
}

enum class Place { kQuery, kKey, kValue };

void test_nan(const Kernels& isa, const Case& c, Place place) {
  Problem p(c, 5);
  const int last = c.begin + c.n - 1;
  const bool in_query = place == Place::kQuery;
  if (in_query) {
    p.q[3] = kNaN;  // row 0
  } else if (place == Place::kKey) {
    p.norms[last * (1 + c.padding)] = 0x7e00;  // every row that attends it
  } else {
    p.params[last * p.head.param_stride] = 0x7e00;
  }
  std::vector<float> store;
  auto got = partials(store, c.rows, c.value_dim);
  isa.k.attend_coded(p.head, p.shape, p.rows, c.begin, c.begin + c.n, got.data());
  const bool in_sum = place == Place::kValue || std::isnan(got[0].sum);
  expect(in_sum && std::isnan(got[0].out[0]) && got[0].max != -kInf, isa.name,
         "NaN must propagate from place " + std::to_string(int(place)) + ": " + name(c));
  if (in_query && c.rows > 1)
    expect(!std::isnan(got[1].sum) && !std::isnan(got[1].out[0]), isa.name, "NaN of one row must stay there");
}

// A number that is not finite in a block's mean makes NaN of the rows that attend to a token of the block, of no other.
void test_bad_offset(const Kernels& isa, const Case& c, int bad_block, float bad) {
  Problem p(c, 6);
  const int begin = std::max(c.begin, bad_block * kBlockTokens), end = begin + kBlockTokens;
  for (int r = 0; r < c.rows; r++) p.offset[r * p.rows.offset_stride + bad_block - p.rows.first_block] = bad;
  for (int r = 0; r < c.rows; r++) {
    for (auto& x : p.bias_store[r]) x = 0;
    if (r % 4 == 1) p.ends[r] = begin;  // the last token before the block
    if (r % 4 == 2) p.ends[r] = std::min(begin + 1, c.begin + c.n);
    for (int t = begin; r % 4 == 3 && t < std::min(end, c.begin + c.n); t++) p.bias_store[r][t] = -kInf;
  }
  std::vector<float> store;
  auto got = partials(store, c.rows, c.value_dim);
  isa.k.attend_coded(p.head, p.shape, p.rows, c.begin, c.begin + c.n, got.data());
  for (int r = 0; r < c.rows; r++) {
    const bool attended = r % 4 == 0 || r % 4 == 2;
    const bool is_nan = std::isnan(got[r].sum) && std::isnan(got[r].out[0]) && std::isnan(got[r].out[c.value_dim - 1]);
    const bool finite = std::isfinite(got[r].sum) && std::isfinite(got[r].out[0]) && std::isfinite(got[r].out[c.value_dim - 1]);
    expect(attended ? is_nan && got[r].max != -kInf : finite, isa.name,
           "offset " + std::to_string(bad) + " of block " + std::to_string(bad_block) + ", row " + std::to_string(r) + ": " +
               name(c));
  }
}

// Products of query rows with block means, relative to the largest one.
void test_means(const Kernels& isa, bool half, int dim, int n_rows, int first, int n, int pad, double& worst) {
  std::mt19937 random(dim + n + n_rows);
  std::normal_distribution<float> normal;
  const size_t size = size_t(first + n - 1) * (dim + pad) + dim;  // nothing beyond the last mean
  std::vector<float> means, q;
  std::vector<uint16_t> halves;
  for (size_t i = 0; i < size; i++) {
    halves.push_back(float_to_half(normal(random) * 20));
    means.push_back(half ? half_to_float(halves.back()) : normal(random) * 20);
  }
  for (int i = 0; i < n_rows * dim; i++) q.push_back(normal(random));
  std::vector<float> got(size_t(n_rows) * n, kNaN);
  isa.k.score_means(q.data(), n_rows, {half ? (const void*)halves.data() : means.data(), half, dim, dim + pad}, first, n,
                    got.data());
  double top = 0, error = 0;
  for (int r = 0; r < n_rows; r++) {
    for (int i = 0; i < n; i++) {
      double want = 0;
      for (int d = 0; d < dim; d++) want += double(q[r * dim + d]) * means[size_t(first + i) * (dim + pad) + d];
      const double e = std::fabs(got[size_t(r) * n + i] - want);
      error = e == e ? std::max(error, e) : kInf;
      top = std::max(top, std::fabs(want));
    }
  }
  worst = std::max(worst, error / top);
  expect(error <= 1e-6 * std::sqrt(double(dim)) * top, isa.name,
         "means half=" + std::to_string(half) + " D=" + std::to_string(dim) + " rows=" + std::to_string(n_rows) +
             " n=" + std::to_string(n),
         error / top);
}

void test_exact(const Kernels& isa, ExactType type, int dim, int value_dim, int n, int n_rows, int begin, bool bias,
                bool causal, double& worst) {
  std::mt19937 random(dim + n + n_rows);
  std::normal_distribution<float> normal;
  const int pad = n % 3, total = begin + n;
  std::vector<float> k, v, q;
  std::vector<uint16_t> k16, v16;
  auto convert = [&](float x, std::vector<uint16_t>& to) {
    const uint16_t h = type == ExactType::kFloat16 ? float_to_half(x) : float_to_bfloat(x);
    to.push_back(h);
    return type == ExactType::kFloat32 ? x : type == ExactType::kFloat16 ? half_to_float(h) : bfloat_to_float(h);
  };
  for (int i = 0; i < (total - 1) * (dim + pad) + dim; i++) k.push_back(convert(normal(random), k16));
  for (int i = 0; i < (total - 1) * (value_dim + pad) + value_dim; i++) v.push_back(convert(normal(random), v16));
  for (int i = 0; i < n_rows * dim; i++) q.push_back(normal(random) * 1.44f / std::sqrt(float(dim)));
  std::vector<int> ends;
  std::vector<std::vector<float>> store;
  std::vector<const float*> pointers;
  for (int r = 0; r < n_rows; r++) {
    ends.push_back(causal ? std::max(0, total - n_rows + r + 1) : total);
    store.emplace_back(total);
    for (auto& x : store.back()) x = random() % 4 == 0 ? -kInf : normal(random);
  }
  for (auto& x : store) pointers.push_back(x.data());
  const QueryRows rows{.n_rows = n_rows,
                       .q = q.data(),
                       .residual_q = nullptr,
                       .offset = nullptr,
                       .offset_stride = 0,
                       .first_block = 0,
                       .end = ends.data(),
                       .bias = bias ? pointers.data() : nullptr};
  const bool wide = type == ExactType::kFloat32;
  const ExactHead head{wide ? (const void*)k.data() : k16.data(),
                       wide ? (const void*)v.data() : v16.data(),
                       type,
                       dim,
                       value_dim,
                       dim + pad,
                       value_dim + pad};
  std::vector<float> out;
  auto got = partials(out, n_rows, value_dim);
  isa.k.attend_exact(head, rows, begin, total, got.data());
  auto want = reference<int>(
      rows, value_dim, begin, total,
      [&](int r, int t) {
        double s = 0;
        for (int d = 0; d < dim; d++) s += double(q[r * dim + d]) * k[size_t(t) * (dim + pad) + d];
        return s;
      },
      [&](int t, double* x) {
        for (int d = 0; d < value_dim; d++) x[d] = v[size_t(t) * (value_dim + pad) + d];
      });
  const double e = difference(want, got, value_dim);
  worst = std::max(worst, e);
  expect(e <= 1e-5, isa.name,
         "exact D=" + std::to_string(dim) + "/" + std::to_string(value_dim) + " n=" + std::to_string(n) +
             " rows=" + std::to_string(n_rows),
         e);
}

void test(const Kernels& isa, int every) {
  double worst[2] = {}, worst_exact = 0;
  std::vector<Case> cases;
  for (bool half : {false, true}) {
    for (int dim : {32, 64, 96, 128, 160, 192, 224, 256, 288, 384, 480, 512}) {
      for (int kb : {2, 3, 4})
        for (int vb : {2, 4}) cases.push_back({dim, dim, kb, vb, 4, 3, 150, half});
      for (int vb : {2, 3, 4}) {
        for (int rows : {1, 4}) {
          cases.push_back({dim, dim, vb, vb, rows, 3, 150, half});
          cases.back().lloyd = true;
        }
        cases.push_back({dim, 544 - dim, 3, vb, 3, 0, 77, half});
        cases.back().lloyd = true;
      }
      cases.push_back({dim, 544 - dim, 3, 2, 3, 0, 77, half});
    }
    for (int n : {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000}) {
      for (int rows : {1, 2, 3, 4, 5, 7, 8}) {
        cases.push_back({128, 128, 3, 2, rows, n % 5, n, half});
        cases.push_back({128, 128, 3, 3, rows, n % 5, n, half});
        cases.back().lloyd = true;
      }
      const int within = kBlockTokens - std::min(n, 40);  // with offsets, calls begin with a block or stay within one
      for (bool lloyd : {false, true}) {
        for (int begin : {0, n <= 40 ? within : 2 * kBlockTokens}) {
          cases.push_back({64, 96, 4, 4, 6, begin, n, half, true, true, true, true, n > 2, n % 7, 1});
          cases.back().lloyd = lloyd;
          cases.push_back({96, 64, 2, 2, 4, begin, n, half, false, true, false, true, n > 2, 2, 1});
          cases.back().lloyd = lloyd;
          cases.push_back(
              {128, 128, 3, lloyd ? 3 : 2, 1 + n % 9, begin, n, half, false, n % 2 == 1, n % 4 > 1, true, false, n % 2});
          cases.back().lloyd = lloyd;
        }
      }
    }
    for (int dim : {32, 64, 96, 128, 160, 192, 256, 480}) {  // rows enough for levels kept as bytes
      for (int bits : {2, 3, 4}) {
        cases.push_back(
            {dim, dim, bits, bits == 3 ? 2 : bits, 9 + bits, 0, 150, half, false, bits == 3, bits != 3, true, bits == 3});
        cases.push_back({dim, dim, bits, bits, 11 + bits, 0, 150, half, false, bits == 2, bits != 2, true, bits == 2});
        cases.back().lloyd = true;
      }
    }
    for (int rows : {12, 13, 31, 40}) cases.push_back({128, 128, 3, 2, rows, 3, 200, half, false, false, true});
    for (float spread : {0.1f, 3.0f, 10.0f})
      for (int rows : {1, 4})
        for (bool lloyd : {false, true}) {
          cases.push_back({128, 128, 3, 2, rows, 0, 1000, half, false, false, false, false, false, 0, spread});
          cases.back().lloyd = lloyd;
        }
    for (int dim : {64, 96, 128, 160, 256}) {  // 96: a head dimension of 80, padded
      for (int vb : {2, 4}) {
        for (int octaves : {0, 10})
          for (bool equal : {false, true}) {
            if (!octaves && !equal) continue;
            for (bool lloyd : {false, true}) {
              cases.push_back({dim, dim, 3, vb, 4, 0, 1000, half});
              cases.back().equal = equal;
              cases.back().octaves = octaves;
              cases.back().lloyd = lloyd;
            }
          }
      }
    }
    for (bool lloyd : {false, true}) {
      cases.push_back({128, 128, 3, 2, 4, 0, 5000, half, true, false, true, true, false, 4});
      cases.back().lloyd = lloyd;
      cases.push_back({128, 128, 3, 2, 4, 0, kMostTokens, half});
      cases.back().lloyd = lloyd;
      cases.push_back({64, 64, 3, 2, 4, 0, kMostTokens, half});
      cases.back().lloyd = lloyd;
      cases.back().same = true;
    }
  }
  unsigned seed = 1;
  for (size_t i = 0; i < cases.size(); i += every) test_coded(isa, cases[i], seed++, worst);
  auto chosen = [&] { return seed++ % unsigned(every) == 0; };
  for (int n : {1, 40, 300}) {
    for (int rows : {1, 4, 30}) {
      for (bool half : {false, true}) {
        for (bool lloyd : {false, true}) {
          Case c{128, 128, 3, 2, rows, 0, n, half};
          c.lloyd = lloyd;
          for (Place place : {Place::kQuery, Place::kKey, Place::kValue})
            if (chosen()) test_nan(isa, c, place);
          c.offset = c.bias = true;
          for (int begin : {0, 64, n == 300 ? 128 : 65}) {
            c.begin = begin;
            for (int block = begin / kBlockTokens; block < n_blocks(begin + n); block++)
              for (float bad : {kNaN, kInf, -kInf})
                if (chosen()) test_bad_offset(isa, c, block, bad);
          }
        }
      }
    }
  }
  double worst_mean = 0;
  for (int dim = kMinDim; dim <= kMaxDim; dim += dim < 136 ? kDimStep : 72)
    for (int n_rows : {1, 2, 3, 4, 5, 8, 9, 30})
      for (int n : {1, 2, 3, 4, 5, 8, 23})
        for (bool half : {false, true})
          if (chosen()) test_means(isa, half, dim, n_rows, n % 3, n, n_rows % 2 * 8, worst_mean);
  for (ExactType type : {ExactType::kFloat32, ExactType::kFloat16, ExactType::kBFloat16}) {
    for (int dim : {32, 40, 64, 80, 96, 128, 256, 512})
      for (int n : {1, 4, 33, 64, 150})
        for (int rows : {1, 2, 3, 4, 8, 29})
          if (chosen())
            test_exact(isa, type, dim, rows % 2 ? dim : 72, n, rows, n % 4, rows == 4, rows == 8 || rows == 29, worst_exact);
  }
  std::printf("%-9s coded: fp32 query %.1e, half query %.1e; exact tokens %.1e; means %.1e\n", isa.name, worst[0], worst[1],
              worst_exact, worst_mean);
}

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

void time(const Kernels& isa) {
  struct Shape {
    Case c;
  };
  const char* one = std::getenv("ONE");  // profile: only fp32 or half, and one shape, the first unless SHAPE names it
  const int only = std::getenv("SHAPE") ? std::atoi(std::getenv("SHAPE")) : 0;
  const bool with_means = std::getenv("MEANS");
  for (bool half : {false, true})
    for (int shape = 0; shape < 16; shape++) {
      if (one && (shape != only || half != (std::string(one) == "half"))) continue;
      Case c{128, 128, 3, 2, 4, 0, 16384, half};
      if (shape == 1) c.n = 1024;
      if (shape == 2) c.rows = 1;
      if (shape == 3) c.rows = 8;
      if (shape == 4) c.key_dim = c.value_dim = 64;
      if (shape == 5) c.key_dim = c.value_dim = 96;
      if (shape == 6) c.key_dim = c.value_dim = 256;
      if (shape == 7) c.rows = 128, c.n = 4096;
      if (shape == 8) c.key_bits = c.value_bits = 4;
      if (shape >= 9) c.lloyd = true, c.value_bits = 3;
      if (shape == 10) c.rows = 1;
      if (shape == 11) c.rows = 8;
      if (shape == 12) c.key_dim = c.value_dim = 64;
      if (shape == 13) c.key_dim = c.value_dim = 256;
      if (shape == 14) c.key_bits = c.value_bits = 4;
      if (shape == 15) c.rows = 128, c.n = 4096;
      c.offset = with_means;
      std::vector<Problem> heads;
      for (int h = 0; h < 8; h++) heads.emplace_back(c, h);
      std::vector<float> store;
      auto got = partials(store, c.rows, c.value_dim);
      std::vector<double> seconds;
      const std::vector<uint16_t> means(size_t(c.n) / kBlockTokens * c.key_dim, 0x2e66);  // 0.1
      const bool slow = std::string(isa.name) == "portable";
      if (slow && shape) continue;
      for (int i = 0; i < (slow ? 2 : c.rows > 8 ? 3 : one ? 60 : 40); i++) {
        const double a = cpu_seconds();
        for (auto& p : heads) {
          if (with_means)
            isa.k.score_means(p.q.data(), c.rows, {means.data(), true, c.key_dim, c.key_dim}, 0, c.n / kBlockTokens,
                              p.offset.data());
          isa.k.attend_coded(p.head, p.shape, p.rows, 0, c.n, got.data());
        }
        seconds.push_back(cpu_seconds() - a);
      }
      std::sort(seconds.begin(), seconds.end());
      const double keys = 8.0 * c.n;
      std::printf("%-9s %s D=%-3d bits=%d/%d%s rows=%-3d n=%-6d  median %8.3f ms, least %8.3f ms, %7.2f ns per key and head\n",
                  isa.name, half ? "half" : "fp32", c.key_dim, c.key_bits, c.value_bits, c.lloyd ? " lloyd" : "", c.rows, c.n,
                  seconds[seconds.size() / 2] * 1e3, seconds[0] * 1e3, seconds[0] * 1e9 / keys);
      std::fflush(stdout);
    }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Kernels> all;
  for (Isa isa : available_isas()) all.push_back({isa_name(isa), attention_kernels_of(isa)});
  bool timing = false;
  int every = 1;
  std::string only;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    if (word == "time") {
      timing = true;
    } else if (std::isdigit(word[0])) {
      every = std::stoi(word);
    } else {
      only = word;
    }
  }
  for (const Kernels& isa : all) {
    if (!only.empty() && only != isa.name) continue;
    timing ? time(isa) : test(isa, every);
  }
  return std::min(failures, 255);  // an exit status has eight bits
}
