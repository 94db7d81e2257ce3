#include <string>

#include "lists.h"
#include "update.h"
#include "update_kernels.h"

namespace mollm {
namespace {

const UpdateKernels* choose_kernels() {
#ifdef MOLLM_X86
  const std::string isa = cpu_instruction_set();
  if (isa == "avx512bf16") return &avx512bf16::update_kernels;
  if (isa == "avx512") return &avx512::update_kernels;
  if (isa == "avx2") return &avx2::update_kernels;
#endif
  return &baseline::update_kernels;
}

Span span_of(const TensorList& list, const Chunk& chunk) {
  void* const data = list.data ? list.data[chunk.tensor] : nullptr;
  if (!data) return {nullptr, DType::kFloat32};
  const DType dtype = list.dtypes[chunk.tensor];
  return {const_cast<void*>(advance(data, dtype, chunk.begin)), dtype};
}

}  // namespace

void update_cpu(const TensorLists& gradients, const double* weights, const double* second_weights,
                const RunningMeans& means, const UpdateTargets& targets,
                const UpdateOptions& options, double* changes, int threads) {
  static const UpdateKernels* const kernels = choose_kernels();
  const int K = gradients.lists;
  const std::vector<double> total =
      reduce_chunks(gradients, K, threads, [&](const Chunk& chunk, double* sums) {
        const Rows rows = rows_of(gradients, chunk, weights);
        double second[kMaxRows], partial[kMaxRows] = {};
        for (int r = 0; second_weights && r < rows.count; ++r)
          second[r] = second_weights[rows.list[r]];
        Span moving[kMaxRows];
        for (int r = 0; means.data && r < rows.count; ++r)
          moving[r] = span_of({means.data + rows.list[r] * gradients.tensors,
                               means.dtypes + rows.list[r] * gradients.tensors},
                              chunk);
        const float step = *targets.steps[chunk.tensor];
        const Span first = span_of(targets.first, chunk);
        const UpdateChunk task = {rows.count,
                                  rows.data,
                                  rows.dtypes,
                                  rows.weights,
                                  second_weights ? second : nullptr,
                                  means.data ? moving : nullptr,
                                  means.beta,
                                  chunk.begin,
                                  chunk.count,
                                  span_of(targets.param, chunk),
                                  first,
                                  span_of(targets.second, chunk),
                                  options.method,
                                  step_scalars(options, options.lr, step, first.data != nullptr),
                                  options.stochastic,
                                  rounding_key(options.seed, step, chunk.tensor)};
        kernels->update(task, changes ? partial : nullptr);
        for (int r = 0; r < rows.count; ++r) sums[rows.list[r]] = partial[r];
      });
  if (changes) std::copy(total.begin(), total.end(), changes);
}

}  // namespace mollm
