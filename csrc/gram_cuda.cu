// Gram matrix, solver and weighted sum on a CUDA device.
//
// Bytes: gram reads each of the K gradients once, combine reads them once more and writes one.
// Work is cut into chunks of one tensor; a persistent grid takes them in a fixed pattern. Products
// are added in float over one chunk per thread, then in double; block partials are added by the
// last block in the order of the blocks. No atomics on floating-point numbers: for a given device
// the result is the same, bit for bit, in every run. Where squares are beyond what a float holds,
// the thread that meets them does its part of the chunk once more in double.
#include "cuda_lists.cuh"
#include "dual_space.h"

namespace mollm {
namespace {

// Few lists are few loads at a time for each thread: more threads must hide their latency.
constexpr int blocks_per_sm(int lists) { return lists <= 3 ? 4 : 2; }
constexpr int moved_blocks_per_sm(int lists, bool means) {
  if (means) return lists <= 3 ? 2 : 1;
  return lists == 1 ? 4 : lists == 2 ? 3 : lists <= 4 ? 2 : 1;
}
static_assert(kThreads >= 1 << kMaxObjectives, "the solver gives every face a thread");

// Below this sum of a thread's squares, floats too small to have a square may be what is missing
// from it: 2^7 of them, each up to the smallest float 2^-149, are 2^-24 of it or less.
constexpr float kFaint = 0x1p-100f;

// ---- Gram

// One sum for each pair of lists. Where registers are short it is `volatile`, and so in memory,
// which is looked at once a chunk only.
template <int K, class S = double>
struct Products {
  static constexpr int kPairs = K * (K + 1) / 2;
  S total[kPairs];
};

template <int K>
__device__ inline void multiply(const float x[][kVector], float* sums) {
#pragma unroll
  for (int i = 0; i < K; ++i)
#pragma unroll
    for (int j = 0; j <= i; ++j)
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        sums[i * (i + 1) / 2 + j] = fmaf(x[i][e], x[j][e], sums[i * (i + 1) / 2 + j]);
}

// Whether this thread's part of a row, whole vectors of the chunk, is zero.
__device__ inline bool is_zero(Row row, int64_t begin, int64_t end) {
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kVector; at < end; at += kThreads * kVector) {
    const Packet p = fetch(row, at);
    const uint4 a = p.raw[0], b = p.raw[1];
    if (a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w) return false;
  }
  return true;
}

// Whether floats held all squares of this thread's part of the rows, or there was nothing to hold.
// Rows are looked up again, one by one: few registers are free here.
template <int K>
__device__ inline bool in_range(const float* sums, const DeviceLists& lists,
                                const DeviceMeans& moving, const Chunk& chunk, int64_t end) {
  bool finite = true;
  unsigned faint = 0;
#pragma unroll
  for (int p = 0; p < Products<K>::kPairs; ++p) finite &= isfinite(sums[p]);
#pragma unroll
  for (int k = 0; k < K; ++k) faint |= unsigned{sums[k * (k + 1) / 2 + k] < kFaint} << k;
  if (!finite) return false;
#pragma unroll 1
  for (int64_t k = 0; faint; ++k, faint >>= 1) {
    if (!(faint & 1u)) continue;
    const int64_t at = k * lists.tensors + chunk.tensor;
    const Row row = row_at(lists.data, lists.dtypes, at);
    if (!row.data) continue;
    if (!is_zero(row, chunk.begin, end)) return false;
    if (moving.data && !is_zero(row_at(moving.data, moving.dtypes, at), chunk.begin, end))
      return false;
  }
  return true;
}

// In double, one element at a time. Each thread takes kRun neighbours, then those of its next turn.
template <int K, int kRun>
__device__ inline void gram_elements(const Row* rows, int64_t begin, int64_t end,
                                     Products<K>& products) {
#pragma unroll 1
  for (int64_t run = begin + threadIdx.x * kRun; run < end; run += kThreads * kRun) {
#pragma unroll 1
    for (int64_t at = run; at < run + kRun; ++at) {
      double x[K];
#pragma unroll
      for (int k = 0; k < K; ++k) x[k] = rows[k].data ? load_one(rows[k], at) : 0.0;
#pragma unroll
      for (int i = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j) products.total[i * (i + 1) / 2 + j] += x[i] * x[j];
    }
  }
}

// The sums of this thread's part of the chunk's whole vectors, which end at `end`.
template <int K>
__device__ inline void add_sums(const float* sums, const DeviceLists& lists, const Row* rows,
                                const Chunk& chunk, int64_t end, Products<K>& products) {
  if (!in_range<K>(sums, lists, DeviceMeans(), chunk, end))
    return gram_elements<K, kVector>(rows, chunk.begin, end, products);
#pragma unroll
  for (int p = 0; p < Products<K>::kPairs; ++p) products.total[p] += sums[p];
}

template <int K, class T>
__device__ inline void gram_vectors(const DeviceLists& lists, const Row* rows, const Chunk& chunk,
                                    Products<K>& products) {
  float sums[Products<K>::kPairs] = {};
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kVector * kVector;
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < whole; at += kThreads * kVector) {
    float x[K][kVector];
#pragma unroll
    for (int k = 0; k < K; ++k) load_vector(static_cast<const T*>(rows[k].data) + at, x[k]);
    multiply<K>(x, sums);
  }
  add_sums<K>(sums, lists, rows, chunk, whole, products);
}

