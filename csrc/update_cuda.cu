// The optimizer step on a CUDA device.
//
// Bytes: every gradient, parameter and state is read once, parameter and state are written once.
// Each thread holds eight elements of every row in registers, so that nothing is read again for
// the changes.
#include "cuda_lists.cuh"
#include "update.h"

namespace mollm {
namespace {

struct Elements {
  Row param, first, second;
};

// What the rows of one chunk have in common.
struct Plan {
  StepScalars scalars;
  uint32_t key;
};

template <class S>
__device__ inline void sgd(const StepScalars& s, bool has_first, S d, S& x, S& b) {
  if (has_first) {
    b = static_cast<S>(s.momentum) * b + d;
    d = s.nesterov ? d + static_cast<S>(s.momentum) * b : b;
  }
  x = static_cast<S>(s.keep) * x - static_cast<S>(s.lr) * d;
}

template <class S>
__device__ inline void adamw(const StepScalars& s, bool has_first, S d, S square, S& x, S& m,
                             S& v) {
  if (has_first) d = m = static_cast<S>(s.beta1) * m + static_cast<S>(1 - s.beta1) * d;
  v = static_cast<S>(s.beta2) * v + static_cast<S>(1 - s.beta2) * square;
  x = static_cast<S>(s.keep) * x -
      static_cast<S>(s.lr) * d / (sqrt(v) * static_cast<S>(s.root) + static_cast<S>(s.eps));
}

template <class S>
__device__ inline void step(Method method, const Elements& to, const StepScalars& s, S d, S square,
                            S& x, S& m, S& v) {
  if (method == Method::kSgd)
    sgd<S>(s, to.first.data, d, x, m);
  else
    adamw<S>(s, to.first.data, d, square, x, m, v);
}

// The bfloat16 above or below x, with the probabilities that make the mean exact; as a float.
__device__ inline float rounded_stochastically(float x, uint32_t key, int64_t at) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  const uint32_t noise = mix(key ^ static_cast<uint32_t>(at)) & 0xffffu;
  return __uint_as_float((bits + noise) & 0xffff0000u);
}

__device__ inline void write_vector(Row to, bool stochastic, uint32_t key, int64_t at, float* x) {
  if (stochastic && to.dtype == DType::kBFloat16)
#pragma unroll
    for (int e = 0; e < kVector; ++e) x[e] = rounded_stochastically(x[e], key, at + e);
  put_vector(const_cast<void*>(to.data), to.dtype, at, x);
}

__device__ inline void write_one(Row to, bool stochastic, uint32_t key, int64_t at, double x) {
  if (stochastic && to.dtype == DType::kBFloat16)
    x = rounded_stochastically(static_cast<float>(x), key, at);
  store_one(const_cast<void*>(to.data), to.dtype, at, x);
}

template <int K>
__device__ inline void update_vectors(const Row* rows, const Row* means, const Elements& to,
                                      const DeviceUpdate& u, const Plan& plan, const Chunk& chunk,
                                      double* changes) {
  float totals[K] = {};
  for (int64_t at = chunk.begin + threadIdx.x * kVector; at < chunk.end; at += kThreads * kVector) {
    Packet g[K], old[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      g[k] = fetch(rows[k], at);
      old[k] = fetch(means[k], at);
    }
    const Packet param = fetch(to.param, at), first = fetch(to.first, at),
                 second = fetch(to.second, at);
    float d[kVector] = {}, square[kVector] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!rows[k].data) continue;
      float x[kVector];
      unpack(g[k], rows[k].dtype, x);
      if (u.means.data) {
        float mean[kVector];
        unpack(old[k], means[k].dtype, mean);
        const float beta = static_cast<float>(u.means.beta);
        const float fresh = static_cast<float>(1 - u.means.beta);
#pragma unroll
        for (int e = 0; e < kVector; ++e) x[e] = beta * mean[e] + fresh * x[e];
        round_to(means[k].dtype, x);
        put_vector(const_cast<void*>(means[k].data), means[k].dtype, at, x);
      }
      const float weight = static_cast<float>(u.weights[k]);
      const float second_weight = u.second_weights ? static_cast<float>(u.second_weights[k]) : 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (weight != 0) d[e] = fmaf(weight, x[e], d[e]);
        if (u.second_weights) square[e] += second_weight * x[e] * x[e];
      }
    }
    float x[kVector], m[kVector], v[kVector], before[kVector];
    unpack(param, to.param.dtype, x);
    unpack(first, to.first.dtype, m);
    unpack(second, to.second.dtype, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      before[e] = x[e];
      step<float>(u.options.method, to, plan.scalars, d[e],
                  u.second_weights ? square[e] : d[e] * d[e], x[e], m[e], v[e]);
    }
    const bool stochastic = u.options.stochastic;
    if (to.second.data) write_vector(to.second, stochastic, salted(plan.key, 2), at, v);
    if (to.first.data) write_vector(to.first, stochastic, salted(plan.key, 1), at, m);
    write_vector(to.param, stochastic, plan.key, at, x);
    if (!u.changes) continue;
    round_to(to.param.dtype, x);
