#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(TQ_GUARDS)
#include <cstdio>
#include <cstring>
#include <vector>
#endif

namespace tqext::cpu {

#if defined(TQ_GUARDS)
namespace {

constexpr unsigned char kUntouched = 0xd5;  // as a float of four such bytes -2.9e13: no sum or score is that

struct Guard {
  const unsigned char* begin;
  size_t n, size;  // of the guard; of the array before it
};
thread_local std::vector<Guard> guards;

}  // namespace

void guard(void* behind, size_t n, size_t size) {
  std::memset(behind, kUntouched, n);
  guards.push_back({static_cast<const unsigned char*>(behind), n, size});
}

void check_guards() {
  for (size_t array = 0; array < guards.size(); array++) {
    const Guard& g = guards[array];
    for (size_t i = 0; i < g.n; i++) {
      if (g.begin[i] == kUntouched) continue;
      std::fprintf(stderr,
                   "[tqext] array %zu of a kernel's working memory: expected writes to its %zu bytes, got one to byte %zu\n",
                   array, g.size, g.size + i);
      std::abort();  // what else it has written to is not known
    }
  }
}

void fail_placement(size_t wanted, size_t size) {
  std::fprintf(stderr, "[tqext] arrays of a kernel's working memory: expected at most %zu bytes, got %zu\n", size, wanted);
  std::abort();
}
#endif

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
#elif defined(TQ_GUARDS)
  guards.clear();
#endif
  return memory.get();
}

}  // namespace tqext::cpu
