// Runs f(0) ... f(count - 1) on up to `threads` threads; which thread runs what is left open.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace mollm {

// Each thread takes the next number as it becomes free, so that one that is slowed down by other
// work on the machine holds nobody up. A thread that the system refuses to start is done without.
// What f throws first is thrown on, once every thread has stopped.
template <class F>
void parallel_for(int64_t count, int threads, const F& f) {
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), count);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // written by the one thread that sets `failed`
  const auto work = [&]() noexcept {
    try {
      for (int64_t i = next++; i < count && !failed; i = next++) f(i);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  try {
    pool.reserve(static_cast<size_t>(std::max<int64_t>(workers - 1, 0)));
    while (static_cast<int64_t>(pool.size()) < workers - 1) pool.emplace_back(work);
  } catch (const std::exception&) {
    // A limit on threads or memory: those that run, this one among them, do the rest.
  }
  work();
  for (std::thread& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mollm
