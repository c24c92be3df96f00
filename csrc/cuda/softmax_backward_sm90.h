// The Hopper backward pass as its family asks about it, besides `backward` of kernels.h.
#pragma once
#include "cuda/kernels.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// Of calls that the forward pass takes.
const char* backward_why_not(const SoftmaxParams& p, const SoftmaxGradients& g);
int64_t backward_workspace(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call);

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
