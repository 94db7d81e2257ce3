// Gram matrix, solver and weighted sum on a CUDA device.
//
// Bytes: gram reads each of the K gradients once, combine reads them once more and writes one.
// Work is cut into chunks of one tensor; a persistent grid takes them in a fixed pattern. Products
// are added in float over one chunk per thread, then in double; block partials are added by the
// last block in the order of the blocks. No atomics on floating-point numbers: for a given device
// the result is the same, bit for bit, in every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "dual_space.h"
#include "gram.h"

namespace mollm {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;
constexpr int kVector = 8;  // elements a thread takes at a time: 16 bytes of a 16-bit type
static_assert(kThreads >= 1 << kMaxObjectives, "the solver gives every face a thread");

// ---- reading and writing eight elements of one row

struct Row {
  const void* data;
  DType dtype;
};

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(double x) { return static_cast<float>(x); }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }

// Sixteen bytes at a time; the chunk's start must be aligned to them.
template <class T>
__device__ inline void load_vector(const T* p, float* x) {
  constexpr int kPer = 16 / sizeof(T);
  alignas(16) T raw[kVector];
#pragma unroll
  for (int v = 0; v < kVector / kPer; ++v)
    reinterpret_cast<uint4*>(raw)[v] = __ldcs(reinterpret_cast<const uint4*>(p) + v);
#pragma unroll
  for (int e = 0; e < kVector; ++e) x[e] = as_float(raw[e]);
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

template <int K>
__device__ inline void rows_of(const DeviceLists& lists, int64_t tensor, Row* rows) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t at = k * lists.tensors + tensor;
    rows[k].data = reinterpret_cast<const void*>(lists.data[at]);
    rows[k].dtype = static_cast<DType>(lists.dtypes[at]);
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

// ---- Gram

template <int K>
struct Products {
  static constexpr int kPairs = K * (K + 1) / 2;
  double total[kPairs];
};

template <int K, class T>
__device__ inline void gram_vectors(const Row* rows, const Chunk& chunk, Products<K>& products) {
  float sums[Products<K>::kPairs] = {};
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kVector * kVector;
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < whole; at += kThreads * kVector) {
    float x[K][kVector];
#pragma unroll
    for (int k = 0; k < K; ++k) load_vector(static_cast<const T*>(rows[k].data) + at, x[k]);
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j)
#pragma unroll
        for (int e = 0; e < kVector; ++e)
          sums[i * (i + 1) / 2 + j] = fmaf(x[i][e], x[j][e], sums[i * (i + 1) / 2 + j]);
  }
#pragma unroll
  for (int p = 0; p < Products<K>::kPairs; ++p) products.total[p] += sums[p];
}

template <int K>
__device__ inline void gram_elements(const Row* rows, int64_t begin, int64_t end,
                                     Products<K>& products) {
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    double x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = rows[k].data ? load_one(rows[k], at) : 0.0;
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j) products.total[i * (i + 1) / 2 + j] += x[i] * x[j];
  }
}

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

template <int K>
__global__ void __launch_bounds__(kThreads) gram_kernel(DeviceLists lists, GramWorkspace work,
                                                        double* gram) {
  constexpr int kPairs = Products<K>::kPairs;
  __shared__ double shared[kThreads / 32];
  __shared__ bool last;
  Products<K> products = {};
  for (int64_t c = blockIdx.x; c < lists.chunks; c += gridDim.x) {
    const Chunk chunk = find_chunk(lists, c);
    Row rows[K];
    rows_of<K>(lists, chunk.tensor, rows);
    const int64_t length = chunk.end - chunk.begin;
    int64_t done = chunk.begin + length / kVector * kVector;
    if (uniform<K>(rows, DType::kBFloat16))
      gram_vectors<K, __nv_bfloat16>(rows, chunk, products);
    else if (uniform<K>(rows, DType::kFloat32))
      gram_vectors<K, float>(rows, chunk, products);
    else if (uniform<K>(rows, DType::kFloat16))
      gram_vectors<K, __half>(rows, chunk, products);
    else
      done = chunk.begin;
    gram_elements<K>(rows, done, chunk.end, products);
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const double sum = block_sum(products.total[p], shared);
    if (threadIdx.x == 0) work.partials[static_cast<int64_t>(p) * gridDim.x + blockIdx.x] = sum;
  }
  __threadfence();
  if (threadIdx.x == 0) last = atomicAdd(work.arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int p = threadIdx.x; p < kPairs; p += kThreads) {
    double sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b)
      sum += __ldcg(work.partials + static_cast<int64_t>(p) * gridDim.x + b);
    int i = 0;
    while ((i + 1) * (i + 2) / 2 <= p) ++i;
    const int j = p - i * (i + 1) / 2;
    gram[i * K + j] = gram[j * K + i] = sum;
  }
  if (threadIdx.x == 0) *work.arrived = 0;  // ready for the next launch on this stream
}

// ---- solver: one block, one face per thread

struct FacePerThread {
  double* values;   // [kThreads], shared
  unsigned* faces;  // [kThreads], shared

