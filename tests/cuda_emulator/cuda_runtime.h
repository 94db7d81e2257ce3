#pragma once

#include "emulator.h"

typedef int cudaError_t;
typedef void* cudaStream_t;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

constexpr int kEmulatedMultiprocessors = 2;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kEmulatedMultiprocessors;
  return cudaSuccess;
}
cudaError_t cudaGetLastError();                     // not 0 after a fault, once
const char* cudaGetErrorString(cudaError_t error);  // what the fault was
