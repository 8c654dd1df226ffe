#include "word_sum.h"

namespace tqext {

SumRows::SumRows(const mx::array& x)
    : n_rows(x.ndim() == 4 ? int64_t(x.shape(0)) * x.shape(1) : x.shape(0)),
      heads(x.ndim() == 4 ? x.shape(1) : x.shape(0)),
      tokens(x.ndim() == 4 ? x.shape(2) : 1),
      columns(x.shape(-1)),
      stride{} {
  for (int axis = 0; axis < int(x.ndim()); axis++) stride[x.ndim() == 4 ? axis : 2 * axis + 1] = x.strides(axis);
  const int64_t elements = int64_t(tokens) * columns;
  kind = x.itemsize() == 4 ? kWords : elements % 2 == 0 ? kPairs : kHalves;
  n_words = kind == kPairs ? elements / 2 : elements;
}

std::optional<mx::array> word_sum(const std::vector<mx::array>& arrays, const std::vector<int>& begin, int first,
                                  uint32_t constant, const std::optional<mx::array>& previous,
                                  const std::vector<int32_t>& numbers, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  if (stream.device == mx::Device::gpu && !gpu_sums_words()) return std::nullopt;
  WordSum::State state{
      .starts = {}, .places = {}, .constant = constant, .has_previous = previous.has_value(), .numbers = numbers};
  std::vector<mx::array> inputs;
  for (size_t i = 0; i < arrays.size(); i++) {
    const mx::array& x = arrays[i];
    if ((x.ndim() != 4 && x.ndim() != 2) || (x.itemsize() != 4 && x.itemsize() != 2)) return std::nullopt;
    if (x.size() == 0) continue;
    const SumRows rows(x);
    state.starts.push_back(begin.empty() ? 0 : uint32_t(int64_t(begin.at(i)) * rows.n_words / x.shape(2)));
    state.places.push_back(uint32_t(first) + uint32_t(i));
    inputs.push_back(x);
  }
  if (previous) inputs.push_back(*previous);
  return mx::array({int(numbers.size()) + 1}, numbers.empty() ? mx::uint32 : mx::int32,
                   std::make_shared<WordSum>(stream, std::move(state)), std::move(inputs));
}

}  // namespace tqext
