#include <string>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "rows_kernels.h"

namespace mollm {
namespace {

constexpr int64_t kWorthAThread = 1 << 16;  // logits below which a thread costs more than it saves

const RowKernels* choose_kernels() {
#ifdef MOLLM_X86
  const std::string isa = cpu_instruction_set();
  if (isa == "avx512bf16") return &avx512bf16::row_kernels;
  if (isa == "avx512") return &avx512::row_kernels;
  if (isa == "avx2") return &avx2::row_kernels;
#endif
  return &baseline::row_kernels;
}

// A thread's own, kept for its next row.
void* scratch_of(const LogitRows& rows) {
  if (rows.map.cap <= 0 && rows.reference_map.cap <= 0) return nullptr;
  static thread_local std::vector<double> scratch;
  const size_t floats = static_cast<size_t>(kScratchRows * rows.vocab);
  const size_t doubles = rows.dtype == DType::kFloat64 ? floats : (floats + 1) / 2;
  if (scratch.size() < doubles) scratch.resize(doubles);
  return scratch.data();
}

}  // namespace

void rows_cpu(const LogitRows& rows, double eps, const RowLoss& ce, const RowLoss& kl,
              int threads) {
  static const RowKernels* const kernels = choose_kernels();
  const int64_t useful = 1 + rows.rows * rows.vocab / kWorthAThread;
  parallel_for(rows.rows, static_cast<int>(std::min<int64_t>(threads, useful)),
               [&](int64_t r) { kernels->row(rows, eps, ce, kl, r, scratch_of(rows)); });
}

}  // namespace mollm
