#include "store_tokens.h"

#include <cstring>

#include "eval.h"

namespace tqext {

namespace {

constexpr size_t kRows = 64;  // tokens per task

struct Source {
  cpu::View view;
  int begin, n;

  // Token t of row `head` (over batch and heads) to contiguous memory.
  void copy(size_t head, int t, size_t size, char* to) const {
    const size_t heads = view.shape[1], last = view.shape[3];
    const char* from = static_cast<const char*>(view.data) +
                       size * (ptrdiff_t(head / heads) * view.strides[0] + ptrdiff_t(head % heads) * view.strides[1] +
                               ptrdiff_t(begin + t) * view.strides[2]);
    if (view.strides[3] == 1 || last == 1) {
      std::memcpy(to, from, last * size);
    } else {
      for (size_t i = 0; i < last; i++)
        std::memcpy(to + i * size, from + ptrdiff_t(i) * view.strides[3] * ptrdiff_t(size), size);
    }
  }
};

}  // namespace

void StoreTokens::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto encoder = cpu::prepare("store_tokens", stream(), inputs, outputs);
  struct Job {
    char* out;
    size_t size, n_heads, last;
    int room;
    std::vector<Source> sources;
  };
  std::vector<Job> jobs;
  for (size_t i = 0; i < outputs.size(); i++) {
    mx::array& out = outputs[i];
    const Store& store = stores_[i];
    std::vector<Source> sources;
    if (store.kept) sources.push_back({cpu::View(inputs[i]), store.begin, store.kept});
    if (store.added >= 0) sources.push_back({cpu::View(inputs[store.added]), 0, inputs[store.added].shape(2)});
    if (out.size() == 0) continue;
    jobs.push_back({.out = static_cast<char*>(out.data<void>()),
                    .size = out.itemsize(),
                    .n_heads = size_t(out.shape(0)) * out.shape(1),
                    .last = size_t(out.shape(3)),
                    .room = store.room,
                    .sources = std::move(sources)});
  }
  encoder.dispatch([jobs = std::move(jobs)] {
    for (const Job& job : jobs) {
      const size_t bytes = job.last * job.size;
      cpu::for_rows(job.n_heads * job.room, kRows, [&](size_t row) {
        const size_t head = row / job.room;
        const int t = int(row % job.room);
        int before = 0;
        for (const Source& source : job.sources) {
          if (t < before + source.n) return source.copy(head, t - before, job.size, job.out + row * bytes);
          before += source.n;
        }
        std::memset(job.out + row * bytes, 0, bytes);
      });
    }
  });
}

}  // namespace tqext
