// Softmax attention backward for sm_90a: statistics of the rows; dK and dV of tiles of keys; dQ of tiles of queries,
// or, where the order of additions may differ from run to run, the same pass as dK and dV with sums of dQ in memory.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/softmax_backward_consume_sm90.h"
#include "cuda/softmax_backward_produce_sm90.h"
#include "cuda/softmax_backward_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {
namespace {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) gradient_kernel(const __grid_constant__ GradientArguments p) {
    OwnTile own;
    if (!own.template find<Tile>(p)) return;
    const GradientShared<Tile> at;
    const int warp = from_lane(thread_index() / 32, 0);
    if (thread_index() == 0) {
        constexpr int kConsumerWarps = 8;
        barrier_init(at.own_full(), 1);
        for (int slot = 0; slot < Tile::kSlots; ++slot) {
            barrier_init(at.full(slot), 1);
            barrier_init(at.empty(slot), kConsumerWarps);
            barrier_init(at.clean(slot), 1);
        }
        barrier_init_fence();
        store_shared(at.own_tile(), own);
    }
    sync_threads();
    if (warp < 4) {
        lower_registers<Tile::kProducerRegisters>();
        if (warp == 0) {
            if (thread_index() == 0) GradientProducer<Tile>(p, at, own).run();
        } else if (!Tile::keys && warp == 1 && p.plan_start) {
            clean_keys<Tile>(p, at, own);
        }
    } else {
        raise_registers<Tile::kConsumerRegisters>();
        if constexpr (!Tile::keys)
            GradientConsumer<Tile, true, false>(p, at).run();
        else if constexpr (!Tile::apart)
            GradientConsumer<Tile, true, true>(p, at).run();
        else if (warp < 8)
            GradientConsumer<Tile, true, false>(p, at).run();
        else
            GradientConsumer<Tile, false, true>(p, at).run();
    }
}

struct StatsArguments {
    const char *out, *dout;
    int64_t out_stride[3], dout_stride[3];  // of b, h, i in elements
    const float *parts, *dlse;
    StatsTile* stats;
    int Hq, Lq, Dv, q_tiles;
};

constexpr int kStatsThreads = 128;

// A block to 64 queries, 8 lanes to a row.
template <DType dtype>
__global__ void __launch_bounds__(kStatsThreads) row_stats(const StatsArguments p) {
    const int64_t block = block_index(), head = block / p.q_tiles, b = head / p.Hq, h = head % p.Hq;
    const int first = static_cast<int>(block % p.q_tiles) * int(kTile), lane = thread_index() % 8;
    StatsTile& tile = p.stats[block];
    for (int row = thread_index() / 8; row < kTile; row += kStatsThreads / 8) {
        const int i = first + row;
        float sum = 0.0f;
        for (int d = 8 * lane; i < p.Lq && d < p.Dv; d += 64) {
            const auto eight = [&](const char* data, const int64_t (&stride)[3]) {
                return *reinterpret_cast<const Sixteen*>(data +
                                                         2 * (b * stride[0] + h * stride[1] + i * stride[2] + d));
            };
            const Sixteen x = eight(p.out, p.out_stride), y = eight(p.dout, p.dout_stride);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                sum += unpack_low<dtype>(x.x[n]) * unpack_low<dtype>(y.x[n]);
                sum += unpack_high<dtype>(x.x[n]) * unpack_high<dtype>(y.x[n]);
            }
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) sum += shuffle_xor(sum, lanes);
        if (lane) continue;
        // Rows that see nothing, and those past the last, have weights 0.
        float top = 0.0f, tail = infinity(), delta = 0.0f;
        const int64_t at = head * p.Lq + i;
        if (i < p.Lq && p.parts[2 * at + 1] != -infinity()) {
            top = p.parts[2 * at];
            tail = p.parts[2 * at + 1];
            delta = sum - (p.dlse ? p.dlse[at] : 0.0f);
        }
        tile.minus_log[row] = -(top + tail);
        tile.delta[row] = delta;
        tile.minus_top[row] = -top;
        tile.minus_tail[row] = -tail;
    }
}

// A warp to 64 own keys: which of them some query of the group sees.
__global__ void __launch_bounds__(32) find_seen(const __grid_constant__ GradientArguments p) {
    const int64_t head = block_index() / p.plan_tiles;
    const int key_tile = static_cast<int>(block_index() % p.plan_tiles), kv_head = static_cast<int>(head % p.heads);
    const OwnTile own{key_tile * int(kTile), static_cast<int>(head / p.heads), kv_head};
    uint64_t seen = 0;
    for (int h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h) {
        const int32_t* start = p.plan_start + own.plan_slice(p, h) * p.plan_tiles + key_tile;
        for (int r = start[0]; r < start[1] && ~seen; ++r) {
            const TileRun run = p.plan_runs[r];
            for (int tile = run.first; tile < run.first + run.count && ~seen; ++tile) {
                for (int row = thread_index(); row < kTile; row += 32) {
                    const int i = tile * int(kTile) + row;
                    if (i >= p.streamed_length) continue;
                    const uint64_t word = band_word(-p.hi, -p.lo, p.own_length, i, key_tile);
                    seen |= run.bits < 0 ? word : word & p.plan_words[int64_t{run.bits} * kTile + row];
                }
                seen = or_over_warp(seen);
            }
        }
    }
    if (thread_index() == 0) p.seen[block_index()] = seen;
}

