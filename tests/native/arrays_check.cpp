// What becomes of a kernel that steps out of its arrays. Argument: how it does it.
#include "cpu/arrays.h"

#include <cstdio>
#include <cstring>
#include <string>

using namespace tqext::cpu;

namespace {

struct Kernel : OwnsArrays {
  explicit Kernel(bool grows) : grows(grows) { Arrays::place(*this); }
  void place(Arrays& arrays) {
    first = arrays.take<float>(grows && times > 0 ? 1000 : 5);
    second = arrays.take<char>(100);
    empty = arrays.take<float>(0);
    last = arrays.take<short>(32);  // ends with a cache line
    times++;
  }

  bool grows;
  int times = 0;
  float *first = nullptr, *empty = nullptr;
  char* second = nullptr;
  short* last = nullptr;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc > 1 ? argv[1] : "none";
  for (int call = 0; call < 3; call++) {
    Kernel kernel(fault == "grows");
    for (int i = 0; i < 5; i++) kernel.first[i] = float(i);
    std::memset(kernel.second, call, 100);
    std::memset(kernel.last, call, 64);
    if (fault == "first") kernel.first[5] = 0;
    if (fault == "second") kernel.second[100] = 1;
    if (fault == "far") kernel.second[150] = 1;
    if (fault == "empty") kernel.empty[0] = 1;
    if (fault == "last") kernel.last[32] = 1;
  }
  std::puts("done");
}
