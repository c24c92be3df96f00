// Softmax attention backward with mma.sync, in passes that need no atomics: statistics of the rows; dK and dV of 64
// keys, walking over the queries of every head of their group; dQ of 64 queries, walking over keys; the gradient of a
// bias.
#include "cuda/backward_sm80.h"
#include "cuda/bias_gradient_sm80.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace fastattn::cuda {
namespace {

constexpr int kStatsRows = 64;

// What the other passes need of a row: 8 lanes to a row of out and dout.
template <DType dtype>
__global__ void __launch_bounds__(kThreads) row_stats(const Arguments a) {
    const int64_t block = block_index();
    const int tiles = a.padded_queries() / kStatsRows, head = static_cast<int>(block / tiles);
    const int i0 = static_cast<int>(block % tiles) * kStatsRows, lane = thread_index() % 8;
    for (int i = i0 + thread_index() / 8; i < i0 + kStatsRows; i += kThreads / 8) {
        float sum = 0.0f;
        if (i < a.Lq) {
            const uint16_t* out = a.out.at(head / a.Hq, head % a.Hq, i);
            const uint16_t* dout = a.dout.at(head / a.Hq, head % a.Hq, i);
            for (int d = lane * 8; d < a.Dv; d += 64) {
                const Chunk x = *reinterpret_cast<const Chunk*>(out + d), y = *reinterpret_cast<const Chunk*>(dout + d);
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    sum += unpack_low<dtype>(x.x[n]) * unpack_low<dtype>(y.x[n]);
                    sum += unpack_high<dtype>(x.x[n]) * unpack_high<dtype>(y.x[n]);
                }
            }
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) sum += shuffle_xor(sum, lanes);
        if (lane != 0) continue;
        // Rows that see nothing, and those past the last, have weights 0.
        RowStats stats{0.0f, -infinity(), 0.0f, 0.0f};
        const int64_t at = int64_t{head} * a.Lq + i;
        if (i < a.Lq && a.parts[2 * at + 1] != -infinity())
            stats = {-a.parts[2 * at], -a.parts[2 * at + 1], sum - (a.dlse ? a.dlse[at] : 0.0f), 0.0f};
        a.stats[int64_t{head} * a.padded_queries() + i] = stats;
    }
}