struct QueryArguments {
    const float* parts;
    char* dq;
    int64_t stride[3];
    int Hq, Lq, D, q_tiles, chunks;
    float scale;
};

// A block to 64 queries and 64 columns: sums as a warpgroup of gradient_kernel had them.
template <DType dtype>
__global__ void __launch_bounds__(128) finish_queries(const QueryArguments p) {
    const int64_t tile = block_index() / p.chunks, head = tile / p.q_tiles;
    const int column = static_cast<int>(block_index() % p.chunks) * kTileColumns;
    const int first = static_cast<int>(tile % p.q_tiles) * int(kTile);
    float sums[32];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const Four four =
            *reinterpret_cast<const Four*>(p.parts + block_index() * (64 * 64) + (c * 128 + thread_index()) * 4);
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[4 * c + n] = four.x[n];
    }
    char* to = p.dq + 2 * (head / p.Hq * p.stride[0] + head % p.Hq * p.stride[1] + first * p.stride[2] + column);
    write_sums<dtype, 64>(to, p.stride[2], sums_row(), p.Lq - first, p.D - column, p.scale, sums);
}

// What the passes of one call share.
struct Passes {
    const SoftmaxParams& p;
    const SoftmaxGradients& g;
    const CudaCall& call;
    int64_t q_tiles = tile_count(p.Lq());

    StatsTile* stats() const { return reinterpret_cast<StatsTile*>(call.workspace); }
    int64_t stats_bytes() const { return p.B() * p.Hq() * q_tiles * int64_t{sizeof(StatsTile)}; }
    float* dq_parts() const { return reinterpret_cast<float*>(call.workspace + stats_bytes()); }
    int64_t dq_bytes() const { return p.B() * p.Hq() * q_tiles * width() * int64_t{kTile * sizeof(float)}; }
    uint64_t* seen() const { return reinterpret_cast<uint64_t*>(call.workspace + stats_bytes() + dq_bytes()); }
    int64_t seen_bytes() const { return p.plan ? p.B() * p.Hk() * p.plan->k_tiles * int64_t{sizeof(uint64_t)} : 0; }
    int64_t width() const {
        const int64_t widest = std::max(p.D(), p.Dv());
        return widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
    }
    // One pass over all pairs for all three gradients.
    bool single() const { return !call.deterministic && width() <= 128 && g.dq && (g.dk || g.dv); }
};

template <class T>
void set_strides(int64_t (&stride)[3], const T& x) {
    for (int d = 0; d < 3; ++d) stride[d] = x.size[d] == 1 ? 0 : x.stride[d];
}

template <DType dtype>
void launch_stats(const Passes& x) {
    StatsArguments a{
        x.p.out.data,  x.g.dout.data, {}, {}, x.p.lse_parts, x.g.dlse, x.stats(), int(x.p.Hq()), int(x.p.Lq()),
        int(x.p.Dv()), int(x.q_tiles)};
    set_strides(a.out_stride, x.p.out);
    set_strides(a.dout_stride, x.g.dout);
    launch("softmax_row_stats_sm90", row_stats<dtype>, x.p.B() * x.p.Hq() * x.q_tiles, kStatsThreads, 0, x.call.stream,
           a);
}

