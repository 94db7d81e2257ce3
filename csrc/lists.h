// How the CPU side cuts K lists of tensors into chunks for its threads.
#pragma once

#include <algorithm>
#include <vector>

#include "gram.h"
#include "parallel.h"

namespace mollm {

constexpr int64_t kChunk = 1 << 16;  // elements of every list that one task works on
constexpr int64_t kWorthAThread = 1
                                  << 18;  // elements below which a thread costs more than it saves

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

inline const void* advance(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * size_of(dtype);
}

struct Chunk {
  int64_t tensor, begin, count;
};

inline std::vector<Chunk> chunks_of(const TensorLists& lists) {
  std::vector<Chunk> chunks;
  for (int64_t n = 0; n < lists.tensors; ++n)
    for (int64_t begin = 0; begin < lists.counts[n]; begin += kChunk)
      chunks.push_back({n, begin, std::min(kChunk, lists.counts[n] - begin)});
  return chunks;
}

// The lists of a chunk that hold anything.
struct Rows {
  int count = 0;
  int list[kMaxRows];
  const void* data[kMaxRows];
  DType dtypes[kMaxRows];
  double weights[kMaxRows];
};

// Where only_weighted is set, lists of weight 0 are left out as well.
inline Rows rows_of(const TensorLists& lists, const Chunk& chunk, const double* weights = nullptr,
                    bool only_weighted = false) {
  Rows rows;
  for (int k = 0; k < lists.lists; ++k) {
    const int64_t at = k * lists.tensors + chunk.tensor;
    if (!lists.data[at] || (only_weighted && weights[k] == 0)) continue;
    rows.list[rows.count] = k;
    rows.data[rows.count] = advance(lists.data[at], lists.dtypes[at], chunk.begin);
    rows.dtypes[rows.count] = lists.dtypes[at];
    rows.weights[rows.count] = weights ? weights[k] : 1;
    ++rows.count;
  }
  return rows;
}

inline int useful_threads(const TensorLists& lists, int threads) {
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

}  // namespace mollm
