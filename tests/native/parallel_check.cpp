// Tasks that throw in csrc/cpu/parallel.cpp, from several callers at once. Exit status: the number of wrong outcomes.
// parallel_check ROUNDS; built with a sanitizer, it sees a task that is called after its caller has left.
// With NO_THREADS the system refuses every thread: the caller does all the work.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

#ifdef NO_THREADS
extern "C" int pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) { return EAGAIN; }
constexpr int kCallers = 1;
#else
constexpr int kCallers = 4;
#endif

namespace {

std::atomic<int> errors{0};

void expect(bool holds, const char* what, int n) {
  if (holds) return;
  errors++;
  std::fprintf(stderr, "wrong: %s (n = %d)\n", what, n);
}

void call(unsigned seed, int rounds) {
  std::mt19937 random(seed);
  for (int round = 0; round < rounds; round++) {
    const int n = int(random() % 65);
    // Which items throw: none, one, some or all; and what.
    const unsigned kind = random() % 4, bad = n ? random() % n : 0;
    auto throws = [&](int i) { return kind == 1 ? i == int(bad) : kind == 2 ? i % 3 == 0 : kind == 3; };
    bool any = false;
    for (int i = 0; i < n; i++) any |= throws(i);
    // On the heap and freed at once: a late call would read freed memory.
    auto runs = std::make_unique<std::vector<std::atomic<int>>>(n);
    auto task = std::make_unique<std::function<void(int)>>([&, counts = runs.get()](int i) {
      (*counts)[i]++;
      if (i % 7 == 0) std::this_thread::yield();
      if (!throws(i)) return;
      if (i % 2) throw std::bad_alloc();
      throw std::runtime_error("item " + std::to_string(i));
    });
    std::string caught;
    try {
      tqext::cpu::parallel_for(n, *task);
    } catch (const std::bad_alloc&) {
      caught = "bad_alloc";
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    for (auto& count : *runs) {
      expect(count <= 1, "an item ran twice", n);
      expect(any || count == 1, "an item was left out", n);
    }
    expect(any == !caught.empty(), "the caller sees an exception when an item throws, and only then", n);
    expect(caught.rfind("item ", 0) != 0 || throws(std::atoi(caught.c_str() + 5)), "the exception is an item's own", n);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000;
  if (kCallers == 1) {
    call(0, rounds);
  } else {
    std::vector<std::thread> callers;
    for (unsigned i = 0; i < kCallers; i++) callers.emplace_back(call, i, rounds);
    for (auto& caller : callers) caller.join();
  }
  std::printf("%d threads, %d calls, %d wrong\n", tqext::cpu::num_threads(), kCallers * rounds, errors.load());
  return errors > 0;
}
