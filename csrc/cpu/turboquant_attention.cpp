// eval_cpu: rotates the query rows once, shares runs of tokens (decoding) or blocks of queries (prefill) over the threads,
// joins the softmax states, rotates the result back. A KV head's bytes are read once for all of its query heads.
#include "turboquant_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "attention_kernels.h"
#include "codec.h"
#include "eval.h"
#include "listed_tokens.h"
#include "softmax.h"

namespace tqext {

namespace {

using cpu::View;

// An array whose last axis must be contiguous for the kernels: strided ones (rare: a transposed view) are copied.
struct Packed {
  View view;
  std::shared_ptr<std::vector<char>> copy;

  Packed(const mx::array& x) : view(x) {}  // NOLINT: used as a plain conversion

  void make_rows_contiguous() {
    if (view.strides.back() == 1 || view.shape.back() == 1) return;
    const int n = view.shape.back(), size = mx::size_of(view.type);
    copy = std::make_shared<std::vector<char>>(view.n_rows() * n * size);
    for (size_t i = 0; i < view.n_rows(); i++) {
      const ptrdiff_t start = cpu::row_start(view.shape, view.strides, i);
      for (int d = 0; d < n; d++) {
        std::copy_n(static_cast<const char*>(view.data) + (start + d * view.strides.back()) * size, size,
                    copy->data() + (i * n + d) * size);
      }
    }
    view.data = copy->data();
    ptrdiff_t stride = 1;
    for (int axis = int(view.shape.size()) - 1; axis >= 0; axis--) {
      view.strides[axis] = stride;
      stride *= view.shape[axis];
    }
  }
  template <class T>
  const T* head(int b, int h) const {
    return static_cast<const T*>(view.data) + b * view.strides[0] + h * view.strides[1];
  }
  ptrdiff_t token_stride() const { return view.strides[2]; }
};

// [begin, end)
struct Range {
  int begin, end;
  int size() const { return std::max(0, end - begin); }
};

enum Part : int { kFirst, kCoded, kTail, kNumParts };

struct Task {
  TurboQuantAttention::State state;
  Packed q, key_codes, key_norms, value_codes, value_params;
  std::optional<Packed> means, balance, signs, residual_norms, first_keys, first_values, tail_keys, tail_values, mask, sinks,
      left_padding, lengths, indices;
  void* out;
  mx::Dtype type;

  void run();

 private:
  // The query rows of one KV head for a range of queries: row r is query head r / queries.size(), query r % queries.size().
  struct Block {
    int b, h;  // sequence, KV head
    Range queries;
  };
  // A run of valid tokens of one part; where coded tokens are listed, of slots of a list. own: the queries' own keys, which
  // lengths set apart from the rest of the tail.
  struct Run {
    Part part;
    Range tokens;
    bool own = false;
  };
  // A block's rows in the forms that the kernels take.
  struct Rows {
    std::vector<float> exact, coded, residual;  // exact: unrotated; coded: balanced and rotated
    std::vector<std::vector<float>> mask_store;
    std::vector<const float*> bias[kNumParts];  // from the part's first column on
    std::vector<int> end[kNumParts], own_end;
  };
  // Softmax states of a block's rows after each of its runs.
  struct States {
    std::vector<float> outs;
    std::vector<cpu::Partial> partials;  // [runs][rows]
  };

  int batch() const { return q.view.shape[0]; }
  int n_q_heads() const { return q.view.shape[1]; }
  int n_queries() const { return q.view.shape[2]; }
  int n_kv_heads() const { return key_codes.view.shape[1]; }
  int n_repeats() const { return n_q_heads() / n_kv_heads(); }
  int size(Part part) const {
    if (part == kCoded) return key_codes.view.shape[2];
    const auto& keys = part == kFirst ? first_keys : tail_keys;
    return keys ? keys->view.shape[2] : 0;
  }
  int start(Part part) const { return part == kFirst ? 0 : part == kCoded ? size(kFirst) : size(kFirst) + size(kCoded); }
  int n_keys() const { return start(kTail) + size(kTail); }
  int n_rows(const Block& block) const { return n_repeats() * block.queries.size(); }
  int q_head(const Block& block, int r) const { return block.h * n_repeats() + r / block.queries.size(); }
  int query(const Block& block, int r) const { return block.queries.begin + r % block.queries.size(); }
  size_t q_row(const Block& block, int r) const {
    return (size_t(block.b) * n_q_heads() + q_head(block, r)) * n_queries() + query(block, r);
  }
  bool own_tokens() const { return lengths && state.causal; }
  int key_dim() const { return padded_dim(state.head_dim); }
  int value_dim() const { return padded_dim(state.value_dim); }

