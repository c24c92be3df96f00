// Words of CUDA C++ that the kernels use, for a host compiler.
#pragma once
#include <cstdlib>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Of the host's functions those that csrc/cuda/api.cpp asks for its versions with.
constexpr int cudaSuccess = 0;
inline int cudaDriverGetVersion(int* version) {
    const char* emulated = std::getenv("FASTATTN_EMULATED_DRIVER");
    return *version = emulated ? std::atoi(emulated) : 13000, cudaSuccess;
}
inline int cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
