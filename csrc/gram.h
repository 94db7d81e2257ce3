// Gram matrix of K lists of tensors, and their weighted sum.
#pragma once

#include <cstdint>

namespace mollm {

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

// gram[i, j] = sum over all elements of g_i * g_j, [K, K]. The order of the additions depends on
// the sizes alone: the result is the same, bit for bit, for any number of threads.
void gram_cpu(const TensorLists& gradients, double* gram, int threads);

// out[n] = sum_k weights[k] * g_k[n]. A list of weight 0 is not read: an infinity in it is inert.
// out may be one of the lists.
void combine_cpu(const TensorLists& gradients, const double* weights, void* const* out,
                 const DType* out_dtypes, int threads);

// dots[k] = g_k . x for one more list x, [K], every product and sum in double.
void dots_cpu(const TensorLists& gradients, const void* const* x, const DType* x_dtypes,
              double* dots, int threads);

// The instruction set that gram_cpu and combine_cpu run on: "avx512", "avx2" or "baseline".
const char* cpu_instruction_set();

#ifdef MOLLM_WITH_CUDA
// The same on the current device, enqueued on `stream` (a cudaStream_t). All pointers but those in
// `gradients` itself and `out_dtypes` point to device memory. Return the cudaError_t.
int gram_cuda(const TensorLists& gradients, double* gram, void* stream);
int combine_cuda(const TensorLists& gradients, const double* weights, void* const* out,
                 const DType* out_dtypes, void* stream);
const char* cuda_error_string(int error);
#endif

}  // namespace mollm
