// Tiles of 16-bit numbers in shared memory, and products of them with mma.sync.
// Rows are W numbers wide (64, 128 or 256); the 16-byte chunk c of row r lies at place c ^ (r % 8), so that the eight
// rows of an 8 x 8 matrix lie in different banks. A warp's accumulators [16 MB, 8 NB] are float [MB][NB][4]: lane l
// holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once
#include <cstdint>

#include "cuda/ptx.h"

namespace fastattn::cuda {

constexpr int kThreads = 128;  // of every block

struct alignas(16) Chunk {
    uint32_t x[4];
};

__device__ __forceinline__ int lane_index() { return thread_index() % 32; }
__device__ __forceinline__ int warp_index() { return from_lane(thread_index() / 32, 0); }

template <int W>
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk) {
    return tile + row * (2 * W) + ((chunk ^ (row & 7)) << 4);
}

// Rows [0, wanted) of `from`, the first D numbers of each; zeros elsewhere.
template <int ROWS, int W>
__device__ __forceinline__ void load_tile(uint32_t tile, const uint16_t* from, int64_t stride, int wanted, int D) {
    constexpr int kChunks = W / 8, kStep = kThreads / kChunks;
    const uint32_t thread = volatile_copy(thread_index()), chunk = thread % kChunks;
    const int row = static_cast<int>(thread / kChunks);
    const uint16_t* source = from + chunk * 8 + row * stride;
#pragma unroll
    for (int r = 0; r < ROWS; r += kStep) {
        const bool inside = r + row < wanted && static_cast<int>(chunk) < D / 8;
        cp_async(chunk_address<W>(tile, r + row, chunk), inside ? source + r * stride : from, inside);
    }
}

// The numbers of a tile with the opposite sign.
template <int ROWS, int W>
__device__ __forceinline__ void flip_signs(uint32_t tile) {
    for (int at = thread_index() * 4; at < ROWS * W * 2; at += kThreads * 4)
        store_shared<uint32_t>(tile + at, load_shared<uint32_t>(tile + at) ^ 0x80008000u);
}

// Address of a lane's row for ldmatrix: operands of 16 rows (A, or B transposed), and of 16 rows of B.
template <int W>
__device__ __forceinline__ uint32_t lane_row_a(uint32_t tile) {
    return chunk_address<W>(tile, lane_index() % 16, lane_index() / 16);
}
template <int W>
__device__ __forceinline__ uint32_t lane_row_b(uint32_t tile) {
    return chunk_address<W>(tile, lane_index() % 8 + lane_index() / 16 * 8, lane_index() / 8 % 2);
}

// acc [16 MB, 8 NB] += a b^T over the W columns of both: rows of `a` from the warp's first, rows of `b` from 0.
template <DType dtype, int W, int MB, int NB>
__device__ __forceinline__ void multiply_rows(float (&acc)[MB][NB][4], uint32_t a, uint32_t b) {
    const uint32_t row_a = lane_row_a<W>(a), row_b = lane_row_b<W>(b);
#pragma unroll
    for (int k = 0; k < W / 16; ++k) {
        uint32_t left[MB][4];
#pragma unroll
        for (int m = 0; m < MB; ++m) ldmatrix(left[m], (row_a ^ (k * 32)) + m * (32 * W));
#pragma unroll
        for (int n = 0; n < NB; n += 2) {
            uint32_t right[4];
            ldmatrix(right, (row_b ^ (k * 32)) + n * (16 * W));
#pragma unroll
            for (int m = 0; m < MB; ++m) {
                mma<dtype>(acc[m][n], left[m], right[0], right[1]);
                mma<dtype>(acc[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// acc [16 MB, W] += a b, where a [16 MB, 16 KB] lies in registers and b has 16 KB rows. With DROP, rows of b whose bit
// is 0 in `alive` count as zeros: bits 2n and 2n + 1 are the two columns of a's accumulator n that the lane holds.
template <DType dtype, int W, bool DROP, int MB, int KB>
__device__ __forceinline__ void multiply_columns(float (&acc)[MB][W / 8][4], const uint32_t (&a)[MB][KB][4], uint32_t b,
                                                 uint32_t alive) {
    const uint32_t row = lane_row_a<W>(b);
#pragma unroll
    for (int k = 0; k < KB; ++k) {
        uint32_t keep[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t bits = alive >> (4 * k + 2 * half);
            keep[half] = (bits & 1 ? 0x0000FFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
        }
#pragma unroll
        for (int n = 0; n < W / 16; ++n) {
            uint32_t right[4];
            ldmatrix_trans(right, (row ^ (n * 32)) + k * (32 * W));
            if constexpr (DROP) {
#pragma unroll
                for (int r = 0; r < 4; ++r) right[r] &= keep[r % 2];
            }
#pragma unroll
            for (int m = 0; m < MB; ++m) {
                mma<dtype>(acc[m][2 * n], a[m][k], right[0], right[1]);
                mma<dtype>(acc[m][2 * n + 1], a[m][k], right[2], right[3]);
            }
        }
    }
}

// f(element, m, n, r) for every element of a lane's accumulators.
template <int MB, int NB, class F>
__device__ __forceinline__ void for_each(float (&s)[MB][NB][4], F&& f) {
#pragma unroll
    for (int m = 0; m < MB; ++m)
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
            for (int r = 0; r < 4; ++r) f(s[m][n][r], m, n, r);
}

template <int MB, int NB>
__device__ __forceinline__ void clear(float (&acc)[MB][NB][4]) {
    for_each(acc, [](float& x, int, int, int) { x = 0.0f; });
}

// Accumulators as the left operand of a product over their columns.
template <DType dtype, int MB, int NB>
__device__ __forceinline__ void as_operand(uint32_t (&a)[MB][NB / 2][4], const float (&acc)[MB][NB][4]) {
#pragma unroll
    for (int m = 0; m < MB; ++m)
#pragma unroll
        for (int k = 0; k < NB / 2; ++k)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float* x = acc[m][2 * k + r / 2];
                a[m][k][r] = pack<dtype>(x[r % 2 * 2], x[r % 2 * 2 + 1]);
            }
}

// Writes the warp's rows, times `factor` of each, to rows [0, wanted) of `to`, D numbers each, by way of its rows of
// `tile`, which nobody else may be reading.
template <DType dtype, int W, int MB>
__device__ __forceinline__ void store_rows(uint16_t* to, int64_t stride, int wanted, int D,
                                           const float (&acc)[MB][W / 8][4], const float (&factor)[MB][2],
                                           uint32_t tile) {
    const int lane = lane_index();
    sync_warp();
#pragma unroll
    for (int m = 0; m < MB; ++m)
#pragma unroll
        for (int n = 0; n < W / 8; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t at = chunk_address<W>(tile, m * 16 + r * 8 + lane / 4, n) + lane % 4 * 4;
                const float* x = acc[m][n] + 2 * r;
                store_shared<uint32_t>(at, pack<dtype>(x[0] * factor[m][r], x[1] * factor[m][r]));
            }
    sync_warp();
    constexpr int kChunks = W / 8, kStep = 32 / kChunks;
    const int row = lane / kChunks, chunk = lane % kChunks;
#pragma unroll
    for (int r = row; r < MB * 16; r += kStep)
        if (r < wanted && chunk * 8 < D)
            *reinterpret_cast<Chunk*>(to + r * stride + chunk * 8) =
                load_shared<Chunk>(chunk_address<W>(tile, r, chunk));
}

// Over the four lanes that share rows.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

}  // namespace fastattn::cuda
