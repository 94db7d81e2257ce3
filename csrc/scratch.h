// Rows of any dtype read into, and written from, small float or double arrays that stay in L1.
// Included, like simd.h, only by sources that are compiled once per instruction set.
#pragma once

#include "gram.h"
#include "simd.h"

namespace mollm {
namespace {

constexpr int64_t kScratch = 512;  // elements of a row converted at a time

MOLLM_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// In place of size_of of lists.h, which is not always inlined: of its copies in all sources the
// linker keeps one, maybe one made for AVX-512, which code for any processor would then call.
MOLLM_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The last, partial vector: the missing lanes are zero and add nothing.
template <class T>
MOLLM_INLINE f32v load_tail(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
MOLLM_INLINE f32v load_some(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_tail(p, count);
}

template <class T>
static void convert(const T* from, int64_t count, float* to) {
  for (int64_t n = 0; n < count; n += kLanes) store(to + n, load_some(from + n, count - n));
}

static void convert(const void* from, DType dtype, int64_t begin, int64_t count, float* to) {
  switch (dtype) {
    case DType::kFloat32: return convert(static_cast<const float*>(from) + begin, count, to);
    case DType::kBFloat16: return convert(static_cast<const bf16*>(from) + begin, count, to);
    case DType::kFloat16: return convert(static_cast<const fp16*>(from) + begin, count, to);
    case DType::kFloat64: {
      const double* p = static_cast<const double*>(from) + begin;
      for (int64_t n = 0; n < count; ++n) to[n] = static_cast<float>(p[n]);
    }
  }
}

inline void convert(const void* from, DType dtype, int64_t begin, int64_t count, double* to) {
  if (dtype == DType::kFloat64) {
    std::memcpy(to, static_cast<const double*>(from) + begin,
                static_cast<size_t>(count) * sizeof(double));
    return;
  }
  float narrow[kScratch];
  convert(from, dtype, begin, count, narrow);
  for (int64_t n = 0; n < count; ++n) to[n] = narrow[n];
}

// Zeros up to the next whole vector, so that the product loops need no tail.
template <class S>
MOLLM_INLINE int64_t pad(S* row, int64_t count) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t n = count; n < padded; ++n) row[n] = 0;
  return padded;
}

// g <- beta mean + (1 - beta) g
template <class S>
static void moved_mean(const void* mean, DType dtype, double beta, int64_t begin, int64_t count,
                       S* g) {
  alignas(64) S old[kScratch];
  const S kept = static_cast<S>(beta), fresh = static_cast<S>(1 - beta);
  convert(mean, dtype, begin, count, old);
  for (int64_t n = 0; n < count; ++n) g[n] = kept * old[n] + fresh * g[n];
}

inline bool any_double(int rows, const DType* dtypes) {
  for (int k = 0; k < rows; ++k)
    if (dtypes[k] == DType::kFloat64) return true;
  return false;
}

template <class T>
static void put(const float* from, int64_t count, T* to) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) store(to + n, load(from + n));
  if (n < count) {
    T tail[kLanes];
    store(tail, load_tail(from + n, count - n));
    std::memcpy(to + n, tail, static_cast<size_t>(count - n) * sizeof(T));
  }
}

inline void put(const float* from, int64_t begin, int64_t count, void* out, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return put(from, count, static_cast<float*>(out) + begin);
    case DType::kBFloat16: return put(from, count, static_cast<bf16*>(out) + begin);
    case DType::kFloat16: return put(from, count, static_cast<fp16*>(out) + begin);
    case DType::kFloat64: {
      double* p = static_cast<double*>(out) + begin;
      for (int64_t n = 0; n < count; ++n) p[n] = from[n];
    }
  }
}

inline void put(const double* from, int64_t begin, int64_t count, void* out, DType dtype) {
  if (dtype == DType::kFloat64) {
    std::memcpy(static_cast<double*>(out) + begin, from,
                static_cast<size_t>(count) * sizeof(double));
    return;
  }
  float narrow[kScratch];
  for (int64_t n = 0; n < count; ++n) narrow[n] = static_cast<float>(from[n]);
  put(narrow, begin, count, out, dtype);
}

}  // namespace
}  // namespace mollm
