// Working memory of a kernel call.
#pragma once

#include <cstddef>

namespace tqext::cpu {

// At least n bytes, aligned to 64, of this thread alone; valid until its next call. Kept between calls: a decoding step
// takes some 100 KB per head. In a file of its own, compiled for the baseline.
void* scratch(size_t n);

}  // namespace tqext::cpu
