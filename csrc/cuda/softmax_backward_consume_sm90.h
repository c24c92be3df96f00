// A consumer warpgroup of the Hopper backward kernels: 64 own rows against all tiles that go past them.
#pragma once
#include "cuda/softmax_backward_sums_sm90.h"
#include "cuda/softmax_backward_tile_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// tanh(x) by one exponential; near 0, where 1 - e cancels, by the series.
__device__ __forceinline__ float tanh_approx(float x) {
    const float e = exp2_approx(-2.885390082f * fabsf(x)), square = x * x;
    const float small = fabsf(x) * (1.0f + square * (-0.333333333f + square * 0.133333333f));
    return copysignf(fabsf(x) < 0.1f ? small : (1.0f - e) * reciprocal_approx(1.0f + e), x);
}

// with_first, with_second: which of the sums dS streamed0 and P streamed1 this warpgroup makes.
template <class Tile, bool with_first, bool with_second>
class GradientConsumer {
   public:
    __device__ GradientConsumer(const GradientArguments& p, const GradientShared<Tile>& at)
        : p_(p),
          at_(at),
          warpgroup_(from_lane(thread_index() / 128 - 1, 0)),
          part_(Tile::apart ? 0 : warpgroup_),
          lane_(thread_index() % 32),
          row_(64 * part_ + sums_row()) {}

    __device__ void run() {
        float first[with_first ? Tile::D / 2 : 2], second[with_second ? Tile::D / 2 : 2];
#pragma unroll
        for (float& x : first) x = 0.0f;
#pragma unroll
        for (float& x : second) x = 0.0f;
        own_stats();
        for (int step = 0;; ++step) {
            const int slot0 = ring_.stage;
            wait();
            const Visit visit = load_shared<Visit>(at_.visit(slot0));
            if (from_lane(visit.first, 0) < 0) break;
            if (step == 0) {
                barrier_wait(at_.own_full(), 0);
                if (Tile::with_dq && p_.seen) clean_own();
            }

            float weights[32], gradients[with_first ? 32 : 2];
            wgmma_fence();
            multiply_rows(weights, 0, slot0);
            wgmma_commit();
            ring_.advance();
            const int slot1 = ring_.stage;
            wait();
            if constexpr (with_first) {
                multiply_rows(gradients, 1, slot1);
                wgmma_commit();
                wgmma_wait<1>(weights);
            } else {
                wgmma_wait<0>(weights);
            }

            const uint32_t seen = visit.masked ? seen_elements(visit) : ~0u;
            uint32_t p[4][4], ds[4][4];
            weigh(weights, p, slot0, seen);
            if constexpr (with_first) {
                wgmma_wait<0>(gradients);
                grade(gradients, weights, slot0, seen);
                round(gradients, ds);
                if constexpr (Tile::with_dq) store_gradients(ds, step);
            }
            wgmma_fence();
            if constexpr (with_second) multiply_columns(second, p, slot1);
            if constexpr (Tile::with_dq) {
                queries(first, second, ds, visit, step, slot0);
            } else {
                if constexpr (with_first) multiply_columns(first, ds, slot0);
                wgmma_wait<0>(first, second);
            }
            release(slot1);
            release(slot0);
            ring_.advance();
        }
        if constexpr (with_first) write(0, first);
        if constexpr (with_second) write(1, second);
        if constexpr (Tile::with_dq) bulk_wait_read();
    }

   private:
    __device__ void wait() const {
        barrier_wait(!Tile::keys && p_.plan_start ? at_.clean(ring_.stage) : at_.full(ring_.stage), ring_.parity);
    }
    __device__ OwnTile own() const { return load_shared<OwnTile>(at_.own_tile()); }
    __device__ void release(int slot) const { barrier_arrive_if(at_.empty(slot), lane_ == 0); }

    __device__ static void meet_consumers() { named_barrier(1, 256); }

