// Compiled once per instruction set into the namespace MOLLM_ISA.
#include "gram_kernels.h"

#include "simd.h"

namespace mollm {
namespace {

constexpr int64_t kFlush = 2048;    // float products added before they go into doubles
constexpr int64_t kScratch = 512;   // elements of each row converted at a time, stays in L1
constexpr int kDirectRows = 4;      // up to here all products of a position fit in registers
constexpr int kTile = 4;

MOLLM_INLINE int triangle(int i, int j) { return i * (i + 1) / 2 + j; }

MOLLM_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The last, partial vector: the missing lanes are zero and add nothing.
template <class T>
MOLLM_INLINE f32x16 load_tail(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
MOLLM_INLINE f32x16 load_some(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_tail(p, count);
}

// ---- Gram, few rows of one dtype: everything in registers.

template <int K, class T>
static void gram_direct(const void* const* data, int64_t count, double* partial) {
  constexpr int kPairs = K * (K + 1) / 2;
  const T* rows[K];
  for (int k = 0; k < K; ++k) rows[k] = static_cast<const T*>(data[k]);
  f64x8 total[kPairs] = {};
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    const int64_t end = min64(begin + kFlush, count);
    f32x16 products[kPairs] = {};
    const auto accumulate = [&](auto read) __attribute__((always_inline)) {
      f32x16 x[K];
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) x[i] = read(rows[i]);
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
        for (int j = 0; j <= i; ++j) products[triangle(i, j)] += x[i] * x[j];
    };
    int64_t n = begin;
    for (; n + kLanes <= end; n += kLanes)
      accumulate([n](const T* row) __attribute__((always_inline)) { return load(row + n); });
    if (n < end)
      accumulate([n, end](const T* row) __attribute__((always_inline)) {
        return load_tail(row + n, end - n);
      });
    for (int p = 0; p < kPairs; ++p)
      total[p] += widen_low(products[p]) + widen_high(products[p]);
  }
  for (int p = 0; p < kPairs; ++p) partial[p] = sum(total[p]);
}

template <class T>
static bool gram_direct(int rows, const void* const* data, int64_t count, double* partial) {
  switch (rows) {
    case 1: gram_direct<1, T>(data, count, partial); return true;
    case 2: gram_direct<2, T>(data, count, partial); return true;
    case 3: gram_direct<3, T>(data, count, partial); return true;
    case 4: gram_direct<4, T>(data, count, partial); return true;
    default: return false;
  }
}

// ---- Gram, any number of rows of any dtypes: rows converted into scratch, products in tiles.

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

static void convert(const void* from, DType dtype, int64_t begin, int64_t count, double* to) {
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

static void gram_tile(const float (*row)[kScratch], int i, int j, int columns, int64_t count,
                      double* partial) {
  f32x16 products[kTile] = {};
  for (int64_t n = 0; n < count; n += kLanes) {
    const f32x16 x = load(row[i] + n);
#pragma GCC unroll 4
    for (int c = 0; c < kTile; ++c)
      if (c < columns) products[c] += x * load(row[j + c] + n);
  }
  for (int c = 0; c < columns; ++c)
    partial[triangle(i, j + c)] += sum(widen_low(products[c]) + widen_high(products[c]));
}

static void gram_tile(const double (*row)[kScratch], int i, int j, int columns, int64_t count,
                      double* partial) {
  for (int c = 0; c < columns; ++c) {
    f64x8 products = {};
    for (int64_t n = 0; n < count; n += 8)
      products += load_bits<f64x8>(row[i] + n) * load_bits<f64x8>(row[j + c] + n);
    partial[triangle(i, j + c)] += sum(products);
  }
}

template <class S>
static void gram_scratch(int rows, const void* const* data, const DType* dtypes, int64_t count,
                         double* partial) {
  alignas(64) S scratch[kMaxRows][kScratch];
  for (int p = 0; p < rows * (rows + 1) / 2; ++p) partial[p] = 0;
  for (int64_t begin = 0; begin < count; begin += kScratch) {
    const int64_t length = min64(kScratch, count - begin);
    int64_t padded = 0;
    for (int k = 0; k < rows; ++k) {
      convert(data[k], dtypes[k], begin, length, scratch[k]);
      padded = pad(scratch[k], length);
    }
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j <= i; j += kTile)
        gram_tile(scratch, i, j, static_cast<int>(min64(kTile, i - j + 1)), padded, partial);
  }
}

static bool uniform(int rows, const DType* dtypes) {
  for (int k = 1; k < rows; ++k)
    if (dtypes[k] != dtypes[0]) return false;
  return true;
}

static bool any_double(int rows, const DType* dtypes) {
  for (int k = 0; k < rows; ++k)
    if (dtypes[k] == DType::kFloat64) return true;
  return false;
}

static void gram(int rows, const void* const* data, const DType* dtypes, int64_t count,
                 double* partial) {
  if (rows <= kDirectRows && uniform(rows, dtypes)) {
    switch (dtypes[0]) {
      case DType::kFloat32:
        if (gram_direct<float>(rows, data, count, partial)) return;
        break;
      case DType::kBFloat16:
        if (gram_direct<bf16>(rows, data, count, partial)) return;
        break;
      case DType::kFloat16:
        if (gram_direct<fp16>(rows, data, count, partial)) return;
        break;
      case DType::kFloat64: break;
    }
  }
  if (any_double(rows, dtypes))
    gram_scratch<double>(rows, data, dtypes, count, partial);
  else
    gram_scratch<float>(rows, data, dtypes, count, partial);
}

// ---- Weighted sum.

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

static void put(const float* from, int64_t begin, int64_t count, void* out, DType dtype) {
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

static void put(const double* from, int64_t begin, int64_t count, void* out, DType dtype) {
  if (dtype == DType::kFloat64) {
    std::memcpy(static_cast<double*>(out) + begin, from,
                static_cast<size_t>(count) * sizeof(double));
    return;
  }
  float narrow[kScratch];
  for (int64_t n = 0; n < count; ++n) narrow[n] = static_cast<float>(from[n]);
  put(narrow, begin, count, out, dtype);
}

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
      f64x8 products = {};
      for (int64_t n = 0; n < padded; n += 8)
        products += load_bits<f64x8>(row + n) * load_bits<f64x8>(column + n);
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
