// Working memory of a kernel call.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TQ_REDZONES
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TQ_REDZONES
#endif
#endif
#if defined(TQ_REDZONES)
#include <sanitizer/asan_interface.h>
#endif

namespace tqext::cpu {

// At least n bytes, aligned to 64, of this thread alone; valid until its next call. Kept between calls: a decoding step
// takes some 100 KB per head. In a file of its own, compiled for the baseline.
void* scratch(size_t n);

}  // namespace tqext::cpu
