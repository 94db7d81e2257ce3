// The per-instruction-set kernel behind update_cpu: it works on one chunk of one parameter.
#pragma once

#include "update.h"

namespace mollm {

struct Span {
  void* data;
  DType dtype;
};

struct UpdateChunk {
  int rows;
  const void* const* data;
  const DType* dtypes;
  const double* weights;
  const double* second_weights;  // null: v takes d^2
  const Span* means;             // null: no running means
  double beta;                   // of the means
  int64_t begin, count;          // its elements of the tensor; rows and spans start at `begin`
  Span param, first, second;
  Method method;
  StepScalars scalars;
  bool stochastic;
  uint32_t key;
};

struct UpdateKernels {
  // changes[k] = row k . (param after - param before), where changes is not null
  void (*update)(const UpdateChunk& chunk, double* changes);
};

namespace baseline {
extern const UpdateKernels update_kernels;
}
namespace avx2 {
extern const UpdateKernels update_kernels;
}
namespace avx512 {
extern const UpdateKernels update_kernels;
}
namespace avx512bf16 {
extern const UpdateKernels update_kernels;
}

}  // namespace mollm
