// Few queries against many keys: the rows of a whole GQA group are one tile, the keys are split, and a second kernel
// combines the splits.
#include "cuda/softmax_launch_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {
namespace {

struct Splits {
    int64_t first_block = 0, blocks = 0, splits = 1, split_blocks = 1;
};

// As many splits as finish first: in waves over all processors, each as long as a split and about one block more.
Splits split_keys(const SoftmaxParams& p, const CudaCall& call, int64_t BN) {
    constexpr int64_t kMost = 128;
    Splits s;
    int64_t first, last;
    loaded_keys(p, &first, &last);
    const int64_t lo = p.lo - first, hi = p.hi - first, keys = last - first;
    const int64_t begin = lo > 0 ? lo : 0, end = p.Lq() + hi < keys ? p.Lq() + hi : keys;
    if (begin >= end) return s;
    s.first_block = begin / BN;
    s.blocks = (end + BN - 1) / BN - s.first_block;
    int64_t best = INT64_MAX;
    for (int64_t n = 1; n <= (s.blocks < kMost ? s.blocks : kMost); ++n) {
        const int64_t length = (s.blocks + n - 1) / n, items = p.B() * p.Hk() * n;
        const int64_t cost = (items + call.processors - 1) / call.processors * (length + 1);
        if (cost >= best) continue;
        best = cost;
        s.split_blocks = length;
        s.splits = (s.blocks + length - 1) / length;
    }
    return s;
}

constexpr int kCombineThreads = 128;

// One warp for each row; rows are [B, Hq, Lq].
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ ForwardArguments p, DType dtype, int64_t rows) {
    constexpr float kLog2e = 1.442695041f, kLn2 = 0.6931471806f;
    const int64_t row = block_index() * (kCombineThreads / 32) + thread_index() / 32;
    if (row >= rows) return;
    const int lane = thread_index() % 32;
    const int64_t head = row / p.Lq, i = row - head * p.Lq, b = head / p.Hq, h = head - b * p.Hq;
    const Two* stats = reinterpret_cast<const Two*>(p.stats) + row * p.splits;
    const float sink = p.sinks ? p.sinks[h] * kLog2e : -infinity();
    float top = sink;
#pragma unroll 4
    for (int n = 0; n < p.splits; ++n) top = fmaxf(top, stats[n].x[0]);
    const float reference = top == -infinity() ? 0.0f : top;
    float total = exp2_approx(sink - reference);
#pragma unroll 4
    for (int n = 0; n < p.splits; ++n) total += exp2_approx(stats[n].x[0] - reference) * stats[n].x[1];
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    char* to = p.out + (b * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2]) * 2;
    for (int column = 2 * lane; column < p.Dv; column += 64) {
        const float* sums = p.sums + row * p.splits * p.Dv + column;
        float low = 0.0f, high = 0.0f;
#pragma unroll 4
        for (int n = 0; n < p.splits; ++n, sums += p.Dv) {
            const Two sum = *reinterpret_cast<const Two*>(sums);
            const float weight = exp2_approx(stats[n].x[0] - reference);
            low += weight * sum.x[0];
            high += weight * sum.x[1];
        }
        low *= share;
        high *= share;
        *reinterpret_cast<uint32_t*>(to + 2 * column) =
            dtype == DType::kBFloat16 ? pack<DType::kBFloat16>(low, high) : pack<DType::kFloat16>(low, high);
    }
    if (lane) return;
    const float log = log2_approx(total);
    if (p.lse) p.lse[row] = kLn2 * reference + kLn2 * log;
    if (!p.lse_parts) return;
    p.lse_parts[2 * row] = reference;
    p.lse_parts[2 * row + 1] = log;
}

int block_keys(const SoftmaxParams& p) {
    int keys = 0;
    with_dtype_and_width(p, [&](auto dtype, auto width) { keys = ForwardTile<dtype(), width(), true, true>::BN; });
    return keys;
}

}  // namespace

int64_t packed_workspace(const SoftmaxParams& p, const CudaCall& call) {
    const int64_t rows = p.B() * p.Hq() * p.Lq();
    return rows * split_keys(p, call, block_keys(p)).splits * (p.Dv() + 2) * 4;
}

void packed_forward(const SoftmaxParams& p, const CudaCall& call) {
    const int64_t rows = p.B() * p.Hq() * p.Lq();
    const Splits s = split_keys(p, call, block_keys(p));
    ForwardArguments a = forward_arguments(p, static_cast<int>(p.Lq()), static_cast<int>(p.group()), block_keys(p));
    const int64_t items = p.B() * p.Hk() * s.splits;
    if (items > INT32_MAX) throw std::runtime_error("more heads than 2^31");
    a.items = static_cast<int>(items);
    a.first_block = static_cast<int>(s.first_block);
    a.splits = static_cast<int>(s.splits);
    a.split_blocks = static_cast<int>(s.split_blocks);
    a.sums = reinterpret_cast<float*>(call.workspace);
    a.stats = a.sums + rows * s.splits * p.Dv();
    with_dtype_and_width(p, [&](auto dtype, auto width) {
        // Loading keys takes longer than turning scores into logits: one kernel for all options.
        launch_forward<ForwardTile<dtype(), width(), true, true>>("softmax_decode_sm90", a, call);
    });
    constexpr int kRows = kCombineThreads / 32;
    launch("softmax_combine_sm90", combine_kernel, (rows + kRows - 1) / kRows, kCombineThreads, 0, call.stream, a,
           p.q.dtype, rows);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
