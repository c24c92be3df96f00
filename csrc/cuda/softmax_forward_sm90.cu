#include "cuda/kernels.h"
#include "cuda/softmax_backward_sm90.h"
#include "cuda/softmax_launch_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {
namespace {

constexpr int64_t kL2Bytes = 32 << 20;

int64_t tile_count_of(const SoftmaxParams& p, int64_t rows) {
    return p.plan ? p.plan->q_tiles : (p.Lq() + rows - 1) / rows;
}

// Items of unequal length are given out one by one, so that no multiprocessor is left with several long ones.
bool counts_items(const SoftmaxParams& p) {
    return !is_packed(p) && (p.plan || p.lo > -kUnbounded / 2 || p.hi < kUnbounded / 2);
}

template <class Tile>
void tiled_forward(const SoftmaxParams& p, const CudaCall& call) {
    ForwardArguments a = forward_arguments(p, Tile::BM, 1, Tile::BN);
    const int64_t tiles = tile_count_of(p, Tile::BM), heads = p.B() * p.Hq();
    if (tiles * heads > INT32_MAX) throw std::runtime_error("more tiles of queries than 2^31");
    const int64_t kv_bytes = p.Lk() * (p.D() + p.Dv()) * 2;
    const int64_t section = (kL2Bytes > kv_bytes && kv_bytes ? kL2Bytes / kv_bytes : 1) * p.group();
    a.tiles = static_cast<int>(tiles);
    a.heads = static_cast<int>(heads);
    a.items = static_cast<int>(tiles * heads);
    a.section = static_cast<int>(section < heads ? section : heads);
    a.heavy_last = !p.plan && p.hi < kUnbounded / 2 && p.lo < -kUnbounded / 2;
    if (counts_items(p)) {
        a.counter = reinterpret_cast<int*>(call.workspace);
        clear(a.counter, sizeof(int), call.stream);
    }
    launch_forward<Tile>("softmax_forward_sm90", a, call);
}

}  // namespace

const char* why_not(const SoftmaxParams& p, const SoftmaxGradients* g) {
    if (p.q.dtype != DType::kBFloat16 && p.q.dtype != DType::kFloat16)
        return "the kernels for sm_90a compute in bfloat16 and float16";
    if (p.D() > 256 || p.Dv() > 256 || p.D() % 8 || p.Dv() % 8)
        return "the kernels for sm_90a need D and Dv of at most 256 in steps of 8";
    if (p.bias || p.slopes) return "the kernels for sm_90a have no bias and no ALiBi slopes";
    if (p.dropout_p > 0) return "the kernels for sm_90a have no dropout";
    for (const TensorView* x : {&p.q, &p.k, &p.v})
        if (x->size[2] > 1 && x->stride[2] == 0) return "the kernels for sm_90a cannot read expanded rows";
    if (p.Lq() > INT32_MAX / 4 || p.Lk() > INT32_MAX / 4) return "the kernels for sm_90a count rows in 32 bits";
    return g ? backward_why_not(p, *g) : nullptr;
}

int64_t workspace(const SoftmaxParams& p, const SoftmaxGradients* g, const CudaCall& call) {
    if (g) return backward_workspace(p, *g, call);
    if (is_packed(p)) return packed_workspace(p, call);
    return counts_items(p) ? sizeof(int) : 0;
}

void forward(const SoftmaxParams& p, const CudaCall& call) {
    if (is_packed(p)) return packed_forward(p, call);
    with_dtype_and_width(p, [&](auto dtype, auto width) {
        if (needs_logits(p))
            tiled_forward<ForwardTile<dtype(), width(), true, false>>(p, call);
        else
            tiled_forward<ForwardTile<dtype(), width(), false, false>>(p, call);
    });
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
