// What the CUDA kernels share: K lists of tensors cut into chunks, rows of any dtype in vectors of
// eight, and sums over all blocks in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "gram.h"

namespace mollm {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements a thread takes at a time: 16 bytes of a 16-bit type

// ---- reading and writing eight elements of one row

struct Row {
  const void* data;
  DType dtype;
};

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(double x) { return static_cast<float>(x); }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }

// Eight elements, read sixteen bytes at a time; they must be aligned to them.
template <class T>
struct Raw {
  alignas(16) T values[kVector];

  Raw() = default;
  __device__ explicit Raw(const T* p) {
#pragma unroll
    for (int v = 0; v < kVector * static_cast<int>(sizeof(T)) / 16; ++v)
      reinterpret_cast<uint4*>(values)[v] = __ldcs(reinterpret_cast<const uint4*>(p) + v);
  }
};

template <class T>
__device__ inline void load_vector(const T* p, float* x) {
  const Raw<T> raw(p);
#pragma unroll
  for (int e = 0; e < kVector; ++e) x[e] = as_float(raw.values[e]);
}

__device__ inline double load_one(Row row, int64_t at) {
  switch (row.dtype) {
    case DType::kFloat32: return static_cast<const float*>(row.data)[at];
    case DType::kFloat64: return static_cast<const double*>(row.data)[at];
    case DType::kBFloat16: return as_float(static_cast<const __nv_bfloat16*>(row.data)[at]);
    default: return as_float(static_cast<const __half*>(row.data)[at]);
  }
}

__device__ inline void store_one(void* out, DType dtype, int64_t at, double x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(out)[at] = static_cast<float>(x); break;
    case DType::kFloat64: static_cast<double*>(out)[at] = x; break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16(static_cast<float>(x));
      break;
    default: static_cast<__half*>(out)[at] = __float2half(static_cast<float>(x));
  }
}

// ---- which chunk is whose

struct Chunk {
  int64_t tensor, begin, end;  // elements [begin, end) of the tensor
};

__device__ Chunk find_chunk(const DeviceLists& lists, int64_t chunk) {
  int64_t low = 0, high = lists.tensors - 1;
  while (low < high) {  // the last tensor whose first chunk is not beyond `chunk`
    const int64_t middle = (low + high + 1) / 2;
    if (lists.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t begin = (chunk - lists.first_chunk[low]) * kCudaChunk;
  const int64_t end = begin + kCudaChunk;
  return {low, begin, end < lists.counts[low] ? end : lists.counts[low]};
}

__device__ inline Row row_at(const int64_t* data, const int64_t* dtypes, int64_t at) {
  return {reinterpret_cast<const void*>(data[at]), static_cast<DType>(dtypes[at])};
}

template <int K>
__device__ inline void rows_of(const DeviceLists& lists, int64_t tensor, Row* rows) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    rows[k] = row_at(lists.data, lists.dtypes, k * lists.tensors + tensor);
  }
}

// Whether every row is there, of dtype `dtype`, and starts on a 16-byte boundary.
template <int K>
__device__ inline bool uniform(const Row* rows, DType dtype) {
  bool same = true;
#pragma unroll
  for (int k = 0; k < K; ++k)
    same &= rows[k].data && rows[k].dtype == dtype &&
            reinterpret_cast<uintptr_t>(rows[k].data) % 16 == 0;
  return same;
}

// ---- eight elements of a row whose dtype is known at run time only

struct Packet {
  uint4 raw[2];
};

// Rows that are missing or may be read sixteen bytes at a time as floats.
__device__ inline bool in_packets(Row row) {
  return !row.data ||
         (row.dtype != DType::kFloat64 && reinterpret_cast<uintptr_t>(row.data) % 16 == 0);
}

template <int K>
__device__ inline bool all_in_packets(const Row* rows) {
  bool all = true;
#pragma unroll
  for (int k = 0; k < K; ++k) all &= in_packets(rows[k]);
  return all;
}

