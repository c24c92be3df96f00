// Long queries: K and V are packed once per key-value head, then blocks of query rows run over them in parallel.
#pragma once
#include "fastattn/parallel.h"
#include "fastattn/softmax.h"
#include "softmax_forward_operands.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockRows = 64;                 // query rows of a block
constexpr int64_t kWaveBytes = int64_t{48} << 20;  // packed keys and values held at once for all threads
constexpr int64_t kStretchBytes = 512 << 10;       // keys and values that all blocks of a task read in turn
// A packed head that fits beside the work in a second-level cache: 2 MiB where there are matrix tiles, else 1 MiB.
template <class Math>
constexpr int64_t kOwnBytes = (Math::kTiles ? 1664 : 640) << 10;
template <class Math>
constexpr int kMaxBlocks = Math::kTiles ? 8 : 1;  // blocks of a task

template <class Math>
class Tiled {
   public:
    Tiled(const SoftmaxParams& p)
        : p_(p),
          terms_(p),
          layout_(p),
          sight_(p, Sight::kSeen | Sight::kRows),
          blocks_(blocks_of_task()),
          head_tasks_(ceil_div(p.Lq(), blocks_ * kBlockRows) * p.group()),
          threads_(team_of(p, p.B() * p.Hk() * head_tasks_)),
          stretch_(blocks_ == 1 ? layout_.tiles
                                : most<int64_t>(kSlots, kStretchBytes * layout_.tiles / (layout_.head_size() * 4))) {}

    // False where numbers are too large for their parts: then nothing it has written counts.
    bool run() {
        work();
        return !large_;
    }

   private:
    void work() {
        const int64_t heads = p_.B() * p_.Hk(), own = own_heads(heads), size = layout_.head_size();
        const int64_t shared = least(heads - own, most<int64_t>(1, kWaveBytes / (size * 4 + 1)));
        const int64_t scratch = block_scratch();
        const Scratch packed(most<int64_t>(own ? threads_ : 0, shared) * size * 4), blocks(threads_ * scratch * 4);
        std::atomic<int> members{0};
        std::atomic<int64_t> next{0};
        if (own) {
            run_team(threads_, [&] {
                const MatrixUnit<Math::kTiles> unit;
                const int me = members.fetch_add(1);
                float* mine = packed.as<float>() + me * size;
                for (int64_t head; (head = next.fetch_add(1)) < own;) {
                    for (int64_t tile = 0; tile < layout_.tiles; ++tile) pack(head, tile, mine);
                    for (int64_t task = 0; task < head_tasks_; ++task) {
                        attend(head, task, mine, blocks.as<float>() + me * scratch);
                    }
                }
            });
        }
        for (int64_t first = own; first < heads; first += shared) {
            const int64_t count = least(shared, heads - first);
            parallel_for(threads_, count * layout_.tiles, [&](int64_t task) {
                const int64_t at = task / layout_.tiles;
                pack(first + at, task % layout_.tiles, packed.as<float>() + at * size);
            });
            members = 0;
            next = 0;
            run_team(threads_, [&] {
                const MatrixUnit<Math::kTiles> unit;
                const int me = members.fetch_add(1);
                for (int64_t task; (task = next.fetch_add(1)) < count * head_tasks_;) {
                    // Matrix tiles use a head up faster than it comes from a third-level cache: it stays in the second.
                    const int64_t at = Math::kTiles ? task / head_tasks_ : task % count;
                    const int64_t rest = Math::kTiles ? task % head_tasks_ : task / count;
                    attend(first + at, heaviest(first + at, rest), packed.as<float>() + at * size,
                           blocks.as<float>() + me * scratch);
                }
            });
        }
    }

    // Heads that threads pack for themselves, each its own, so that what stays in a second-level cache is in that of
    // the thread that needs it. All of many, and of few that take equally long as many as occupy every thread; the
    // others are shared, and so are heads that would take too much memory.
    int64_t own_heads(int64_t heads) const {
        if (layout_.head_size() * 4 > most(kOwnBytes<Math>, kWaveBytes / threads_)) return 0;
        if (heads >= 8 * threads_) return heads;
        return sight_.alike() ? heads - heads % threads_ : 0;
    }

