// The per-instruction-set kernel behind rows_cpu: it works on one row.
#pragma once

#include "rows.h"

namespace mollm {

constexpr int kScratchRows = 3;

struct RowKernels {
  // scratch: of capped logits kScratchRows * vocab floats, doubles for double logits; else null
  void (*row)(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl, int64_t r,
              void* scratch);
};

namespace baseline {
extern const RowKernels row_kernels;
}
namespace avx2 {
extern const RowKernels row_kernels;
}
namespace avx512 {
extern const RowKernels row_kernels;
}
namespace avx512bf16 {
extern const RowKernels row_kernels;
}

}  // namespace mollm
