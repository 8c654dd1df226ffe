#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "check.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace tqext::cpu {

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  const std::function<void(int)>* task;
  int n;
  std::atomic<int> next{0}, done{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first item that failed; read by the caller once all items are done

  // The caller's function is touched only while an item is open, so a late worker may outlive the call. A failed item is
  // done as well: the caller may leave only when no thread can touch its function any more.
  void work() noexcept {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          (*task)(i);
        } catch (...) {
          if (!failed.exchange(true, std::memory_order_relaxed)) error = std::current_exception();
        }
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

class Pool {
 public:
  explicit Pool(int n_workers) {
    try {
      for (int i = 0; i < n_workers; i++) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system has no more threads to give: those that there are share the work, with the caller.
    }
  }

  void run(int n, const std::function<void(int)>& task) {
    auto job = std::make_shared<Job>();
    job->task = &task;
    job->n = n;
    {
      std::lock_guard lock(mutex_);
      job_ = job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job->work();
    // What is left runs on workers now and ends soon.
    for (int spins = 0; job->done.load(std::memory_order_acquire) < n; spins++) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    {
      std::lock_guard lock(mutex_);
      if (job_ == job) job_ = nullptr;
    }
    if (job->error) std::rethrow_exception(std::move(job->error));
  }

 private:
  // About 20 us: a decoding step calls attention again and again, and waking a sleeping thread costs more than that.
  static constexpr int kSpins = 1000;

  void serve() {
    uint64_t seen = 0;
    while (true) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; spins++) pause();
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job) job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> generation_{0};
};

int count_threads() {
  if (const char* wanted = std::getenv("TQEXT_NUM_THREADS"); wanted && *wanted) {
    char* end = nullptr;
    const long n = std::strtol(wanted, &end, 10);
    check(*end == 0 && n >= 1 && n <= 1024, "[tqext] TQEXT_NUM_THREADS: expected a number from 1 to 1024, got ", wanted);
    return int(n);
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int num_threads() {
  static const int n = count_threads();
  return n;
}

void parallel_for(int n, const std::function<void(int)>& task) {
  if (n <= 1 || num_threads() == 1) {
    for (int i = 0; i < n; i++) task(i);
    return;
  }
  // Leaked: workers may still sleep in it when the process ends.
  static Pool* pool = new Pool(num_threads() - 1);
  pool->run(n, task);
}

}  // namespace tqext::cpu