    // Where a head leaves no room in a second-level cache, several blocks go through it together, stretch by stretch.
    // Which keys a block takes at once, and so its result, is the same.
    int blocks_of_task() const {
        int blocks = layout_.head_size() * 4 > kOwnBytes<Math> ? kMaxBlocks<Math> : 1;
        while (blocks > 1 && p_.B() * p_.Hq() * ceil_div(p_.Lq(), blocks * kBlockRows) < 4 * p_.threads) blocks /= 2;
        return blocks;
    }

    int64_t block_floats() const { return kBlockRows * (layout_.ldq + layout_.ldo); }
    int64_t block_scratch() const { return round_up(blocks_ * block_floats() + Scores<Math>::kFloats + 64, 16); }

    void pack(int64_t head, int64_t tile, float* out) const {
        const int64_t b = head / p_.Hk(), hk = head % p_.Hk();
        pack_key_tile<Math>(p_, key_source(p_, sight_, p_.k, b, hk, &large_), tile, out + tile * layout_.k_tile);
        pack_value_tile<Math>(p_, key_source(p_, sight_, p_.v, b, hk, &large_), tile, out + layout_.k_size,
                              layout_.v_steps, tile * 64 / Math::kPair);
    }

    // The n-th task of a head in the order of their work. Without a plan the last one is first: under a causal band it
    // is the longest.
    int64_t heaviest(int64_t kv_head, int64_t n) const {
        const int32_t* order = sight_.plan.row_order;
        if (!order || blocks_ > 1) return head_tasks_ - 1 - n;
        const int64_t g = n % p_.group(), h = kv_head % p_.Hk() * p_.group() + g;
        return order[sight_.plan.slice(kv_head / p_.Hk(), h) * sight_.plan.q_tiles + n / p_.group()] * p_.group() + g;
    }

    // Query rows [i0, i1) of one head, and the key tiles they are to see next.
    struct Block {
        int64_t i0, i1;
        Panel panels[kBlockRows / kRows];
        int count, filled;
        int64_t tiles[kSlots], bits[kSlots];
    };

    // `task` counts (blocks of queries, head of the group).
    void attend(int64_t kv_head, int64_t task, const float* packed, float* scratch) const {
        const int64_t b = kv_head / p_.Hk(), h = kv_head % p_.Hk() * p_.group() + task % p_.group();
        const int64_t start = task / p_.group() * blocks_ * kBlockRows;
        float* scores = scratch + blocks_ * block_floats();
        Block blocks[kMaxBlocks<Math>];
        int count = 0;
        for (int64_t i0 = start; count < blocks_ && i0 < p_.Lq(); i0 += kBlockRows, ++count) {
            open(blocks[count], b, h, i0, scratch + count * block_floats());
        }
        for (int64_t tile = 0; tile < layout_.tiles; tile += stretch_) {
            for (int n = 0; n < count; ++n) {
                Block& x = blocks[n];
                visit_tiles(b, h, x.i0, x.i1, tile, least(tile + stretch_, layout_.tiles) - 1,
                            [&](int64_t at, int64_t words) {
                                x.tiles[x.filled] = at;
                                x.bits[x.filled] = words;
                                if (++x.filled == kSlots) step(x, packed, scores);
                            });
            }
        }
        for (int n = 0; n < count; ++n) {
            if (blocks[n].filled) step(blocks[n], packed, scores);
            for (int m = 0; m < blocks[n].count; ++m) {
                Panel& x = blocks[n].panels[m];
                x.add_up();
                x.clear_out();
                for (int r = 0; r < x.rows; ++r) finish_row(terms_, x, r, x.top[r], x.total[r], x.out + r * x.ldo);
            }
        }
    }