// The same for rows of which some are missing or that differ in dtype.
template <int K>
__device__ inline void gram_packets(const DeviceLists& lists, const Row* rows, const Chunk& chunk,
                                    Products<K>& products) {
  float sums[Products<K>::kPairs] = {};
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kVector * kVector;
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < whole; at += kThreads * kVector) {
    Packet g[K];
#pragma unroll
    for (int k = 0; k < K; ++k) g[k] = fetch(rows[k], at);
    float x[K][kVector];
#pragma unroll
    for (int k = 0; k < K; ++k) unpack(g[k], rows[k].dtype, x[k]);
    multiply<K>(x, sums);
  }
  add_sums<K>(sums, lists, rows, chunk, whole, products);
}

// Writes the totals of grid_sums as a symmetric matrix; called by the last block.
template <int K>
__device__ inline void write_gram(const GramWorkspace& work, double* gram) {
  for (int p = threadIdx.x; p < Products<K>::kPairs; p += kThreads) {
    int i = 0;
    while ((i + 1) * (i + 2) / 2 <= p) ++i;
    const int j = p - i * (i + 1) / 2;
    gram[i * K + j] = gram[j * K + i] = work.partials[static_cast<int64_t>(p) * gridDim.x];
  }
}

template <int K>
__global__ void __launch_bounds__(kThreads, K <= 6 ? blocks_per_sm(K) : 1)
    gram_kernel(DeviceLists lists, GramWorkspace work, double* gram) {
  Products<K> products = {};
  for (int64_t c = blockIdx.x; c < lists.chunks; c += gridDim.x) {
    const Chunk chunk = find_chunk(lists, c);
    Row rows[K];
    rows_of<K>(lists, chunk.tensor, rows);
    const int64_t length = chunk.end - chunk.begin;
    int64_t done = chunk.begin + length / kVector * kVector;
    if (uniform<K>(rows, DType::kBFloat16))
      gram_vectors<K, __nv_bfloat16>(lists, rows, chunk, products);
    else if (uniform<K>(rows, DType::kFloat32))
      gram_vectors<K, float>(lists, rows, chunk, products);
    else if (uniform<K>(rows, DType::kFloat16))
      gram_vectors<K, __half>(lists, rows, chunk, products);
    else if (all_in_packets<K>(rows))
      gram_packets<K>(lists, rows, chunk, products);
    else
      done = chunk.begin;
    gram_elements<K, 1>(rows, done, chunk.end, products);
  }
  if (grid_sums<Products<K>::kPairs>(products.total, work)) write_gram<K>(work, gram);
}

