// What the warps of all Hopper kernels do: go round rings of shared memory, trade parts of rows, clean rows.
#pragma once
#include "cuda/tensor_tiles.h"
#include "fastattn/tile_plan.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// A place in a ring of stages; parity is that of the round.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance() {
        if (++stage < kStages) return;
        stage = 0;
        parity ^= 1;
    }
};

struct alignas(16) Sixteen {
    uint32_t x[4];
};
struct alignas(8) Two {
    float x[2];
};
struct alignas(16) Four {
    float x[4];
};

// w[g] of the four lanes of a row are columns 2 lane, 2 lane + 1 of group g; afterwards lane g has all 8 of group g.
__device__ __forceinline__ Sixteen gather_group(const uint32_t (&w)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    const uint32_t from_near[2] = {shuffle_xor(odd ? w[0] : w[1], 1), shuffle_xor(odd ? w[2] : w[3], 1)};
    // Of groups odd and 2 + odd, what this lane and its neighbour have.
    const uint32_t low[2] = {odd ? from_near[0] : w[0], odd ? w[1] : from_near[0]};
    const uint32_t high[2] = {odd ? from_near[1] : w[2], odd ? w[3] : from_near[1]};
    const uint32_t from_far[2] = {shuffle_xor(upper ? low[0] : high[0], 2), shuffle_xor(upper ? low[1] : high[1], 2)};
    if (upper) return {{from_far[0], from_far[1], high[0], high[1]}};
    return {{low[0], low[1], from_far[0], from_far[1]}};
}

__device__ __forceinline__ uint64_t or_over_warp(uint64_t x) {
    uint32_t low = static_cast<uint32_t>(x), high = static_cast<uint32_t>(x >> 32);
    for (int step = 1; step < 32; step *= 2) {
        low |= shuffle_xor(low, step);
        high |= shuffle_xor(high, step);
    }
    return uint64_t{high} << 32 | low;
}

// Zeros, by `threads` threads side by side, those of 64 rows from `at` on whose bit is set; columns 64 * chunk on are
// `chunk_bytes` further.
template <int D, int threads>
__device__ __forceinline__ void zero_rows(uint32_t at, int chunk_bytes, uint64_t which) {
    constexpr int kUnits = D / 8;
    for (int n = thread_index() % threads; which && n < kTile * kUnits; n += threads) {
        const int row = n / kUnits, unit = n % kUnits;
        if (which >> row & 1)
            store_shared(at + unit / 8 * chunk_bytes + row * kTileRowBytes + unit % 8 * 16, Sixteen{});
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
