// Runs f(0) ... f(count - 1) on up to `threads` threads; which thread runs what is left open.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace mollm {

template <class F>
void parallel_for(int64_t count, int threads, const F& f) {
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), count);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) f(i);
  };
  std::vector<std::thread> pool;
  for (int64_t w = 1; w < workers; ++w) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace mollm