// ---- Gram of running means, or in Adam's metric

template <int K>
using MovedProducts = Products<K, std::conditional_t<(K > 6), volatile double, double>>;

// The largest sum of squares and the largest second moment that the step can compute and store.
struct Largest {
  double square, moment;
};

template <int K>
__device__ inline Largest largest_of(const Row* rows, const Row* means, const Row& second) {
  bool wide = second.data && second.dtype == DType::kFloat64;
#pragma unroll
  for (int k = 0; k < K; ++k)
    wide |= (rows[k].data && rows[k].dtype == DType::kFloat64) ||
            (means[k].data && means[k].dtype == DType::kFloat64);
  const double square = largest_moment(wide ? DType::kFloat64 : DType::kFloat32);
  return {square, second.data ? fmin(square, largest_moment(second.dtype)) : square};
}

// Adam's metric in float for one chunk. In shared memory, and not worked out by every thread: the
// compiler would convert the doubles again for every element.
template <int K>
struct FloatMetric {
  float weights[K], beta2, fresh, eps;
  float root;     // 1 / sqrt(1 - beta2^t)
  float largest;  // moment in float; larger ones, and larger squares, are left to doubles
};

template <int K>
__device__ inline void set_float_metric(const DeviceMetric& metric, double root, DType second,
                                        FloatMetric<K>& m) {
#pragma unroll
  for (int k = 0; k < K; ++k) m.weights[k] = static_cast<float>(metric.weights[k]);
  m.beta2 = static_cast<float>(metric.beta2);
  m.fresh = static_cast<float>(1 - metric.beta2);
  m.eps = static_cast<float>(metric.eps);
  m.root = static_cast<float>(root);
  m.largest = fminf(second == DType::kFloat16 ? 0x1p15f : 0x1p126f, m.fresh * 0x1p126f);
}

// P = 1 / (sqrt(v') root + eps), a few units in the last place away; NaN where the coming second
// moment v' is nearly more than a float or its dtype holds, 0 or infinite where P is.
template <int K>
__device__ inline float preconditioner(const FloatMetric<K>& m, const float x[][kVector], float v,
                                       int e) {
  float square = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) square = fmaf(m.weights[k] * x[k][e], x[k][e], square);
  const float moment = fmaf(m.beta2, v, m.fresh * square);
  const float deviation = moment == 0 ? 0 : moment * rsqrtf(moment);
  // A sum, because a choice would become a branch.
  return __fdividef(1, fmaf(deviation, m.root, m.eps)) + (moment <= m.largest ? 0.f : NAN);
}

// In double, one element at a time; each thread takes `run` neighbours at a turn.
template <int K>
__device__ inline void moved_elements(const Row* rows, const Row* means, Row second,
                                      const DeviceMeans& moving, const DeviceMetric& metric,
                                      double root, const Chunk& chunk, int run,
                                      MovedProducts<K>& products) {
  const Largest largest = largest_of<K>(rows, means, second);
#pragma unroll 1
  for (int64_t first = chunk.begin + threadIdx.x * run; first < chunk.end;
       first += kThreads * run) {
#pragma unroll 1
    for (int64_t at = first; at < first + run; ++at) {
      double x[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        x[k] = rows[k].data ? load_one(rows[k], at) : 0.0;
        if (moving.data && rows[k].data)
          x[k] = stored(means[k].dtype,
                        moving.beta * load_one(means[k], at) + (1 - moving.beta) * x[k]);
      }
      double scale = 1;
      if (metric.weights) {
        const double v = second.data ? load_one(second, at) : 0.0;
        double square = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) square += metric.weights[k] * x[k] * x[k];
        const double moment = metric.beta2 * v + (1 - metric.beta2) * square;
        // NaN where the step could not compute or store the second moment.
        const bool fits = square <= largest.square && moment <= largest.moment;
        scale = fits ? 1 / (sqrt(moment) * root + metric.eps) : NAN;
      }
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const double scaled = scale * x[i];
#pragma unroll
        for (int j = 0; j <= i; ++j)
          products.total[i * (i + 1) / 2 + j] = products.total[i * (i + 1) / 2 + j] + scaled * x[j];
      }
    }
  }
}