    void open(Block& block, int64_t b, int64_t h, int64_t i0, float* scratch) const {
        const int64_t i1 = least(i0 + kBlockRows, p_.Lq());
        float* q = scratch;
        float* out = q + kBlockRows * layout_.ldq;
        if (terms_.zero_logits) {
            memset(q, 0, sizeof(float) * static_cast<size_t>((i1 - i0) * layout_.ldq));
        } else {
            pack_rows<Math>(source_of(p_.q, b, h, &large_), i0, i1 - i0, p_.D(), terms_.sign, q);
        }
        block.i0 = i0;
        block.i1 = i1;
        block.count = block.filled = 0;
        for (int64_t i = i0; i < i1; i += kRows, ++block.count) {
            Panel& x = block.panels[block.count];
            x.rows = static_cast<int>(least<int64_t>(kRows, i1 - i));
            x.b = b;
            for (int r = 0; r < x.rows; ++r) {
                x.head[r] = h;
                x.i[r] = i + r;
            }
            x.q = q + (i - i0) * layout_.ldq;
            x.ldq = layout_.ldq;
            x.out = out + (i - i0) * layout_.ldo;
            x.ldo = layout_.ldo;
            x.reset(p_.sinks);
        }
    }

    // The block's rows against the tiles it has gathered.
    void step(Block& block, const float* packed, float* scores) const {
        for (int n = 0; n < block.count; ++n) {
            Panel& x = block.panels[n];
            select_tiles(x, block.tiles, block.bits, block.filled);
            if (!x.count) continue;
            softmax_step<Math>(terms_, x, scores, [&] {
                score_tiles<Math>(x, layout_.d_units, scores,
                                  [&](int slot) { return packed + x.tiles[slot].tile * layout_.k_tile; });
            });
            add_values<Math>(x, scores, packed + layout_.k_size, layout_.v_steps, layout_.dv_vecs,
                             [&](int slot) { return x.tiles[slot].tile * 64 / Math::kPair; });
        }
        block.filled = 0;
    }

    // visit(tile, words) for those of the key tiles [from, to] that rows [i0, i1) may see: those of the band, and of
    // the plan if there is one.
    template <class Visit>
    void visit_tiles(int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t from, int64_t to, Visit&& visit) const {
        const int64_t lowest = most<int64_t>(0, i0 + p_.lo), highest = least(p_.Lk() - 1, i1 - 1 + p_.hi);
        if (lowest > highest) return;
        const int64_t first = most(from, lowest / 64), last = least(to, highest / 64);
        if (!sight_.plan.row_start) {
            for (int64_t tile = first; tile <= last; ++tile) visit(tile, -1);
            return;
        }
        const TilePlanView& plan = sight_.plan;
        const TileRun* end = plan.rows + plan.row_start[plan.slice(b, h) * plan.q_tiles + i0 / 64 + 1];
        const TileRun* run = find_run(plan, b, h, i0 / 64, first);
        for (; run && run < end && run->first <= last; ++run) {
            const int64_t stop = least<int64_t>(last, run->first + run->count - 1);
            for (int64_t tile = most<int64_t>(first, run->first); tile <= stop; ++tile) visit(tile, run->bits);
        }
    }

    void select_tiles(Panel& x, const int64_t* tiles, const int64_t* bits, int n) const {
        const int64_t i0 = x.i[0], i1 = x.i[x.rows - 1];
        x.count = 0;
        for (int slot = 0; slot < n; ++slot) {
            const int64_t j0 = tiles[slot] * 64;
            const bool in_band = j0 >= i1 + p_.lo && j0 + 63 <= i0 + p_.hi && j0 + 64 <= p_.Lk();
            if (bits[slot] < 0 && in_band) {
                x.add_full(tiles[slot]);
                continue;
            }
            uint64_t* seen = x.tiles[x.count].bits;
            for (int r = 0; r < x.rows && !in_band; ++r)
                seen[r] = band_word(p_.lo, p_.hi, p_.Lk(), x.i[r], tiles[slot]);
            if (bits[slot] >= 0) {
                // The rows of a panel are neighbours in one tile of the plan.
                const uint64_t* words = sight_.plan.words + bits[slot] * kTile + i0 % 64;
                for (int r = 0; r < x.rows; ++r) seen[r] = in_band ? words[r] : seen[r] & words[r];
            }
            x.add(tiles[slot]);
        }
    }

    const SoftmaxParams& p_;
    const Terms terms_;
    const Layout<Math> layout_;
    const Sight sight_;
    const int blocks_;  // of 64 rows in a task
    const int64_t head_tasks_;
    const int threads_;
    const int64_t stretch_;
    mutable std::atomic<bool> large_{false};
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
