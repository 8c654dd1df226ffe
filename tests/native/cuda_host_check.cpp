// What the CUDA host code can do without a GPU. The map of compiled kernels: each is made once, makers of different keys do not
// wait for each other, and one that fails is tried again. The sizes of scratch memory, beyond 32 bits. Prints "ok".
#include "../../cuda/once_map.h"
#include "../../cuda/workspace_sizes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using tqext::cuda::OnceMap;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

void run_at_once(int n, const auto& call) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; i++) threads.emplace_back([&call, i] { call(i); });
  for (std::thread& t : threads) t.join();
}

}  // namespace

int main() {
  // Four makers that each wait until all four are at work: under one lock they would wait for ever.
  OnceMap<int, std::string> map;
  std::atomic<int> at_work = 0, made = 0;
  run_at_once(4, [&](int i) {
    map.get(i, [&] {
      at_work++;
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (at_work < 4 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      expect(at_work == 4, "makers of different keys work at once");
      made++;
      return std::to_string(i);
    });
  });
  const std::string* first = &map.get(0, [&] { return made++, std::string("again"); });
  run_at_once(8, [&](int i) {
    for (int k = 0; k < 2000; k++) {
      const std::string& value = map.get(k % 300, [&] { return made++, std::to_string(k % 300); });
      expect(value == std::to_string(k % 300), "the value is that of its key");
      if (i == 0) std::this_thread::yield();
    }
  });
  expect(made == 300, "each is made once");
  expect(first == &map.get(0, [] { return std::string(); }) && *first == "0", "a reference stays valid");

  std::atomic<int> failed = 0, tries = 0;
  run_at_once(8, [&](int) {
    try {
      map.get(1000, [&]() -> std::string {
        tries++;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        throw std::runtime_error("no");
      });
    } catch (const std::runtime_error&) {
      failed++;
    }
  });
  expect(failed == 8 && tries >= 1, "all who waited see the failure");
  expect(map.get(1000, [] { return std::string("now"); }) == "now", "and the next one tries again");

  for (int bits = 0; bits < 45; bits++) {
    for (const size_t bytes : {(size_t(1) << bits) - 1, size_t(1) << bits, (size_t(1) << bits) + 1}) {
      for (const size_t zeroed : {size_t(0), size_t(1) << 16, (size_t(1) << 20) + 4}) {
        const auto [zeros, size] = tqext::cuda::workspace_sizes(zeroed, bytes);
        expect(zeros >= zeroed && size >= bytes, "there is as much as was asked for");
        expect(size <= std::max(2 * bytes, size_t(1) << 22), "and no more than twice that");
        expect(size <= std::max(bytes + (size_t(1) << 30), size_t(1) << 22), "nor a GiB more");
        const std::vector<int32_t> rows = tqext::cuda::workspace_rows(zeros, size);
        expect(rows[0] > 0 && uint64_t(rows[0]) * uint64_t(rows[1]) * 4 == zeros + size, "the array has all of it");
      }
    }
  }
  std::puts("ok");
}