// What a thread reads at a time. Everything is on its way before the first of it is waited for.
template <int K, bool kMeans>
struct MovedPackets {
  Packet g[K], mean[kMeans ? K : 1], second;
};

template <int K, bool kMeans>
__device__ inline MovedPackets<K, kMeans> fetch_moved(const Row* rows, const Row* means, Row second,
                                                      int64_t at) {
  MovedPackets<K, kMeans> packets;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    packets.g[k] = fetch(rows[k], at);
    if (kMeans) packets.mean[k] = fetch(means[k], at);
  }
  packets.second = fetch(second, at);
  return packets;
}

// The eight gradients of one row, or its eight coming means.
template <bool kMeans>
__device__ inline void unpack_moved(const Packet& g, DType dtype, const Packet& mean,
                                    DType mean_dtype, bool present, double beta, float* x) {
  unpack(g, dtype, x);
  if (!kMeans || !present) return;
  float old[kVector];
  unpack(mean, mean_dtype, old);
  const float kept = static_cast<float>(beta), fresh = static_cast<float>(1 - beta);
#pragma unroll
  for (int e = 0; e < kVector; ++e) x[e] = kept * old[e] + fresh * x[e];
  round_to(mean_dtype, x);
}

// False where this thread's part is left for moved_elements.
template <int K, bool kMeans>
__device__ inline bool moved_vectors(const DeviceLists& lists, const Row* rows, const Row* means,
                                     Row second, const DeviceMeans& moving, bool has_metric,
                                     const FloatMetric<K>& metric, const Chunk& chunk,
                                     MovedProducts<K>& products) {
  float sums[Products<K>::kPairs] = {};
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < chunk.end; at += kThreads * kVector) {
    const auto packets = fetch_moved<K, kMeans>(rows, means, second, at);
    float x[K][kVector], P[kVector];
#pragma unroll
    for (int k = 0; k < K; ++k)
      unpack_moved<kMeans>(packets.g[k], rows[k].dtype, packets.mean[kMeans ? k : 0],
                           means[kMeans ? k : 0].dtype, rows[k].data, moving.beta, x[k]);
    unpack(packets.second, second.dtype, P);
#pragma unroll
    for (int e = 0; e < kVector; ++e) P[e] = has_metric ? preconditioner<K>(metric, x, P[e], e) : 1;
#pragma unroll
    for (int e = 0; e < kVector; ++e)
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const float scaled = P[e] * x[i][e];
#pragma unroll
        for (int j = 0; j <= i; ++j)
          sums[i * (i + 1) / 2 + j] = fmaf(scaled, x[j][e], sums[i * (i + 1) / 2 + j]);
      }
  }
  if (!in_range<K>(sums, lists, moving, chunk, chunk.end)) return false;
#pragma unroll
  for (int p = 0; p < Products<K>::kPairs; ++p) products.total[p] = products.total[p] + sums[p];
  return true;
}

