// The coded tokens that a list of ids names: copied together, so that the kernels read them as any other run of tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention_kernels.h"

namespace tqext::cpu {

// Rows ids[0 ... n) of an array, one after the other: row i is `width` elements from from + i * stride on.
template <class T>
void gather_rows(const T* from, ptrdiff_t stride, int width, const int* ids, int n, std::vector<T>& to) {
  constexpr int kAhead = 8, kLine = 64 / sizeof(T);  // rows far apart are not in a cache, and nothing tells the next ones
  to.resize(size_t(n) * width);
  for (int i = 0; i < n; i++) {
    for (int d = 0; i + kAhead < n && d < width; d += kLine) __builtin_prefetch(from + ids[i + kAhead] * stride + d);
    const T* row = from + ids[i] * stride;
    T* out = &to[size_t(i) * width];
    for (int d = 0; d < width; d++) out[d] = row[d];
  }
}

class ListedTokens {
 public:
  // Copies tokens ids[0 ... n) of the head; valid until the next call.
  CodedHead gather(const CodedHead& head, const CodecShape& shape, const int* ids, int n) {
    const int key_width = code_words(shape.key_dim, shape.key_bits), sign_width = sign_words(shape.key_dim);
    const int value_width = code_words(shape.value_dim, shape.value_bits);
    const int n_params = value_params(shape.value_dim, shape.value_coding);
    gather_rows(head.key_codes, head.key_stride, key_width, ids, n, key_codes_);
    gather_rows(head.key_norms, head.norm_stride, 1, ids, n, key_norms_);
    if (head.key_signs) {
      gather_rows(head.key_signs, head.sign_stride, sign_width, ids, n, key_signs_);
      gather_rows(head.residual_norms, head.residual_stride, 1, ids, n, residual_norms_);
    }
    gather_rows(head.value_codes, head.value_stride, value_width, ids, n, value_codes_);
    gather_rows(head.value_params, head.param_stride, n_params, ids, n, value_params_);
    return {key_codes_.data(),
            key_norms_.data(),
            head.key_signs ? key_signs_.data() : nullptr,
            head.key_signs ? residual_norms_.data() : nullptr,
            value_codes_.data(),
            value_params_.data(),
            key_width,
            1,
            sign_width,
            1,
            value_width,
            n_params};
  }

  // Adds to bias [n_rows][n] what the means of the tokens' blocks add to the scores of rows q [n_rows][means.dim].
  void add_means(ScoreMeans score, const float* q, int n_rows, const BlockMeans& means, const int* ids, int n, float* bias) {
    // Tokens near each other share a block: each block once, or again where two blocks share a place.
    constexpr int kPlaces = 1024;
    int known[kPlaces], column_of[kPlaces];
    std::fill_n(known, kPlaces, -1);
    columns_.resize(n);
    blocks_.clear();
    for (int i = 0; i < n; i++) {
      const int block = ids[i] / kBlockTokens, place = block % kPlaces;
      if (known[place] != block) {
        known[place] = block;
        column_of[place] = int(blocks_.size());
        blocks_.push_back(block);
      }
      columns_[i] = column_of[place];
    }
    const int n_columns = int(blocks_.size());
    BlockMeans gathered = means;
    gathered.stride = means.dim;
    if (means.half) {
      gather_rows(static_cast<const uint16_t*>(means.data), means.stride, means.dim, blocks_.data(), n_columns, half_means_);
      gathered.data = half_means_.data();
    } else {
      gather_rows(static_cast<const float*>(means.data), means.stride, means.dim, blocks_.data(), n_columns, means_);
      gathered.data = means_.data();
    }
    scores_.resize(size_t(n_rows) * n_columns);
    score(q, n_rows, gathered, 0, n_columns, scores_.data());
    for (int r = 0; r < n_rows; r++) {
      const float* of_row = &scores_[size_t(r) * n_columns];
      float* to = bias + ptrdiff_t(r) * n;
      // An infinite mean must not make a score minus infinity, which is that of a token that is not attended.
      for (int i = 0; i < n_columns; i++) scores_[size_t(r) * n_columns + i] += 0.0f * of_row[i];
      for (int i = 0; i < n; i++) to[i] += of_row[columns_[i]];
    }
  }

 private:
  std::vector<uint32_t> key_codes_, key_signs_, value_codes_;
  std::vector<uint16_t> key_norms_, residual_norms_, value_params_, half_means_;
  std::vector<float> means_, scores_;
  std::vector<int> columns_, blocks_;
};

}  // namespace tqext::cpu
