// What the warps of the Hopper forward kernel share: arguments, tile sizes, shared memory, and messages between warps.
#pragma once
#include "cuda/tensor_tiles.h"
#include "cuda/warps_sm90.h"
#include "fastattn/tile_plan.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

struct ForwardArguments {
    TensorTiles q, k, v;
    char* out;
    int64_t out_stride[3];  // of b, h, i in elements
    float *lse, *lse_parts;
    const float* sinks;
    float *sums, *stats;  // packed: [rows][splits][Dv] and [rows][splits][2], see `Partial`
    TilePlanView plan;    // row_start is null without one
    int* counter;         // of items taken, or null: every block takes each grid-th
    int Hq, group, Lq, Lk, Dv;
    int64_t lo, hi;
    float unit;        // weight = 2^(score * unit - max); where scores are made logits first, that uses it
    float cap, uncap;  // logit = cap * tanh(score * uncap), no cap where cap is 0
    int items, tiles, heads, section;
    bool heavy_last;
    int first_block, splits, split_blocks;  // packed: which blocks of keys there are, and how many a split has
};

// packed: rows are the queries of all heads of one kv head, keys are split over items, results are partial.
// logits: scores are turned into logits one by one (softcap, scale <= 0), not by the factor of the exponential.
template <DType dtype_, int D_, bool logits_, bool packed_>
struct ForwardTile {
    static constexpr DType dtype = dtype_;
    static constexpr int D = D_, kConsumers = packed_ ? 1 : 2, BM = 64 * kConsumers, BN = D == 256 ? 64 : 128;
    static constexpr bool logits = logits_, packed = packed_;
    static constexpr int kThreads = 128 * (kConsumers + 1), kParts = BN / 64;

    static constexpr int kQBytes = BM * D * 2, kBlockBytes = BN * D * 2;
    // All that fit into 227 KB with 2 KB to spare for barriers and messages.
    static constexpr int kStages = ((225 << 10) - kQBytes) / (2 * kBlockBytes);
    static_assert(kStages >= 2 && kStages <= 6);
};

// What follows: nothing, blocks that need a mask, blocks that need none; or no item at all.
enum Next : int { kEnd = 0, kMasked = 1, kFull = 2, kNoItem = 3 };

// One tile of queries (packed: one split of keys), from the producer to the consumers.
struct Item {
    int row, b, h, kv_head, split;
    int next;
};

// One block of keys, from the producer to those who use it. bits, of 64 queries and 64 keys each: words of the plan, or
// kAll or kNothing of the plan.
constexpr int kAll = -1, kNothing = -2;
struct Block {
    int block, row;
    int kind, next;  // of this block and of the one after it
    int bits[2][2];
};

template <class Tile>
struct Shared {
    static constexpr int kStages = Tile::kStages;
    uint32_t base = shared_memory();

    static constexpr int kBarriers = Tile::kQBytes + 2 * kStages * Tile::kBlockBytes;
    static constexpr int kItem = kBarriers + 8 * (2 + 5 * kStages), kBlocks = kItem + 2 * 32,
                         kBytes = kBlocks + 64 * kStages;
    static_assert(kBytes <= 227 << 10);

    // Column `chunk` of 64 numbers of all rows follows the one before.
    __device__ uint32_t q(int chunk) const { return base + chunk * (Tile::BM * kTileRowBytes); }
    __device__ uint32_t k(int stage) const { return base + Tile::kQBytes + stage * Tile::kBlockBytes; }
    __device__ uint32_t v(int stage) const { return k(kStages + stage); }

    __device__ uint32_t q_full() const { return base + kBarriers; }
    __device__ uint32_t q_empty() const { return base + kBarriers + 8; }
    __device__ uint32_t k_full(int stage) const { return base + kBarriers + 8 * (2 + stage); }
    __device__ uint32_t k_empty(int stage) const { return k_full(kStages + stage); }
    __device__ uint32_t v_full(int stage) const { return k_full(2 * kStages + stage); }
    __device__ uint32_t v_empty(int stage) const { return k_full(3 * kStages + stage); }
    // Full, and rows that no query of the tile sees are zero.
    __device__ uint32_t v_clean(int stage) const { return k_full(4 * kStages + stage); }

    // Of two, by the parity of q_full: one is written while the one before is in use to the end.
    __device__ uint32_t item(uint32_t parity) const { return base + kItem + 32 * parity; }
    __device__ uint32_t k_block(int stage) const { return base + kBlocks + 32 * stage; }
    __device__ uint32_t v_block(int stage) const { return k_block(kStages + stage); }
};

// Keys of the 64 from 64 * tile on that query i sees, by band, plan and Lk.
__device__ __forceinline__ uint64_t seen_word(const ForwardArguments& p, int bits, int i, int tile) {
    if (bits == kNothing) return 0;
    const uint64_t word = band_word(p.lo, p.hi, p.Lk, i, tile);
    return bits < 0 ? word : word & p.plan.words[bits * kTile + i % kTile];
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
