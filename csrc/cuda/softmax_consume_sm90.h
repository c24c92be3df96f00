// A consumer warpgroup of the Hopper forward kernel: 64 rows of queries against all blocks of an item.
#pragma once
#include "cuda/softmax_forward_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// A reference this large is rounded so coarsely that its own weight could leave the range of fp16.
constexpr float kHuge = 65536.0f;

// cap * tanh(x) by one exponential; near 0, where the difference cancels, by the series.
__device__ __forceinline__ float capped(float x, float cap) {
    const float tanh = 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.885390082f * x)), square = x * x;
    return cap * (square < 0.01f ? x + x * square * (-0.333333333f + square * 0.133333333f) : tanh);
}

// Of a thread, in the order of wgmma's accumulators: rows lane / 4 and lane / 4 + 8 of a warp's 16.
template <class Tile>
struct Rows {
    static constexpr int kScores = Tile::BN / 2, kSums = Tile::D / 2;
    float scores[kScores];  // then weights
    float sums[kSums];
    uint32_t weights[Tile::BN / 16][4];  // in the input's precision
    float top[2], total[2], rescale[2];  // total: of this thread's columns
};

template <class Tile>
__device__ __forceinline__ void hide(const ForwardArguments& p, const Block& block, int warpgroup, int row,
                                     float (&scores)[Tile::BN / 2]) {
    const int shift = 2 * (thread_index() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = row + 8 * half, i = Tile::packed ? r % p.Lq : block.row + r;
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
            const int bits = warpgroup ? block.bits[1][part] : block.bits[0][part];
            const uint64_t seen = seen_word(p, bits, i, block.block * Tile::kParts + part) >> shift;
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const int key = n / 2 * 8 + n % 2;
                const uint32_t word = static_cast<uint32_t>(key < 32 ? seen : seen >> 32);
                float& score = scores[32 * part + n / 2 * 4 + 2 * half + n % 2];
                score = word >> key % 32 & 1 ? score : -infinity();
            }
        }
    }
}

// Folds a block's scores into top and total, and turns them into weights. `masked`: a row may have seen nothing yet.
template <class Tile, bool masked>
__device__ __forceinline__ void weigh(const ForwardArguments& p, Rows<Tile>& x) {
    float unit = Tile::logits ? 1.0f : p.unit;
    float reference[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float top = x.scores[2 * half];
#pragma unroll
        for (int n = 1; n < Tile::BN / 4; ++n) top = fmaxf(top, x.scores[n / 2 * 4 + 2 * half + n % 2]);
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        top = fmaxf(multiply(top, unit), x.top[half]);
        reference[half] = masked && top == -infinity() ? 0.0f : top;
        x.rescale[half] = exp2_approx(x.top[half] - reference[half]);
        x.top[half] = top;
    }
    if (!Tile::logits && warp_any(fmaxf(fabsf(reference[0]), fabsf(reference[1])) > kHuge)) {
#pragma unroll
        for (float& score : x.scores) score = multiply(score, unit);
        unit = 1.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < Tile::BN / 4; ++n) {
            float& score = x.scores[n / 2 * 4 + 2 * half + n % 2];
            score = exp2_approx(fused_multiply_add(score, unit, -reference[half]));
            total += score;
        }
        x.total[half] = fused_multiply_add(x.total[half], x.rescale[half], total);
    }
}

template <class Tile>
class Consumer {
   public:
    __device__ Consumer(const ForwardArguments& p, const Shared<Tile>& at)
        : p_(p), at_(at), warpgroup_(from_lane(thread_index() / 128 - 1, 0)), lane_(thread_index() % 32) {
        row_ = 64 * warpgroup_ + thread_index() % 128 / 32 * 16 + lane_ / 4;
    }

    template <class Finish>
    __device__ void run(Finish finish) {
        Rows<Tile> x;
        for (uint32_t parity = 0;; parity ^= 1) {
            barrier_wait(at_.q_full(), parity);
            int next = load_shared<Item>(at_.item(parity)).next;
            if (next == kNoItem) return;
#pragma unroll
            for (float& sum : x.sums) sum = 0.0f;
            begin(load_shared<Item>(at_.item(parity)), x);
            if (next != kEnd) {
                scores(x);
                wgmma_wait<0>(x.scores);
                // Masked in any case, since no row has seen a key yet.
                next = weights<true>(x);
                round(x);
                while (next == kMasked) next = step<true>(x);
                while (next == kFull) next = step<false>(x);
                release(at_.q_empty());
                product(x);
                wgmma_wait<0>(x.sums);
                release(at_.v_empty(v_.stage));
                v_.advance();
            } else {
                sync_warp();
                release(at_.q_empty());
            }
            // Read again: through the loops above it would cost registers.
            finish(load_shared<Item>(at_.item(parity)), row_, x);
        }
    }

