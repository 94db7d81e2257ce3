// Runs the CUDA sources on a CPU. Every CUDA thread is a fiber; warps of 32 exchange values in
// their shuffles, barriers are checked for divergence, and the order of blocks and threads can be
// chosen. It proves indices, masks, barriers, tickets and determinism; not speed, and not the
// memory order of a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned a) : x(a) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

struct Place {
  dim3 thread, block, block_size, grid_size;
};
extern Place* here;  // of the fiber that runs

void fail(const char* what, const char* file, int line);
void yield();  // another fiber's turn, where the chosen order says so
void barrier(const char* file, int line);
uint64_t exchange(unsigned mask, uint64_t value, int from, const char* file, int line);
void* shared_bytes(int id, size_t size);
void launch(dim3 grid, dim3 block, const std::function<void()>& kernel);

template <class T>
T& shared(int id) {
  return *static_cast<T*>(shared_bytes(id, sizeof(T)));
}

template <class T>
T shuffle_down(unsigned mask, T x, int delta, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes here");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  const int lane = here->thread.x % 32;
  bits = exchange(mask, bits, lane + delta < 32 ? lane + delta : lane, file, line);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
T load(const T* p, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("misaligned load", file, line);
  yield();
  return *p;
}

}  // namespace emulator

#define threadIdx (::emulator::here->thread)
#define blockIdx (::emulator::here->block)
#define blockDim (::emulator::here->block_size)
#define gridDim (::emulator::here->grid_size)
#define __syncthreads() ::emulator::barrier(__FILE__, __LINE__)
#define __shfl_down_sync(mask, x, d) ::emulator::shuffle_down(mask, x, d, __FILE__, __LINE__)
#define __ldcs(p) ::emulator::load(p, __FILE__, __LINE__)
#define __ldcg(p) ::emulator::load(p, __FILE__, __LINE__)
#define __threadfence() ::emulator::yield()

inline unsigned atomicAdd(unsigned* p, unsigned v) {
  emulator::yield();
  const unsigned old = *p;
  *p += v;
  emulator::yield();
  return old;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
// As documented: 0 where the divisor is beyond 2^126, and infinity where its reciprocal is.
inline float __fdividef(float x, float y) {
  return std::fabs(y) > 0x1p126f && std::fabs(y) < INFINITY ? 0 * x : x / y;
}
