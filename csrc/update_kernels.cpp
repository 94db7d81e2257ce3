// Compiled once per instruction set into the namespace MOLLM_ISA.
#include "update_kernels.h"

#include <math.h>

#include <type_traits>

#include "scratch.h"

namespace mollm {
namespace {

constexpr int64_t kFlush = 4096;  // elements whose products are added in V before they go to double

// ---- one vector of a row of any dtype, in float or in double

template <class V>
struct Lanes;
template <>
struct Lanes<f32v> {
  using Scalar = float;
  static constexpr int64_t count = kLanes;
};
template <>
struct Lanes<f64v> {
  using Scalar = double;
  static constexpr int64_t count = kLanes / 2;
};

template <class V>
using ScalarOf = typename Lanes<V>::Scalar;

// The first `valid` lanes come from p + at, the others are zero.
template <class T>
MOLLM_INLINE f32v read_as(const T* p, int64_t valid, f32v) {
  return load_some(p, valid);
}

MOLLM_INLINE f32v read_as(const double* p, int64_t valid, f32v) {
  f32v x = {};
  for (int64_t l = 0; l < min64(valid, kLanes); ++l) x[l] = static_cast<float>(p[l]);
  return x;
}

template <class T>
MOLLM_INLINE f64v read_as(const T* p, int64_t valid, f64v) {
  f32v x = load_tail(p, min64(valid, kLanes / 2));
  return widen_low(x);
}

MOLLM_INLINE f64v read_as(const double* p, int64_t valid, f64v) {
  f64v x = {};
  std::memcpy(&x, p, static_cast<size_t>(min64(valid, kLanes / 2)) * sizeof(double));
  return x;
}

template <class V>
MOLLM_INLINE V read(const void* from, DType dtype, int64_t at, int64_t valid) {
  switch (dtype) {
    case DType::kFloat32: return read_as(static_cast<const float*>(from) + at, valid, V{});
    case DType::kBFloat16: return read_as(static_cast<const bf16*>(from) + at, valid, V{});
    case DType::kFloat16: return read_as(static_cast<const fp16*>(from) + at, valid, V{});
    default: return read_as(static_cast<const double*>(from) + at, valid, V{});
  }
}

template <class T>
MOLLM_INLINE void write_as(T* to, f32v x, int64_t valid) {
  if (valid >= kLanes) return store(to, x);
  T tail[kLanes];
  store(tail, x);
  std::memcpy(to, tail, static_cast<size_t>(valid) * sizeof(T));
}

MOLLM_INLINE void write_as(double* to, f32v x, int64_t valid) {
  for (int64_t l = 0; l < min64(valid, kLanes); ++l) to[l] = x[l];
}

template <class T>
MOLLM_INLINE void write_as(T* to, f64v x, int64_t valid) {
  f32v narrow = {};
  for (int l = 0; l < kLanes / 2; ++l) narrow[l] = static_cast<float>(x[l]);
  write_as(to, narrow, min64(valid, kLanes / 2));
}

MOLLM_INLINE void write_as(double* to, f64v x, int64_t valid) {
  std::memcpy(to, &x, static_cast<size_t>(min64(valid, kLanes / 2)) * sizeof(double));
}

template <class V>
MOLLM_INLINE void write(const Span& to, int64_t at, int64_t valid, V x) {
  switch (to.dtype) {
    case DType::kFloat32: return write_as(static_cast<float*>(to.data) + at, x, valid);
    case DType::kBFloat16: return write_as(static_cast<bf16*>(to.data) + at, x, valid);
    case DType::kFloat16: return write_as(static_cast<fp16*>(to.data) + at, x, valid);
    case DType::kFloat64: return write_as(static_cast<double*>(to.data) + at, x, valid);
  }
}

// A bfloat16 keeps the upper half of a float's bits; adding a random lower half first carries into
// it with just the probability that makes the mean exact. The bits below are cleared, so that the
// write that follows rounds nothing.
MOLLM_INLINE f32v rounded_stochastically(f32v x, uint32_t key, int64_t element) {
  for (int l = 0; l < kLanes; ++l) {
    uint32_t bits;
    float value = x[l];
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7f800000u) == 0x7f800000u) continue;
    bits = (bits + (mix(key ^ static_cast<uint32_t>(element + l)) & 0xffffu)) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof(value));
    x[l] = value;
  }
  return x;
}

