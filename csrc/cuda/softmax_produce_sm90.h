// The producer warpgroup of the Hopper forward kernel: one thread loads, one warp cleans values.
#pragma once
#include "cuda/softmax_walk_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// Item number `work`; false if there is nothing to do under this number. Heads of one section share L2; inside it the
// heaviest tiles of all heads go first.
template <class Tile>
__device__ bool find_item(const ForwardArguments& p, int work, Item* item) {
    int head, tile = 0;
    item->split = 0;
    if constexpr (Tile::packed) {
        head = work / p.splits;
        item->split = work - head * p.splits;
    } else {
        const int first_head = work / (p.tiles * p.section) * p.section, rest = work - first_head * p.tiles;
        const int width = p.section < p.heads - first_head ? p.section : p.heads - first_head;
        tile = rest / width;
        head = first_head + rest - tile * width;
    }
    const int heads = Tile::packed ? p.Hq / p.group : p.Hq;
    item->b = head / heads;
    item->h = head - item->b * heads;
    if (!Tile::packed && p.plan.row_start) {
        // The order is one of tiles of 64: a pair goes where its first one does.
        tile = p.plan.row_order[p.plan.slice(item->b, item->h) * p.plan.q_tiles + tile];
        if (tile % 2) return false;
        tile /= 2;
    } else if (p.heavy_last) {
        tile = p.tiles - 1 - tile;
    }
    item->kv_head = Tile::packed ? item->h : item->h / p.group;
    if (Tile::packed) item->h *= p.group;
    item->row = tile * Tile::BM;
    return true;
}

// Keys and values go through the same rings, values one block behind, as they are used.
template <class Tile>
struct Producer {
    static constexpr int kChunks = Tile::D / kTileColumns;
    const ForwardArguments& p;
    const Shared<Tile>& at;
    Ring<Tile::kStages> k, v;

    __device__ void load_queries(const Item& item) const {
        barrier_expect(at.q_full(), (Tile::packed ? p.Lq * p.group : Tile::BM) * kTileRowBytes * kChunks);
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
            load_tile(at.q(c), p.q, at.q_full(), c * kTileColumns, item.row, item.h, item.b);
    }

    __device__ void load(const TensorTiles& x, uint32_t to, uint32_t full, const Item& item, int block) const {
        barrier_expect(full, Tile::kBlockBytes);
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
            load_tile(to + c * (Tile::BN * kTileRowBytes), x, full, c * kTileColumns, block * Tile::BN, item.kv_head,
                      item.b);
    }

    __device__ void load_keys(const Item& item, const Block& block) {
        barrier_wait(at.k_empty(k.stage), k.parity ^ 1);
        store_shared(at.k_block(k.stage), block);
        load(p.k, at.k(k.stage), at.k_full(k.stage), item, block.block);
        k.advance();
    }

    __device__ void load_values(const Item& item) {
        barrier_wait(at.v_empty(v.stage), v.parity ^ 1);
        // What the keys' message said; their stage is not yet used again.
        const Block block = load_shared<Block>(at.k_block(v.stage));
        store_shared(at.v_block(v.stage), block);
        load(p.v, at.v(v.stage), at.v_full(v.stage), item, block.block);
        v.advance();
    }

    // One thread. The message of a block says what comes after it, so that consumers need not wait to know.
    __device__ void run() {
        uint32_t parity = 1;
        int next_work;
        for (int work = static_cast<int>(block_index()); work < p.items; work = next_work) {
            next_work = grid_blocks() + (p.counter ? atomic_increment(p.counter) : work);
            Item item;
            if (!find_item<Tile>(p, work, &item)) continue;
            Walk<Tile> walk(p, item);
            Block block, after;
            item.next = walk.next(&block);
            barrier_wait(at.q_empty(), parity);
            parity ^= 1;
            store_shared(at.item(parity), item);
            if (item.next == kEnd) {
                barrier_arrive(at.q_full());
                continue;
            }
            load_queries(item);
            for (bool first = true;; first = false) {
                block.next = walk.next(&after);
                load_keys(item, block);
                if (!first) load_values(item);
                if (block.next == kEnd) break;
                block = after;
            }
            load_values(item);
        }
        barrier_wait(at.q_empty(), parity);
        store_shared(at.item(parity ^ 1), Item{0, 0, 0, 0, 0, kNoItem});
        barrier_arrive(at.q_full());
        if (p.plan.row_start) {
            barrier_wait(at.v_empty(v.stage), v.parity ^ 1);
            store_shared(at.v_block(v.stage), Block{0, 0, kEnd, kEnd, {}});
            barrier_arrive(at.v_full(v.stage));
        }
    }
};

// One warp, where there is a plan. Keys that no query sees may hold anything, and 0 * NaN is NaN: their values become
// 0. A band needs no such care, since all keys it hides lie outside the tensor that is loaded.
template <class Tile>
__device__ void clean_values(const ForwardArguments& p, const Shared<Tile>& at, int lane) {
    for (Ring<Tile::kStages> v;; v.advance()) {
        barrier_wait(at.v_full(v.stage), v.parity);
        const Block block = load_shared<Block>(at.v_block(v.stage));
        if (block.kind == kEnd) return;
        for (int part = 0; block.kind == kMasked && part < Tile::kParts; ++part) {
            uint64_t seen = 0;
#pragma unroll
            for (int n = 0; n < Tile::BM / 32; ++n) {
                const int r = 32 * n + lane, i = Tile::packed ? r % p.Lq : block.row + r;
                const int bits = part ? block.bits[n / 2][1] : block.bits[n / 2][0];
                if (i < p.Lq) seen |= seen_word(p, bits, i, block.block * Tile::kParts + part);
            }
            zero_rows<Tile::D, 32>(at.v(v.stage) + part * (64 * kTileRowBytes), Tile::BN * kTileRowBytes,
                                   ~or_over_warp(seen));
        }
        fence_async_proxy();
        sync_warp();
        if (lane == 0) barrier_arrive(at.v_clean(v.stage));
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