  // Queries that a block may have: those that share a list.
  int most_queries() const { return indices && indices->view.shape[2] > 1 ? 1 : n_queries(); }
  int n_own() const { return own_tokens() ? n_queries() : 0; }

  int padding(int b) const;
  Range valid(Part part, int b) const;
  std::vector<Run> runs(int b) const;
  static std::vector<Run> cut(const std::vector<Run>& runs, int step);
  Rows prepare(const Block& block) const;
  void add_masks(const Block& block, Rows& rows) const;
  States make_states(int n_runs, int n_rows) const;
  cpu::CodecShape codec_shape() const;
  cpu::CodedHead coded_head(int b, int h) const;
  cpu::BlockMeans block_means(int b, int h) const;
  void attend(const Block& block, const Rows& rows, const Run& run, cpu::Partial* partials) const;
  void attend_latents(const Block& block, const cpu::CodedHead& head, const cpu::CodecShape& shape, const cpu::QueryRows& rows,
                      Range tokens, cpu::Partial* partials) const;
  // Whether the states of a part's tokens are in the rotated space.
  bool is_rotated(Part part) const { return part == kCoded && !state.latent; }
  void attend_listed(const Block& block, const Rows& rows, const Range& slots, cpu::Partial* partials) const;
  void join(const Block& block, const std::vector<Run>& runs, const States& states) const;
  void decode() const;
  void prefill() const;
};

int Task::padding(int b) const {
  if (!left_padding) return 0;
  // Clamped: differences must not overflow whatever the array holds.
  const View& v = left_padding->view;
  return std::clamp(int(static_cast<const int32_t*>(v.data)[b * v.strides[0]]), 0, n_keys());
}

// The tokens of a part that padding and lengths leave, without the queries' own.
Range Task::valid(Part part, int b) const {
  const int stored = size(part) - (part == kTail ? n_own() : 0);
  int end = stored;
  if (lengths) {
    const View& v = lengths->view;
    end = std::clamp(int(static_cast<const int32_t*>(v.data)[b * v.strides[0] + part * v.strides[1]]), 0, stored);
  }
  return {std::clamp(padding(b) - start(part), 0, end), end};
}

std::vector<Task::Run> Task::runs(int b) const {
  std::vector<Run> runs;
  for (Part part : {kCoded, kFirst, kTail}) {  // the longest first, so that no thread is left with it at the end
    const Range range = valid(part, b);
    if (part == kCoded && indices) {
      if (range.size() && indices->view.shape[3]) runs.push_back({part, {0, indices->view.shape[3]}});
      continue;
    }
    // Coded tokens' runs begin with a block, but for a first one within a block.
    const int aligned = part == kCoded ? std::clamp(n_blocks(range.begin) * kBlockTokens, range.begin, range.end) : range.begin;
    if (range.begin < aligned) runs.push_back({part, {range.begin, aligned}});
    if (aligned < range.end) runs.push_back({part, {aligned, range.end}});
  }
  const Range own{std::max(size(kTail) - n_own(), padding(b) - start(kTail)), size(kTail)};
  if (own.size()) runs.push_back({kTail, own, true});
  return runs;
}

// The runs in pieces of at most `step` tokens, a multiple of a block.
std::vector<Task::Run> Task::cut(const std::vector<Run>& runs, int step) {
  std::vector<Run> pieces;
  for (const Run& run : runs) {
    for (int t = run.tokens.begin; t < run.tokens.end; t += step) {
      pieces.push_back({run.part, {t, std::min(t + step, run.tokens.end)}, run.own});
    }
  }
  return pieces;
}

// Additive masks in base 2 over all columns.
void Task::add_masks(const Block& block, Rows& rows) const {
  const View& m = mask->view;
  rows.mask_store.reserve(n_rows(block));
  std::vector<std::pair<ptrdiff_t, const float*>> known;  // heads often share a mask
  for (int r = 0; r < n_rows(block); r++) {
    const ptrdiff_t start_of_row = block.b * m.strides[0] + q_head(block, r) * m.strides[1] + query(block, r) * m.strides[2];
    const size_t same = r % block.queries.size();
    const float* row = nullptr;
    if (known.size() > same && known[same].first == start_of_row) {
      row = known[same].second;
    } else {
      std::vector<float> values(n_keys());
      for (int c = 0; c < n_keys(); c++) {
        const ptrdiff_t i = start_of_row + c * m.strides[3];
        values[c] = m.type == mx::bool_ ? (static_cast<const bool*>(m.data)[i] ? 0.0f : kNegInf)
                                        : static_cast<const float*>(m.data)[i] * kLog2e;
      }
      rows.mask_store.push_back(std::move(values));
      row = rows.mask_store.back().data();
      if (known.size() == same) known.emplace_back(start_of_row, row);
    }
    for (Part part : {kFirst, kCoded, kTail}) rows.bias[part].push_back(row + start(part));
  }
}

Task::Rows Task::prepare(const Block& block) const {
  const int n = n_rows(block), dim = key_dim();
  Rows x;
  x.exact.assign(size_t(n) * state.head_dim, 0.0f);
  x.coded.assign(size_t(n) * dim, 0.0f);
  if (signs) x.residual.assign(size_t(n) * dim, 0.0f);
  for (int r = 0; r < n; r++) {
    float* exact = &x.exact[size_t(r) * state.head_dim];
    float* coded = &x.coded[size_t(r) * dim];
    q.view.load(q_row(block, r), state.head_dim, exact);
    for (int d = 0; d < state.head_dim; d++) exact[d] *= state.scale * kLog2e;
    std::copy_n(exact, state.head_dim, coded);
    if (balance) {
      const View& v = balance->view;
      const float* factor = static_cast<const float*>(v.data) + block.h * v.strides[0];
      for (int d = 0; d < state.head_dim; d++) coded[d] /= factor[d * v.strides[1]];
    }
    if (state.hadamard) cpu::rotate_row(coded, dim, TQ_ROTATION_SEED, false);
    if (signs) {
      float* residual = &x.residual[size_t(r) * dim];
      std::copy_n(coded, dim, residual);
      cpu::rotate_row(residual, dim, TQ_RESIDUAL_SEED, false);
      for (int d = 0; d < dim; d++) residual[d] *= std::sqrt(float(M_PI / 2) / dim);
    }
    const int last = n_keys() - n_queries() + query(block, r);  // the last column of a causal row
    for (Part part : {kFirst, kCoded, kTail}) {
      const bool causal = state.causal && !own_tokens();
      x.end[part].push_back(causal ? std::clamp(last + 1 - start(part), 0, size(part)) : size(part));
    }
    x.own_end.push_back(last + 1 - start(kTail));
  }
  if (mask) add_masks(block, x);
  return x;
}

Task::States Task::make_states(int n_runs, int n_rows) const {
  States states;
  const int dim = std::max(value_dim(), state.value_dim);
  states.outs.resize(size_t(n_runs) * n_rows * dim);
  states.partials.resize(size_t(n_runs) * n_rows);
  for (size_t i = 0; i < states.partials.size(); i++) states.partials[i] = {kNegInf, 0.0f, &states.outs[i * dim]};
  return states;
}

// The state of both parts' tokens.
void add(const cpu::Partial& part, int dim, cpu::Partial& total) {
  if (part.max == kNegInf) return;
  const float max = std::max(total.max, part.max), keep = rescale(total.max, max), weight = rescale(part.max, max);
  total.max = max;
  total.sum = keep * total.sum + weight * part.sum;
  for (int d = 0; d < dim; d++) total.out[d] = keep * total.out[d] + weight * part.out[d];
}

cpu::CodecShape Task::codec_shape() const {
  cpu::CodecShape shape{.key_dim = key_dim(),
                        .value_dim = value_dim(),
                        .key_bits = state.key_bits,
                        .value_bits = state.value_bits,
                        .value_coding = ValueCoding(state.value_coding),
                        .codebook = {},
                        .value_codebook = {},
                        .half_query = type != mx::float32};
  std::copy_n(codebook(state.key_bits, key_dim()).levels, kMaxKeyLevels, shape.codebook);
  if (state.value_coding == kValueLloyd) {
    std::copy_n(codebook(state.value_bits, value_dim()).levels, kMaxKeyLevels, shape.value_codebook);
  }
  return shape;
}

cpu::CodedHead Task::coded_head(int b, int h) const {
  return {key_codes.head<uint32_t>(b, h),
          key_norms.head<uint16_t>(b, h),
          signs ? signs->head<uint32_t>(b, h) : nullptr,
          residual_norms ? residual_norms->head<uint16_t>(b, h) : nullptr,
          value_codes.head<uint32_t>(b, h),
          value_params.head<uint16_t>(b, h),
          key_codes.token_stride(),
          key_norms.token_stride(),
          signs ? signs->token_stride() : 0,
          residual_norms ? residual_norms->token_stride() : 0,
          value_codes.token_stride(),
          value_params.token_stride()};
}

cpu::BlockMeans Task::block_means(int b, int h) const {
  const bool half = means->view.type == mx::float16;
  const void* data = half ? static_cast<const void*>(means->head<uint16_t>(b, h)) : means->head<float>(b, h);
  return {data, half, state.head_dim, means->token_stride()};
}

void Task::attend(const Block& block, const Rows& rows, const Run& run, cpu::Partial* partials) const {
  const cpu::AttentionKernels& kernels = cpu::attention_kernels();
  const auto [b, h, queries] = block;
  const std::vector<int>& ends = run.own ? rows.own_end : rows.end[run.part];
  cpu::QueryRows query{.n_rows = n_rows(block),
                       .q = nullptr,
                       .residual_q = nullptr,
                       .offset = nullptr,
                       .offset_stride = 0,
                       .first_block = 0,
                       .end = ends.data(),
                       .bias = mask ? rows.bias[run.part].data() : nullptr};
  const int end = std::min(run.tokens.end, *std::max_element(ends.begin(), ends.end()));
  if (run.part == kCoded && indices) return attend_listed(block, rows, run.tokens, partials);
  if (run.part == kCoded) {
    query.q = rows.coded.data();
    query.residual_q = signs ? rows.residual.data() : nullptr;
    if (run.tokens.begin >= end) return;  // partials begin as states of nothing
    std::vector<float> offsets;
    if (means) {
      query.first_block = run.tokens.begin / kBlockTokens;
      query.offset_stride = n_blocks(end) - query.first_block;
      offsets.resize(size_t(query.n_rows) * query.offset_stride);
      kernels.score_means(rows.exact.data(), query.n_rows, block_means(b, h), query.first_block, int(query.offset_stride),
                          offsets.data());
      query.offset = offsets.data();
    }
    if (state.latent) {
      attend_latents(block, coded_head(b, h), codec_shape(), query, {run.tokens.begin, end}, partials);
    } else {
      kernels.attend_coded(coded_head(b, h), codec_shape(), query, run.tokens.begin, end, partials);
    }
    return;
  }
  const Packed& keys = run.part == kFirst ? *first_keys : *tail_keys;
  const Packed& values = run.part == kFirst ? *first_values : *tail_values;
  query.q = rows.exact.data();
  // The type decides the size of an element; head() counts in elements.
  const bool wide = type == mx::float32;
  const void* k = wide ? static_cast<const void*>(keys.head<float>(b, h)) : keys.head<uint16_t>(b, h);
  const void* v = wide ? static_cast<const void*>(values.head<float>(b, h)) : values.head<uint16_t>(b, h);
  const auto exact_type = wide                  ? cpu::ExactType::kFloat32
                          : type == mx::float16 ? cpu::ExactType::kFloat16
                                                : cpu::ExactType::kBFloat16;
  const cpu::ExactHead exact{k, v, exact_type, state.head_dim, state.value_dim, keys.token_stride(), values.token_stride()};
  kernels.attend_exact(exact, query, run.tokens.begin, end, partials);
}

// The coded tokens in slots of the block's list.
void Task::attend_listed(const Block& block, const Rows& rows, const Range& slots, cpu::Partial* partials) const {
  constexpr int kPiece = 512;  // tokens whose copies stay in a second-level cache
  const cpu::AttentionKernels& kernels = cpu::attention_kernels();
  const auto [b, h, queries] = block;
  const int n = n_rows(block);
  const cpu::CodecShape shape = codec_shape();
  const cpu::CodedHead head = coded_head(b, h);
  const View& list = indices->view;
  const int32_t* ids_of_list =
      static_cast<const int32_t*>(list.data) + b * list.strides[0] + h * list.strides[1] + queries.begin * list.strides[2];
  const std::vector<int>& ends = rows.end[kCoded];
  Range range = valid(kCoded, b);
  range.end = std::min(range.end, *std::max_element(ends.begin(), ends.end()));
  const bool all_rows = *std::min_element(ends.begin(), ends.end()) >= range.end;  // attend to all of them
  const bool biased = means || mask || !all_rows;

  cpu::ListedTokens tokens;
  std::vector<int> ids, all(n);
  std::vector<float> bias;
  std::vector<const float*> bias_rows(n);
  std::optional<States> more;  // of the pieces after the first
  bool first = true;
  for (int slot = slots.begin; slot < slots.end;) {
    ids.clear();
    for (; slot < slots.end && int(ids.size()) < kPiece; slot++) {
      const int id = ids_of_list[slot * list.strides[3]];
      if (id >= range.begin && id < range.end) ids.push_back(id);
    }
    const int n_ids = int(ids.size());
    if (n_ids == 0) break;
    if (biased) {
      bias.assign(size_t(n) * n_ids, 0.0f);
      if (means) {
        tokens.add_means(kernels.score_means, rows.exact.data(), n, block_means(b, h), ids.data(), n_ids, bias.data());
      }
      for (int r = 0; r < n; r++) {
        float* to = &bias[size_t(r) * n_ids];
        bias_rows[r] = to;
        for (int i = 0; mask && i < n_ids; i++) {
          const float x = rows.bias[kCoded][r][ids[i]];
          to[i] = x == kNegInf ? x : to[i] + x;
        }
        for (int i = 0; !all_rows && i < n_ids; i++) to[i] = ids[i] < ends[r] ? to[i] : kNegInf;
      }
    }
    std::fill(all.begin(), all.end(), n_ids);
    const cpu::QueryRows query{.n_rows = n,
                               .q = rows.coded.data(),
                               .residual_q = signs ? rows.residual.data() : nullptr,
                               .offset = nullptr,
                               .offset_stride = 0,
                               .first_block = 0,
                               .end = all.data(),
                               .bias = biased ? bias_rows.data() : nullptr};
    if (!first && !more) more = make_states(1, n);
    cpu::Partial* states = first ? partials : more->partials.data();
    kernels.attend_coded(tokens.gather(head, shape, ids.data(), n_ids), shape, query, 0, n_ids, states);
    for (int r = 0; !first && r < n; r++) add(states[r], value_dim(), partials[r]);
    first = false;
  }
}

// Coded tokens whose values are their keys. A block's weights also weigh its mean, so blocks are attended to one by one. The
// states are in the unrotated space.
void Task::attend_latents(const Block& block, const cpu::CodedHead& head, const cpu::CodecShape& shape,
                          const cpu::QueryRows& rows, Range tokens, cpu::Partial* partials) const {
  const int n = rows.n_rows, dim = key_dim(), head_dim = state.head_dim;
  std::vector<float> outs(size_t(n) * dim), of_means(means ? size_t(n) * head_dim : 0), mean(head_dim);
  std::vector<cpu::Partial> one(n);
  for (int r = 0; r < n; r++) one[r].out = &outs[size_t(r) * dim];
  for (int r = 0; r < n; r++) {
    partials[r].max = kNegInf;
    partials[r].sum = 0;
    std::fill_n(partials[r].out, dim, 0.0f);
  }
  for (int t = tokens.begin; t < tokens.end;) {
    const int next = std::min((t / kBlockTokens + 1) * kBlockTokens, tokens.end);
    cpu::attention_kernels().attend_coded(head, shape, rows, t, next, one.data());
    if (means) {
      const size_t row = (size_t(block.b) * n_kv_heads() + block.h) * means->view.shape[2] + t / kBlockTokens;
      means->view.load(row, head_dim, mean.data());
    }
    for (int r = 0; r < n; r++) {
      if (one[r].max == kNegInf) continue;
      cpu::Partial& p = partials[r];
      const float max = std::max(p.max, one[r].max), keep = rescale(p.max, max), weight = rescale(one[r].max, max);
      const float sum = weight * one[r].sum;
      p.max = max;
      p.sum = keep * p.sum + sum;
      for (int d = 0; d < dim; d++) p.out[d] = keep * p.out[d] + weight * one[r].out[d];
      if (!means) continue;
      float* to = &of_means[size_t(r) * head_dim];
      for (int d = 0; d < head_dim; d++) to[d] = keep * to[d] + sum * mean[d];
    }
    t = next;
  }
  const float* factor = balance ? static_cast<const float*>(balance->view.data) + block.h * balance->view.strides[0] : nullptr;
  for (int r = 0; r < n; r++) {
    float* out = partials[r].out;
    if (state.hadamard) cpu::rotate_row(out, dim, TQ_ROTATION_SEED, true);
    for (int d = 0; d < head_dim && factor; d++) out[d] /= factor[d * balance->view.strides[1]];
    for (int d = 0; d < head_dim && means; d++) out[d] += of_means[size_t(r) * head_dim + d];
  }
}

// Joins the states of each row's runs, rotates the coded part back and writes the output.
void Task::join(const Block& block, const std::vector<Run>& runs, const States& states) const {
  float coded[kMaxDim], exact[kMaxDim + 1];
  const int n = n_rows(block);
  for (int r = 0; r < n; r++) {
    float sink = kNegInf;
    if (sinks) sink = static_cast<const float*>(sinks->view.data)[q_head(block, r) * sinks->view.strides[0]] * kLog2e;
    float max = sink;
    for (size_t i = 0; i < runs.size(); i++) max = std::max(max, states.partials[i * n + r].max);
    float sum = sink == kNegInf ? 0.0f : std::exp2(sink - max);
    std::fill_n(coded, value_dim(), 0.0f);
    std::fill_n(exact, state.value_dim, 0.0f);
    for (size_t i = 0; i < runs.size(); i++) {
      const cpu::Partial& p = states.partials[i * n + r];
      const float weight = rescale(p.max, max);
      const bool is_coded = is_rotated(runs[i].part);
      float* to = is_coded ? coded : exact;
      sum += weight * p.sum;
      for (int d = 0; d < (is_coded ? value_dim() : state.value_dim); d++) to[d] += weight * p.out[d];
    }
    if (state.hadamard && !state.latent) cpu::rotate_row(coded, value_dim(), TQ_ROTATION_SEED, true);
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int d = 0; d < state.value_dim; d++) exact[d] = (exact[d] + coded[d]) * inverse;
    if (state.lse) exact[state.value_dim] = (max + std::log2(sum)) / kLog2e;
    cpu::store_row(exact, state.out_columns(), out, state.lse ? mx::float32 : type, q_row(block, r) * state.out_columns());
  }
}

// Few queries: the tokens are split over the threads.
void Task::decode() const {
  // Long enough that an item's overhead does not show, enough items for every thread to share the work evenly.
  constexpr int kMinTokens = 1024, kItemsPerThread = 4;
  const int n_lists = n_queries() / most_queries();  // of a head
  const int n_blocks = batch() * n_kv_heads() * n_lists;
  const int n_ranges = std::max(1, kItemsPerThread * cpu::num_threads() / n_blocks);
  std::vector<Block> blocks;
  std::vector<std::vector<Run>> block_runs(n_blocks);
  std::vector<std::pair<int, int>> items;  // block, run
  for (int i = 0; i < n_blocks; i++) {
    const int head = i / n_lists, query = i % n_lists * most_queries();
    blocks.push_back({head / n_kv_heads(), head % n_kv_heads(), {query, query + most_queries()}});
    const std::vector<Run> whole = runs(blocks[i].b);
    int n_tokens = 0;
    for (const Run& run : whole) n_tokens += run.tokens.size();
    const int share = std::clamp((n_tokens + n_ranges - 1) / n_ranges, kMinTokens, cpu::kMostTokens);
    block_runs[i] = cut(whole, (share + 127) / 128 * 128);
    for (int run = 0; run < int(block_runs[i].size()); run++) items.emplace_back(i, run);
  }
  std::vector<Rows> rows(n_blocks);
  std::vector<States> states(n_blocks);
  cpu::parallel_for(n_blocks, [&](int i) {
    rows[i] = prepare(blocks[i]);
    states[i] = make_states(int(block_runs[i].size()), n_rows(blocks[i]));
  });
  cpu::parallel_for(int(items.size()), [&](int i) {
    const auto [block, run] = items[i];
    attend(blocks[block], rows[block], block_runs[block][run], &states[block].partials[size_t(run) * n_rows(blocks[block])]);
  });
  cpu::parallel_for(n_blocks, [&](int i) { join(blocks[i], block_runs[i], states[i]); });
}

// Many queries: the queries are split over the threads, and each block keeps only its own scratch.
void Task::prefill() const {
  // Per block: a decoded tile of tokens serves 64 times n_repeats rows, fewer where those would not stay in the caches.
  constexpr int kMostQueries = 64, kMostRows = 1024;
  const int n_block_queries = std::min(most_queries(), std::clamp(kMostRows / n_repeats(), 1, kMostQueries));
  const int n_query_blocks = (n_queries() + n_block_queries - 1) / n_block_queries;
  cpu::parallel_for(batch() * n_kv_heads() * n_query_blocks, [&](int i) {
    // The last queries have the most keys under a causal mask: they go first.
    const int query = (n_query_blocks - 1 - i % n_query_blocks) * n_block_queries, head = i / n_query_blocks;
    const Block block{head / n_kv_heads(), head % n_kv_heads(), {query, std::min(query + n_block_queries, n_queries())}};
    const Rows rows = prepare(block);
    const int n = n_rows(block);
    // The state of all coded tokens, that of all exact ones, and that of the run at hand.
    const std::vector<Run> totals{{kCoded, {}}, {kTail, {}}};
    States states = make_states(int(totals.size()), n), one = make_states(1, n);
    for (const Run& run : cut(runs(block.b), cpu::kMostTokens)) {
      for (cpu::Partial& p : one.partials) p.max = kNegInf;
      attend(block, rows, run, one.partials.data());
      const bool is_coded = run.part == kCoded;
      for (int r = 0; r < n; r++) {
        add(one.partials[r], is_rotated(run.part) ? value_dim() : state.value_dim, states.partials[is_coded ? r : n + r]);
      }
    }
    join(block, totals, states);
  });
}

void Task::run() {
  for (Packed* x : {&key_codes, &key_norms, &value_codes, &value_params}) x->make_rows_contiguous();
  for (auto* x : {&means, &signs, &residual_norms, &first_keys, &first_values, &tail_keys, &tail_values}) {
    if (*x) (*x)->make_rows_contiguous();
  }
  if (batch() == 0 || n_q_heads() == 0 || n_queries() == 0) return;
  n_queries() <= kMaxDecodeQueries ? decode() : prefill();
}

}  // namespace

