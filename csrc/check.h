// One form of error message: "[op] argument: expected X, got Y". Becomes ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace tqext {

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace tqext
