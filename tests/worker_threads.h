// Compiled into the extension by tests/sanitize_threads.sh, before every source: our kernels' items are shared by std::thread and
// not by torch's pool. ThreadSanitizer does not see how libgomp's threads wait for each other, and would report each of its
// barriers as a race. It does see std::thread. Every range of items goes to as many threads as possible, whatever the grain.
#pragma once

#ifdef __cplusplus
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

template <class Work>
void share_between_threads(int64_t begin, int64_t end, int64_t /*grain*/, const Work& work) {
  const int64_t count = std::min<int64_t>(4, end - begin);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = begin + (end - begin) * i / count, to = begin + (end - begin) * (i + 1) / count;
    threads.emplace_back([&work, from, to] { work(from, to); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for share_between_threads
#endif
