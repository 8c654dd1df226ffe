// Work shared by a pool of threads.
#pragma once

#include <functional>

#include "core_api.h"

namespace tqext::cpu {

// Threads that take part, the caller included: TQEXT_NUM_THREADS, or the number of processors this process may run on.
TQ_CORE int num_threads();

// Calls task(i) once for every i in [0, n), on the caller and the pool; returns when all are done. Throws what a task throws
// (the first one, if several do) when no task runs any more; tasks not begun by then are left out.
// May be called from several threads at once.
TQ_CORE void parallel_for(int n, const std::function<void(int)>& task);

}  // namespace tqext::cpu
