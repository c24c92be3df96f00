// Which blocks of keys a tile of queries visits: those the band reaches, or the plan's runs inside it.
#pragma once
#include "cuda/softmax_forward_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int greatest(int a, int b) { return a > b ? a : b; }

// All blocks that need a mask, then all others.
template <class Tile>
class Walk {
   public:
    __device__ Walk(const ForwardArguments& p, const Item& item) : p_(p), row_(item.row) {
        constexpr int BN = Tile::BN;
        const int last = least(row_ + Tile::BM, p.Lq) - 1;
        begin_ = key(row_ + p.lo) / BN;
        end_ = (key(last + p.hi + 1) + BN - 1) / BN;
        full_begin_ = (key(last + p.lo) + BN - 1) / BN;
        full_end_ = key(row_ + p.hi + 1) / BN;
        if constexpr (Tile::packed) {
            const int first = p.first_block + item.split * p.split_blocks;
            begin_ = greatest(begin_, first);
            end_ = least(end_, first + p.split_blocks);
        }
        full_begin_ = greatest(full_begin_, begin_);
        full_end_ = least(full_end_, end_);
        if (full_begin_ >= full_end_) full_begin_ = full_end_ = end_;
        slice_ = p.plan.row_start ? static_cast<int>(p.plan.slice(item.b, item.h) * p.plan.q_tiles) + row_ / kTile : 0;
        start(kMasked);
    }

    // Kind of the block that comes next, or kEnd; fills all of `block` but its `next`.
    __device__ Next next(Block* block) {
        block->row = row_;
        for (;; start(kFull)) {
            if (p_.plan.row_start ? planned(block) : plain(block)) {
                block->kind = kind_;
                return kind_;
            }
            if (kind_ == kFull) return kEnd;
        }
    }

   private:
    __device__ int key(int64_t j) const { return static_cast<int>(j < 0 ? 0 : j > p_.Lk ? p_.Lk : j); }

    __device__ void start(Next kind) {
        kind_ = kind;
        at_ = kind == kMasked ? begin_ : full_begin_;
        if (!p_.plan.row_start) return;
#pragma unroll
        for (int w = 0; w < Tile::kConsumers; ++w) {
            const bool there = row_ + w * kTile < p_.Lq;
            run_[w] = there ? p_.plan.row_start[slice_ + w] : 0;
            stop_[w] = there ? p_.plan.row_start[slice_ + w + 1] : 0;
        }
    }

    __device__ bool plain(Block* block) {
        if (kind_ == kMasked && at_ == full_begin_) at_ = full_end_;
        if (at_ >= (kind_ == kMasked ? end_ : full_end_)) return false;
        block->block = at_++;
        block->bits[0][0] = block->bits[0][1] = block->bits[1][0] = block->bits[1][1] = kAll;
        return true;
    }

    // The run of 64 queries that has this tile of keys or the next after it; false if there is none.
    __device__ bool seek(int w, int tile, TileRun* run) {
        for (; run_[w] < stop_[w]; ++run_[w]) {
            *run = p_.plan.rows[run_[w]];
            if (run->first + run->count > tile) return true;
        }
        return false;
    }

    // Up to two tiles of queries side by side: a block is visited if one of them has a part of it.
    __device__ bool planned(Block* block) {
        constexpr int kParts = Tile::kParts;
        const int end = kind_ == kMasked ? end_ : full_end_;
        for (TileRun run{};;) {
            int first = end * kParts;
#pragma unroll
            for (int w = 0; w < Tile::kConsumers; ++w)
                if (seek(w, at_ * kParts, &run)) first = least(first, run.first);
            at_ = greatest(at_, first / kParts);
            if (at_ >= end) return false;
            bool full = at_ >= full_begin_ && at_ < full_end_;
            int until = full_end_ * kParts;
#pragma unroll
            for (int w = 0; w < Tile::kConsumers; ++w)
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    const int tile = at_ * kParts + part;
                    const bool there = seek(w, tile, &run) && run.first <= tile;
                    const int bits = !there ? kNothing : run.bits < 0 ? kAll : run.bits;
                    full = full && bits == kAll;
                    until = least(until, run.first + run.count);
                    block->bits[w][part] = bits;
                }
            block->block = at_;
            // Blocks of the other kind are passed over, whole runs of full ones at once.
            at_ = full && kind_ == kMasked ? greatest(at_ + 1, until / kParts) : at_ + 1;
            if (full == (kind_ == kFull)) return true;
        }
    }

    const ForwardArguments& p_;
    const int row_;
    int slice_, begin_, end_, full_begin_, full_end_;
    Next kind_;
    int at_, run_[2], stop_[2];
};

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