template <DType dtype, int W, int N, bool EXTRAS>
__global__ void __launch_bounds__(kThreads, W == 256 ? 1 : 2) query_gradients(const Arguments a) {
    constexpr int kTileBytes = N * W * 2, kOwnBytes = kRows * W * 2;
    const WorkItem work(static_cast<uint32_t>(block_index()), a.tiles, a.B * a.Hq, a.section, a.last_first);
    const int b = work.head / a.Hq, h = work.head % a.Hq;
    const int64_t slice = a.slice(b, h);
    const int i0 = (a.plan.order ? a.plan.order[slice * a.tiles + work.tile] : work.tile) * kRows;
    const int i1 = (i0 + kRows < a.Lq ? i0 + kRows : a.Lq) - 1;
    const int first_row = warp_index() * 16;

    const uint32_t q_tile = shared_memory(), dout_tile = q_tile + kOwnBytes, ring = dout_tile + kOwnBytes;
    const uint32_t own_rows = first_row * W * 2;
    const uint16_t *k = a.k.at(b, h / a.group, 0), *v = a.v.at(b, h / a.group, 0);
    const auto load = [&](uint32_t to, Block x) {
        if (x.first < 0) return;
        load_tile<N, W>(to, k + x.first * a.k.row, a.k.row, a.Lk - x.first, a.D);
        load_tile<N, W>(to + kTileBytes, v + x.first * a.v.row, a.v.row, a.Lk - x.first, a.Dv);
    };

    Walk<N> walk(a.plan, slice, i0, i1, a.lo, a.hi, a.Lk);
    Block now = walk.next();
    if (now.first >= 0) {
        load_tile<kRows, W>(q_tile, a.q.at(b, h, i0), a.q.row, a.Lq - i0, a.D);
        load_tile<kRows, W>(dout_tile, a.dout.at(b, h, i0), a.dout.row, a.Lq - i0, a.Dv);
    }
    load(ring, now);
    cp_async_commit();
    RowStats stats[2];
    for (int half = 0; half < 2; ++half)
        stats[half] = a.stats[int64_t{work.head} * a.padded_queries() + i0 + first_row + row_of(0, 2 * half)];
    if (a.negate && now.first >= 0) {
        cp_async_wait<0>();
        sync_threads();
        flip_signs<kRows, W>(q_tile);
    }

    float dq[1][W / 8][4];
    clear(dq);
    const Options<dtype> options(a, b, h);
    for (int stage = 0; now.first >= 0; stage ^= 1) {
        cp_async_wait<0>();
        sync_threads();
        const uint32_t k_tile = ring + stage * 2 * kTileBytes;
        const Block next = walk.next();
        load(ring + (stage ^ 1) * 2 * kTileBytes, next);
        cp_async_commit();

        const int j0 = now.first;
        ScoreGradients<dtype, W, N, EXTRAS> g;
        uint32_t alive = g.kAll;
        g.compute(a, options, stats, q_tile + own_rows, dout_tile + own_rows, k_tile, k_tile + kTileBytes, work.head,
                  i0 + first_row, j0, is_cut<N>(a, i0, i1, now), now.bits, alive);
        uint32_t ds[1][N / 16][4];
        as_operand<dtype>(ds, g.ds);
        // Keys that nobody sees may hold NaN, and 0 * NaN would reach every query.
        if (warp_any(alive != g.kAll))
            multiply_columns<dtype, W, true>(dq, ds, k_tile, alive);
        else
            multiply_columns<dtype, W, false>(dq, ds, k_tile, alive);
        now = next;
    }
    const float factor[1][2] = {{a.scale, a.scale}};
    store_rows<dtype, W>(a.dq.at(b, h, i0 + first_row), a.dq.row, a.Lq - i0 - first_row, a.D, dq, factor,
                         q_tile + own_rows);
}

