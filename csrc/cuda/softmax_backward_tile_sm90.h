// What the warps of the Hopper backward kernels share: arguments, tile sizes, shared memory, and messages between
// warps.
//
// One kernel in two orientations. A block owns rows of two tensors and streams tiles of two others past them:
// with X = own0 streamed0^T (scores) and Y = own1 streamed1^T, it sums dS streamed0 and, for keys, P streamed1.
//   owns keys:    own K, V; streams Q, dO of every head of the group; the sums are dK and dV.
//   owns queries: own Q, dO; streams K, V; the sum is dQ.
#pragma once
#include "cuda/tensor_tiles.h"
#include "cuda/warps_sm90.h"
#include "fastattn/tile_plan.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// Of 64 queries: weight = 2^(score * unit + minus_log), and gradient of a logit = weight * (dP - delta). The last two
// are what minus_log is made of, for scores so large that one float cannot hold their sum well enough.
struct StatsTile {
    float minus_log[kTile], delta[kTile], minus_top[kTile], minus_tail[kTile];
};
constexpr float kHugeTop = 4096.0f;

struct GradientArguments {
    TensorTiles own[2], streamed[2];
    int own_skip, streamed_skip;  // keys before the first that the tensor maps have
    char* sums[2];                // dK and dV, or dQ; null where not wanted
    int64_t sums_stride[2][3];    // of b, h and row, in elements
    int columns[2];
    float factor[2];
    const StatsTile* stats;  // [B * Hq][q_tiles]
    float* dq_parts;         // [B * Hq][q_tiles][D / 64][64 x 64 as wgmma has it], added to by all; or null
    int q_tiles;
    const int32_t *plan_start, *plan_order;  // of the side that is owned; null without a plan
    const TileRun* plan_runs;
    const uint64_t* plan_words;
    uint64_t* seen;  // [B * Hk][plan_tiles]: keys that some query sees, for dQ from own keys; null without a plan
    int plan_tiles, plan_batches, plan_heads;
    int heads, group;  // own heads of a batch element; query heads of a kv head
    int own_length, streamed_length;
    int lo, hi;              // streamed row x meets own row y iff lo <= x - y <= hi; no further out than the lengths
    float unit, cap, uncap;  // as in the forward pass
    int tiles, all_heads, section;
    bool last_first;
};

template <DType dtype_, int D_, bool keys_, bool with_dq_>
struct GradientTile {
    static constexpr DType dtype = dtype_;
    static constexpr int D = D_;
    static constexpr bool keys = keys_, with_dq = with_dq_;
    // dK and dV of 64 keys at D = 256 are all registers of two warpgroups: each takes one of them.
    static constexpr bool apart = keys && D == 256;
    static constexpr int BM = apart ? 64 : 128, BN = 64, kParts = BM / 64;
    static constexpr int kThreads = 384;
    // Where queries are owned, the producer warpgroup also cleans keys.
    static constexpr int kProducerRegisters = keys ? 24 : 56, kConsumerRegisters = keys ? 240 : 224;
    static_assert(!with_dq || (keys && D <= 128));

    static constexpr int kOwnBytes = BM * D * 2, kSlotBytes = BN * D * 2;
    static constexpr int kStatsBytes = keys ? int(sizeof(StatsTile)) : 0;
    // dS of two steps, and 64 x 64 sums of each warpgroup on their way out.
    static constexpr int kGradientBytes = BM * kTileRowBytes, kOutgoingBytes = 64 * 64 * 4;
    static constexpr int kQueryBytes = with_dq ? 2 * kGradientBytes + 2 * kOutgoingBytes : 0;
    // All that fit into 227 KB with 3 KB to spare for barriers and messages.
    static constexpr int kFit = ((224 << 10) - 2 * kOwnBytes - kQueryBytes) / (kSlotBytes + kStatsBytes);
    static constexpr int kSlots = kFit < 8 ? kFit : 8;
    static_assert(kSlots >= 3);
};