void TurboQuantAttention::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  const AttentionInputs in = named(inputs);
  const bool decodes = in.q.shape(2) <= kMaxDecodeQueries;
  auto encoder =
      cpu::prepare(decodes ? "turboquant_attention of a step" : "turboquant_attention of a prompt", stream(), inputs, {out});
  auto optional = [](const mx::array* x) { return x ? std::optional<Packed>(*x) : std::nullopt; };
  auto broadcast = [](const mx::array* x) {
    std::optional<Packed> packed;
    if (!x) return packed;
    packed.emplace(*x);
    for (int axis = 0; axis < 4; axis++) {
      if (packed->view.shape[axis] == 1) packed->view.strides[axis] = 0;
    }
    return packed;
  };
  auto task = std::make_shared<Task>(Task{.state = state_,
                                          .q = in.q,
                                          .key_codes = in.key_codes,
                                          .key_norms = in.key_norms,
                                          .value_codes = in.value_codes,
                                          .value_params = in.value_params,
                                          .means = optional(in.means),
                                          .balance = optional(in.balance),
                                          .signs = optional(in.signs),
                                          .residual_norms = optional(in.residual_norms),
                                          .first_keys = optional(in.first_keys),
                                          .first_values = optional(in.first_values),
                                          .tail_keys = optional(in.tail_keys),
                                          .tail_values = optional(in.tail_values),
                                          .mask = broadcast(in.mask),
                                          .sinks = optional(in.sinks),
                                          .left_padding = optional(in.left_padding),
                                          .lengths = optional(in.lengths),
                                          .indices = broadcast(in.indices),
                                          .out = out.data<void>(),
                                          .type = in.q.dtype()});
  encoder.dispatch([task] { task->run(); });
}

}  // namespace tqext
