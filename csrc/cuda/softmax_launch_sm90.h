// From a call to the arguments and the kernel of the Hopper forward pass, on the host.
#pragma once
#include <cmath>

#include "cuda/launch.h"
#include "cuda/softmax_kernel_sm90.h"
#include "fastattn/cuda.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// Rows of a kv head (queries x heads) up to which they make one tile and the keys are split over blocks.
constexpr int64_t kPackedRows = 64;

inline bool is_packed(const SoftmaxParams& p) {
    const bool one_plan = !p.plan || p.plan->heads == 1 || p.group() == 1;
    const bool heads_apart = p.group() == 1 || p.q.stride[1] != 0;
    return p.Lq() * p.group() <= kPackedRows && one_plan && heads_apart;
}

// Whether a positive factor does not lead from scores to logits, or vanishes in fp32, where -inf times it is NaN.
inline bool needs_logits(const SoftmaxParams& p) { return p.softcap > 0 || p.scale < 1e-37; }

// Keys that the band leaves to some query; all of them where there is a plan, which counts its tiles from key 0.
inline void loaded_keys(const SoftmaxParams& p, int64_t* first, int64_t* last) {
    *first = 0;
    *last = p.Lk();
    if (!p.plan) seen_range(p, first, last);
    if (*last < *first) *last = *first;
}

// What all kernels need; tiles of `rows` queries of `heads` heads against blocks of `keys`.
inline ForwardArguments forward_arguments(const SoftmaxParams& p, int rows, int heads, int keys) {
    constexpr double kLog2e = 1.4426950408889634;
    ForwardArguments a = {};
    int64_t first, last;
    loaded_keys(p, &first, &last);
    const auto part = [&](TensorView x) {
        x.data += first * x.stride[2] * element_size(x.dtype);
        x.size[2] = last - first;
        return x;
    };
    if (last > first) {
        a.q = tensor_tiles(p.q, rows, heads);
        a.k = tensor_tiles(part(p.k), keys, 1);
        a.v = tensor_tiles(part(p.v), keys, 1);
    }
    a.out = p.out.data;
    for (int d = 0; d < 3; ++d) a.out_stride[d] = p.out.stride[d];
    a.lse = p.lse;
    a.lse_parts = p.lse_parts;
    a.sinks = p.sinks;
    if (p.plan) a.plan = *p.plan;
    a.Hq = static_cast<int>(p.Hq());
    a.group = static_cast<int>(p.group());
    a.Lq = static_cast<int>(p.Lq());
    a.Lk = static_cast<int>(last - first);
    a.Dv = static_cast<int>(p.Dv());
    a.lo = p.lo - first;
    a.hi = p.hi - first;
    a.unit = static_cast<float>(p.scale * kLog2e);
    if (p.softcap > 0) {
        a.cap = static_cast<float>(p.softcap * kLog2e);
        a.uncap = static_cast<float>(p.scale / p.softcap);
    }
    return a;
}

// Calls run(DType constant, width constant) for the dtype and the narrowest kernel that holds D and Dv.
template <class Run>
void with_dtype_and_width(const SoftmaxParams& p, Run run) {
    const int64_t width = p.D() > p.Dv() ? p.D() : p.Dv();
    const auto with_width = [&](auto dtype) {
        if (width <= 64) return run(dtype, std::integral_constant<int, 64>());
        if (width <= 128) return run(dtype, std::integral_constant<int, 128>());
        run(dtype, std::integral_constant<int, 256>());
    };
    if (p.q.dtype == DType::kBFloat16) return with_width(std::integral_constant<DType, DType::kBFloat16>());
    with_width(std::integral_constant<DType, DType::kFloat16>());
}

template <class Tile>
void launch_forward(const char* name, const ForwardArguments& a, const CudaCall& call) {
    launch(name, forward_kernel<Tile>, a.items < call.processors ? a.items : call.processors, Tile::kThreads,
           Shared<Tile>::kBytes, call.stream, a);
}

// softmax_decode_sm90.cu
int64_t packed_workspace(const SoftmaxParams& p, const CudaCall& call);
void packed_forward(const SoftmaxParams& p, const CudaCall& call);

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
