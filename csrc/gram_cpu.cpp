#include "gram.h"

#include <vector>

#include "gram_kernels.h"
#include "parallel.h"

namespace mollm {
namespace {

constexpr int64_t kChunk = 1 << 16;           // elements of every list that one task works on
constexpr int64_t kWorthAThread = 1 << 18;    // elements below which a thread costs more than it saves

struct Isa {
  const char* name;
  const GramKernels* kernels;
};

Isa choose_isa() {
#ifdef MOLLM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {"avx512", &avx512::gram_kernels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", &avx2::gram_kernels};
#endif
  return {"baseline", &baseline::gram_kernels};
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

const void* advance(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * size_of(dtype);
}

struct Chunk {
  int64_t tensor, begin, count;
};

// The lists of a chunk that hold anything (and, where weights are given, have a weight).
struct Rows {
  int count = 0;
  int list[kMaxRows];
  const void* data[kMaxRows];
  DType dtypes[kMaxRows];
  double weights[kMaxRows];
};

Rows rows_of(const TensorLists& lists, const Chunk& chunk, const double* weights = nullptr) {
  Rows rows;
  for (int k = 0; k < lists.lists; ++k) {
    const int64_t at = k * lists.tensors + chunk.tensor;
    if (!lists.data[at] || (weights && weights[k] == 0)) continue;
    rows.list[rows.count] = k;
    rows.data[rows.count] = advance(lists.data[at], lists.dtypes[at], chunk.begin);
    rows.dtypes[rows.count] = lists.dtypes[at];
    rows.weights[rows.count] = weights ? weights[k] : 1;
    ++rows.count;
  }
  return rows;
}

std::vector<Chunk> chunks_of(const TensorLists& lists) {
  std::vector<Chunk> chunks;
  for (int64_t n = 0; n < lists.tensors; ++n)
    for (int64_t begin = 0; begin < lists.counts[n]; begin += kChunk)
      chunks.push_back({n, begin, std::min(kChunk, lists.counts[n] - begin)});
  return chunks;
}

int useful_threads(const TensorLists& lists, int threads) {
  int64_t elements = 0;
  for (int64_t n = 0; n < lists.tensors; ++n) elements += lists.counts[n] * lists.lists;
  return static_cast<int>(std::min<int64_t>(threads, 1 + elements / kWorthAThread));
}

// Adds up `width` doubles of every chunk, in the order of the chunks.
template <class F>
std::vector<double> reduce_chunks(const TensorLists& lists, int width, int threads,
                                  const F& chunk_sums) {
  const std::vector<Chunk> chunks = chunks_of(lists);
  std::vector<double> sums(chunks.size() * width, 0.0);
  parallel_for(static_cast<int64_t>(chunks.size()), useful_threads(lists, threads),
               [&](int64_t c) { chunk_sums(chunks[c], &sums[c * width]); });
  std::vector<double> total(width, 0.0);
  for (size_t c = 0; c < chunks.size(); ++c)
    for (int w = 0; w < width; ++w) total[w] += sums[c * width + w];
  return total;
}

}  // namespace

void gram_cpu(const TensorLists& gradients, double* gram, int threads) {
  const int K = gradients.lists;
  const std::vector<double> total =
      reduce_chunks(gradients, K * K, threads, [&](const Chunk& chunk, double* sums) {
        const Rows rows = rows_of(gradients, chunk);
        if (rows.count == 0) return;
        double partial[kMaxRows * (kMaxRows + 1) / 2];
        isa().kernels->gram(rows.count, rows.data, rows.dtypes, chunk.count, partial);
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
                 const Rows rows = rows_of(gradients, chunk, weights);
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
