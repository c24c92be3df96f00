// Gradients of scores, one tile at a time, as accumulators of mma.sync: with queries as rows for dQ, with keys as rows
// for dK and dV, so that either is the left operand of the product that follows without leaving the registers.
#pragma once
#include "cuda/logits.h"

namespace fastattn::cuda {

constexpr int kRows = 64;  // of the queries or keys that a block owns
static_assert(kRows == kTile, "a block owns one tile of a plan");

// Whether a tile of queries i0..i1 and N keys has anything to hide.
template <int N>
__device__ __forceinline__ bool is_cut(const Arguments& a, int i0, int i1, Block x) {
    return x.bits >= 0 || x.first + N > a.Lk || x.first < i1 + a.lo || x.first + N - 1 > i0 + a.hi;
}

// Rows are queries: ds [16, N] = p (dP - delta), times the derivative of a softcap.
template <DType dtype, int W, int N, bool EXTRAS>
struct ScoreGradients {
    static constexpr uint32_t kAll = (uint64_t{1} << N / 4) - 1;

    float ds[1][N / 8][4];

    // LOGITS: of the logits instead, without that derivative.
    template <bool LOGITS = false>
    __device__ void compute(const Arguments& a, const Options<dtype>& options, const RowStats (&stats)[2], uint32_t q,
                            uint32_t dout, uint32_t k, uint32_t v, int head, int i0, int j0, bool cut, int bits,
                            uint32_t& alive) {
        float p[1][N / 8][4], damp[1][EXTRAS ? N / 8 : 1][4];
        clear(p);
        multiply_rows<dtype, W>(p, q, k);
        if constexpr (EXTRAS) options.template apply<false>(p, damp, i0, j0);
        if (cut) hide(p, a, i0, j0, bits);
        const bool hides = cut || (EXTRAS && a.bias);
        if (hides) alive = alive_columns(p);
        const float slope = EXTRAS ? kLog2eF : a.slope;
        if (warp_any(is_huge(stats[0].minus_top) || is_huge(stats[1].minus_top))) {
            for_each(p, [&](float& x, int, int, int r) { x = exponent<true>(x, slope, stats[r / 2].minus_top); });
        } else {
            for_each(p, [&](float& x, int, int, int r) { x = exponent<false>(x, slope, stats[r / 2].minus_top); });
        }
        for_each(p, [&](float& x, int, int, int r) { x = exp2_approx(x + stats[r / 2].minus_tail); });
        for_each(ds, [&](float& x, int, int, int r) { x = EXTRAS ? 0.0f : -stats[r / 2].delta; });
        multiply_rows<dtype, W>(ds, dout, v);
        if constexpr (EXTRAS) {
            uint32_t kept[1] = {~0u};
            if (a.drops) kept_elements<false, 1, N / 8>(kept, a, head, i0, j0);
            for_each(ds, [&](float& x, int, int n, int r) {
                const float dp = kept[0] >> (4 * n + r) & 1 ? x * a.keep_factor : 0.0f;
                x = (dp - stats[r / 2].delta) * (LOGITS ? 1.0f : damp[0][n][r]);
            });
        }
        // Values that nobody sees may hold NaN.
        if (hides) for_each(ds, [&](float& x, int, int n, int r) { x = p[0][n][r] == 0.0f ? 0.0f : x; });
        for_each(ds, [&](float& x, int, int n, int r) { x *= p[0][n][r]; });
    }
};

// Rows are keys: weights p [16, N], and their gradients in the same registers.
template <DType dtype, int W, int N, bool EXTRAS>
struct KeyScores {
    float p[1][N / 8][4], damp[1][EXTRAS ? N / 8 : 1][4];
    uint32_t kept[1];
    bool hides;

    // Of the query in a column; `stats` is the address of the tile's.
    __device__ static RowStats stats_of(uint32_t stats, int n, int r) {
        return load_shared<RowStats>(stats + column_of(n, r) * sizeof(RowStats));
    }

    __device__ void weights(const Arguments& a, const Options<dtype>& options, uint32_t k, uint32_t q, uint32_t stats,
                            int head, int i0, int j0, bool cut, int bits) {
        clear(p);
        multiply_rows<dtype, W>(p, k, q);
        kept[0] = ~0u;
        if constexpr (EXTRAS) {
            options.template apply<true>(p, damp, i0, j0);
            if (a.drops) kept_elements<true, 1, N / 8>(kept, a, head, i0, j0);
        }
        if (cut) hide_keys(p, a, i0, j0, bits);
        hides = cut || (EXTRAS && a.bias);
        const float slope = EXTRAS ? kLog2eF : a.slope;
        bool huge = false;
        for (int i = lane_index(); i < N; i += 32)
            huge = huge || is_huge(load_shared<float>(stats + i * sizeof(RowStats)));
        if (warp_any(huge)) {
            for_each(
                p, [&](float& x, int, int n, int r) { x = exponent<true>(x, slope, stats_of(stats, n, r).minus_top); });
        } else {
            for_each(p, [&](float& x, int, int n, int r) {
                x = exponent<false>(x, slope, stats_of(stats, n, r).minus_top);
            });
        }
        for_each(p, [&](float& x, int, int n, int r) { x = exp2_approx(x + stats_of(stats, n, r).minus_tail); });
    }

    // The weights that dropout keeps, as an operand.
    __device__ void kept_weights(uint32_t (&operand)[1][N / 16][4]) const {
        float x[1][N / 8][4];
        for_each(x,
                 [&](float& y, int, int n, int r) { y = !EXTRAS || kept[0] >> (4 * n + r) & 1 ? p[0][n][r] : 0.0f; });
        as_operand<dtype>(operand, x);
    }

    __device__ void gradients(const Arguments& a, uint32_t v, uint32_t dout, uint32_t stats) {
        float dp[1][N / 8][4];
        for_each(dp, [&](float& x, int, int n, int r) { x = EXTRAS ? 0.0f : -stats_of(stats, n, r).delta; });
        multiply_rows<dtype, W>(dp, v, dout);
        if constexpr (EXTRAS) {
            for_each(dp, [&](float& x, int, int n, int r) {
                x = kept[0] >> (4 * n + r) & 1 ? x * a.keep_factor : 0.0f;
                x = (x - stats_of(stats, n, r).delta) * damp[0][n][r];
            });
        }
        // Values that nobody sees may hold NaN.
        if (hides) for_each(dp, [&](float& x, int, int n, int r) { x = p[0][n][r] == 0.0f ? 0.0f : x; });
        for_each(p, [&](float& x, int, int n, int r) { x *= dp[0][n][r]; });
    }
};

}  // namespace fastattn::cuda