// A tile of 64 streamed rows, from the producer to those who use it. bits, of each 64 own rows: words of the plan, or
// kAllSeen or kNoneSeen of it. No tile, and none after it: first < 0.
constexpr int kAllSeen = -1, kNoneSeen = -2;
struct alignas(16) Visit {
    int first, head, bits[2];
    bool masked;
};

template <class Tile>
struct GradientShared {
    uint32_t base = shared_memory();

    static constexpr int kSlots = Tile::kSlots;
    static constexpr int kRing = 2 * Tile::kOwnBytes, kQuery = kRing + kSlots * Tile::kSlotBytes,
                         kStats = kQuery + Tile::kQueryBytes, kVisits = kStats + kSlots * Tile::kStatsBytes,
                         kTileAt = kVisits + kSlots * int(sizeof(Visit)), kBarriers = kTileAt + 16,
                         kBytes = kBarriers + 8 * (1 + 3 * kSlots);
    static_assert(kBytes <= 227 << 10);

    // Columns 64 * chunk on of all rows follow the ones before.
    __device__ uint32_t own(int which, int chunk) const {
        return base + which * Tile::kOwnBytes + chunk * (Tile::BM * kTileRowBytes);
    }
    __device__ uint32_t slot(int s) const { return base + kRing + s * Tile::kSlotBytes; }
    // [BM keys][64 queries]
    __device__ uint32_t gradient(int step) const { return base + kQuery + step % 2 * Tile::kGradientBytes; }
    __device__ uint32_t outgoing(int warpgroup) const {
        return base + kQuery + 2 * Tile::kGradientBytes + warpgroup * Tile::kOutgoingBytes;
    }
    __device__ uint32_t stats(int s) const { return base + kStats + s * Tile::kStatsBytes; }
    __device__ uint32_t visit(int s) const { return base + kVisits + s * int(sizeof(Visit)); }

    // An OwnTile: kept here, since registers are scarce.
    __device__ uint32_t own_tile() const { return base + kTileAt; }

    __device__ uint32_t own_full() const { return base + kBarriers; }
    __device__ uint32_t full(int s) const { return base + kBarriers + 8 * (1 + s); }
    __device__ uint32_t empty(int s) const { return full(kSlots + s); }
    // Full, and keys that no own query sees are zero.
    __device__ uint32_t clean(int s) const { return full(2 * kSlots + s); }
};

// What a block owns: rows from `first` on of a head. Heads of one section share L2; inside it the heaviest tiles of all
// heads go first.
struct OwnTile {
    int first, b, h;

    // False if there is nothing to do under this number.
    template <class Tile>
    __device__ bool find(const GradientArguments& p) {
        const uint32_t block = static_cast<uint32_t>(block_index()), per_section = uint32_t(p.tiles) * p.section;
        const uint32_t section = block / per_section, rest = block - section * per_section;
        const uint32_t first_head = section * p.section;
        const uint32_t width = p.all_heads - first_head < uint32_t(p.section) ? p.all_heads - first_head : p.section;
        int tile = static_cast<int>(rest / width);
        const int head = static_cast<int>(first_head + rest - tile * width);
        b = head / p.heads;
        h = head - b * p.heads;
        if (p.plan_order) {
            // The order is one of tiles of 64: a pair goes where its first one does.
            tile = p.plan_order[plan_slice(p, Tile::keys ? h * p.group : h) * p.plan_tiles + tile];
            if (tile % Tile::kParts) return false;
            tile /= Tile::kParts;
        } else if (p.last_first) {
            tile = p.tiles - 1 - tile;
        }
        first = tile * Tile::BM;
        return true;
    }

    __device__ int64_t plan_slice(const GradientArguments& p, int query_head) const {
        return int64_t{p.plan_batches == 1 ? 0 : b} * p.plan_heads + (p.plan_heads == 1 ? 0 : query_head);
    }
};

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
