// Which key tiles one tile of queries sees: lists made from rows of intervals or words, and combined tile by tile.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "fastattn/plan_builder.h"

namespace fastattn {

FASTATTN_INLINE uint64_t low_bits(int64_t n) { return n >= kTile ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

enum Kind : uint8_t { kEmpty, kPartial, kFull };

// Rows past Lq repeat the last one: they make no tile partial. Keys past Lk are 0 in `all` as in the words.
Kind classify(uint64_t* tile, int64_t rows, uint64_t all);

struct BitTile {
    uint64_t row[kTile];
    int32_t number;  // in the plan, -1 before it is there
};

// `count` full key tiles from `first` on, or one partial tile.
struct Span {
    int32_t first, count;
    BitTile* partial;
};
using Spans = std::vector<Span>;

// Tiles that stay where they are; clear() drops all of them and keeps their memory.
class TileStore {
   public:
    BitTile* next() {
        if (used_ == blocks_.size() * kBlock) blocks_.emplace_back(new BitTile[kBlock]);
        BitTile* tile = &blocks_[used_ / kBlock][used_ % kBlock];
        ++used_;
        tile->number = -1;
        return tile;
    }
    void drop_last() { --used_; }
    void clear() { used_ = 0; }

   private:
    static constexpr size_t kBlock = 64;
    std::vector<std::unique_ptr<BitTile[]>> blocks_;
    size_t used_ = 0;
};

// Evaluates steps for one tile of queries after the other.
class RowProgram {
   public:
    RowProgram(const std::vector<RowStep>& steps, int64_t i0, int64_t Lq, int64_t Lk);
    const Spans& of(int64_t b, int64_t h, int64_t t);

   private:
    struct Result {  // of one step
        Spans spans;
        TileStore tiles;
        std::vector<Span> by_remainder;  // tiles of kMultiples, see there
        TileStore kept;

        // Where all rows of a tile are the same piece of memory, the next tile of that piece has the same result:
        // false.
        bool begin(bool same, const void* lo, const void* hi, int64_t count) {
            if (same && lo == lo_ && hi == hi_ && count == count_) return false;
            lo_ = lo;
            hi_ = hi;
            count_ = same ? count : -1;
            clear();
            return true;
        }
        void clear() {
            spans.clear();
            tiles.clear();
        }

       private:
        const void *lo_ = nullptr, *hi_ = nullptr;
        int64_t count_ = -1;
    };
    struct Row {
        const int32_t *lo, *hi;
        int64_t count;
    };

    uint64_t all(int64_t k) const { return low_bits(Lk_ - k * kTile); }
    Row row_of(const RowStep& step, int64_t b, int64_t h, int64_t i) const;
    void add(Result* result, int64_t k, BitTile* tile, int64_t rows) const;
    void intervals(const RowStep& step, Result* result, int64_t b, int64_t h, int64_t i, int64_t rows);
    void few_intervals(Result* result, int64_t rows, int64_t most);
    void partial_of_intervals(Result* result, int64_t rows, int64_t k);
    void many_intervals(Result* result, int64_t rows);
    void words(const RowStep& step, Result* result, int64_t b, int64_t h, int64_t i, int64_t rows) const;
    void multiples(const RowStep& step, Result* result, int64_t t, int64_t rows, int64_t k0, int64_t k1) const;
    template <bool kAnd>
    void combine(const Spans& a, const Spans& b, Result* result) const;
    void complement(const Spans& a, Result* result) const;

    // Key tiles one row's interval touches and covers whole.
    struct Extent {
        int32_t touch, touch_end, cover, cover_end;
        bool operator==(const Extent& o) const {
            return touch == o.touch && touch_end == o.touch_end && cover == o.cover && cover_end == o.cover_end;
        }
    };
    // From key tile `tile` on, this many more rows touch it and cover it whole.
    struct Change {
        int32_t tile, touch, cover;
    };
    void push_changes(const Extent& e, int32_t rows);

    const std::vector<RowStep>& steps_;
    const int64_t i0_, Lq_, Lk_, k_tiles_;
    std::vector<Result> results_;
    std::vector<const Spans*> stack_;
    Row rows_[kTile];
    int64_t behind_[kTile];
    std::vector<Change> changes_;
    std::vector<uint64_t> block_;  // [k_tiles][kTile], 0 between uses
};

}  // namespace fastattn
