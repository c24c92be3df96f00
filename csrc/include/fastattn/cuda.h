// The CUDA library as the binding sees it: C functions, so that one library serves every Python. Tensors, plan, lse and
// the other pointers of the params structs are device memory; the structs themselves are read before a call returns.
#pragma once
#include <cstdint>

#include "fastattn/params.h"

namespace fastattn {

constexpr int kCudaAbi = 1;

enum class CudaKernel : int {
    kPortable = 0,  // mma.sync, sm_80 and newer: csrc/cuda/softmax_*_sm80.cu
    kHopper = 1,    // wgmma and TMA, sm_90a: csrc/cuda/softmax_*_sm90.cu
};

struct CudaCall {
    void* stream;
    int device;         // the current device of the calling thread
    int processors;     // multiprocessors of the device
    CudaKernel kernel;  // which family runs
    bool deterministic;
    char* workspace;  // device memory of at least the bytes asked for, 256-byte aligned; null where none was
};

}  // namespace fastattn

#define FASTATTN_EXPORT __attribute__((visibility("default")))

extern "C" {

// kCudaAbi of the library; another number than the caller's means that files of two versions are mixed.
FASTATTN_EXPORT int fastattn_cuda_abi();

// Why no kernel of the library can run with the driver of this machine, and what to do, or null.
FASTATTN_EXPORT const char* fastattn_cuda_problem();

// Device bytes that the call with these params needs as CudaCall::workspace. Launches nothing. `gradients` null:
// forward.
FASTATTN_EXPORT int64_t fastattn_cuda_softmax_workspace(const fastattn::SoftmaxParams* params,
                                                        const fastattn::SoftmaxGradients* gradients,
                                                        const fastattn::CudaCall* call);

// Why this family of kernels does not take the call, or null. Text of the calling thread, valid until its next call.
FASTATTN_EXPORT const char* fastattn_cuda_softmax_why_not(const fastattn::SoftmaxParams* params,
                                                          const fastattn::SoftmaxGradients* gradients,
                                                          const fastattn::CudaCall* call);

// Launch on the stream: no allocation, no synchronisation. Null, or what went wrong, naming the kernel and the shapes.
FASTATTN_EXPORT const char* fastattn_cuda_softmax_forward(const fastattn::SoftmaxParams* params,
                                                          const fastattn::CudaCall* call);
FASTATTN_EXPORT const char* fastattn_cuda_softmax_backward(const fastattn::SoftmaxParams* params,
                                                           const fastattn::SoftmaxGradients* gradients,
                                                           const fastattn::CudaCall* call);
}