// dK and dV of 64 keys: both, or one of them where both do not fit the registers.
template <DType dtype, int W, int N, bool DK, bool DV, bool EXTRAS>
__global__ void __launch_bounds__(kThreads, W == 256 ? 1 : 2) key_gradients(const Arguments a) {
    constexpr int kTileBytes = N * W * 2, kOwnBytes = kRows * W * 2;
    const WorkItem work(static_cast<uint32_t>(block_index()), a.tiles, a.B * a.Hk, a.section, a.last_first);
    const int b = work.head / a.Hk, h_kv = work.head % a.Hk, last_head = (h_kv + 1) * a.group - 1;
    int h = h_kv * a.group;
    const int j0 = (a.plan.order ? a.plan.order[a.slice(b, h) * a.tiles + work.tile] : work.tile) * kRows;
    const int j1 = (j0 + kRows < a.Lk ? j0 + kRows : a.Lk) - 1;
    const int first_row = warp_index() * 16;

    const uint32_t k_tile = shared_memory(), v_tile = k_tile + kOwnBytes, ring = v_tile + kOwnBytes;
    const uint32_t own_rows = first_row * W * 2;
    const auto stats_tile = [&](int stage) { return ring + 4 * kTileBytes + stage * N * int(sizeof(RowStats)); };
    const auto load = [&](int stage, int head, Block x) {
        if (x.first < 0) return;
        const uint32_t to = ring + stage * 2 * kTileBytes;
        // Addresses are computed where they are used: kept through the loop, they would not fit the registers.
        head = volatile_copy(head);
        load_tile<N, W>(to, a.q.at(b, head, x.first), a.q.row, a.Lq - x.first, a.D);
        load_tile<N, W>(to + kTileBytes, a.dout.at(b, head, x.first), a.dout.row, a.Lq - x.first, a.Dv);
        if (thread_index() < N)
            cp_async(stats_tile(stage) + thread_index() * sizeof(RowStats),
                     a.stats + (int64_t{b} * a.Hq + head) * a.padded_queries() + x.first + thread_index(), true);
    };
    const auto walk_over = [&](int head) { return Walk<N>(a.plan, a.slice(b, head), j0, j1, -a.hi, -a.lo, a.Lq); };
    Walk<N> walk = walk_over(h);
    // The next block of this head or, where it has no more, of the next one with any.
    const auto next_block = [&](int& head) {
        Block x = walk.next();
        while (x.first < 0 && head < last_head) {
            walk = walk_over(++head);
            x = walk.next();
        }
        return x;
    };

    Block now = next_block(h);
    if (now.first >= 0) load_tile<kRows, W>(k_tile, a.k.at(b, h_kv, j0), a.k.row, a.Lk - j0, a.D);
    if (DK && now.first >= 0) load_tile<kRows, W>(v_tile, a.v.at(b, h_kv, j0), a.v.row, a.Lk - j0, a.Dv);
    load(0, h, now);
    cp_async_commit();
    if (a.negate && now.first >= 0) {
        cp_async_wait<0>();
        sync_threads();
        flip_signs<kRows, W>(k_tile);
    }

    float dk[1][DK ? W / 8 : 1][4], dv[1][DV ? W / 8 : 1][4];
    clear(dk);
    clear(dv);
    for (int stage = 0; now.first >= 0; stage ^= 1) {
        cp_async_wait<0>();
        sync_threads();
        const uint32_t q_tile = ring + stage * 2 * kTileBytes, dout_tile = q_tile + kTileBytes;
        int next_head = h;
        const Block next = next_block(next_head);
        load(stage ^ 1, next_head, next);
        cp_async_commit();

        const Options<dtype> options(a, b, h);
        KeyScores<dtype, W, N, EXTRAS> t;
        // A query reaches the whole tile of keys or not: the band as the queries of a key see it.
        const bool cut = now.bits >= 0 || now.first < j1 - a.hi || now.first + N - 1 > j0 - a.lo;
        t.weights(a, options, k_tile + own_rows, q_tile, stats_tile(stage), b * a.Hq + h, now.first, j0 + first_row,
                  cut, now.bits);
        if constexpr (DV) {
            uint32_t p[1][N / 16][4];
            t.kept_weights(p);
            multiply_columns<dtype, W, false>(dv, p, dout_tile, 0);
        }
        if constexpr (DK) {
            t.gradients(a, v_tile + own_rows, dout_tile, stats_tile(stage));
            uint32_t ds[1][N / 16][4];
            as_operand<dtype>(ds, t.p);
            multiply_columns<dtype, W, false>(dk, ds, q_tile, 0);
        }
        now = next;
        h = next_head;
    }
    const int wanted = a.Lk - j0 - first_row;
    if constexpr (DK)
        if (a.dk.data) {
            const float factor[1][2] = {{a.scale, a.scale}};
            store_rows<dtype, W>(a.dk.at(b, h_kv, j0 + first_row), a.dk.row, wanted, a.D, dk, factor,
                                 k_tile + own_rows);
        }
    if constexpr (DV)
        if (a.dv.data) {
            const float factor[1][2] = {{a.keep_factor, a.keep_factor}};
            store_rows<dtype, W>(a.dv.at(b, h_kv, j0 + first_row), a.dv.row, wanted, a.Dv, dv, factor,
                                 v_tile + own_rows);
        }
}

template <DType dtype, int W, int N, bool EXTRAS>
void start_queries(const Arguments& a, const CudaCall& call) {
    constexpr int kShared = 2 * kRows * W * 2 + 4 * N * W * 2;
    launch("softmax_query_gradients_sm80", query_gradients<dtype, W, N, EXTRAS>, int64_t{a.tiles} * a.B * a.Hq,
           kThreads, kShared, call.stream, a);
}

template <DType dtype, int W, int N, bool EXTRAS>
void start_keys(const Arguments& a, const CudaCall& call) {
    constexpr int kShared = 2 * kRows * W * 2 + 4 * N * W * 2 + 2 * N * int(sizeof(RowStats));
    const int64_t blocks = int64_t{a.tiles} * a.B * a.Hk;
    const char* name = "softmax_key_gradients_sm80";
    if constexpr (W < 256) {
        launch(name, key_gradients<dtype, W, N, true, true, EXTRAS>, blocks, kThreads, kShared, call.stream, a);
    } else {
        if (a.dk.data)
            launch(name, key_gradients<dtype, W, N, true, false, EXTRAS>, blocks, kThreads, kShared, call.stream, a);
        if (a.dv.data)
            launch(name, key_gradients<dtype, W, N, false, true, EXTRAS>, blocks, kThreads, kShared, call.stream, a);
    }
}

