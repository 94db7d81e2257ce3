// Compiled once per instruction set into the namespace MOLLM_ISA.
#include "gram_kernels.h"

#include <math.h>

#include <type_traits>

#include "scratch.h"

namespace mollm {
namespace {

constexpr int64_t kFlush = 2048;  // float products added before they go into doubles
constexpr int kDirectRows = 4;    // up to here all products of a position fit in registers
constexpr int kTile = kRegisters == 32 ? 4 : 3;

// Below this sum of squares of a chunk, floats too small to have a square may be what is missing
// from it: 2^16 of them, each up to the smallest normal float 2^-126, are 2^-24 of it. Products of
// bfloat16 take smaller elements for zero, which is less.
constexpr double kFaint = 0x1p-86;

MOLLM_INLINE int triangle(int i, int j) { return i * (i + 1) / 2 + j; }

// ---- Adam's metric at one position: P = 1 / (root sqrt(v') + eps), v' the second moment after the
// step; NaN where the step could not compute or store v'. V is a vector, or S itself.

static bool any_in_double(const GramChunk& chunk) {
  return any_double(chunk.rows, chunk.dtypes) ||
         (chunk.means && any_double(chunk.rows, chunk.mean_dtypes)) ||
         (chunk.second && chunk.second_dtype == DType::kFloat64);
}

template <class S>
struct Metric {
  S beta2, fresh, root, eps, largest, largest_square;

  explicit Metric(const GramChunk& chunk)
      : beta2(static_cast<S>(chunk.beta2)),
        fresh(static_cast<S>(1 - chunk.beta2)),
        root(static_cast<S>(1 / sqrt(chunk.correction))),
        eps(static_cast<S>(chunk.eps)) {
    // Of the step, which computes in float also where this does in double for its range.
    const DType computed = any_in_double(chunk) ? DType::kFloat64 : DType::kFloat32;
    const DType kept = chunk.second ? chunk.second_dtype : computed;
    largest = static_cast<S>(fmin(largest_moment(kept), largest_moment(computed)));
    largest_square = static_cast<S>(largest_moment(computed));
  }

  template <class V>
  inline __attribute__((always_inline)) V at(V second, V square) const {
    const V v = beta2 * second + fresh * square;
    const auto fits = (square <= largest_square) & (v <= largest);
    return fits ? 1 / (square_root(v) * root + eps) : V{} + static_cast<S>(NAN);
  }
};

// ---- Gram, few rows of one dtype: everything in registers.

template <class T>
MOLLM_INLINE f32v as_stored(f32v x) {
  T stored[kLanes];
  store(stored, x);
  return load(stored);
}

// Of T are also the running means and the second moment, where there are such.
template <int K, class T, bool kMeans, bool kMetric>
static void gram_direct(const GramChunk& chunk, double* partial) {
  constexpr int kPairs = K * (K + 1) / 2;
  const T *rows[K], *means[K];
  f32v weights[K];
  for (int k = 0; k < K; ++k) {
    rows[k] = static_cast<const T*>(chunk.data[k]);
    if constexpr (kMeans) means[k] = static_cast<const T*>(chunk.means[k]);
    if constexpr (kMetric) weights[k] = f32v{} + static_cast<float>(chunk.second_weights[k]);
  }
  const T* const second = static_cast<const T*>(chunk.second);
  const Metric<float> metric(chunk);
  const float beta = static_cast<float>(chunk.beta), fresh = static_cast<float>(1 - chunk.beta);
  f64v total[kPairs] = {};
  for (int64_t begin = 0; begin < chunk.count; begin += kFlush) {
    const int64_t end = min64(begin + kFlush, chunk.count);
    f32v products[kPairs] = {};
    const auto add = [&](const f32v* x, const f32v* y) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
        for (int j = 0; j <= i; ++j) products[triangle(i, j)] += x[i] * y[j];
    };
    const auto accumulate = [&](auto read) __attribute__((always_inline)) {
      f32v x[K];
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) {
        x[i] = read(rows[i]);
        if constexpr (kMeans) x[i] = as_stored<T>(beta * read(means[i]) + fresh * x[i]);
      }
      if constexpr (kMetric) {
        f32v square = {}, scaled[K];
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i) square += weights[i] * x[i] * x[i];
        const f32v scale = metric.at(second ? read(second) : f32v{}, square);
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i) scaled[i] = scale * x[i];
        add(scaled, x);
      } else {
        add(x, x);
      }
    };
    int64_t n = begin;
    if constexpr (std::is_same_v<T, bf16> && !kMeans && !kMetric)
      for (; n + 2 * kLanes <= end; n += 2 * kLanes) {
        f32v even[K], odd[K];
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i) load_pairs(rows[i] + n, &even[i], &odd[i]);
        add(even, even);
        add(odd, odd);
      }
    for (; n + kLanes <= end; n += kLanes)
      accumulate([n](const T* row) __attribute__((always_inline)) { return load(row + n); });
    if (n < end)
      accumulate([n, end](const T* row)
                     __attribute__((always_inline)) { return load_tail(row + n, end - n); });
    for (int p = 0; p < kPairs; ++p) total[p] += widen_low(products[p]) + widen_high(products[p]);
  }
  for (int p = 0; p < kPairs; ++p) partial[p] = sum(total[p]);
}

