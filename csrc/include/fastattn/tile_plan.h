// Which 64 x 64 tiles of the scores a mask leaves, and which keys anybody sees. Built once per call, read by kernels.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "fastattn/params.h"

namespace fastattn {

constexpr int64_t kTile = 64;

// `count` neighbouring tiles from `first` on, all full (bits < 0), or one partial tile whose rows are
// words[bits * kTile + row]. Three int32, so that an int32 tensor [n, 3] is an array of these.
struct TileRun {
    int32_t first, count, bits;
};
static_assert(sizeof(TileRun) == 12);

// Runs of key tiles per query tile (rows) and of query tiles per key tile (columns), for each mask batch and head.
struct TilePlan {
    int64_t batches = 0, heads = 0, q_tiles = 0, k_tiles = 0;
    std::vector<int32_t> row_start, column_start;  // [batches * heads * tiles + 1]
    std::vector<TileRun> rows, columns;
    std::vector<uint64_t> words;                   // [partial tiles][kTile], equal tiles once; bit j of a word is key j
    std::vector<int32_t> row_order, column_order;  // [batches * heads][tiles]: tiles with most to visit first
};

// What kernels read: null pointers where every tile is full.
struct TilePlanView {
    const int32_t *row_start = nullptr, *column_start = nullptr;
    const TileRun *rows = nullptr, *columns = nullptr;
    const uint64_t* words = nullptr;
    const int32_t *row_order = nullptr, *column_order = nullptr;
    int64_t batches = 1, heads = 1, q_tiles = 0, k_tiles = 0, Lq = 0, Lk = 0;

    TilePlanView() = default;
    explicit TilePlanView(const TilePlan& plan);
    // Index into row_start of query tile 0 of (b, h); column_start alike with k_tiles.
    FASTATTN_INLINE int64_t slice(int64_t b, int64_t h) const {
        return (batches == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
    }
};

FASTATTN_INLINE int64_t tile_count(int64_t n) { return (n + kTile - 1) / kTile; }

// Plan of a bool mask [B|1, Hq|1, Lq|1, Lk|1], or of a bias, whose -inf hide, over Lq x Lk, rows only.
TilePlan plan_from_mask(const TensorView& mask, int64_t Lq, int64_t Lk, int threads);

// Bits of the 64 keys of a key tile that row i of (b, h) of a bool mask or a bias leaves; keys past Lk are 0.
uint64_t mask_word(const TensorView& mask, int64_t b, int64_t h, int64_t i, int64_t tile, int64_t Lk);

// The first run of a query tile that ends after key tile `tile`, or null.
const TileRun* find_run(const TilePlanView& plan, int64_t b, int64_t h, int64_t q_tile, int64_t tile);

// Keys [64 * tile, 64 * tile + 64) that row i of (b, h) may see: mask, band and Lk together, as bits.
uint64_t visible_word(const SoftmaxParams& p, int64_t b, int64_t h, int64_t i, int64_t tile);

// Bits [B][Hk][ceil(Lk / 64)]: keys that some query of some head of the group sees by mask, band and bias (-inf hides).
// Null where the band alone decides (then it is the range of seen_range).
std::unique_ptr<uint64_t[]> seen_keys(const SoftmaxParams& p);

// [first, last): keys the band leaves to at least one query.
FASTATTN_INLINE void seen_range(const SoftmaxParams& p, int64_t* first, int64_t* last) {
    *first = p.lo > 0 ? p.lo : 0;
    const int64_t end = p.hi >= kUnbounded / 2 ? p.Lk() : p.Lq() + p.hi;
    *last = end < p.Lk() ? end : p.Lk();
}

// Bits of the keys j in [64 * tile, 64 * tile + 64) with i + lo <= j <= i + hi and j < Lk.
FASTATTN_INLINE uint64_t band_word(int64_t lo, int64_t hi, int64_t Lk, int64_t i, int64_t tile) {
    const int64_t j0 = tile * kTile;
    const int64_t first = i + lo > j0 ? i + lo - j0 : 0;
    int64_t last = i + hi - j0;
    if (last > Lk - 1 - j0) last = Lk - 1 - j0;
    if (last > kTile - 1) last = kTile - 1;
    if (first > last) return 0;
    return (~uint64_t{0} >> (kTile - 1 - last)) & (~uint64_t{0} << first);
}

// Everything a call hides, built outside the ISA files so that no standard container is compiled into them.
class Sight {
   public:
    enum What { kSeen = 1, kRows = 2 };
    Sight(const SoftmaxParams& p, int what);
    ~Sight();
    Sight(const Sight&) = delete;
    Sight& operator=(const Sight&) = delete;

    // Of kRows: whether all heads see the same keys by band and mask, and so take equally long.
    FASTATTN_INLINE bool alike() const { return plan.batches * plan.heads == 1; }

    TilePlanView plan;               // row_start is null without a mask
    const uint64_t* seen = nullptr;  // [B][Hk][words], null where the range [first, last) decides alone
    int64_t first = 0, last = 0, words = 0;

   private:
    struct Owned;
    Owned* owned_;
};

}  // namespace fastattn