   private:
    // A sink is a key before all others; one thread of a row's four counts it.
    __device__ void begin(const Item& item, Rows<Tile>& x) const {
        const float sink = !Tile::packed && p_.sinks ? p_.sinks[item.h] * 1.442695041f : -infinity();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            x.top[half] = sink;
            x.total[half] = lane_ % 4 == 0 && sink > -infinity() ? 1.0f : 0.0f;
        }
    }

    __device__ void release(uint32_t barrier) const { barrier_arrive_if(barrier, lane_ == 0); }

    // Starts queries [64, D] times keys [D, BN].
    __device__ void scores(Rows<Tile>& x) {
        barrier_wait(at_.k_full(k_.stage), k_.parity);
        wgmma_fence();
        const uint64_t q = wgmma_operand(at_.q(0) + warpgroup_ * (64 * kTileRowBytes));
        const uint64_t k = wgmma_operand(at_.k(k_.stage));
#pragma unroll
        for (int step = 0; step < Tile::D / 16; ++step) {
            const int chunk = step / 4, inside = step % 4 * 32;
            wgmma<Tile::dtype, Tile::BN, false, false>(
                x.scores, wgmma_advance(q, chunk * Tile::BM * kTileRowBytes + inside),
                wgmma_advance(k, chunk * Tile::BN * kTileRowBytes + inside), step > 0);
        }
        wgmma_commit();
    }

    // Starts weights [64, BN] times values [BN, D], added to the sums.
    __device__ void product(Rows<Tile>& x) {
        barrier_wait(p_.plan.row_start ? at_.v_clean(v_.stage) : at_.v_full(v_.stage), v_.parity);
        wgmma_fence();
        const uint64_t v = wgmma_operand(at_.v(v_.stage), Tile::BN * kTileRowBytes);
#pragma unroll
        for (int step = 0; step < Tile::BN / 16; ++step)
            wgmma<Tile::dtype, Tile::D, true>(x.sums, x.weights[step], wgmma_advance(v, step * 16 * kTileRowBytes),
                                              true);
        wgmma_commit();
    }

    // From scores to weights in fp32, and the keys' stage given back. Says what comes after this block.
    template <bool masked>
    __device__ int weights(Rows<Tile>& x) {
        const Block block = load_shared<Block>(at_.k_block(k_.stage));
        if (Tile::logits && p_.cap > 0.0f) {
#pragma unroll
            for (float& score : x.scores) score = capped(score * p_.uncap, p_.cap);
        } else if (Tile::logits) {
#pragma unroll
            for (float& score : x.scores) score = multiply(score, p_.unit);
        }
        if constexpr (masked) hide<Tile>(p_, block, warpgroup_, row_, x.scores);
        weigh<Tile, masked>(p_, x);
        // The second condition always holds. It keeps ptxas from moving the exponentials behind the wait for the
        // product.
        barrier_arrive_if(at_.k_empty(k_.stage), lane_ == 0 && !(x.total[0] + x.total[1] < 0.0f));
        k_.advance();
        return from_lane(block.next, 0);
    }

    __device__ void round(Rows<Tile>& x) {
#pragma unroll
        for (int step = 0; step < Tile::BN / 16; ++step)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                x.weights[step][r] = pack<Tile::dtype>(x.scores[8 * step + 2 * r], x.scores[8 * step + 2 * r + 1]);
    }

    // Scores of the next block and the product of this one run while the former become weights.
    template <bool masked>
    __device__ int step(Rows<Tile>& x) {
        scores(x);
        product(x);
        wgmma_wait<1>(x.scores);
        const int next = weights<masked>(x);
        wgmma_wait<0>(x.scores, x.sums);
        release(at_.v_empty(v_.stage));
        v_.advance();
#pragma unroll
        for (int n = 0; n < Tile::D / 2; ++n) x.sums[n] *= x.rescale[n / 2 % 2];
        round(x);
        return next;
    }

    const ForwardArguments& p_;
    const Shared<Tile>& at_;
    const int warpgroup_, lane_;
    int row_;  // of the tile, and row_ + 8
    Ring<Tile::kStages> k_, v_;
};

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
