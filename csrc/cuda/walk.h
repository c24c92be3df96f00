// Which tiles a thread block works on, and in which order: the band and the tile plan as loop bounds.
#pragma once
#include <cstdint>

#include "cuda/ptx.h"
#include "fastattn/tile_plan.h"

namespace fastattn::cuda {

// Which tile of which head a thread block takes. Heads of one section share L2; inside it the heaviest tiles of all
// heads go first.
struct WorkItem {
    int tile, head;

    __device__ WorkItem(uint32_t block, int tiles, int heads, int section, bool last_first) {
        const uint32_t per_section = static_cast<uint32_t>(tiles) * section, which = block / per_section;
        const uint32_t rest = block - which * per_section, first_head = which * section;
        const uint32_t width = first_head + section <= static_cast<uint32_t>(heads) ? section : heads - first_head;
        tile = static_cast<int>(rest / width);
        head = static_cast<int>(first_head + rest - tile * width);
        if (last_first) tile = tiles - 1 - tile;
    }
};

// Lists of one side of a plan: of query tiles (rows) or of key tiles (columns). Null pointers without a plan.
struct PlanSide {
    const int32_t *start, *order;
    const TileRun* runs;
    int tiles;
};

// `N` neighbouring keys (or queries) from `first` on; bits as in TileRun. No block: first < 0.
struct Block {
    int first, bits;
};

// Blocks of x in [0, length) with lo <= x - y <= hi for some y in first..last, of the runs of one tile of a plan.
template <int N>
class Walk {
   public:
    __device__ Walk(const PlanSide& side, int64_t slice, int first, int last, int lo, int hi, int length) {
        begin_ = first + lo > 0 ? (first + lo) / N * N : 0;
        end_ = last + hi + 1 < length ? last + hi + 1 : length;
        if (side.runs) {
            const int32_t* start = side.start + slice * side.tiles + first / kTile;
            run_ = side.runs + start[0];
            last_run_ = side.runs + start[1];
            at_ = until_ = 0;
        } else {
            run_ = last_run_ = nullptr;
            at_ = begin_;
            until_ = end_;
        }
        bits_ = -1;
    }

    __device__ Block next() {
        while (at_ >= until_) {
            if (run_ == last_run_) return {-1, -1};
            const TileRun run = *run_++;
            const int from = run.first * int(kTile), to = (run.first + run.count) * int(kTile);
            at_ = from > begin_ ? from : begin_;
            until_ = to < end_ ? to : end_;
            bits_ = run.bits;
        }
        at_ += N;
        return {at_ - N, bits_};
    }

   private:
    const TileRun *run_, *last_run_;
    int begin_, end_, at_, until_, bits_;
};

// Bits of the x in [from, from + 64) with y + lo <= x <= y + hi and x < length.
__device__ __forceinline__ uint64_t band_bits(int y, int lo, int hi, int length, int from) {
    const int first = y + lo > from ? y + lo - from : 0;
    const int reach = y + hi < length - 1 ? y + hi - from : length - 1 - from;
    const int last = reach < 63 ? reach : 63;
    if (first > last) return 0;
    return (~uint64_t{0} >> (63 - last)) & (~uint64_t{0} << first);
}

}  // namespace fastattn::cuda
