// Working memory of a kernel call.
#pragma once

#include <cstddef>

// What finds a kernel's step out of an array: the address sanitizer; without it, in builds that keep their assertions, guards.
#if defined(__SANITIZE_ADDRESS__)
#define TQ_REDZONES
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TQ_REDZONES
#endif
#endif
#if defined(TQ_REDZONES)
#include <sanitizer/asan_interface.h>
#elif !defined(NDEBUG)
#define TQ_GUARDS
#endif

namespace tqext::cpu {

// At least n bytes, aligned to 64, of this thread alone; valid until its next call. Kept between calls: a decoding step
// takes some 100 KB per head. In a file of its own, compiled for the baseline.
void* scratch(size_t n);

#if defined(TQ_GUARDS)
// Nobody may write into the n bytes behind an array of `size` bytes in this thread's scratch memory.
void guard(void* behind, size_t n, size_t size);
// Ends the process with a sentence if somebody did, since this thread's last call of scratch.
void check_guards();
// Ends the process with a sentence: arrays of `wanted` bytes were placed in memory of `size` bytes.
[[noreturn]] void fail_placement(size_t wanted, size_t size);
#endif

}  // namespace tqext::cpu