    // Keys that nobody sees may hold anything, and 0 * NaN is NaN: for dQ they become 0.
    __device__ void clean_own() const {
        const OwnTile own = this->own();
        const int tile = own.first / kTile + part_;
        const int64_t head = int64_t{own.b} * p_.heads + own.h;
        if (tile < p_.plan_tiles)
            zero_rows<Tile::D, 128>(at_.own(0, 0) + part_ * (64 * kTileRowBytes), Tile::BM * kTileRowBytes,
                                    ~p_.seen[head * p_.plan_tiles + tile]);
        fence_async_proxy();
        meet_consumers();
    }

    // Starts own rows [64, D] of a tensor times streamed rows [D, 64].
    __device__ void multiply_rows(float (&x)[32], int which, int slot) const {
        const uint64_t a = wgmma_operand(at_.own(which, 0) + part_ * (64 * kTileRowBytes));
        const uint64_t b = wgmma_operand(at_.slot(slot));
#pragma unroll
        for (int step = 0; step < Tile::D / 16; ++step) {
            const int chunk = step / 4, inside = step % 4 * 32;
            wgmma<Tile::dtype, 64, false, false>(x, wgmma_advance(a, chunk * (Tile::BM * kTileRowBytes) + inside),
                                                 wgmma_advance(b, chunk * (Tile::BN * kTileRowBytes) + inside),
                                                 step > 0);
        }
    }

    // Starts x [64, 64] times streamed rows [64, D], added to the sums.
    __device__ void multiply_columns(float (&sums)[Tile::D / 2], const uint32_t (&x)[4][4], int slot) const {
        const uint64_t b = wgmma_operand(at_.slot(slot), Tile::BN * kTileRowBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step)
            wgmma<Tile::dtype, Tile::D, true>(sums, x[step], wgmma_advance(b, step * (16 * kTileRowBytes)), true);
        wgmma_commit();
    }

    // Where queries are owned, a thread's two rows have their statistics in registers.
    __device__ void own_stats() {
        if constexpr (Tile::keys) return;
        const OwnTile own = this->own();
        const StatsTile* tiles = p_.stats + (int64_t{own.b} * p_.heads + own.h) * p_.q_tiles;
        float top[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = own.first + row_ + 8 * half;
            const bool there = i < p_.own_length;
            const StatsTile& tile = tiles[there ? i / kTile : 0];
            log_[half] = there ? tile.minus_log[i % kTile] : -infinity();
            delta_[half] = there ? tile.delta[i % kTile] : 0.0f;
            top[half] = there ? tile.minus_top[i % kTile] : 0.0f;
            top_[half] = top[half];
            tail_[half] = there ? tile.minus_tail[i % kTile] : -infinity();
        }
        huge_ = warp_any(fmaxf(fabsf(top[0]), fabsf(top[1])) > kHugeTop);
    }

    // Element 4 c + 2 half + e of a thread is own row row_ + 8 half and streamed row 8 c + 2 (lane % 4) + e.
    // Of the queries of elements 4 c to 4 c + 3: `own` where queries are owned, else the tile's numbers at `stats`.
    __device__ Two stat(uint32_t stats, int c) const { return load_shared<Two>(stats + (8 * c + 2 * (lane_ % 4)) * 4); }