template <int K, bool kMeans>
__global__ void __launch_bounds__(kThreads, moved_blocks_per_sm(K, kMeans))
    gram_moved_kernel(DeviceLists lists, DeviceMeans moving, DeviceMetric metric,
                      GramWorkspace work, double* gram) {
  __shared__ FloatMetric<K> in_float;
  MovedProducts<K> products = {};
  for (int64_t c = blockIdx.x; c < lists.chunks; c += gridDim.x) {
    const Chunk chunk = find_chunk(lists, c);
    Row rows[K], means[K], second = {nullptr, DType::kFloat32};
    rows_of<K>(lists, chunk.tensor, rows);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      means[k] = {nullptr, DType::kFloat32};
      if (kMeans) means[k] = row_at(moving.data, moving.dtypes, k * lists.tensors + chunk.tensor);
    }
    bool packets = all_in_packets<K>(rows) && all_in_packets<K>(means);
    double root = 1;
    if (metric.weights) {
      second = row_at(metric.second, metric.dtypes, chunk.tensor);
      const float step = *reinterpret_cast<const float*>(metric.steps[chunk.tensor]);
      root = 1 / sqrt(1 - pow(metric.beta2, static_cast<double>(step) + 1));
      packets &= in_packets(second);
      __syncthreads();
      if (threadIdx.x == 0) set_float_metric<K>(metric, root, second.dtype, in_float);
      __syncthreads();
    }
    Chunk part = chunk;
    part.end = packets ? chunk.begin + (chunk.end - chunk.begin) / kVector * kVector : chunk.begin;
    bool done = moved_vectors<K, kMeans>(lists, rows, means, second, moving,
                                         metric.weights != nullptr, in_float, part, products);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn, done = false) {  // what was left, then the odd elements
      const int run = turn == 0 ? kVector : 1;
      if (!done) moved_elements<K>(rows, means, second, moving, metric, root, part, run, products);
      part = {chunk.tensor, part.end, chunk.end};
    }
  }
  if (grid_sums<Products<K>::kPairs>(products.total, work)) write_gram<K>(work, gram);
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

__global__ void __launch_bounds__(kThreads, 1)
    solve_kernel(int K, const double* gram, SolveRequest request, double* packed) {
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
  // Everything is on its way before the first of it is waited for. Where a row's weight is 0 the
  // first other one takes its place: a choice of whether to read would be waited for.
  const void* any = rows[0].data;
#pragma unroll
  for (int k = K - 1; k >= 0; --k)
    if (weights[k] != 0) any = rows[k].data;
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kVector * kVector;
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < whole; at += kThreads * kVector) {
    Raw<T> raw[K];
#pragma unroll
    for (int k = 0; k < K; ++k)
      raw[k] = Raw<T>(static_cast<const T*>(weights[k] == 0 ? any : rows[k].data) + at);
    float sum[kVector] = {};
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (weights[k] != 0) sum[e] = fmaf(weights[k], as_float(raw[k].values[e]), sum[e]);
    put_vector(out + at, sum);
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
__global__ void __launch_bounds__(kThreads, blocks_per_sm(K))
    combine_kernel(DeviceLists lists, const double* weights, DeviceOutputs out) {
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

}  // namespace

static int filled_grid(int blocks_per_multiprocessor, int* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *blocks = multiprocessors * blocks_per_multiprocessor;
  return error;
}

int cuda_grid(int lists, int* blocks) { return filled_grid(blocks_per_sm(lists), blocks); }

int cuda_moved_grid(int lists, bool means, int* blocks) {
  return filled_grid(moved_blocks_per_sm(lists, means), blocks);
}

int gram_cuda(const DeviceLists& lists, const GramWorkspace& work, int blocks, double* gram,
              void* stream) {
  return with_lists(lists.lists, [&](auto k) {
    gram_kernel<k.value>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(lists, work, gram);
    return cudaGetLastError();
  });
}

int gram_moved_cuda(const DeviceLists& lists, const DeviceMeans& means, const DeviceMetric& metric,
                    const GramWorkspace& work, int blocks, double* gram, void* stream) {
  return with_lists(lists.lists, [&](auto k) {
    if (means.data)
      gram_moved_kernel<k.value, true><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          lists, means, metric, work, gram);
    else
      gram_moved_kernel<k.value, false><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          lists, means, metric, work, gram);
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
