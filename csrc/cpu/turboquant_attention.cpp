// eval_cpu: rotates the query rows once, shares (sequence, KV head, token range) items over the threads, joins the softmax
// states, rotates the result back. Each KV head's bytes are read once for all of its query heads.
#include "turboquant_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "attention_kernels.h"
#include "codec.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "parallel.h"
#include "rows.h"
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

struct Task {
  TurboQuantAttention::State state;
  Packed q, key_codes, key_norms, value_codes, value_params;
  std::optional<Packed> mean, signs, residual_norms, first_keys, first_values, tail_keys, tail_values, mask, sinks, left_padding,
      lengths;
  void* out;
  mx::Dtype type;

  void run();

 private:
  // [begin, end) of the valid tokens of one part of a sequence.
  struct Range {
    int begin, end;
  };
  struct Sequence {
    Range first, coded, tail, own;  // own: the queries' own keys in the tail, when lengths set them apart
  };
  // A run of tokens of one part, for one KV head.
  struct Item {
    int head;  // over (sequence, KV head)
    int part;  // 0 first, 1 coded, 2 tail
    int begin, end;
    int slot;  // index of its partial results within the head
  };

  int batch() const { return q.view.shape[0]; }
  int n_q_heads() const { return q.view.shape[1]; }
  int n_queries() const { return q.view.shape[2]; }
  int n_kv_heads() const { return key_codes.view.shape[1]; }
  int n_first() const { return first_keys ? first_keys->view.shape[2] : 0; }
  int n_coded() const { return key_codes.view.shape[2]; }
  int n_tail() const { return tail_keys ? tail_keys->view.shape[2] : 0; }
  int n_keys() const { return n_first() + n_coded() + n_tail(); }
  int n_rows() const { return n_q_heads() / n_kv_heads() * n_queries(); }  // of a KV head
  bool own_tokens() const { return lengths && state.causal; }

  Sequence sequence(int b) const;
  std::vector<const float*> mask_rows(int b, int h, std::vector<std::vector<float>>& store) const;
};

Task::Sequence Task::sequence(int b) const {
  const int padding = left_padding ? left_padding->head<int32_t>(0, 0)[b * left_padding->view.strides[0]] : 0;
  const int sizes[3] = {n_first(), n_coded(), n_tail()};
  const int n_own = own_tokens() ? n_queries() : 0;
  Range ranges[3];
  for (int part = 0, start = 0; part < 3; start += sizes[part++]) {
    const int stored = sizes[part] - (part == 2 ? n_own : 0);
    int end = stored;
    if (lengths) {
      const auto& v = lengths->view;
      end = std::clamp(int(static_cast<const int32_t*>(v.data)[b * v.strides[0] + part * v.strides[1]]), 0, stored);
    }
    ranges[part] = {std::clamp(padding - start, 0, end), end};
  }
  const int own_begin = std::max(n_tail() - n_own, std::min(padding - n_first() - n_coded(), n_tail()));
  return {ranges[0], ranges[1], ranges[2], {own_begin, n_own ? n_tail() : own_begin}};
}

// Additive masks in base 2 of the rows of KV head h of sequence b, over all columns; empty without a mask.
std::vector<const float*> Task::mask_rows(int b, int h, std::vector<std::vector<float>>& store) const {
  if (!mask) return {};
  const View& m = mask->view;
  const int n_repeats = n_q_heads() / n_kv_heads();
  std::vector<const float*> rows;
  store.reserve(n_rows());
  ptrdiff_t previous_start = -1;
  for (int r = 0; r < n_rows(); r++) {
    const ptrdiff_t start = b * m.strides[0] + (h * n_repeats + r / n_queries()) * m.strides[1] + r % n_queries() * m.strides[2];
    if (start != previous_start) {
      std::vector<float> row(n_keys());
      for (int c = 0; c < n_keys(); c++) {
        const ptrdiff_t i = start + c * m.strides[3];
        row[c] = m.type == mx::bool_ ? (static_cast<const bool*>(m.data)[i] ? 0.0f : kNegInf)
                                     : static_cast<const float*>(m.data)[i] * kLog2e;
      }
      store.push_back(std::move(row));
      previous_start = start;
    }
    rows.push_back(store.back().data());
  }
  return rows;
}

// Rows of one KV head in the forms that the kernels take.
struct HeadRows {
  std::vector<float> exact, coded, residual, offset;  // exact: unrotated; coded: rotated
  std::vector<std::vector<float>> mask_store;
  std::vector<const float*> bias[3];  // per part, at the part's first column
  std::vector<int> end[3];
  std::vector<int> own_end;
};

