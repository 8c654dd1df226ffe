// A kernel call's working memory, cut into arrays. Included inside the target pragma of each instruction set: internal linkage
// only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scratch.h"

namespace tqext::cpu {
namespace {

// Base of what owns arrays: in builds with guards its end is where they are checked.
struct OwnsArrays {
#if defined(TQ_GUARDS)
  OwnsArrays() = default;
  OwnsArrays(const OwnsArrays&) = delete;
  ~OwnsArrays() { check_guards(); }
#endif
};

// Arrays that begin with a cache line. The owner's place(Arrays&) takes them all; it runs twice, once to find the size, so that
// the size is that of what is taken. A step from one array into the next is found by the address sanitizer, and a write without
// it in builds that keep their assertions (NDEBUG not defined).
class Arrays {
 public:
  template <class Owner>
  static void place(Owner& owner) {
    static_assert(__is_base_of(OwnsArrays, Owner));
    Arrays arrays;
    owner.place(arrays);
    arrays.memory_ = static_cast<char*>(scratch(arrays.size_));
#if defined(TQ_GUARDS)
    arrays.end_ = arrays.size_;
#endif
    arrays.size_ = 0;
    owner.place(arrays);
  }

  template <class T>
  T* take(size_t n) {
    const size_t start = size_, end = start + n * sizeof(T);
    size_ = (end + kGap + 63) / 64 * 64;
    if (!memory_) return nullptr;  // only the size is wanted
#if defined(TQ_REDZONES)
    ASAN_POISON_MEMORY_REGION(memory_ + end, size_ - end);
#elif defined(TQ_GUARDS)
    if (size_ > end_) fail_placement(size_, end_);
    guard(memory_ + end, size_ - end, end - start);
#endif
    return reinterpret_cast<T*>(memory_ + start);
  }

 private:
#if defined(TQ_REDZONES) || defined(TQ_GUARDS)
  static constexpr size_t kGap = 64;  // at least, after each array
#else
  static constexpr size_t kGap = 0;
#endif
#if defined(TQ_GUARDS)
  size_t end_ = 0;
#endif
  char* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
}  // namespace tqext::cpu
