// MOLLM_HD marks a function that both the CPU and the CUDA sources compile.
#pragma once

#ifdef __CUDACC__
#define MOLLM_HD __host__ __device__
#else
#define MOLLM_HD
#endif
