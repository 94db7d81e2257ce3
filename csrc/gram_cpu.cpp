#include <cstdlib>
#include <string>

#include "gram.h"
#include "gram_kernels.h"
#include "lists.h"

namespace mollm {
namespace {

struct Isa {
  const char* name;
  const GramKernels* kernels;
};

// The best that the processor has and the variable allows that limits Torch's own kernels too.
Isa choose_isa() {
#ifdef MOLLM_X86
  const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable ? variable : "";
  const bool up_to_avx512 = limit == "avx512", up_to_avx2 = limit == "avx2";
  if (limit == "default") return {"baseline", &baseline::gram_kernels};
  __builtin_cpu_init();
  if (!up_to_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!up_to_avx512 && __builtin_cpu_supports("avx512bf16"))
      return {"avx512bf16", &avx512bf16::gram_kernels};
    return {"avx512", &avx512::gram_kernels};
  }
#if defined(__clang__) || __GNUC__ >= 11  // GCC 10 cannot be asked for it; whoever has AVX2 has it
  const bool f16c = __builtin_cpu_supports("f16c");
#else
  const bool f16c = true;
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)
    return {"avx2", &avx2::gram_kernels};
#endif
  return {"baseline", &baseline::gram_kernels};
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace

void gram_cpu(const TensorLists& gradients, const RunningMeans& means, const AdamMetric& metric,
              double* gram, int threads) {
  const int K = gradients.lists;
  const std::vector<double> total =
      reduce_chunks(gradients, K * K, threads, [&](const Chunk& chunk, double* sums) {
        const Rows rows = rows_of(gradients, chunk, metric.weights);
        if (rows.count == 0) return;
        GramChunk task = {};
        task.rows = rows.count;
        task.data = rows.data;
        task.dtypes = rows.dtypes;
        task.count = chunk.count;
        Rows averages;
        if (means.data) {
          for (int r = 0; r < rows.count; ++r) {
            const int64_t at = rows.list[r] * gradients.tensors + chunk.tensor;
            averages.dtypes[r] = means.dtypes[at];
            averages.data[r] = advance(means.data[at], means.dtypes[at], chunk.begin);
          }
          task.means = averages.data;
          task.mean_dtypes = averages.dtypes;
          task.beta = means.beta;
        }
        if (metric.weights) {
          const void* const second = metric.second[chunk.tensor];
          task.second_weights = rows.weights;
          task.second_dtype = metric.dtypes[chunk.tensor];
          task.second = second ? advance(second, task.second_dtype, chunk.begin) : nullptr;
          task.beta2 = metric.beta2;
          task.correction = metric.corrections[chunk.tensor];
          task.eps = metric.eps;
        }
        double partial[kMaxRows * (kMaxRows + 1) / 2];
        isa().kernels->gram(task, partial);
        for (int i = 0; i < rows.count; ++i)
          for (int j = 0; j <= i; ++j) {
            const double product = partial[i * (i + 1) / 2 + j];
            sums[rows.list[i] * K + rows.list[j]] = product;
            sums[rows.list[j] * K + rows.list[i]] = product;
          }
      });
  std::copy(total.begin(), total.end(), gram);
}

void combine_cpu(const TensorLists& gradients, const double* weights, void* const* out,
                 const DType* out_dtypes, int threads) {
  const std::vector<Chunk> chunks = chunks_of(gradients);
  parallel_for(static_cast<int64_t>(chunks.size()), useful_threads(gradients, threads),
               [&](int64_t c) {
                 const Chunk& chunk = chunks[c];
                 const Rows rows = rows_of(gradients, chunk, weights, true);
                 const DType dtype = out_dtypes[chunk.tensor];
                 void* to = const_cast<void*>(advance(out[chunk.tensor], dtype, chunk.begin));
                 isa().kernels->combine(rows.count, rows.data, rows.dtypes, rows.weights,
                                        chunk.count, to, dtype);
               });
}

void dots_cpu(const TensorLists& gradients, const void* const* x, const DType* x_dtypes,
              double* dots, int threads) {
  const std::vector<double> total =
      reduce_chunks(gradients, gradients.lists, threads, [&](const Chunk& chunk, double* sums) {
        const Rows rows = rows_of(gradients, chunk);
        const DType dtype = x_dtypes[chunk.tensor];
        double partial[kMaxRows];
        isa().kernels->dots(rows.count, rows.data, rows.dtypes,
                            advance(x[chunk.tensor], dtype, chunk.begin), dtype, chunk.count,
                            partial);
        for (int r = 0; r < rows.count; ++r) sums[rows.list[r]] = partial[r];
      });
  std::copy(total.begin(), total.end(), dots);
}

const char* cpu_instruction_set() { return isa().name; }

}  // namespace mollm
