// TQEXT_LOG=1: one line on stderr for every kernel that runs, for bug reports.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "mlx/array.h"

namespace tqext {

namespace mx = mlx::core;

// Decided at the first call. Throws unless TQEXT_LOG is 0, 1 or empty; the operators' checks call it (check_environment).
bool logs_kernels();

// The time from here to the destructor, which prints the line. Costs a look at a flag where nothing is logged.
class KernelLog {
 public:
  // verb: what was done in the time, such as "ran".
  // what: called for the kernel's name and what it reads, if it is logged.
  template <class What>
  KernelLog(const char* verb, const What& what) : verb_(verb) {
    if (!logs_kernels()) return;
    text_ = what();
    start_ = std::chrono::steady_clock::now();
  }
  ~KernelLog();
  KernelLog(const KernelLog&) = delete;
  KernelLog& operator=(const KernelLog&) = delete;

 private:
  const char* verb_;
  std::string text_;  // empty: not logged
  std::chrono::steady_clock::time_point start_;
};

// "float16 [1, 8, 1, 128], uint32 [1, 2, 4096, 12]".
std::string shapes_of(const std::vector<mx::array>& arrays);

// "4 x 8 x 1 of 128 threads".
std::string grid_of(unsigned x, unsigned y, unsigned z, unsigned threads);

}  // namespace tqext