template <class T, bool kMeans, bool kMetric>
static void gram_direct(const GramChunk& chunk, double* partial) {
  switch (chunk.rows) {
    case 1: return gram_direct<1, T, kMeans, kMetric>(chunk, partial);
    case 2: return gram_direct<2, T, kMeans, kMetric>(chunk, partial);
    case 3: return gram_direct<3, T, kMeans, kMetric>(chunk, partial);
    case 4: return gram_direct<4, T, kMeans, kMetric>(chunk, partial);
  }
}

template <class T>
static void gram_direct(const GramChunk& chunk, double* partial) {
  if (chunk.means && chunk.second_weights) return gram_direct<T, true, true>(chunk, partial);
  if (chunk.means) return gram_direct<T, true, false>(chunk, partial);
  if (chunk.second_weights) return gram_direct<T, false, true>(chunk, partial);
  gram_direct<T, false, false>(chunk, partial);
}

// ---- Gram, any number of rows of any dtypes: rows converted into scratch, products in tiles.

template <class S>
struct Vector;
template <>
struct Vector<float> {
  using type = f32v;
};
template <>
struct Vector<double> {
  using type = f64v;
};

MOLLM_INLINE f64v widen(f32v v) { return widen_low(v) + widen_high(v); }
MOLLM_INLINE f64v widen(f64v v) { return v; }