  __device__ void operator()(const Quadratic& q, double* y) const {
    const unsigned me = threadIdx.x;
    double value = 0;
    const bool found = me > 0 && me < (1u << q.n) && face_solution(q, me, y, &value);
    __syncthreads();
    values[me] = found ? value : 0;
    faces[me] = me;
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (me >= half) continue;
      const bool better = values[me + half] < values[me] ||
                          (values[me + half] == values[me] && faces[me + half] < faces[me]);
      if (better) {
        values[me] = values[me + half];
        faces[me] = faces[me + half];
      }
    }
    __syncthreads();
    for (int i = 0; i < q.n; ++i) y[i] = 0;
    if (values[0] < 0) face_solution(q, faces[0], y, &value);
  }
};

__global__ void __launch_bounds__(kThreads, 1) solve_kernel(int K, const double* gram,
                                                         SolveRequest request, double* packed) {
  __shared__ double values[kThreads];
  __shared__ unsigned faces[kThreads];
  const FacePerThread nnls{values, faces};
  const Length length = static_cast<Length>(request.length);
  Solution s;
  if (request.rule == 0)
    s = dual_space_solution(K, gram, length, nnls);
  else if (request.rule == 1)
    s = min_norm_solution(K, gram, request.normalize, length, nnls);
  else
    s = projected_solution(K, gram, request.preferences, request.rule == 3, request.normalize,
                           length, nnls);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < K; ++k) packed[k] = s.weights[k];
  packed[K] = static_cast<double>(static_cast<int>(s.status));
  packed[K + 1] = s.pareto_gap;
}

// ---- weighted sum

template <int K, class T>
__device__ inline void combine_vectors(const Row* rows, const Chunk& chunk, const float* weights,
                                       T* out) {
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kVector * kVector;
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < whole; at += kThreads * kVector) {
    float sum[kVector] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (weights[k] == 0) continue;
      float x[kVector];
      load_vector(static_cast<const T*>(rows[k].data) + at, x);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] = fmaf(weights[k], x[e], sum[e]);
    }
    alignas(16) T rounded[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) rounded[e] = static_cast<T>(sum[e]);
    constexpr int kPer = 16 / sizeof(T);
#pragma unroll
    for (int v = 0; v < kVector / kPer; ++v)
      reinterpret_cast<uint4*>(out + at)[v] = reinterpret_cast<uint4*>(rounded)[v];
  }
}

template <int K>
__device__ inline void combine_elements(const Row* rows, int64_t begin, int64_t end,
                                        const double* weights, void* out, DType dtype) {
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (rows[k].data && weights[k] != 0) sum += weights[k] * load_one(rows[k], at);
    store_one(out, dtype, at, sum);
  }
}

template <int K>
__global__ void __launch_bounds__(kThreads) combine_kernel(DeviceLists lists,
                                                           const double* weights,
                                                           DeviceOutputs out) {
  double exact[K];
  float w[K];
#pragma unroll
  for (int k = 0; k < K; ++k) w[k] = static_cast<float>(exact[k] = weights[k]);
  // Backwards: what gram read last may still be in L2.
  for (int64_t c = lists.chunks - 1 - blockIdx.x; c >= 0; c -= gridDim.x) {
    const Chunk chunk = find_chunk(lists, c);
    Row rows[K];
    rows_of<K>(lists, chunk.tensor, rows);
    void* to = reinterpret_cast<void*>(out.data[chunk.tensor]);
    const DType dtype = static_cast<DType>(out.dtypes[chunk.tensor]);
    const bool aligned = uniform<K>(rows, dtype) && reinterpret_cast<uintptr_t>(to) % 16 == 0;
    int64_t done = chunk.begin + (chunk.end - chunk.begin) / kVector * kVector;
    if (aligned && dtype == DType::kBFloat16)
      combine_vectors<K>(rows, chunk, w, static_cast<__nv_bfloat16*>(to));
    else if (aligned && dtype == DType::kFloat32)
      combine_vectors<K>(rows, chunk, w, static_cast<float*>(to));
    else if (aligned && dtype == DType::kFloat16)
      combine_vectors<K>(rows, chunk, w, static_cast<__half*>(to));
    else
      done = chunk.begin;
    combine_elements<K>(rows, done, chunk.end, exact, to, dtype);
  }
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

int cuda_grid(int* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *blocks = multiprocessors * kBlocksPerSm;
  return error;
}

int gram_cuda(const DeviceLists& lists, const GramWorkspace& work, int blocks, double* gram,
              void* stream) {
  return with_lists(lists.lists, [&](auto k) {
    gram_kernel<k.value>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(lists, work, gram);
    return cudaGetLastError();
  });
}

int combine_cuda(const DeviceLists& lists, const double* weights, const DeviceOutputs& out,
                 int blocks, void* stream) {
  return with_lists(lists.lists, [&](auto k) {
    combine_kernel<k.value>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(lists, weights, out);
    return cudaGetLastError();
  });
}

int solve_cuda(int K, const double* gram, const SolveRequest& request, double* packed,
               void* stream) {
  solve_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(K, gram, request, packed);
  return cudaGetLastError();
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace mollm
