#include "log.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string_view>

#include "check.h"
#include "mlx/utils.h"

namespace tqext {

bool logs_kernels() {
  static const bool logs = [] {
    const char* given = std::getenv("TQEXT_LOG");
    const std::string_view value = given ? given : "";
    check(value.empty() || value == "0" || value == "1", "[tqext] TQEXT_LOG: expected 0 or 1, got ", value);
    return value == "1";
  }();
  return logs;
}

KernelLog::~KernelLog() {
  if (text_.empty()) return;
  const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start_;
  std::fprintf(stderr, "tqext: %s: %s in %.3f ms\n", text_.c_str(), verb_, time.count());
}

std::string shapes_of(const std::vector<mx::array>& arrays) {
  std::ostringstream text;
  for (size_t i = 0; i < arrays.size(); i++) {
    text << (i ? ", " : "") << arrays[i].dtype() << " [";
    for (size_t axis = 0; axis < arrays[i].ndim(); axis++) text << (axis ? ", " : "") << arrays[i].shape(int(axis));
    text << "]";
  }
  return text.str();
}

std::string grid_of(unsigned x, unsigned y, unsigned z, unsigned threads) {
  std::ostringstream text;
  text << x << " x " << y << " x " << z << " of " << threads << " threads";
  return text.str();
}

}  // namespace tqext
