// The producer warpgroup of the Hopper backward kernels: one thread loads, one warp cleans keys.
#pragma once
#include "cuda/softmax_backward_tile_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// Tiles of 64 streamed rows that own rows meet, by band and plan.
template <int kParts>
class TileWalk {
   public:
    __device__ TileWalk(const GradientArguments& p, const OwnTile& own, int query_head)
        : p_(p), first_(own.first), head_(query_head) {
        const int rows = kParts * kTile, stop = first_ + rows < p.own_length ? first_ + rows : p.own_length;
        last_ = stop - 1;
        cut_ = first_ + rows > p.own_length;
        at_ = first_ + p.lo > 0 ? (first_ + p.lo) / kTile : 0;
        const int end = last_ + p.hi + 1 < p.streamed_length ? last_ + p.hi + 1 : p.streamed_length;
        end_ = (end + kTile - 1) / kTile;
        if (!p.plan_start) return;
        const int32_t* start = p.plan_start + own.plan_slice(p, query_head) * p.plan_tiles + first_ / kTile;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const bool there = first_ + part * kTile < p.own_length;
            run_[part] = there ? start[part] : 0;
            stop_[part] = there ? start[part + 1] : 0;
        }
    }

    __device__ bool next(Visit* visit) {
        visit->bits[0] = visit->bits[1] = kAllSeen;
        if (p_.plan_start) seek(visit);
        if (at_ >= end_) return false;
        const int x = at_++ * kTile;
        visit->first = x;
        visit->head = head_;
        visit->masked = cut_ | (x < last_ + p_.lo) | (x + kTile - 1 > first_ + p_.hi) |
                        (x + kTile > p_.streamed_length) | (visit->bits[0] != kAllSeen) | (visit->bits[1] != kAllSeen);
        return true;
    }

   private:
    // On to the first tile that a run has; to the end if there is none.
    __device__ void seek(Visit* visit) {
        TileRun run[kParts];
        int found = end_;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            run[part] = {end_, 0, 0};
            for (; run_[part] < stop_[part]; ++run_[part]) {
                run[part] = p_.plan_runs[run_[part]];
                if (run[part].first + run[part].count > at_) break;
                run[part] = {end_, 0, 0};
            }
            if (run[part].first < found) found = run[part].first;
        }
        if (at_ < found) at_ = found;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
            if (run[part].first > at_)
                visit->bits[part] = kNoneSeen;
            else if (run[part].bits >= 0)
                visit->bits[part] = run[part].bits;
    }

    const GradientArguments& p_;
    const int first_, head_;
    int last_, at_, end_;
    bool cut_;
    int run_[kParts], stop_[kParts];
};

// One thread.
template <class Tile>
class GradientProducer {
   public:
    __device__ GradientProducer(const GradientArguments& p, const GradientShared<Tile>& at, const OwnTile& own)
        : p_(p), at_(at), own_(own) {}

    __device__ void run() {
        bool fresh = true;
        const int first_head = Tile::keys ? own_.h * p_.group : own_.h, heads = Tile::keys ? p_.group : 1;
        for (int h = first_head; h < first_head + heads; ++h) {
            TileWalk<Tile::kParts> walk(p_, own_, h);
            for (Visit visit; walk.next(&visit); fresh = false) {
                if (fresh) load_own();
                // The kv head or query head whose rows go past.
                const int head = Tile::keys ? h : h / p_.group;
                wait();
                store_shared(at_.visit(ring_.stage), visit);
                barrier_expect(at_.full(ring_.stage), Tile::kSlotBytes + Tile::kStatsBytes);
                if constexpr (Tile::keys)
                    bulk_load(at_.stats(ring_.stage),
                              p_.stats + (int64_t{own_.b} * p_.heads * p_.group + h) * p_.q_tiles + visit.first / kTile,
                              Tile::kStatsBytes, at_.full(ring_.stage));
                load_slot(0, visit.first, head);
                wait();
                barrier_expect(at_.full(ring_.stage), Tile::kSlotBytes);
                load_slot(1, visit.first, head);
            }
        }
        wait();
        store_shared(at_.visit(ring_.stage), Visit{-1, 0, {}, false});
        barrier_arrive(at_.full(ring_.stage));
    }

   private:
    static constexpr int kChunks = Tile::D / kTileColumns;

    __device__ void wait() const { barrier_wait(at_.empty(ring_.stage), ring_.parity ^ 1); }

    __device__ void load_own() const {
        barrier_expect(at_.own_full(), 2 * Tile::kOwnBytes);
#pragma unroll
        for (int which = 0; which < 2; ++which)
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
                load_tile(at_.own(which, c), p_.own[which], at_.own_full(), c * kTileColumns, own_.first - p_.own_skip,
                          own_.h, own_.b);
    }

    __device__ void load_slot(int which, int row, int head) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
            load_tile(at_.slot(ring_.stage) + c * (Tile::BN * kTileRowBytes), p_.streamed[which], at_.full(ring_.stage),
                      c * kTileColumns, row - p_.streamed_skip, head, own_.b);
        ring_.advance();
    }

    const GradientArguments& p_;
    const GradientShared<Tile>& at_;
    const OwnTile& own_;
    Ring<Tile::kSlots> ring_;
};

// One warp, where queries are owned and there is a plan: keys that no own query sees may hold anything, and 0 * NaN is
// NaN: they become 0. A band needs no such care, since all keys it hides from everybody lie outside the tensor maps.
template <class Tile>
__device__ void clean_keys(const GradientArguments& p, const GradientShared<Tile>& at, const OwnTile& own) {
    const int lane = thread_index() % 32;
    for (Ring<Tile::kSlots> ring;;) {
        barrier_wait(at.full(ring.stage), ring.parity);
        const Visit visit = load_shared<Visit>(at.visit(ring.stage));
        if (visit.first >= 0 && visit.masked) {
            uint64_t seen = 0;
#pragma unroll
            for (int n = 0; n < Tile::BM / 32; ++n) {
                const int row = 32 * n + lane, i = own.first + row, bits = n < 2 ? visit.bits[0] : visit.bits[1];
                if (i >= p.own_length || bits == kNoneSeen) continue;
                const uint64_t word = band_word(p.lo, p.hi, p.streamed_length, i, visit.first / kTile);
                seen |= bits < 0 ? word : word & p.plan_words[int64_t{bits} * kTile + row % kTile];
            }
            zero_rows<Tile::D, 32>(at.slot(ring.stage), Tile::BN * kTileRowBytes, ~or_over_warp(seen));
            fence_async_proxy();
        }
        sync_warp();
        if (lane == 0) barrier_arrive(at.clean(ring.stage));
        if (visit.first < 0) return;
        // Values need no cleaning, only their turn.
        ring.advance();
        barrier_wait(at.full(ring.stage), ring.parity);
        if (lane == 0) barrier_arrive(at.clean(ring.stage));
        ring.advance();
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
