#include <cuda_runtime.h>

#include <exception>
#include <string>

#include "cuda/kernels.h"

namespace fastattn::cuda {
namespace {

struct Family {
    decltype(&sm80::why_not) why_not;
    decltype(&sm80::workspace) workspace;
    decltype(&sm80::forward) forward;
    decltype(&sm80::backward) backward;
};

const Family& family(const CudaCall& call) {
    static constexpr Family kPortable{sm80::why_not, sm80::workspace, sm80::forward, sm80::backward};
#ifdef FASTATTN_CUDA_HOPPER
    static constexpr Family kHopper{sm90::why_not, sm90::workspace, sm90::forward, sm90::backward};
    if (call.kernel == CudaKernel::kHopper) return kHopper;
#endif
    (void)call;
    return kPortable;
}

const char* refusal(const SoftmaxParams& p, const SoftmaxGradients* g, const CudaCall& call) {
#ifndef FASTATTN_CUDA_HOPPER
    if (call.kernel == CudaKernel::kHopper) return "the library was built without sm_90a";
#endif
    return family(call).why_not(p, g);
}

std::string shape(const TensorView& t) {
    std::string s = "[";
    for (int i = 0; i < 4; ++i) s += (i ? ", " : "") + std::to_string(t.size[i]);
    return s + "]";
}

// Runs `launch` and gives its error as text: no exception crosses the C interface.
template <class Launch>
const char* guarded(const char* pass, const SoftmaxParams& p, const SoftmaxGradients* g, const CudaCall& call,
                    Launch launch) {
    thread_local std::string message;
    std::string cause;
    try {
        const char* why = refusal(p, g, call);
        if (!why) {
            launch(family(call));
            return nullptr;
        }
        cause = why;
    } catch (const std::exception& error) {
        cause = error.what();
    }
    message = std::string("softmax ") + pass + " on CUDA: " + cause + " (q " + shape(p.q) + ", k " + shape(p.k) +
              ", v " + shape(p.v) + ")";
    return message.c_str();
}

}  // namespace
}  // namespace fastattn::cuda

using fastattn::CudaCall;
using fastattn::SoftmaxGradients;
using fastattn::SoftmaxParams;
using fastattn::cuda::Family;

int fastattn_cuda_abi() { return fastattn::kCudaAbi; }

const char* fastattn_cuda_problem() {
    thread_local std::string message;
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) return nullptr;
    // Without a driver (0) there is no device to ask for. One of the same major version runs the library's machine
    // code.
    if (driver == 0 || driver / 1000 >= runtime / 1000) return nullptr;
    message = "the driver knows CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
              ", the library was built with CUDA " + std::to_string(runtime / 1000) + "." +
              std::to_string(runtime % 1000 / 10) + "; update the driver, or build with an older toolkit";
    return message.c_str();
}

int64_t fastattn_cuda_softmax_workspace(const SoftmaxParams* params, const SoftmaxGradients* gradients,
                                        const CudaCall* call) {
    return fastattn::cuda::family(*call).workspace(*params, gradients, *call);
}

const char* fastattn_cuda_softmax_why_not(const SoftmaxParams* params, const SoftmaxGradients* gradients,
                                          const CudaCall* call) {
    return fastattn::cuda::refusal(*params, gradients, *call);
}

const char* fastattn_cuda_softmax_forward(const SoftmaxParams* params, const CudaCall* call) {
    return fastattn::cuda::guarded("forward", *params, nullptr, *call,
                                   [&](const Family& f) { f.forward(*params, *call); });
}

const char* fastattn_cuda_softmax_backward(const SoftmaxParams* params, const SoftmaxGradients* gradients,
                                           const CudaCall* call) {
    return fastattn::cuda::guarded("backward", *params, gradients, *call,
                                   [&](const Family& f) { f.backward(*params, *gradients, *call); });
}
