// A kernel call's working memory, cut into arrays. Included inside the target pragma of each instruction set: internal linkage
// only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scratch.h"

namespace tqext::cpu {
namespace {

// Arrays that begin with a cache line. The owner's place(Arrays&) takes them all; it runs twice, once to find the size, so that
// the size is that of what is taken. The address sanitizer finds a step from one array into the next.
class Arrays {
 public:
  template <class Owner>
  static void place(Owner& owner) {
    Arrays arrays;
    owner.place(arrays);
    arrays.memory_ = static_cast<char*>(scratch(arrays.size_));
    arrays.size_ = 0;
    owner.place(arrays);
  }

  template <class T>
  T* take(size_t n) {
    const size_t start = size_, end = start + n * sizeof(T);
    size_ = (end + kRedzone + 63) / 64 * 64;
    if (!memory_) return nullptr;  // only the size is wanted
#if defined(TQ_REDZONES)
    ASAN_POISON_MEMORY_REGION(memory_ + end, size_ - end);
#endif
    return reinterpret_cast<T*>(memory_ + start);
  }

 private:
#if defined(TQ_REDZONES)
  static constexpr size_t kRedzone = 64;
#else
  static constexpr size_t kRedzone = 0;
#endif
  char* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
}  // namespace tqext::cpu
