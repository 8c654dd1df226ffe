#include "history.h"

#include "check_arrays.h"
#include "mlx/ops.h"

namespace tqext {

namespace {

bool fits(const mx::array& buffer, const mx::array& token, int at) {
  if (buffer.ndim() != 4 || token.ndim() != 4 || token.dtype() != buffer.dtype()) return false;
  // A buffer of one column would become the token itself, and keep what that was cut from.
  return token.shape(2) == 1 && buffer.shape(2) > 1 && at >= 0 && at < buffer.shape(2) && token.shape(0) == buffer.shape(0) &&
         token.shape(1) == buffer.shape(1) && token.shape(3) == buffer.shape(3);
}

mx::array until(const mx::array& buffer, int end) {
  return mx::slice(buffer, {0, 0, 0, 0}, {buffer.shape(0), buffer.shape(1), end, buffer.shape(3)});
}

}  // namespace

AttentionOptions with_mask(AttentionOptions options, const MaskArgument& mask) {
  if (auto* mode = std::get_if<std::string>(&mask)) {
    // Inside, an empty name stands for None.
    check(!mode->empty(), "[turboquant_attention] mask: expected None, \"causal\" or an array, got \"\"");
    options.mask_mode = *mode;
  }
  if (auto* array = std::get_if<mx::array>(&mask)) options.mask = *array;
  return options;
}

mx::array History::attend(const mx::array& q, const mx::array& tail_keys, const mx::array& tail_values, float scale,
                          const MaskArgument& mask, const std::optional<mx::array>& sinks,
                          const std::optional<mx::array>& lengths, const std::optional<mx::array>& left_padding,
                          bool lse) const {
  const AttentionOptions options{.scale = scale,
                                 .mask_mode = "",
                                 .mask = {},
                                 .sinks = sinks,
                                 .left_padding = left_padding,
                                 .lengths = lengths,
                                 .indices = {},
                                 .first = first_,
                                 .tail = ExactTokens(tail_keys, tail_values),
                                 .latent = latent_,
                                 .lse = lse,
                                 .of_cache = true};
  return turboquant_attention(q, keys_, values_, with_mask(options, mask), {});
}

std::optional<ExactTokens> append_token(mx::array& tail_keys, mx::array& tail_values, const mx::array& keys,
                                        const mx::array& values, int at) {
  if (!fits(tail_keys, keys, at) || !fits(tail_values, values, at) || keys.shape(0) != values.shape(0)) return std::nullopt;
  auto write = [&](mx::array& buffer, const mx::array& token) {
    const mx::Shape begin{0, 0, at, 0}, end{buffer.shape(0), buffer.shape(1), at + 1, buffer.shape(3)};
    buffer.overwrite_descriptor(mx::slice_update(buffer, token, begin, end));
    return until(buffer, at + 1);
  };
  mx::array written_keys = write(tail_keys, keys);
  return ExactTokens{written_keys, write(tail_values, values)};
}

std::optional<ExactTokens> append_tokens(mx::array& tail_keys, mx::array& tail_values, const mx::array& keys,
                                         const mx::array& values, const mx::array& at, int most) {
  if (!fits(tail_keys, keys, most) || !fits(tail_values, values, most)) return std::nullopt;
  auto write = [&](mx::array& buffer, const mx::array& token) {
    buffer.overwrite_descriptor(mx::put_along_axis(buffer, mx::broadcast_to(at, token.shape()), token, 2));
    return until(buffer, most + 1);
  };
  mx::array written_keys = write(tail_keys, keys);
  return ExactTokens{written_keys, write(tail_values, values)};
}

}  // namespace tqext