    // Bit n: element n may be seen.
    __device__ uint32_t seen_elements(const Visit& visit) const {
        const int bits = part_ ? visit.bits[1] : visit.bits[0], shift = 2 * (lane_ % 4);
        const int first_row = own().first;
        uint32_t seen = 0;
        if (bits == kNoneSeen) return 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int y = first_row + row_ + 8 * half;
            if (y >= p_.own_length) continue;
            // Streamed rows that y meets, from the thread's first on.
            int last = y + p_.hi < p_.streamed_length - 1 ? y + p_.hi : p_.streamed_length - 1;
            const int first = y + p_.lo - visit.first - shift;
            last -= visit.first + shift;
            uint64_t word = ~uint64_t{0};
            if (!Tile::keys && bits >= 0) word = p_.plan_words[int64_t{bits} * kTile + y % kTile] >> shift;
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const int x = n / 2 * 8 + n % 2;
                const bool meets = x >= first && x <= last && (word >> x & 1);
                seen |= uint32_t{meets} << (n / 2 * 4 + 2 * half + n % 2);
            }
        }
        if (Tile::keys && bits >= 0) {
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const uint64_t word = p_.plan_words[int64_t{bits} * kTile + shift + n / 2 * 8 + n % 2];
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    seen &= ~(uint32_t{!(word >> (row_ + 8 * half) % kTile & 1)} << (n / 2 * 4 + 2 * half + n % 2));
            }
        }
        return seen;
    }

    __device__ float capped_weight(float tanh, float minus_log) const {
        return exp2_approx(fused_multiply_add(tanh, p_.cap, minus_log));
    }

    // Scores become weights, `p` in the input's precision; with a softcap x is left as the tanh.
    __device__ void weigh(float (&x)[32], uint32_t (&p)[4][4], int slot, uint32_t seen) const {
        const uint32_t stats = at_.stats(slot);
        if (p_.cap > 0.0f) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const Two log = Tile::keys ? stat(stats, c) : Two{};
                float weight[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    float& tanh = x[4 * c + n];
                    tanh = tanh_approx(tanh * p_.uncap);
                    weight[n] = capped_weight(tanh, Tile::keys ? log.x[n % 2] : log_[n / 2]);
                    weight[n] = seen >> (4 * c + n) & 1 ? weight[n] : 0.0f;
                }
                p[c / 2][c % 2 * 2] = pack<Tile::dtype>(weight[0], weight[1]);
                p[c / 2][c % 2 * 2 + 1] = pack<Tile::dtype>(weight[2], weight[3]);
            }
            return;
        }
        bool huge = huge_;
        if constexpr (Tile::keys) {
            const Two top = load_shared<Two>(stats + (2 * kTile + 2 * lane_) * 4);
            huge = warp_any(fmaxf(fabsf(top.x[0]), fabsf(top.x[1])) > kHugeTop);
        }
        if (huge) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const Two top = Tile::keys ? stat(stats + 2 * kTile * 4, c) : Two{};
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    x[4 * c + n] = multiply(x[4 * c + n], p_.unit) + (Tile::keys ? top.x[n % 2] : top_[n / 2]);
            }
        }
        const float unit = huge ? 1.0f : p_.unit;
        const uint32_t logs = huge ? stats + 3 * kTile * 4 : stats;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const Two log = Tile::keys ? stat(logs, c) : Two{};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float minus_log = Tile::keys ? log.x[n % 2] : huge ? tail_[n / 2] : log_[n / 2];
                x[4 * c + n] = exp2_approx(fused_multiply_add(x[4 * c + n], unit, minus_log));
            }
        }
        if (seen != ~0u) {
#pragma unroll
            for (int n = 0; n < 32; ++n) x[n] = seen >> n & 1 ? x[n] : 0.0f;
        }
        if constexpr (with_second) round(x, p);
    }

    // dP becomes dS = weight (dP - delta), times the derivative of a softcap. What is hidden may be NaN.
    __device__ void grade(float (&dp)[32], float (&x)[32], int slot, uint32_t seen) const {
        if (p_.cap > 0.0f) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const Two log = Tile::keys ? stat(at_.stats(slot), c) : Two{};
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    float& y = x[4 * c + n];
                    y = (1.0f - y * y) * capped_weight(y, Tile::keys ? log.x[n % 2] : log_[n / 2]);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const Two delta = Tile::keys ? stat(at_.stats(slot) + kTile * 4, c) : Two{};
#pragma unroll
            for (int n = 0; n < 4; ++n)
                dp[4 * c + n] = x[4 * c + n] * (dp[4 * c + n] - (Tile::keys ? delta.x[n % 2] : delta_[n / 2]));
        }
        if (seen == ~0u) return;
