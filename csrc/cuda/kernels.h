// The kernel families behind the C interface of the CUDA library. Errors of a launch are thrown as std::runtime_error.
#pragma once
#include "fastattn/cuda.h"

#define FASTATTN_DECLARE_CUDA_FAMILY(family)                                                    \
    namespace fastattn::cuda::family {                                                          \
    /* Why the family does not take the call, a sentence, or null. `g` null: forward. */        \
    const char* why_not(const SoftmaxParams& p, const SoftmaxGradients* g);                     \
    /* Bytes of device memory that the call needs besides its tensors. */                       \
    int64_t workspace(const SoftmaxParams& p, const SoftmaxGradients* g, const CudaCall& call); \
    void forward(const SoftmaxParams& p, const CudaCall& call);                                 \
    void backward(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call);     \
    }

FASTATTN_DECLARE_CUDA_FAMILY(sm80)
FASTATTN_DECLARE_CUDA_FAMILY(sm90)
#undef FASTATTN_DECLARE_CUDA_FAMILY
