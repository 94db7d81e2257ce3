// One optimizer step along d = sum_k w_k g_k, which is never written: every gradient, parameter and
// state is read once, parameter and state are written once.
//
//     SGD      b <- momentum b + d;  d <- d + momentum b if nesterov, else b
//              x <- (1 - lr decay) x - lr d
//     AdamW    m <- beta1 m + (1 - beta1) d;  v <- beta2 v + (1 - beta2) d^2
//              x <- (1 - lr decay) x - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
#pragma once

#include <math.h>

#include "gram.h"
#include "host_device.h"

namespace mollm {

enum class Method : int { kSgd = 0, kAdamW = 1 };

struct UpdateOptions {
  Method method;
  double lr, decay;
  double momentum;           // SGD
  bool nesterov;             // SGD
  double beta1, beta2, eps;  // AdamW
  bool stochastic;           // round bfloat16 results up or down at random, without bias
  uint64_t seed;
};

// One tensor for each of the N parameters, as in TensorLists; null where the step keeps none.
struct TensorList {
  void* const* data;
  const DType* dtypes;
};

struct UpdateTargets {
  TensorList param;           // x
  TensorList first;           // b or m; where m is null, d takes its place and beta1 counts as 0
  TensorList second;          // v
  const float* const* steps;  // t, this step included
};

// weights are those of d. Where second_weights is given, v takes sum_k second_weights_k g_k^2 in
// place of d^2. Running means are moved on and take the gradients' place in both. Where changes is
// given, [K], it becomes g_k . (x after - x before), of the gradients themselves and of x as it is
// stored.
void update_cpu(const TensorLists& gradients, const double* weights, const double* second_weights,
                const RunningMeans& means, const UpdateTargets& targets,
                const UpdateOptions& options, double* changes, int threads);

#ifdef MOLLM_WITH_CUDA
// The same on the current CUDA device, enqueued on `stream`. Every pointer points to device memory.
// params, first and second are [2, N]: addresses (0 for none) and dtypes.
struct DeviceUpdate {
  const int64_t* params;
  const int64_t* first;
  const int64_t* second;
  const int64_t* steps;          // [N], the addresses of t
  const double* weights;         // [K]
  const double* second_weights;  // [K] or null
  DeviceMeans means;
  const bool* proceed;  // where false nothing is written; may be null
  const double* lr;     // takes the place of options.lr where it is not null
  UpdateOptions options;
  GramWorkspace work;  // partials [K, blocks]
  double* changes;     // [K] or null
};

// One more than the solver takes: the direction may come with the gradients it was made of.
constexpr int kMaxUpdateLists = 9;

int update_cuda(const DeviceLists& lists, const DeviceUpdate& update, int blocks, void* stream);
#endif

// The functions below are static: update_kernels.cpp is compiled once per instruction set, and no
// set's copy may serve another.

// What one element's step needs, with the bias corrections and the learning rate worked in.
struct StepScalars {
  double keep;          // 1 - lr decay
  double lr;            // AdamW: lr / (1 - beta1^t)
  double momentum;      // SGD
  bool nesterov;        // SGD
  double beta1, beta2;  // AdamW
  double root, eps;     // AdamW: 1 / sqrt(1 - beta2^t)
};

MOLLM_HD static inline StepScalars step_scalars(const UpdateOptions& o, double lr, double step,
                                                bool has_first) {
  StepScalars s = {1 - lr * o.decay, lr, o.momentum, o.nesterov, o.beta1, o.beta2, 1, o.eps};
  if (o.method == Method::kSgd) return s;
  if (has_first) s.lr /= 1 - pow(o.beta1, step);
  s.root = 1 / sqrt(1 - pow(o.beta2, step));
  return s;
}

// The hash behind stochastic rounding: every bit of x changes about half of the result's bits.
MOLLM_HD static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// One key for each parameter, step and seed; element e of it then draws mix(key ^ e).
MOLLM_HD static inline uint32_t rounding_key(uint64_t seed, float step, int64_t tensor) {
  uint32_t key = mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32)));
  key = mix(key + static_cast<uint32_t>(step));
  return mix(key ^ mix(static_cast<uint32_t>(tensor) + 0x9e3779b9u));
}

// The parameter (salt 0) and its states draw from keys of their own: keys that differ in a bit only
// would draw the same noise for other elements.
MOLLM_HD static inline uint32_t salted(uint32_t key, uint32_t salt) {
  return salt ? mix(key + salt) : key;
}

}  // namespace mollm