#pragma unroll
        for (int n = 0; n < 32; ++n) dp[n] = seen >> n & 1 ? dp[n] : 0.0f;
    }

    __device__ static void round(const float (&x)[32], uint32_t (&operand)[4][4]) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                operand[step][r] = pack<Tile::dtype>(x[8 * step + 2 * r], x[8 * step + 2 * r + 1]);
    }

    // dS^T of this warpgroup's keys, swizzled, as both warpgroups need it for dQ.
    __device__ void store_gradients(const uint32_t (&ds)[4][4], int step) const {
#pragma unroll
        for (int c = 0; c < 8; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = row_ + 8 * half;
                store_shared(at_.gradient(step) + key * kTileRowBytes + (c ^ key % 8) * 16 + lane_ % 4 * 4,
                             ds[c / 2][c % 2 * 2 + half]);
            }
        fence_async_proxy();
    }

    // dK, and the tile's share of dQ: 64 columns by each warpgroup or, at D = 64, a warpgroup every other step.
    __device__ void queries(float (&first)[Tile::D / 2], float (&second)[Tile::D / 2], const uint32_t (&ds)[4][4],
                            const Visit& visit, int step, int slot0) const {
        meet_consumers();
        float dq[32];
        const bool mine = Tile::D == 128 || step % 2 == warpgroup_;
        if (mine) {
            const int chunk = Tile::D == 128 ? warpgroup_ : 0;
            const uint64_t a = wgmma_operand(at_.gradient(step)), b = wgmma_operand(at_.own(0, chunk));
#pragma unroll
            for (int k = 0; k < Tile::BM / 16; ++k)
                wgmma<Tile::dtype, 64, true, true>(dq, wgmma_advance(a, k * (16 * kTileRowBytes)),
                                                   wgmma_advance(b, k * (16 * kTileRowBytes)), k > 0);
            wgmma_commit();
            multiply_columns(first, ds, slot0);
            wgmma_wait<1>(dq, second);
            const int64_t head = int64_t{own().b} * p_.heads * p_.group + visit.head;
            const int64_t tile = head * p_.q_tiles + visit.first / kTile;
            add_to_memory(p_.dq_parts + (tile * (Tile::D / 64) + chunk) * (64 * 64), dq);
        } else {
            multiply_columns(first, ds, slot0);
        }
        wgmma_wait<0>(first, second);
    }

    __device__ void add_to_memory(float* to, const float (&dq)[32]) const {
        const int thread = thread_index() % 128, barrier = 2 + warpgroup_;
        const uint32_t out = at_.outgoing(warpgroup_);
        if (thread == 0) bulk_wait_read();
        named_barrier(barrier, 128);
#pragma unroll
        for (int c = 0; c < 8; ++c)
            store_shared(out + (c * 128 + thread) * 16, Four{{dq[4 * c], dq[4 * c + 1], dq[4 * c + 2], dq[4 * c + 3]}});
        fence_async_proxy();
        named_barrier(barrier, 128);
        if (thread == 0) bulk_add(to, out, Tile::kOutgoingBytes);
    }

    __device__ void write(int which, const float (&sums)[Tile::D / 2]) const {
        if (!p_.sums[which]) return;
        const OwnTile own = this->own();
        const int64_t* stride = p_.sums_stride[which];
        char* to = p_.sums[which] + 2 * (own.b * stride[0] + own.h * stride[1] + own.first * stride[2]);
        write_sums<Tile::dtype, Tile::D>(to, stride[2], row_, p_.own_length - own.first, p_.columns[which],
                                         p_.factor[which], sums);
    }

    const GradientArguments& p_;
    const GradientShared<Tile>& at_;
    const int warpgroup_, part_, lane_, row_;  // row_ of the tile, and row_ + 8
    float log_[2], delta_[2], top_[2], tail_[2];
    bool huge_ = false;
    Ring<Tile::kSlots> ring_;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