MOLLM_INLINE f64v rounded_stochastically(f64v x, uint32_t key, int64_t element) {
  f32v narrow = {};
  for (int l = 0; l < kLanes / 2; ++l) narrow[l] = static_cast<float>(x[l]);
  return widen_low(rounded_stochastically(narrow, key, element));
}

// ---- the step
//
// T is the dtype of all rows where they share one, so that nothing is left to decide in the loop,
// or void where they do not; kRows is the number of rows, or 0 where it is known at run time only.

template <class V, class T>
MOLLM_INLINE V get(const void* from, DType dtype, int64_t at, int64_t valid) {
  if constexpr (std::is_void_v<T>)
    return read<V>(from, dtype, at, valid);
  else
    return read_as(static_cast<const T*>(from) + at, valid, V{});
}

template <class V, class T>
MOLLM_INLINE V get(const Span& from, int64_t at, int64_t valid) {
  return get<V, T>(from.data, from.dtype, at, valid);
}

template <class T, class V>
MOLLM_INLINE void set(const UpdateChunk& chunk, const Span& to, uint32_t salt, int64_t at,
                      int64_t valid, V x) {
  if (chunk.stochastic && to.dtype == DType::kBFloat16)
    x = rounded_stochastically(x, salted(chunk.key, salt), chunk.begin + at);
  if constexpr (std::is_void_v<T>)
    write(to, at, valid, x);
  else
    write_as(static_cast<T*>(to.data) + at, x, valid);
}

template <class V>
struct Weighed {
  V direction, square;
};

// Sums over the rows at one position; `kept` receives the rows themselves.
template <class V, class T, int kRows>
MOLLM_INLINE Weighed<V> weigh(const UpdateChunk& chunk, int64_t at, int64_t valid, V* kept) {
  using S = ScalarOf<V>;
  const int rows = kRows ? kRows : chunk.rows;
  Weighed<V> sum = {};
#pragma GCC unroll 4
  for (int k = 0; k < rows; ++k) {
    V x = get<V, T>(chunk.data[k], chunk.dtypes[k], at, valid);
    kept[k] = x;
    if (chunk.means) {
      const Span& mean = chunk.means[k];
      x = static_cast<S>(chunk.beta) * read<V>(mean.data, mean.dtype, at, valid) +
          static_cast<S>(1 - chunk.beta) * x;
      write(mean, at, valid, x);
      x = read<V>(mean.data, mean.dtype, at, valid);  // as it is stored
    }
    const S weight = static_cast<S>(chunk.weights[k]);
    if (weight != 0) sum.direction += weight * x;
    if (chunk.second_weights) sum.square += static_cast<S>(chunk.second_weights[k]) * x * x;
  }
  if (!chunk.second_weights) sum.square = sum.direction * sum.direction;
  return sum;
}

template <class V, class T>
MOLLM_INLINE V stepped(const UpdateChunk& chunk, const Weighed<V>& g, int64_t at, int64_t valid,
                       V param) {
  using S = ScalarOf<V>;
  const StepScalars& s = chunk.scalars;
  V d = g.direction;
  if (chunk.method == Method::kSgd) {
    if (chunk.first.data) {
      const S momentum = static_cast<S>(s.momentum);
      const V b = momentum * get<V, T>(chunk.first, at, valid) + d;
      set<T>(chunk, chunk.first, 1, at, valid, b);
      d = s.nesterov ? d + momentum * b : b;
    }
  } else {
    if (chunk.first.data) {
      d = static_cast<S>(s.beta1) * get<V, T>(chunk.first, at, valid) +
          static_cast<S>(1 - s.beta1) * d;
      set<T>(chunk, chunk.first, 1, at, valid, d);
    }
    const V v = static_cast<S>(s.beta2) * get<V, T>(chunk.second, at, valid) +
                static_cast<S>(1 - s.beta2) * g.square;
    set<T>(chunk, chunk.second, 2, at, valid, v);
    d /= square_root(v) * static_cast<S>(s.root) + static_cast<S>(s.eps);
  }
  return static_cast<S>(s.keep) * param - static_cast<S>(s.lr) * d;
}