#pragma unroll
    for (int e = 0; e < kVector; ++e) before[e] = x[e] - before[e];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!rows[k].data) continue;  // nothing times an infinite change
      float y[kVector];
      unpack(g[k], rows[k].dtype, y);
#pragma unroll
      for (int e = 0; e < kVector; ++e) totals[k] = fmaf(y[e], before[e], totals[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) changes[k] += totals[k];
}

template <int K>
__device__ inline void update_elements(const Row* rows, const Row* means, const Elements& to,
                                       const DeviceUpdate& u, const Plan& plan, const Chunk& chunk,
                                       double* changes) {
  const bool stochastic = u.options.stochastic;
  for (int64_t at = chunk.begin + threadIdx.x; at < chunk.end; at += kThreads) {
    double g[K], d = 0, square = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      g[k] = 0;
      if (!rows[k].data) continue;
      double x = g[k] = load_one(rows[k], at);
      if (u.means.data) {
        x = stored(means[k].dtype, u.means.beta * load_one(means[k], at) + (1 - u.means.beta) * x);
        store_one(const_cast<void*>(means[k].data), means[k].dtype, at, x);
      }
      if (u.weights[k] != 0) d += u.weights[k] * x;
      if (u.second_weights) square += u.second_weights[k] * x * x;
    }
    double x = load_one(to.param, at);
    double m = to.first.data ? load_one(to.first, at) : 0;
    double v = to.second.data ? load_one(to.second, at) : 0;
    const double before = x;
    step<double>(u.options.method, to, plan.scalars, d, u.second_weights ? square : d * d, x, m, v);
    if (to.second.data) write_one(to.second, stochastic, salted(plan.key, 2), at, v);
    if (to.first.data) write_one(to.first, stochastic, salted(plan.key, 1), at, m);
    write_one(to.param, stochastic, plan.key, at, x);
    const double moved = load_one(to.param, at) - before;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (rows[k].data) changes[k] += g[k] * moved;
  }
}

template <int K>
__global__ void __launch_bounds__(kThreads) update_kernel(DeviceLists lists, DeviceUpdate u) {
  __shared__ Plan plan;
  if (u.proceed && *u.proceed == 0) return;
  double changes[K] = {};
  // Backwards: what gram read last may still be in L2.
  for (int64_t c = lists.chunks - 1 - blockIdx.x; c >= 0; c -= gridDim.x) {
    const Chunk chunk = find_chunk(lists, c);
    const int64_t n = chunk.tensor;
    Row rows[K], means[K];
    rows_of<K>(lists, n, rows);
    const Elements to = {row_at(u.params, u.params + lists.tensors, n),
                         row_at(u.first, u.first + lists.tensors, n),
                         row_at(u.second, u.second + lists.tensors, n)};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      means[k] = {nullptr, DType::kFloat32};
      if (u.means.data) means[k] = row_at(u.means.data, u.means.dtypes, k * lists.tensors + n);
    }
    const bool packets = in_packets(to.param) && in_packets(to.first) && in_packets(to.second) &&
                         all_in_packets<K>(rows) && all_in_packets<K>(means);
    __syncthreads();
    if (threadIdx.x == 0) {
      const float t = *reinterpret_cast<const float*>(u.steps[n]);
      plan.scalars =
          step_scalars(u.options, u.lr ? *u.lr : u.options.lr, t, to.first.data != nullptr);
      plan.key = rounding_key(u.options.seed, t, n);
    }
    __syncthreads();
    Chunk whole = chunk, rest = chunk;
    whole.end = rest.begin =
        packets ? chunk.begin + (chunk.end - chunk.begin) / kVector * kVector : chunk.begin;
    update_vectors<K>(rows, means, to, u, plan, whole, changes);
    update_elements<K>(rows, means, to, u, plan, rest, changes);
  }
  if (!u.changes || !grid_sums<K>(changes, u.work)) return;
  for (int k = threadIdx.x; k < K; k += kThreads)
    u.changes[k] = u.work.partials[static_cast<int64_t>(k) * gridDim.x];
}

}  // namespace

int update_cuda(const DeviceLists& lists, const DeviceUpdate& update, int blocks, void* stream) {
  const auto launch = [&](auto k) {
    update_kernel<k.value>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(lists, update);
    return cudaGetLastError();
  };
  if (lists.lists == kMaxUpdateLists) return launch(std::integral_constant<int, kMaxUpdateLists>());
  return with_lists(lists.lists, launch);
}

}  // namespace mollm
