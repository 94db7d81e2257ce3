// Gram matrix of K lists of tensors, and their weighted sum.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mollm {

constexpr int kMaxRows = 64;  // K at most; the optimizer's callers stay far below

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// K lists of the same N tensors; tensor n of list k is data[k * tensors + n], contiguous, with
// counts[n] elements of dtypes[k * tensors + n]. A null pointer stands for a tensor of zeros.
struct TensorLists {
  int lists;                // K
  int64_t tensors;          // N
  const void* const* data;  // [K, N]
  const DType* dtypes;      // [K, N]
  const int64_t* counts;    // [N]
};

// Running means of the gradients, which take their place in gram and in the update:
//     mean_k <- beta mean_k + (1 - beta) g_k.
// gram only reads them and multiplies what the update will store, so that a Gram matrix that is not
// finite leaves them as they were.
struct RunningMeans {
  void* const* data = nullptr;    // [K, N]; wherever there is a gradient there is a mean
  const DType* dtypes = nullptr;  // [K, N]
  double beta = 0;
};

// The diagonal metric of Adam in which gram multiplies, sum_e P_e g_i,e g_j,e:
//     v' = beta2 v + (1 - beta2) sum_k weights_k g_k^2,  P = 1 / (sqrt(v' / correction) + eps)
// P is NaN where the step could not compute or store v': the Gram matrix then says that the step
// must be skipped.
struct AdamMetric {
  const void* const* second = nullptr;  // v, [N]; null for zeros
  const DType* dtypes = nullptr;        // [N]
  const double* corrections = nullptr;  // 1 - beta2^t, [N]
  const double* weights = nullptr;      // [K]; null: no metric
  double beta2 = 0, eps = 0;
};

// The largest v' that may be stored: update may round it a little differently than gram does, or
// up.
MOLLM_HD static inline double largest_moment(DType dtype) {
  constexpr double kMargin = 1 - 0x1p-20;
  switch (dtype) {
    case DType::kFloat64: return 0x1.fffffffffffffp1023 * kMargin;
    case DType::kFloat16: return 65504 * kMargin;
    case DType::kBFloat16: return 0x1.fep127 * kMargin;
    default: return 0x1.fffffep127 * kMargin;
  }
}

// gram[i, j] = sum over all elements of g_i * g_j, [K, K]. Products of floats are added as floats
// first; where squares are beyond what a float holds, their chunk is done once more in double. The
// order of the additions depends on sizes and values alone: the result is the same, bit for bit,
// for any number of threads.
void gram_cpu(const TensorLists& gradients, const RunningMeans& means, const AdamMetric& metric,
              double* gram, int threads);

// out[n] = sum_k weights[k] * g_k[n]. A list of weight 0 is not read: an infinity in it is inert.
// out may be one of the lists.
void combine_cpu(const TensorLists& gradients, const double* weights, void* const* out,
                 const DType* out_dtypes, int threads);

// dots[k] = g_k . x for one more list x, [K], every product and sum in double.
void dots_cpu(const TensorLists& gradients, const void* const* x, const DType* x_dtypes,
              double* dots, int threads);

// The instruction set that gram_cpu and combine_cpu run on: "avx512bf16", "avx512", "avx2" or
// "baseline".
const char* cpu_instruction_set();

#ifdef MOLLM_WITH_CUDA
// ---- The same on the current CUDA device, enqueued on `stream` (a cudaStream_t). Every pointer
// points to device memory; each call returns its cudaError_t.

constexpr int64_t kCudaChunk = 1 << 15;  // elements of one tensor that a block takes at a time

// As TensorLists, with addresses and dtypes as int64; tensor n starts with chunk first_chunk[n].
struct DeviceLists {
  int lists;                   // K
  int64_t tensors, chunks;     // N, and the sum of the tensors' chunks
  const int64_t* data;         // [K, N]
  const int64_t* dtypes;       // [K, N]
  const int64_t* counts;       // [N]
  const int64_t* first_chunk;  // [N]
};

struct DeviceOutputs {
  const int64_t* data;    // [N]
  const int64_t* dtypes;  // [N]
};

struct GramWorkspace {
  double* partials;   // [K (K + 1) / 2, blocks]
  unsigned* arrived;  // zero before the launch
};

// As RunningMeans and AdamMetric; null where they are not asked for. `steps` holds the addresses of
// t - 1 as floats.
struct DeviceMeans {
  const int64_t* data = nullptr;    // [K, N]
  const int64_t* dtypes = nullptr;  // [K, N]
  double beta = 0;
};

struct DeviceMetric {
  const int64_t* second = nullptr;  // [N]
  const int64_t* dtypes = nullptr;  // [N]
  const int64_t* steps = nullptr;   // [N]
  const double* weights = nullptr;  // [K]
  double beta2 = 0, eps = 0;
};

// Which rule of dual_space.h: 0 dual, 1 mgda, 2 project, 3 upgrad.
struct SolveRequest {
  int rule, length;
  bool normalize;
  const double* preferences;  // [K]
};

// The number of blocks that fills the current device with gram or combine of K lists; their results
// depend on it. What holds more rows than these K counts those as well.
int cuda_grid(int lists, int* blocks);
// The same for gram_moved.
int cuda_moved_grid(int lists, bool means, int* blocks);
int gram_cuda(const DeviceLists& lists, const GramWorkspace& work, int blocks, double* gram,
              void* stream);
int gram_moved_cuda(const DeviceLists& lists, const DeviceMeans& means, const DeviceMetric& metric,
                    const GramWorkspace& work, int blocks, double* gram, void* stream);
int combine_cuda(const DeviceLists& lists, const double* weights, const DeviceOutputs& out,
                 int blocks, void* stream);
// packed: [K weights, status, Pareto gap]
int solve_cuda(int K, const double* gram, const SolveRequest& request, double* packed,
               void* stream);
const char* cuda_error_string(int error);
#endif

}  // namespace mollm