__device__ inline Packet fetch(Row row, int64_t at) {
  Packet packet = {};
  if (!row.data) return packet;
  if (row.dtype == DType::kFloat32) {
    const uint4* const p = reinterpret_cast<const uint4*>(static_cast<const float*>(row.data) + at);
    packet.raw[0] = __ldcs(p);
    packet.raw[1] = __ldcs(p + 1);
  } else {
    packet.raw[0] =
        __ldcs(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row.data) + at));
  }
  return packet;
}

template <class T>
__device__ inline void unpack(const Packet& packet, float* x) {
  const T* const values = reinterpret_cast<const T*>(packet.raw);
#pragma unroll
  for (int e = 0; e < kVector; ++e) x[e] = as_float(values[e]);
}

__device__ inline void unpack(const Packet& packet, DType dtype, float* x) {
  if (dtype == DType::kFloat32)
    unpack<float>(packet, x);
  else if (dtype == DType::kBFloat16)
    unpack<__nv_bfloat16>(packet, x);
  else
    unpack<__half>(packet, x);
}

template <class T>
__device__ inline void put_vector(T* to, const float* x) {
  alignas(16) T rounded[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) rounded[e] = static_cast<T>(x[e]);
  constexpr int kPer = 16 / sizeof(T);
#pragma unroll
  for (int v = 0; v < kVector / kPer; ++v)
    reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<uint4*>(rounded)[v];
}

__device__ inline void put_vector(void* to, DType dtype, int64_t at, const float* x) {
  if (dtype == DType::kFloat32)
    put_vector(static_cast<float*>(to) + at, x);
  else if (dtype == DType::kBFloat16)
    put_vector(static_cast<__nv_bfloat16*>(to) + at, x);
  else
    put_vector(static_cast<__half*>(to) + at, x);
}

// x as it reads after it was stored in that dtype.
__device__ inline double stored(DType dtype, double x) {
  switch (dtype) {
    case DType::kFloat64: return x;
    case DType::kFloat32: return static_cast<float>(x);
    case DType::kBFloat16: return as_float(__float2bfloat16(static_cast<float>(x)));
    default: return as_float(__float2half(static_cast<float>(x)));
  }
}

// x[0..8) as they read after they were stored in that dtype, of those that fit into packets.
__device__ inline void round_to(DType dtype, float* x) {
  if (dtype == DType::kBFloat16)
#pragma unroll
    for (int e = 0; e < kVector; ++e) x[e] = as_float(__float2bfloat16(x[e]));
  else if (dtype == DType::kFloat16)
#pragma unroll
    for (int e = 0; e < kVector; ++e) x[e] = as_float(__float2half(x[e]));
}

// ---- sums over all blocks

__device__ inline double block_sum(double x, double* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += shared[w];
  return sum;
}

// Adds `count` numbers of every thread over all threads of all blocks, in the order of the blocks.
// The last block to arrive gets true, and then holds the totals in work.partials[p * gridDim.x].
template <int kCount, class S>
__device__ inline bool grid_sums(const S* mine, const GramWorkspace& work) {
  __shared__ double shared[kThreads / 32];
  __shared__ bool last;
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    const double sum = block_sum(mine[p], shared);
    if (threadIdx.x == 0) work.partials[static_cast<int64_t>(p) * gridDim.x + blockIdx.x] = sum;
  }
  __threadfence();
  if (threadIdx.x == 0) last = atomicAdd(work.arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int p = threadIdx.x; p < kCount; p += kThreads) {
    double* const row = work.partials + static_cast<int64_t>(p) * gridDim.x;
    double sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += __ldcg(row + b);
    row[0] = sum;
  }
  __syncthreads();
  return true;
}

template <class F>
cudaError_t with_lists(int lists, const F& f) {
  switch (lists) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    case 8: return f(std::integral_constant<int, 8>());
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace mollm