void Task::run() {
  for (Packed* x : {&key_codes, &key_norms, &value_codes, &value_params}) x->make_rows_contiguous();
  for (auto* x : {&signs, &residual_norms, &first_keys, &first_values, &tail_keys, &tail_values}) {
    if (*x) (*x)->make_rows_contiguous();
  }
  const int n_heads = batch() * n_kv_heads(), rows = n_rows();
  const int dim = state.hadamard ? padded_dim(state.head_dim) : state.head_dim;
  const int value_dim = state.hadamard ? padded_dim(state.value_dim) : state.value_dim;
  const int repeats = n_q_heads() / n_kv_heads();
  if (n_heads == 0 || rows == 0) return;

  cpu::CodecShape shape{dim, value_dim, state.key_bits, state.value_bits, {}, type != mx::float32};
  const Codebook book = codebook(state.key_bits, dim);
  std::copy_n(book.levels, kMaxKeyLevels, shape.codebook);
  const cpu::AttentionKernels& kernels = cpu::attention_kernels();

  // Enough items for every thread to share the work evenly, long enough that their overhead does not show.
  constexpr int kMinTokens = 1024;
  const int items_wanted = 4 * cpu::num_threads();
  const int ranges_wanted = std::max(1, items_wanted / n_heads);
  std::vector<Item> items;
  std::vector<int> n_slots(n_heads, 0);
  std::vector<Sequence> sequences;
  for (int b = 0; b < batch(); b++) sequences.push_back(sequence(b));
  for (int head = 0; head < n_heads; head++) {
    const Sequence& s = sequences[head / n_kv_heads()];
    auto add = [&](int part, Range range) {
      if (range.begin < range.end) items.push_back({head, part, range.begin, range.end, n_slots[head]++});
    };
    const int length = s.coded.end - s.coded.begin;
    const int step = (std::max(kMinTokens, (length + ranges_wanted - 1) / ranges_wanted) + 127) / 128 * 128;
    for (int t = s.coded.begin; t < s.coded.end; t += step) add(1, {t, std::min(t + step, s.coded.end)});
    add(0, s.first);
    add(2, s.tail);
    add(2, s.own);
  }
  // The longest first, so that no thread is left with one at the end.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return (a.part == 1) > (b.part == 1); });

  std::vector<HeadRows> heads(n_heads);
  cpu::parallel_for(n_heads, [&](int head) {
    const int b = head / n_kv_heads(), h = head % n_kv_heads();
    HeadRows& x = heads[head];
    x.exact.assign(size_t(rows) * state.head_dim, 0.0f);
    x.coded.assign(size_t(rows) * dim, 0.0f);
    if (mean) x.offset.assign(rows, 0.0f);
    if (signs) x.residual.assign(size_t(rows) * dim, 0.0f);
    for (int r = 0; r < rows; r++) {
      const size_t row = (size_t(b) * n_q_heads() + h * repeats + r / n_queries()) * n_queries() + r % n_queries();
      float* exact = &x.exact[size_t(r) * state.head_dim];
      float* coded = &x.coded[size_t(r) * dim];
      q.view.load(row, state.head_dim, exact);
      for (int d = 0; d < state.head_dim; d++) exact[d] *= state.scale * kLog2e;
      std::copy_n(exact, state.head_dim, coded);
      if (state.hadamard) cpu::rotate_row(coded, dim, TQ_ROTATION_SEED, false);
      if (mean) {
        const float* m = mean->head<float>(b, h);
        for (int d = 0; d < state.head_dim; d++) x.offset[r] += exact[d] * m[d * mean->view.strides[2]];
      }
      if (signs) {
        float* residual = &x.residual[size_t(r) * dim];
        std::copy_n(coded, dim, residual);
        cpu::rotate_row(residual, dim, TQ_RESIDUAL_SEED, false);
        for (int d = 0; d < dim; d++) residual[d] *= std::sqrt(float(M_PI / 2) / dim);
      }
    }
    const std::vector<const float*> mask = mask_rows(b, h, x.mask_store);
    const int starts[3] = {0, n_first(), n_first() + n_coded()};
    const int sizes[3] = {n_first(), n_coded(), n_tail()};
    for (int part = 0; part < 3; part++) {
      for (const float* row : mask) x.bias[part].push_back(row + starts[part]);
      for (int r = 0; r < rows; r++) {
        const bool causal = state.causal && !own_tokens();
        const int last = n_keys() - n_queries() + r % n_queries();
        x.end[part].push_back(causal ? std::clamp(last + 1 - starts[part], 0, sizes[part]) : sizes[part]);
      }
    }
    for (int r = 0; r < rows; r++) x.own_end.push_back(n_tail() - n_queries() + r % n_queries() + 1);
  });

  std::vector<std::vector<float>> outs(n_heads);
  std::vector<std::vector<cpu::Partial>> partials(n_heads);
  for (int head = 0; head < n_heads; head++) {
    outs[head].resize(size_t(n_slots[head]) * rows * value_dim);
    partials[head].resize(size_t(n_slots[head]) * rows);
    for (size_t i = 0; i < partials[head].size(); i++) partials[head][i].out = &outs[head][i * value_dim];
  }

  cpu::parallel_for(int(items.size()), [&](int i) {
    const Item& item = items[i];
    const int b = item.head / n_kv_heads(), h = item.head % n_kv_heads();
    const HeadRows& x = heads[item.head];
    cpu::Partial* partial = &partials[item.head][size_t(item.slot) * rows];
    cpu::QueryRows query{rows, nullptr, nullptr, nullptr, x.end[item.part].data(), mask ? x.bias[item.part].data() : nullptr};
    if (item.part == 1) {
      query.q = x.coded.data();
      query.residual_q = signs ? x.residual.data() : nullptr;
      query.offset = mean ? x.offset.data() : nullptr;
      const cpu::CodedHead coded{key_codes.head<uint32_t>(b, h),
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
      kernels.attend_coded(coded, shape, query, item.begin, item.end, partial);
    } else {
      const Packed& keys = item.part == 0 ? *first_keys : *tail_keys;
      const Packed& values = item.part == 0 ? *first_values : *tail_values;
      query.q = x.exact.data();
      if (own_tokens() && item.part == 2 && item.begin >= n_tail() - n_queries()) query.end = x.own_end.data();
      const auto exact_type = type == mx::float32   ? cpu::ExactType::kFloat32
                              : type == mx::float16 ? cpu::ExactType::kFloat16
                                                    : cpu::ExactType::kBFloat16;
      // The type decides the size of an element; head() counts in elements.
      const bool wide = type == mx::float32;
      const void* k = wide ? static_cast<const void*>(keys.head<float>(b, h)) : keys.head<uint16_t>(b, h);
      const void* v = wide ? static_cast<const void*>(values.head<float>(b, h)) : values.head<uint16_t>(b, h);
      const cpu::ExactHead exact{k, v, exact_type, state.head_dim, state.value_dim, keys.token_stride(), values.token_stride()};
      kernels.attend_exact(exact, query, item.begin, item.end, partial);
    }
  });

  // Join the states of each row.
  std::vector<std::vector<const Item*>> head_items(n_heads);
  for (const Item& item : items) head_items[item.head].push_back(&item);
  cpu::parallel_for(n_heads, [&](int head) {
    const int b = head / n_kv_heads(), h = head % n_kv_heads();
    float coded[kMaxDim], exact[kMaxDim];
    for (int r = 0; r < rows; r++) {
      const int q_head = h * repeats + r / n_queries();
      float max = kNegInf, sink = kNegInf;
      if (sinks) {
        const View& v = sinks->view;
        sink = static_cast<const float*>(v.data)[q_head * v.strides[0]] * kLog2e;
        max = sink;
      }
      for (const Item* item : head_items[head]) max = std::max(max, partials[head][size_t(item->slot) * rows + r].max);
      float sum = sink == kNegInf ? 0.0f : std::exp2(sink - max);
      std::fill_n(coded, value_dim, 0.0f);
      std::fill_n(exact, state.value_dim, 0.0f);
      for (const Item* item : head_items[head]) {
        const cpu::Partial& p = partials[head][size_t(item->slot) * rows + r];
        const float weight = rescale(p.max, max);
        float* to = item->part == 1 ? coded : exact;
        sum += weight * p.sum;
        for (int d = 0; d < (item->part == 1 ? value_dim : state.value_dim); d++) to[d] += weight * p.out[d];
      }
      if (state.hadamard) cpu::rotate_row(coded, value_dim, TQ_ROTATION_SEED, true);
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      for (int d = 0; d < state.value_dim; d++) exact[d] = (exact[d] + coded[d]) * inverse;
      const size_t row = (size_t(b) * n_q_heads() + q_head) * n_queries() + r % n_queries();
      cpu::store_row(exact, state.value_dim, out, type, row * state.value_dim);
    }
  });
}

}  // namespace

void TurboQuantAttention::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& x : inputs) encoder.set_input_array(x);
  encoder.set_output_array(out);
  auto get = [&](OptionalInput which) -> std::optional<Packed> {
    const mx::array* x = optional(inputs, which);
    return x ? std::optional<Packed>(*x) : std::nullopt;
  };
  auto task = std::make_shared<Task>(Task{state_,
                                          inputs[0],
                                          inputs[1],
                                          inputs[2],
                                          inputs[3],
                                          inputs[4],
                                          get(kMean),
                                          get(kSigns),
                                          get(kResidualNorms),
                                          get(kFirstKeys),
                                          get(kFirstValues),
                                          get(kTailKeys),
                                          get(kTailValues),
                                          get(kMask),
                                          get(kSinks),
                                          get(kLeftPadding),
                                          get(kLengths),
                                          out.data<void>(),
                                          out.dtype()});
  encoder.dispatch([task] { task->run(); });
}

}  // namespace tqext
