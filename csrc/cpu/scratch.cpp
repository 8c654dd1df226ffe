#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace tqext::cpu {

void* scratch(size_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (n > size) {
    size = (n + 4095) / 4096 * 4096;
    memory.reset();
    memory.reset(std::aligned_alloc(64, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
#if defined(TQ_REDZONES)
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), size);  // the last owner's gaps between arrays
#endif
  return memory.get();
}

}  // namespace tqext::cpu
