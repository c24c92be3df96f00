// Softmax attention forward for sm_90a: a producer warpgroup feeds consumer warpgroups through rings of shared memory.
#pragma once
#include "cuda/softmax_consume_sm90.h"
#include "cuda/softmax_produce_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

template <class Tile>
__device__ void write_rows(const ForwardArguments& p, const Item& item, int row, const Rows<Tile>& x) {
    constexpr float kLn2 = 0.6931471806f;
    const int lane = thread_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = x.total[half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float share = total == 0.0f ? 0.0f : 1.0f / total;
        const int i = item.row + row + 8 * half;
        const bool there = i < p.Lq;
        char* to = p.out + (item.b * p.out_stride[0] + item.h * p.out_stride[1] + i * p.out_stride[2]) * 2;
#pragma unroll
        for (int four = 0; four < Tile::D / 32; ++four) {
            uint32_t w[4];
#pragma unroll
            for (int g = 0; g < 4; ++g) {
                const float* sums = x.sums + 16 * four + 4 * g + 2 * half;
                w[g] = pack<Tile::dtype>(sums[0] * share, sums[1] * share);
            }
            const Sixteen eight = gather_group(w, lane);
            const int column = 32 * four + 8 * lane;
            if (there && column < p.Dv) *reinterpret_cast<Sixteen*>(to + 2 * column) = eight;
        }
        if (!there || lane) continue;
        const int64_t at = (int64_t{item.b} * p.Hq + item.h) * p.Lq + i;
        const float top = x.top[half] == -infinity() ? 0.0f : x.top[half], log = log2_approx(total);
        if (p.lse) p.lse[at] = kLn2 * top + kLn2 * log;
        if (!p.lse_parts) continue;
        p.lse_parts[2 * at] = top;
        p.lse_parts[2 * at + 1] = log;
    }
}

// Sums that are not divided yet, and (top, total), for combine_kernel.
template <class Tile>
__device__ void write_partial(const ForwardArguments& p, const Item& item, int row, const Rows<Tile>& x) {
    const int lane = thread_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = x.total[half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const int r = row + 8 * half;
        if (r >= p.Lq * p.group) continue;
        const int64_t at = ((int64_t{item.b} * p.Hq + item.h) * p.Lq + r) * p.splits + item.split;
#pragma unroll
        for (int g = 0; g < Tile::D / 8; ++g) {
            const int column = 8 * g + 2 * lane;
            if (column < p.Dv)
                *reinterpret_cast<Two*>(p.sums + at * p.Dv +
                                        column) = {{x.sums[4 * g + 2 * half], x.sums[4 * g + 2 * half + 1]}};
        }
        if (lane == 0) *reinterpret_cast<Two*>(p.stats + 2 * at) = {{x.top[half], total}};
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments p) {
    const Shared<Tile> at;
    const int warp = from_lane(thread_index() / 32, 0);
    if (thread_index() == 0) {
        // One arrival for each consumer warp.
        constexpr int kWarps = 4 * Tile::kConsumers;
        barrier_init(at.q_full(), 1);
        barrier_init(at.q_empty(), kWarps);
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            barrier_init(at.k_full(stage), 1);
            barrier_init(at.k_empty(stage), kWarps);
            barrier_init(at.v_full(stage), 1);
            barrier_init(at.v_empty(stage), kWarps);
            barrier_init(at.v_clean(stage), 1);
        }
        barrier_init_fence();
    }
    sync_threads();
    // Registers move between warpgroups: 56 + 2 * 224 = 3 * 168, the most that 384 threads can have.
    if (warp < 4) {
        if constexpr (!Tile::packed) lower_registers<56>();
        if (warp == 0) {
            if (thread_index() == 0) Producer<Tile>{p, at}.run();
        } else if (warp == 1 && p.plan.row_start) {
            clean_values<Tile>(p, at, thread_index() % 32);
        }
    } else {
        if constexpr (!Tile::packed) raise_registers<224>();
        Consumer<Tile>(p, at).run([&](const Item& item, int row, const Rows<Tile>& x) {
            if constexpr (Tile::packed)
                write_partial<Tile>(p, item, row, x);
            else
                write_rows<Tile>(p, item, row, x);
        });
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
