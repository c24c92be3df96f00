// The gradient of a bias in the shape it was given, with mma.sync: a block owns 64 x N of its entries (one of them in a
// dimension of size 1) and adds up the gradients of all logits they went to, in one order.
#pragma once
#include "cuda/backward_sm80.h"
#include "cuda/launch.h"

namespace fastattn::cuda {

// Bits of the tile of the plan with these queries and keys, or -2 where the plan has none.
__device__ __forceinline__ int bits_of_tile(const Arguments& a, int64_t slice, int q_tile, int k_tile) {
    if (!a.plan.runs) return -1;
    const int32_t* start = a.plan.start + slice * a.plan.tiles + q_tile;
    int low = start[0], high = start[1];
    while (low < high) {
        const int middle = (low + high) / 2;
        if (a.plan.runs[middle].first + a.plan.runs[middle].count > k_tile)
            high = middle;
        else
            low = middle + 1;
    }
    return low < start[1] && a.plan.runs[low].first <= k_tile ? a.plan.runs[low].bits : -2;
}

// Sums [64, N] of the block's accumulators over rows and columns where the bias has one, and stores them.
template <int N>
__device__ __forceinline__ void store_bias(const Arguments& a, const float (&sum)[1][N / 8][4], int64_t slab, int i0,
                                           int j0) {
    const bool one_row = a.dbias_size[2] == 1, one_column = a.dbias_size[3] == 1;
    const int rows = a.dbias_size[2], columns = a.dbias_size[3], warp = warp_index();
    float* to = a.dbias + slab * rows * columns;
    if (!one_row) {
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + warp * 16 + row_of(0, 2 * half);
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int j = j0 + column_of(n, e);
                    const float x = sum[0][n][2 * half + e];
                    total += x;
                    if (!one_column && i < rows && j < columns) to[int64_t{i} * columns + j] = x;
                }
            total = row_sum(total);
            if (one_column && i < rows && lane_index() % 4 == 0) to[i] = total;
        }
        return;
    }
    const uint32_t sums = shared_memory();  // [4, N]: of each warp
    sync_threads();
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float x = sum[0][n][e] + sum[0][n][2 + e];
            for (int lanes = 4; lanes < 32; lanes *= 2) x += shuffle_xor(x, lanes);
            if (lane_index() < 4) store_shared<float>(sums + (warp * N + column_of(n, e)) * 4, x);
        }
    sync_threads();
    if (thread_index() >= (one_column ? 1 : N)) return;
    float total = 0.0f;
    for (int n = 0; n < (one_column ? N : 1); ++n)
        for (int w = 0; w < kThreads / 32; ++w) total += load_shared<float>(sums + (w * N + n + thread_index()) * 4);
    const int j = j0 + thread_index();
    if (one_column || j < columns) to[one_column ? 0 : j] = total;
}

template <DType dtype, int W, int N>
__global__ void __launch_bounds__(kThreads, W == 256 ? 1 : 2) bias_gradient(const Arguments a) {
    // a.tiles tiles of queries and a.section of keys, of which the block owns one each or, in a dimension of size 1,
    // all.
    const int q_tiles = a.dbias_size[2] == 1 ? 1 : a.tiles, k_tiles = a.dbias_size[3] == 1 ? 1 : a.section;
    const int64_t block = block_index(), slab = block / (int64_t{q_tiles} * k_tiles);
    const int own_q = static_cast<int>(block / k_tiles % q_tiles), own_k = static_cast<int>(block % k_tiles);
    const int own_b = static_cast<int>(slab / a.dbias_size[1]), own_h = static_cast<int>(slab % a.dbias_size[1]);
    const int n_b = a.dbias_size[0] == 1 ? a.B : 1, n_h = a.dbias_size[1] == 1 ? a.Hq : 1;
    const int n_q = a.tiles / q_tiles, n_k = a.section / k_tiles;

    const uint32_t q_tile = shared_memory(), dout_tile = q_tile + kRows * W * 2, k_tile = dout_tile + kRows * W * 2;
    const uint32_t v_tile = k_tile + N * W * 2, own_rows = warp_index() * 16 * W * 2;
    float sum[1][N / 8][4];
    clear(sum);
    for (int64_t n = 0; n < int64_t{n_b} * n_h * n_q * n_k; ++n) {
        const int b = own_b + static_cast<int>(n / (int64_t{n_h} * n_q * n_k));
        const int h = own_h + static_cast<int>(n / (int64_t{n_q} * n_k) % n_h);
        const int i0 = (own_q + static_cast<int>(n / n_k % n_q)) * kRows, j0 = (own_k + static_cast<int>(n % n_k)) * N;
        const int i1 = (i0 + kRows < a.Lq ? i0 + kRows : a.Lq) - 1, head = b * a.Hq + h;
        const int bits = bits_of_tile(a, a.slice(b, h), i0 / int(kTile), j0 / int(kTile));
        if (bits == -2 || j0 + N - 1 < i0 + a.lo || j0 > i1 + a.hi) continue;

        sync_threads();
        load_tile<kRows, W>(q_tile, a.q.at(b, h, i0), a.q.row, a.Lq - i0, a.D);
        load_tile<kRows, W>(dout_tile, a.dout.at(b, h, i0), a.dout.row, a.Lq - i0, a.Dv);
        load_tile<N, W>(k_tile, a.k.at(b, h / a.group, j0), a.k.row, a.Lk - j0, a.D);
        load_tile<N, W>(v_tile, a.v.at(b, h / a.group, j0), a.v.row, a.Lk - j0, a.Dv);
        cp_async_commit();
        const int first = i0 + warp_index() * 16;
        RowStats stats[2];
        for (int half = 0; half < 2; ++half)
            stats[half] = a.stats[int64_t{head} * a.padded_queries() + first + row_of(0, 2 * half)];
        cp_async_wait<0>();
        sync_threads();
        if (a.negate) {
            flip_signs<kRows, W>(q_tile);
            sync_threads();
        }
        const Options<dtype> options(a, b, h);
        ScoreGradients<dtype, W, N, true> g;
        uint32_t alive = g.kAll;
        g.template compute<true>(a, options, stats, q_tile + own_rows, dout_tile + own_rows, k_tile, v_tile, head,
                                 first, j0, is_cut<N>(a, i0, i1, {j0, bits}), bits, alive);
#pragma unroll
        for (int m = 0; m < N / 8; ++m)
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[0][m][r] += g.ds[0][m][r];
    }
    store_bias<N>(a, sum, slab, own_q * kRows, own_k * N);
}

template <DType dtype, int W>
void start_bias(Arguments a, const SoftmaxParams& p, const CudaCall& call) {
    constexpr int N = W == 64 ? 64 : W == 128 ? 32 : 16, kShared = 2 * kRows * W * 2 + 2 * N * W * 2;
    a.plan = plan_rows(p);
    a.tiles = static_cast<int>(tile_count(p.Lq()));
    a.section = static_cast<int>((p.Lk() + N - 1) / N);
    const int64_t blocks = int64_t{a.dbias_size[0]} * a.dbias_size[1] * (a.dbias_size[2] == 1 ? 1 : a.tiles) *
                           (a.dbias_size[3] == 1 ? 1 : a.section);
    launch("softmax_bias_gradient_sm80", bias_gradient<dtype, W, N>, blocks, kThreads, kShared, call.stream, a);
}

}  // namespace fastattn::cuda
