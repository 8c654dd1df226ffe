#include "word_sum.h"

#include <atomic>

#include "eval.h"

namespace tqext {

namespace {

uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * kSumFirst;
  x = (x ^ (x >> 13)) * kSumSecond;
  return x ^ (x >> 16);
}

// Words of a row that a task takes.
constexpr int64_t kTaskWords = 1 << 14;

uint32_t sum_words(const void* data, const SumRows& rows, int64_t row, int64_t begin, int64_t end, uint32_t start,
                   uint32_t place) {
  const int64_t at = row / rows.heads * rows.stride[0] + row % rows.heads * rows.stride[1];
  const uint32_t key = uint32_t(row) * kSumRow + start * kSumWord + place * kSumArray;
  uint32_t sum = 0;
  if (rows.stride[3] == 1 && (rows.tokens == 1 || rows.stride[2] == rows.columns) && rows.kind != SumRows::kHalves) {
    const char* words = static_cast<const char*>(data) + at * (rows.kind == SumRows::kWords ? 4 : 2);
    for (int64_t w = begin; w < end; w++) {
      uint32_t word;
      __builtin_memcpy(&word, words + 4 * w, 4);
      sum += mixed(word ^ (key + uint32_t(w) * kSumWord));
    }
    return sum;
  }
  auto element = [&](int64_t e) {
    const int64_t i = at + e / rows.columns * rows.stride[2] + e % rows.columns * rows.stride[3];
    return rows.kind == SumRows::kWords ? static_cast<const uint32_t*>(data)[i]
                                        : uint32_t(static_cast<const uint16_t*>(data)[i]);
  };
  for (int64_t w = begin; w < end; w++) {
    const uint32_t word = rows.kind == SumRows::kPairs ? element(2 * w) | element(2 * w + 1) << 16 : element(w);
    sum += mixed(word ^ (key + uint32_t(w) * kSumWord));
  }
  return sum;
}

}  // namespace

void WordSum::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  auto encoder = cpu::prepare("word_sum", stream(), inputs, {out});
  struct Part {
    const void* data;
    SumRows rows;
    uint32_t start, place;
  };
  std::vector<Part> parts;
  parts.reserve(state_.places.size());
  for (size_t i = 0; i < state_.places.size(); i++) {
    parts.push_back({inputs[i].data<void>(), SumRows(inputs[i]), state_.starts[i], state_.places[i]});
  }
  encoder.dispatch([parts = std::move(parts), constant = state_.constant,
                    previous = state_.has_previous ? inputs.back().data<uint32_t>() : nullptr, numbers = state_.numbers,
                    to = out.data<uint32_t>()] {
    std::atomic<uint32_t> total{constant + (previous ? *previous : 0)};
    for (const Part& part : parts) {
      const int64_t tasks = (part.rows.n_words + kTaskWords - 1) / kTaskWords;
      cpu::parallel_for(int(part.rows.n_rows * tasks), [&](int task) {
        const int64_t begin = task % tasks * kTaskWords, end = std::min(begin + kTaskWords, part.rows.n_words);
        total += sum_words(part.data, part.rows, task / tasks, begin, end, part.start, part.place);
      });
    }
    std::copy(numbers.begin(), numbers.end(), to);
    to[numbers.size()] = total;
  });
}

}  // namespace tqext