// products[triangle(i + r, j + c)] += row i + r times row j + c, for r < R, c < C; of a tile on the
// diagonal only c <= r.
template <int R, int C, bool kDiagonal, class S>
static void gram_tile(const S (*row)[kScratch], int i, int j, int64_t count,
                      typename Vector<S>::type* products) {
  using V = typename Vector<S>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(S);
  V tile[R][C] = {};
  for (int64_t n = 0; n < count; n += lanes) {
    V x[R], y[C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = load_bits<V>(row[i + r] + n);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = kDiagonal ? x[c] : load_bits<V>(row[j + c] + n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        if (!kDiagonal || c <= r) tile[r][c] += x[r] * y[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < (kDiagonal ? r + 1 : C); ++c)
      products[triangle(i + r, j + c)] += tile[r][c];
}

template <int R, class S>
static void gram_tiles(const S (*row)[kScratch], int i, int64_t count,
                       typename Vector<S>::type* products) {
  for (int j = 0; j < i; j += kTile) gram_tile<R, kTile, false>(row, i, j, count, products);
  gram_tile<R, R, true>(row, i, i, count, products);
}

// g <- beta mean + (1 - beta) g, as it would be stored.
template <class S>
static void move_mean(const GramChunk& chunk, int k, int64_t begin, int64_t count, S* g) {
  alignas(64) S stored[kScratch];
  moved_mean(chunk.means[k], chunk.mean_dtypes[k], chunk.beta, begin, count, g);
  put(g, 0, count, stored, chunk.mean_dtypes[k]);
  convert(stored, chunk.mean_dtypes[k], 0, count, g);
}

// Scales every row by sqrt(P).
template <class S>
static void scale_by_metric(const GramChunk& chunk, int64_t begin, int64_t count,
                            S (*row)[kScratch]) {
  alignas(64) S scale[kScratch] = {}, second[kScratch] = {};
  const Metric<S> metric(chunk);
  if (chunk.second) convert(chunk.second, chunk.second_dtype, begin, count, second);
  for (int k = 0; k < chunk.rows; ++k) {
    const S weight = static_cast<S>(chunk.second_weights[k]);
    for (int64_t n = 0; n < count; ++n) scale[n] += weight * row[k][n] * row[k][n];
  }
  for (int64_t n = 0; n < count; ++n)
    scale[n] = square_root(metric.template at<S>(second[n], scale[n]));
  for (int k = 0; k < chunk.rows; ++k)
    for (int64_t n = 0; n < count; ++n) row[k][n] *= scale[n];
}

// Asks for what is converted next, so that memory works while the products are taken.
MOLLM_INLINE void fetch(const void* row, DType dtype, int64_t begin, int64_t count) {
  const char* const p = static_cast<const char*>(row);
  const int64_t end = min64(begin + kScratch, count) * bytes_of(dtype);
  for (int64_t n = begin * bytes_of(dtype); n < end; n += 64) __builtin_prefetch(p + n);
}

template <class S>
static void gram_scratch(const GramChunk& chunk, double* partial) {
  using V = typename Vector<S>::type;
  const int rows = chunk.rows, pairs = rows * (rows + 1) / 2;
  alignas(64) S row[kMaxRows][kScratch];
  alignas(64) V products[kMaxRows * (kMaxRows + 1) / 2];
  for (int p = 0; p < pairs; ++p) partial[p] = 0;
  for (int64_t begin = 0; begin < chunk.count;) {
    for (int p = 0; p < pairs; ++p) products[p] = V{};
    const int64_t flush = min64(begin + kFlush, chunk.count);
    for (; begin < flush; begin += kScratch) {
      const int64_t length = min64(kScratch, flush - begin);
      int64_t padded = 0;
      for (int k = 0; k < rows; ++k) {
        convert(chunk.data[k], chunk.dtypes[k], begin, length, row[k]);
        if (chunk.means) move_mean(chunk, k, begin, length, row[k]);
      }
      for (int k = 0; k < rows; ++k)
        fetch(chunk.data[k], chunk.dtypes[k], begin + length, chunk.count);
      if (chunk.second_weights) scale_by_metric(chunk, begin, length, row);
      for (int k = 0; k < rows; ++k) padded = pad(row[k], length);
      for (int i = 0; i < rows; i += kTile) switch (rows - i) {
          case 1: gram_tiles<1>(row, i, padded, products); break;
          case 2: gram_tiles<2>(row, i, padded, products); break;
          case 3: gram_tiles<3>(row, i, padded, products); break;
          default: gram_tiles<kTile>(row, i, padded, products);
        }
    }
    for (int p = 0; p < pairs; ++p) partial[p] += sum(widen(products[p]));
  }
}

// ---- Gram, many rows of float or of bfloat16: tiles straight from memory, a block of all rows at
// a time, of which eight of float stay in L1.

// What a tile multiplies: floats, or pairs of bfloat16.
template <class T>
using Factors = std::conditional_t<std::is_same_v<T, bf16>, u32v, f32v>;

template <class T>
MOLLM_INLINE Factors<T> factors(const T* p) {
  if constexpr (std::is_same_v<T, bf16>)
    return load_bits<u32v>(p);
  else
    return load(p);
}

// products[triangle(i + r, j + c)] of `count` elements, as gram_tile.
template <int R, int C, bool kDiagonal, class T>
static void direct_tile(const T* const* row, int i, int j, int64_t count, f64v* products) {
  constexpr int64_t step = kLanes * (std::is_same_v<T, bf16> ? 2 : 1);
  f32v tile[R][C] = {};
  const auto add = [&](auto read) __attribute__((always_inline)) {
    Factors<T> x[R], y[C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = read(row[i + r]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = kDiagonal ? x[c] : read(row[j + c]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        if (!kDiagonal || c <= r) tile[r][c] = add_products(tile[r][c], x[r], y[c]);
  };
  int64_t n = 0;
  for (; n + step <= count; n += step)
    add([n](const T* p) __attribute__((always_inline)) { return factors(p + n); });
  if (n < count)
    add([n, count](const T* p) __attribute__((always_inline)) {
      T padded[step] = {};
      std::memcpy(padded, p + n, static_cast<size_t>(count - n) * sizeof(T));
      return factors(padded);
    });
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < (kDiagonal ? r + 1 : C); ++c)
      products[triangle(i + r, j + c)] += widen(tile[r][c]);
}

template <int R, class T>
static void direct_tiles(const T* const* row, int i, int64_t count, f64v* products) {
  for (int j = 0; j < i; j += kTile) direct_tile<R, kTile, false>(row, i, j, count, products);
  direct_tile<R, R, true>(row, i, i, count, products);
}

template <class T>
static void gram_in_tiles(const GramChunk& chunk, double* partial) {
  const int rows = chunk.rows, pairs = rows * (rows + 1) / 2;
  f64v products[kMaxRows * (kMaxRows + 1) / 2];
  for (int p = 0; p < pairs; ++p) products[p] = f64v{};
  for (int64_t begin = 0; begin < chunk.count; begin += kScratch) {
    const int64_t length = min64(kScratch, chunk.count - begin);
    const T* row[kMaxRows];
    for (int k = 0; k < rows; ++k) row[k] = static_cast<const T*>(chunk.data[k]) + begin;
    for (int i = 0; i < rows; i += kTile) switch (rows - i) {
        case 1: direct_tiles<1>(row, i, length, products); break;
        case 2: direct_tiles<2>(row, i, length, products); break;
        case 3: direct_tiles<3>(row, i, length, products); break;
        default: direct_tiles<kTile>(row, i, length, products);
      }
  }
  for (int p = 0; p < pairs; ++p) partial[p] = sum(products[p]);
}

// The one dtype of all that is read, or float64 where there are several.
static DType common_dtype(const GramChunk& chunk) {
  const DType first = chunk.dtypes[0];
  bool alike = !chunk.second_weights || !chunk.second || chunk.second_dtype == first;
  for (int k = 0; k < chunk.rows; ++k)
    alike = alike && chunk.dtypes[k] == first && (!chunk.means || chunk.mean_dtypes[k] == first);
  return alike ? first : DType::kFloat64;
}

static void gram_in_float(const GramChunk& chunk, double* partial) {
  if (chunk.rows <= kDirectRows) switch (common_dtype(chunk)) {
      case DType::kFloat32: return gram_direct<float>(chunk, partial);
      case DType::kBFloat16: return gram_direct<bf16>(chunk, partial);
      case DType::kFloat16: return gram_direct<fp16>(chunk, partial);
      case DType::kFloat64: break;
    }
  if (chunk.rows > kDirectRows && !chunk.means && !chunk.second_weights)
    switch (common_dtype(chunk)) {
      case DType::kFloat32: return gram_in_tiles<float>(chunk, partial);
      case DType::kBFloat16: return gram_in_tiles<bf16>(chunk, partial);
      default: break;
    }
  gram_scratch<float>(chunk, partial);
}

static bool is_zero(const void* row, DType dtype, int64_t count) {
  const int64_t bytes = count * bytes_of(dtype);
  const char* const p = static_cast<const char*>(row);
  int64_t n = 0;
  for (; n + 64 <= bytes; n += 64) {
    uint64_t words[8], any = 0;
    std::memcpy(words, p + n, sizeof(words));
    for (const uint64_t word : words) any |= word;
    if (any) return false;
  }
  for (; n < bytes; ++n)
    if (p[n]) return false;
  return true;
}

// Whether squares were lost below the smallest float, or beyond the largest.
static bool out_of_range(const GramChunk& chunk, const double* partial) {
  for (int p = 0; p < chunk.rows * (chunk.rows + 1) / 2; ++p)
    if (partial[p] - partial[p] != 0) return true;
  for (int k = 0; k < chunk.rows; ++k) {
    if (partial[triangle(k, k)] >= kFaint) continue;
    if (!is_zero(chunk.data[k], chunk.dtypes[k], chunk.count)) return true;
    if (chunk.means && !is_zero(chunk.means[k], chunk.mean_dtypes[k], chunk.count)) return true;
  }
  return false;
}

static void gram(const GramChunk& chunk, double* partial) {
  const bool wide = any_in_double(chunk);
  if (!wide) gram_in_float(chunk, partial);
  if (wide || out_of_range(chunk, partial)) gram_scratch<double>(chunk, partial);
}

// ---- Weighted sum.

template <class S>
static void combine(int rows, const void* const* data, const DType* dtypes, const double* weights,
                    int64_t count, void* out, DType out_dtype) {
  alignas(64) S row[kScratch], total[kScratch];
  for (int64_t begin = 0; begin < count; begin += kScratch) {
    const int64_t length = min64(kScratch, count - begin);
    for (int64_t n = 0; n < length; ++n) total[n] = 0;
    for (int k = 0; k < rows; ++k) {
      const S weight = static_cast<S>(weights[k]);
      convert(data[k], dtypes[k], begin, length, row);
      for (int64_t n = 0; n < length; ++n) total[n] += weight * row[n];
    }
    put(total, begin, length, out, out_dtype);
  }
}

static void combine(int rows, const void* const* data, const DType* dtypes, const double* weights,
                    int64_t count, void* out, DType out_dtype) {
  if (out_dtype == DType::kFloat64 || any_double(rows, dtypes))
    combine<double>(rows, data, dtypes, weights, count, out, out_dtype);
  else
    combine<float>(rows, data, dtypes, weights, count, out, out_dtype);
}

// ---- Dot products with one more row, in double.

static void dots(int rows, const void* const* data, const DType* dtypes, const void* x,
                 DType x_dtype, int64_t count, double* partial) {
  alignas(64) double row[kScratch], column[kScratch];
  for (int k = 0; k < rows; ++k) partial[k] = 0;
  for (int64_t begin = 0; begin < count; begin += kScratch) {
    const int64_t length = min64(kScratch, count - begin);
    convert(x, x_dtype, begin, length, column);
    const int64_t padded = pad(column, length);
    for (int k = 0; k < rows; ++k) {
      convert(data[k], dtypes[k], begin, length, row);
      pad(row, length);
      f64v products = {};
      for (int64_t n = 0; n < padded; n += kLanes / 2)
        products += load_bits<f64v>(row + n) * load_bits<f64v>(column + n);
      partial[k] += sum(products);
    }
  }
}

}  // namespace

namespace MOLLM_ISA {
extern const GramKernels gram_kernels;
const GramKernels gram_kernels = {gram, combine, dots};
}  // namespace MOLLM_ISA

}  // namespace mollm