template <class V, class T, int kRows>
MOLLM_INLINE void update_at(const UpdateChunk& chunk, int64_t at, int64_t valid, bool track,
                            V* products) {
  V kept[kRows ? kRows : kMaxRows];
  const int rows = kRows ? kRows : chunk.rows;
  const Weighed<V> g = weigh<V, T, kRows>(chunk, at, valid, kept);
  const V before = get<V, T>(chunk.param, at, valid);
  set<T>(chunk, chunk.param, 0, at, valid, stepped<V, T>(chunk, g, at, valid, before));
  if (!track) return;
  const V moved = get<V, T>(chunk.param, at, valid) - before;
#pragma GCC unroll 4
  for (int k = 0; k < rows; ++k) products[k] += kept[k] * moved;
}

// Of any dtypes and any number of elements up to a vector: what is left at the end of a chunk. Not
// inlined, for its many cases would be compiled once more into every loop.
template <class V>
__attribute__((noinline)) static void update_any(const UpdateChunk& chunk, int64_t at,
                                                 int64_t valid, bool track, V* products) {
  update_at<V, void, 0>(chunk, at, valid, track, products);
}

template <class V, class T, int kRows>
static void update(const UpdateChunk& chunk, double* changes) {
  constexpr int64_t lanes = Lanes<V>::count;
  const int rows = kRows ? kRows : chunk.rows;
  for (int64_t begin = 0; begin < chunk.count; begin += kFlush) {
    const int64_t end = min64(begin + kFlush, chunk.count);
    V products[kRows ? kRows : kMaxRows];
    for (int k = 0; k < rows; ++k) products[k] = V{};
    int64_t at = begin;
    for (; at + lanes <= end; at += lanes) {
      if constexpr (std::is_void_v<T>)
        update_any<V>(chunk, at, lanes, changes, products);
      else
        update_at<V, T, kRows>(chunk, at, lanes, changes, products);
    }
    if (at < end) update_any<V>(chunk, at, end - at, changes, products);
    if (!changes) continue;
    for (int k = 0; k < rows; ++k)
      for (int64_t l = 0; l < lanes; ++l) changes[k] += products[k][l];
  }
}

template <class T>
static void update_alike(const UpdateChunk& chunk, double* changes) {
  switch (chunk.rows) {
    case 1: return update<f32v, T, 1>(chunk, changes);
    case 2: return update<f32v, T, 2>(chunk, changes);
    case 3: return update<f32v, T, 3>(chunk, changes);
    case 4: return update<f32v, T, 4>(chunk, changes);
    default: return update<f32v, T, 0>(chunk, changes);
  }
}

static bool all_of(const UpdateChunk& chunk, DType dtype) {
  const Span spans[] = {chunk.param, chunk.first, chunk.second};
  for (const Span& span : spans)
    if (span.data && span.dtype != dtype) return false;
  for (int k = 0; k < chunk.rows; ++k)
    if (chunk.dtypes[k] != dtype) return false;
  return true;
}

static bool any_of(const UpdateChunk& chunk, DType dtype) {
  const Span spans[] = {chunk.param, chunk.first, chunk.second};
  for (const Span& span : spans)
    if (span.data && span.dtype == dtype) return true;
  for (int k = 0; k < chunk.rows; ++k)
    if (chunk.dtypes[k] == dtype || (chunk.means && chunk.means[k].dtype == dtype)) return true;
  return false;
}

static void update(const UpdateChunk& chunk, double* changes) {
  if (any_of(chunk, DType::kFloat64)) return update<f64v, void, 0>(chunk, changes);
  if (all_of(chunk, DType::kFloat32)) return update_alike<float>(chunk, changes);
  if (all_of(chunk, DType::kBFloat16)) return update_alike<bf16>(chunk, changes);
  update<f32v, void, 0>(chunk, changes);
}

}  // namespace

namespace MOLLM_ISA {
extern const UpdateKernels update_kernels;
const UpdateKernels update_kernels = {update};
}  // namespace MOLLM_ISA

}  // namespace mollm