template <class Tile>
void launch_gradients(const char* name, const Passes& x) {
    constexpr double kLog2e = 1.4426950408889634;
    constexpr int64_t kL2Bytes = 32 << 20;
    const SoftmaxParams& p = x.p;
    const SoftmaxGradients& g = x.g;
    // Keys that the band leaves to some query: the tensor maps have no others, so these are read as zeros.
    int64_t first = 0, last = p.Lk();
    if (!p.plan) seen_range(p, &first, &last);
    const auto seen = [&](TensorView t) {
        t.data += first * t.stride[2] * element_size(t.dtype);
        t.size[2] = last - first;
        return t;
    };
    GradientArguments a = {};
    const int own_keys = Tile::keys;
    if (first < last) {
        const int rows_k = own_keys ? Tile::BM : Tile::BN, rows_q = own_keys ? Tile::BN : Tile::BM;
        TensorTiles* keys = own_keys ? a.own : a.streamed;
        TensorTiles* queries = own_keys ? a.streamed : a.own;
        keys[0] = tensor_tiles(seen(p.k), rows_k, 1);
        keys[1] = tensor_tiles(seen(p.v), rows_k, 1);
        queries[0] = tensor_tiles(p.q, rows_q, 1);
        queries[1] = tensor_tiles(g.dout, rows_q, 1);
        (own_keys ? a.own_skip : a.streamed_skip) = static_cast<int>(first);
    }
    const auto result = [&](int n, const TensorView& t, double factor) {
        a.sums[n] = t.data;
        a.columns[n] = static_cast<int>(t.size[3]);
        a.factor[n] = static_cast<float>(factor);
        set_strides(a.sums_stride[n], t);
    };
    if (own_keys) {
        result(0, g.dk, p.scale);
        result(1, g.dv, 1);
    } else {
        result(0, g.dq, p.scale);
    }
    a.stats = x.stats();
    a.dq_parts = Tile::with_dq ? x.dq_parts() : nullptr;
    a.q_tiles = static_cast<int>(x.q_tiles);
    if (p.plan) {
        a.plan_start = own_keys ? p.plan->column_start : p.plan->row_start;
        a.plan_order = own_keys ? p.plan->column_order : p.plan->row_order;
        a.plan_runs = own_keys ? p.plan->columns : p.plan->rows;
        a.plan_words = p.plan->words;
        a.plan_tiles = static_cast<int>(own_keys ? p.plan->k_tiles : p.plan->q_tiles);
        a.plan_batches = static_cast<int>(p.plan->batches);
        a.plan_heads = static_cast<int>(p.plan->heads);
    }
    a.group = static_cast<int>(p.group());
    a.heads = static_cast<int>(own_keys ? p.Hk() : p.Hq());
    a.own_length = static_cast<int>(own_keys ? p.Lk() : p.Lq());
    if (first < last) a.streamed_length = static_cast<int>(own_keys ? p.Lq() : p.Lk());
    const int lo = static_cast<int>(std::clamp(p.lo, -p.Lq(), p.Lk())),
              hi = static_cast<int>(std::clamp(p.hi, -p.Lq(), p.Lk()));
    a.lo = own_keys ? -hi : lo;
    a.hi = own_keys ? -lo : hi;
    a.unit = static_cast<float>(p.scale * kLog2e);
    if (p.softcap > 0) {
        a.cap = static_cast<float>(p.softcap * kLog2e);
        a.uncap = static_cast<float>(p.scale / p.softcap);
    }
    a.tiles = p.plan ? a.plan_tiles : (a.own_length + Tile::BM - 1) / Tile::BM;
    a.last_first = a.hi < a.streamed_length - 1 && a.lo <= 1 - a.own_length;
    const int64_t all_heads = p.B() * a.heads, bytes = (own_keys ? p.Lq() : p.Lk()) * (p.D() + p.Dv()) * 2;
    if (all_heads * a.tiles > INT32_MAX) throw std::runtime_error("more tiles than 2^31");
    // Heads whose streamed tensors fit L2 together.
    const int64_t sets = std::max<int64_t>(1, kL2Bytes / (bytes * (own_keys ? a.group : 1)));
    a.all_heads = static_cast<int>(all_heads);
    a.section = static_cast<int>(std::min(all_heads, sets * (own_keys ? 1 : a.group)));
    if (Tile::with_dq && p.plan) {
        a.seen = x.seen();
        launch("softmax_seen_keys_sm90", find_seen, all_heads * a.plan_tiles, 32, 0, x.call.stream, a);
    }
    launch(name, gradient_kernel<Tile>, all_heads * a.tiles, Tile::kThreads, GradientShared<Tile>::kBytes,
           x.call.stream, a);
}

template <DType dtype, int D>
void run(const Passes& x) {
    launch_stats<dtype>(x);
    if constexpr (D <= 128) {
        if (x.single()) {
            clear(x.dq_parts(), static_cast<size_t>(x.dq_bytes()), x.call.stream);
            launch_gradients<GradientTile<dtype, D, true, true>>("softmax_gradients_sm90", x);
            QueryArguments a{x.dq_parts(), x.g.dq.data,    {},     int(x.p.Hq()),   int(x.p.Lq()),
                             int(x.p.D()), int(x.q_tiles), D / 64, float(x.p.scale)};
            set_strides(a.stride, x.g.dq);
            launch("softmax_finish_queries_sm90", finish_queries<dtype>, x.p.B() * x.p.Hq() * x.q_tiles * (D / 64), 128,
                   0, x.call.stream, a);
            return;
        }
    }
    if (x.g.dk || x.g.dv) launch_gradients<GradientTile<dtype, D, true, false>>("softmax_key_gradients_sm90", x);
    if (x.g.dq) launch_gradients<GradientTile<dtype, D, false, false>>("softmax_query_gradients_sm90", x);
}

template <DType dtype>
void run(const Passes& x) {
    x.width() == 64 ? run<dtype, 64>(x) : x.width() == 128 ? run<dtype, 128>(x) : run<dtype, 256>(x);
}

}  // namespace

const char* backward_why_not(const SoftmaxParams&, const SoftmaxGradients& g) {
    if (g.dout.size[2] > 1 && g.dout.stride[2] == 0) return "the kernels for sm_90a cannot read expanded rows of dout";
    return nullptr;
}

int64_t backward_workspace(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call) {
    const Passes x{p, g, call};
    return x.stats_bytes() + (x.single() ? x.dq_bytes() + x.seen_bytes() : 0);
}

void backward(const SoftmaxParams& p, const SoftmaxGradients& g, const CudaCall& call) {
    const Passes x{p, g, call};
    p.q.dtype == DType::kBFloat16 ? run<DType::kBFloat16>(x) : run<DType::kFloat16>(x);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