// Keys or queries a step: as many as leave room for two blocks on a multiprocessor, in registers and in shared memory
// (with W = 256 for one).
template <DType dtype, int W, bool EXTRAS>
void start_queries(const Arguments& a, bool small, const CudaCall& call) {
    if constexpr (W == 64)
        start_queries<dtype, 64, EXTRAS ? 32 : 64, EXTRAS>(a, call);
    else if constexpr (W == 128)
        small ? start_queries<dtype, 128, 16, EXTRAS>(a, call) : start_queries<dtype, 128, 32, EXTRAS>(a, call);
    else
        start_queries<dtype, 256, 16, EXTRAS>(a, call);
}

template <DType dtype, int W, bool EXTRAS>
void start_keys(const Arguments& a, bool small, const CudaCall& call) {
    if constexpr (W == 256)
        start_keys<dtype, 256, 16, EXTRAS>(a, call);
    else if constexpr (EXTRAS)
        start_keys<dtype, W, W == 64 ? 32 : 16, true>(a, call);
    else if (small)
        start_keys<dtype, W, W == 64 ? 32 : 16, false>(a, call);
    else
        start_keys<dtype, W, W == 64 ? 64 : 32, false>(a, call);
}

template <DType dtype, int W, bool EXTRAS>
void start(Arguments a, const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call) {
    const int64_t width = p.D() + p.Dv();
    const bool small = shared_memory_of_processor(call.device) < 160 << 10;
    launch("softmax_row_stats_sm80", row_stats<dtype>, p.B() * p.Hq() * (a.padded_queries() / kStatsRows), kThreads, 0,
           call.stream, a);
    if ((g.dk || g.dv) && p.Lk() > 0) {
        a.tiles = static_cast<int>(tile_count(p.Lk()));
        a.plan = plan_columns(p);
        a.last_first = !p.plan && a.lo > 1 - a.Lq && a.hi >= a.Lk - 1;
        a.section = heads_per_section(p.B() * p.Hk(), 1, 2 * p.Lq() * width * p.group());
        start_keys<dtype, W, EXTRAS>(a, small, call);
    }
    if (g.dq) {
        a.tiles = static_cast<int>(tile_count(p.Lq()));
        a.plan = plan_rows(p);
        a.last_first = !p.plan && a.hi < a.Lk - 1 && a.lo <= 1 - a.Lq;
        a.section = heads_per_section(p.B() * p.Hq(), p.group(), 2 * p.Lk() * width);
        start_queries<dtype, W, EXTRAS>(a, small, call);
    }
    if (EXTRAS && g.dbias && p.Lk() > 0) start_bias<dtype, W>(a, p, call);
}

template <DType dtype, bool EXTRAS>
void start(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call) {
    const Arguments a = arguments(p, &g, call);
    const int64_t width = std::max(p.D(), p.Dv());
    width <= 64    ? start<dtype, 64, EXTRAS>(a, p, g, call)
    : width <= 128 ? start<dtype, 128, EXTRAS>(a, p, g, call)
                   : start<dtype, 256, EXTRAS>(a, p, g, call);
}

template <DType dtype>
void start(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call) {
    has_extras(p) ? start<dtype, true>(p, g, call) : start<dtype, false>(p, g, call);
}

}  // namespace

namespace sm80 {

int64_t workspace(const SoftmaxParams& p, const SoftmaxGradients* g, const CudaCall&) {
    return g ? p.B() * p.Hq() * tile_count(p.Lq()) * kTile * int64_t{sizeof(RowStats)} : 0;
}

void backward(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call) {
    p.q.dtype == DType::kBFloat16 ? start<DType::kBFloat16>(p, g, call) : start<DType::kFloat16>(p, g, call);
}

}  // namespace sm80
}  // namespace fastattn::cuda
