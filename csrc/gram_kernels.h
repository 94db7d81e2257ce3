// The per-instruction-set kernels behind gram_cpu: each works on one chunk of every list.
#pragma once

#include "gram.h"

namespace mollm {

// One chunk of every row, with RunningMeans and AdamMetric of gram.h where they are asked for.
struct GramChunk {
  int rows;
  const void* const* data;
  const DType* dtypes;
  int64_t count;
  const void* const* means;  // [rows]; null: no running means
  const DType* mean_dtypes;
  double beta;
  const double* second_weights;  // [rows]; null: no metric
  const void* second;            // null for zeros
  DType second_dtype;
  double beta2, correction, eps;
};

struct GramKernels {
  // partial[i * (i + 1) / 2 + j], j <= i: the products of rows i and j.
  void (*gram)(const GramChunk& chunk, double* partial);
  // out = sum_k weights[k] * row k
  void (*combine)(int rows, const void* const* data, const DType* dtypes, const double* weights,
                  int64_t count, void* out, DType out_dtype);
  // partial[k] = row k . x
  void (*dots)(int rows, const void* const* data, const DType* dtypes, const void* x, DType x_dtype,
               int64_t count, double* partial);
};

namespace baseline {
extern const GramKernels gram_kernels;
}
namespace avx2 {
extern const GramKernels gram_kernels;
}
namespace avx512 {
extern const GramKernels gram_kernels;
}
namespace avx512bf16 {
extern const GramKernels gram_kernels;
}

}  // namespace mollm
