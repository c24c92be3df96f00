// Softmax attention forward with mma.sync: a block owns 64 MB queries of one head, a warp 16 MB of them, and walks over
// the keys that band and plan leave. K and V take turns in a ring of three tiles: one is read while two are under way.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/logits.h"

namespace fastattn::cuda {
namespace {

// Weights up to 2^kSlack cost no precision, and save most of the passes over what was summed before.
constexpr float kSlack = 8.0f;

template <DType dtype, int W, int MB, int N, bool EXTRAS>
struct Forward {
    static constexpr int kRows = 64 * MB, kTileBytes = N * W * 2, kShared = kRows * W * 2 + 3 * kTileBytes;

    float o[MB][W / 8][4];
    // Weights are relative to 2^reference: the largest exponent of the row, or up to kSlack less.
    float reference[MB][2], total[MB][2];
    bool huge;  // one of the warp's references is

    __device__ void start() {
        clear(o);
        huge = false;
#pragma unroll
        for (int m = 0; m < MB; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                reference[m][half] = kLowest;
                total[m][half] = 0.0f;
            }
    }

    // Scores of one tile to weights.
    __device__ void weigh(float (&s)[MB][N / 8][4], float slope) {
        float top[MB][2];
        bool outgrown = false;
#pragma unroll
        for (int m = 0; m < MB; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = -infinity();
#pragma unroll
                for (int n = 0; n < N / 8; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top[m][half] = fmaxf(reference[m][half], multiply(row_max(x), slope));
                outgrown = outgrown || top[m][half] > reference[m][half] + kSlack;
            }
        if (warp_any(outgrown)) raise(top);
        if (huge) {
            for_each(s, [&](float& x, int m, int, int r) { x = exponent<true>(x, slope, -reference[m][r / 2]); });
        } else {
            for_each(s, [&](float& x, int m, int, int r) { x = exponent<false>(x, slope, -reference[m][r / 2]); });
        }
        for_each(s, [&](float& x, int m, int, int r) {
            x = exp2_approx(x);
            total[m][r / 2] += x;
        });
    }

    // New references.
    __device__ void raise(const float (&top)[MB][2]) {
        huge = false;
#pragma unroll
        for (int m = 0; m < MB; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float alpha = exp2_approx(reference[m][half] - top[m][half]);
                reference[m][half] = top[m][half];
                huge = huge || is_huge(top[m][half]);
                total[m][half] *= alpha;
#pragma unroll
                for (int n = 0; n < W / 8; ++n) {
                    o[m][n][2 * half] *= alpha;
                    o[m][n][2 * half + 1] *= alpha;
                }
            }
        huge = warp_any(huge);
    }
};

template <DType dtype, int W, int MB, int N, bool EXTRAS>
__global__ void __launch_bounds__(kThreads, 2) softmax_forward(const Arguments a) {
    using F = Forward<dtype, W, MB, N, EXTRAS>;
    const WorkItem work(static_cast<uint32_t>(block_index()), a.tiles, a.B * a.Hq, a.section, a.last_first);
    const int b = work.head / a.Hq, h = work.head % a.Hq;
    const int64_t slice = a.slice(b, h);
    const int i0 = (a.plan.order ? a.plan.order[slice * a.tiles + work.tile] : work.tile) * F::kRows;
    const int i1 = (i0 + F::kRows < a.Lq ? i0 + F::kRows : a.Lq) - 1;
    const int first_row = warp_index() * 16 * MB;

    const uint32_t q_tile = shared_memory(), ring = q_tile + F::kRows * W * 2;
    const uint32_t own_rows = q_tile + first_row * W * 2;
    // Addresses are computed where they are used: kept through the loop, they would not fit the registers.
    const auto load_k = [&](uint32_t to, Block x) {
        if (x.first < 0) return;
        load_tile<N, W>(to, a.k.at(volatile_copy(b), h / a.group, x.first), a.k.row, a.Lk - x.first, a.D);
    };
    const auto load_v = [&](uint32_t to, Block x) {
        if (x.first < 0) return;
        load_tile<N, W>(to, a.v.at(volatile_copy(b), h / a.group, x.first), a.v.row, a.Lk - x.first, a.Dv);
    };

    Walk<N> walk(a.plan, slice, i0, i1, a.lo, a.hi, a.Lk);
    Block now = walk.next();
    int place = 0;  // of K in the ring; V comes next
    // Where there is nothing to see, the tile of queries is only written: by way of it go the zeros.
    if (now.first >= 0) load_tile<F::kRows, W>(q_tile, a.q.at(b, h, i0), a.q.row, a.Lq - i0, a.D);
    load_k(ring, now);
    cp_async_commit();
    load_v(ring + F::kTileBytes, now);
    cp_async_commit();
    if (a.negate && now.first >= 0) {
        cp_async_wait<1>();
        sync_threads();
        flip_signs<F::kRows, W>(q_tile);
    }

    F f;
    f.start();
    const Options<dtype> options(a, b, h);
    while (now.first >= 0) {
        cp_async_wait<1>();
        sync_threads();
        const uint32_t k_tile = ring + place * F::kTileBytes, v_tile = ring + (place + 1) % 3 * F::kTileBytes;
        place = (place + 2) % 3;
        const Block next = walk.next();
        load_k(ring + place * F::kTileBytes, next);
        cp_async_commit();

        float s[MB][N / 8][4];
        clear(s);
        multiply_rows<dtype, W>(s, own_rows, k_tile);
        const int j0 = now.first;
        if constexpr (EXTRAS) {
            float damp[MB][N / 8][4];
            options.template apply<false>(s, damp, i0 + first_row, j0);
        }
        constexpr uint32_t kAll = (uint64_t{1} << N / 4) - 1;
        uint32_t alive = kAll;
        const bool cut = now.bits >= 0 || j0 + N > a.Lk || j0 < i1 + a.lo || j0 + N - 1 > i0 + a.hi;
        if (cut) hide(s, a, i0 + first_row, j0, now.bits);
        if (cut || (EXTRAS && a.bias)) alive = alive_columns(s);
        f.weigh(s, EXTRAS ? kLog2eF : a.slope);
        if (EXTRAS && a.drops) {
            uint32_t kept[MB];
            kept_elements<false, MB, N / 8>(kept, a, work.head, i0 + first_row, j0);
            for_each(s, [&](float& x, int m, int n, int r) { x = kept[m] >> (4 * n + r) & 1 ? x : 0.0f; });
        }
        uint32_t p[MB][N / 16][4];
        as_operand<dtype>(p, s);

        cp_async_wait<1>();
        sync_threads();
        load_v(k_tile, next);
        cp_async_commit();
        // Values that nobody sees may hold NaN, and 0 * NaN would reach every query.
        if (warp_any(alive != kAll))
            multiply_columns<dtype, W, true>(f.o, p, v_tile, alive);
        else
            multiply_columns<dtype, W, false>(f.o, p, v_tile, alive);
        now = next;
    }

    float factor[MB][2];
    const float sink = a.sinks ? multiply(a.sinks[h], kLog2eF) : -infinity();
#pragma unroll
    for (int m = 0; m < MB; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float reference = fmaxf(f.reference[m][half], sink);
            const float alpha = exp2_approx(f.reference[m][half] - reference);
            const float total = row_sum(f.total[m][half]) * alpha + exp2_approx(sink - reference);
            const bool seen = total > 0.0f;
            factor[m][half] = seen ? a.keep_factor * alpha / total : 0.0f;
            const int i = i0 + first_row + row_of(m, 2 * half);
            if (i < a.Lq && lane_index() % 4 == 0) {
                const float tail = seen ? log2_approx(total) : -infinity();
                const int64_t at = int64_t{work.head} * a.Lq + i;
                if (a.lse) a.lse[at] = (reference + tail) * 0.6931471805599453f;
                if (a.parts) {
                    a.parts[2 * at] = seen ? reference : 0.0f;
                    a.parts[2 * at + 1] = tail;
                }
            }
        }
    store_rows<dtype, W>(a.out.at(b, h, i0 + first_row), a.out.row, a.Lq - i0 - first_row, a.Dv, f.o, factor, own_rows);
}

template <DType dtype, int W, int MB, int N, bool EXTRAS>
void start(const Arguments& a, const CudaCall& call) {
    launch("softmax_forward_sm80", softmax_forward<dtype, W, MB, N, EXTRAS>, int64_t{a.tiles} * a.B * a.Hq, kThreads,
           Forward<dtype, W, MB, N, EXTRAS>::kShared, call.stream, a);
}

// One query a head that sees every key: the heads that share keys become the queries of one, and K and V are read once.
void heads_to_queries(Arguments& a) {
    for (Rows* x : {&a.q, &a.out}) {
        x->row = x->head;
        x->head *= a.group;
    }
    a.Lq = a.group;
    a.Hq = a.Hk;
    a.group = 1;
    a.lo = -a.Lq;
    a.hi = a.Lk;
}

template <DType dtype>
void start(Arguments a, const SoftmaxParams& p, const CudaCall& call) {
    const bool extras = has_extras(p);
    if (a.Lq == 1 && a.lo <= 0 && a.hi >= a.Lk - 1 && !p.plan && !p.sinks && !extras) heads_to_queries(a);
    const int64_t width = std::max(a.D, a.Dv), heads = int64_t{a.B} * a.Hq;
    // Less shared memory than this holds a single block of the larger tiles.
    const bool small = shared_memory_of_processor(call.device) < 160 << 10;
    // Tall tiles read K and V half as often, once there are enough of them; those of a plan are 64 queries.
    const bool tall =
        !p.plan && !extras && width <= (small ? 64 : 128) && heads * ((a.Lq + 127) / 128) >= 2 * call.processors;
    const int rows = tall ? 128 : 64;
    a.tiles = (a.Lq + rows - 1) / rows;
    a.last_first = !p.plan && a.hi < a.Lk - 1 && a.lo <= 1 - a.Lq;
    a.section = heads_per_section(heads, a.group, int64_t{2} * a.Lk * (a.D + a.Dv));
    a.plan = plan_rows(p);
    if (width <= 64)
        extras ? start<dtype, 64, 1, 64, true>(a, call)
        : tall ? start<dtype, 64, 2, 64, false>(a, call)
               : start<dtype, 64, 1, 64, false>(a, call);
    else if (width <= 128)
        extras  ? start<dtype, 128, 1, 32, true>(a, call)
        : tall  ? start<dtype, 128, 2, 64, false>(a, call)
        : small ? start<dtype, 128, 1, 32, false>(a, call)
                : start<dtype, 128, 1, 64, false>(a, call);
    else
        extras ? start<dtype, 256, 1, 16, true>(a, call) : start<dtype, 256, 1, 32, false>(a, call);
}

}  // namespace

namespace sm80 {

const char* why_not(const SoftmaxParams& p, const SoftmaxGradients* g) {
    if (p.mask) return "a mask has to come as a plan";
    if (p.q.dtype != DType::kBFloat16 && p.q.dtype != DType::kFloat16) return "the dtype is not bfloat16 or float16";
    if (p.D() % 8 || p.Dv() % 8 || p.D() < 8 || p.Dv() < 8 || std::max(p.D(), p.Dv()) > 256)
        return "head dimensions are not multiples of 8 up to 256";
    if (p.bias && p.bias.dtype != DType::kFloat32 && p.bias.dtype != p.q.dtype)
        return "the bias is neither float32 nor of the dtype of q";
    if (std::max(p.Lq(), p.Lk()) > int64_t{1} << 29) return "more than 2^29 queries or keys";
    if (g && g->dslopes) return "no gradient of ALiBi slopes";
    return nullptr;
}

void forward(const SoftmaxParams& p, const CudaCall& call) {
    const Arguments a = arguments(p, nullptr, call);
    p.q.dtype == DType::kBFloat16 ? start<DType::kBFloat16>(a, p, call) : start<DType::kFloat16>(a, p, call);
}

}  // namespace sm80
}  // namespace fastattn::cuda
