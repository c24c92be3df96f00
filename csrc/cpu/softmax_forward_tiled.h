// Long queries: K and V are packed once per key-value head, then blocks of query rows run over them in parallel.
#pragma once
#include "fastattn/parallel.h"
#include "fastattn/softmax.h"
#include "softmax_forward_operands.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockRows = 64;                 // query rows of a task
constexpr int64_t kWaveBytes = int64_t{48} << 20;  // packed keys and values held at once
constexpr int64_t kLocalBytes = 640 << 10;         // packed head that fits beside the work in a second-level cache

template <class Math>
class Tiled {
   public:
    Tiled(const SoftmaxParams& p)
        : p_(p),
          terms_(p),
          layout_(p),
          sight_(p, Sight::kSeen | Sight::kRows),
          q_blocks_(ceil_div(p.Lq(), kBlockRows)) {}

    void run() {
        const int64_t heads = p_.B() * p_.Hk(), size = layout_.head_size();
        const int64_t scratch = block_scratch();
        const bool local = heads >= 8 * p_.threads && size * 4 <= kLocalBytes;
        const int64_t wave = local ? p_.threads : most<int64_t>(1, least(heads, kWaveBytes / (size * 4 + 1)));
        const Scratch packed(wave * size * 4), blocks(p_.threads * scratch * 4);
        std::atomic<int> members{0};
        if (local) {
            std::atomic<int64_t> next{0};
            run_team(p_.threads, [&] {
                const int me = members.fetch_add(1);
                float* mine = packed.as<float>() + me * size;
                for (int64_t head; (head = next.fetch_add(1)) < heads;) {
                    for (int64_t tile = 0; tile < layout_.tiles; ++tile) pack(head, tile, mine);
                    for (int64_t block = 0; block < q_blocks_ * p_.group(); ++block) {
                        attend(head, block, mine, blocks.as<float>() + me * scratch);
                    }
                }
            });
            return;
        }
        for (int64_t first = 0; first < heads; first += wave) {
            const int64_t count = least(wave, heads - first);
            parallel_for(p_.threads, count * layout_.tiles, [&](int64_t task) {
                const int64_t at = task / layout_.tiles;
                pack(first + at, task % layout_.tiles, packed.as<float>() + at * size);
            });
            std::atomic<int64_t> next{0};
            members = 0;
            run_team(p_.threads, [&] {
                const int me = members.fetch_add(1);
                for (int64_t task; (task = next.fetch_add(1)) < count * q_blocks_ * p_.group();) {
                    const int64_t at = task % count, block = heaviest(first + at, task / count);
                    attend(first + at, block, packed.as<float>() + at * size, blocks.as<float>() + me * scratch);
                }
            });
        }
    }

   private:
    int64_t block_scratch() const {
        return round_up(kBlockRows * (layout_.ldq + layout_.ldo) + kRows * kScoreRow + 64, 16);
    }

    void pack(int64_t head, int64_t tile, float* out) const {
        const int64_t b = head / p_.Hk(), hk = head % p_.Hk();
        pack_key_tile<Math>(p_, key_source(p_, sight_, p_.k, b, hk), tile, out + tile * layout_.k_tile);
        pack_value_tile<Math>(p_, key_source(p_, sight_, p_.v, b, hk), tile, out + layout_.k_size, layout_.v_steps,
                              tile * 64 / Math::kPair);
    }

    // The n-th block of a head in the order of their work. Without a plan the last one is first: under a causal band it
    // is the longest.
    int64_t heaviest(int64_t kv_head, int64_t n) const {
        const int32_t* order = sight_.plan.row_order;
        if (!order) return q_blocks_ * p_.group() - 1 - n;
        const int64_t g = n % p_.group(), h = kv_head % p_.Hk() * p_.group() + g;
        return order[sight_.plan.slice(kv_head / p_.Hk(), h) * q_blocks_ + n / p_.group()] * p_.group() + g;
    }

    // Query rows [i0, i0 + 64) of one head; block counts (query block, head of the group).
    void attend(int64_t kv_head, int64_t block, const float* packed, float* scratch) const {
        const int64_t b = kv_head / p_.Hk(), h = kv_head % p_.Hk() * p_.group() + block % p_.group();
        const int64_t i0 = block / p_.group() * kBlockRows, i1 = least(i0 + kBlockRows, p_.Lq());
        float* q = scratch;
        float* out = q + kBlockRows * layout_.ldq;
        float* scores = out + kBlockRows * layout_.ldo;
        if (terms_.zero_logits) {
            memset(q, 0, sizeof(float) * static_cast<size_t>((i1 - i0) * layout_.ldq));
        } else {
            pack_rows<Math>(source_of(p_.q, b, h), i0, i1 - i0, p_.D(), terms_.sign, q);
        }
        Panel panels[kBlockRows / kRows];
        int count = 0;
        for (int64_t i = i0; i < i1; i += kRows, ++count) {
            Panel& x = panels[count];
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
        const float* values = packed + layout_.k_size;
        int64_t tiles[kSlots], bits[kSlots];
        int filled = 0;
        const auto flush = [&] {
            for (int n = 0; n < count; ++n) {
                Panel& x = panels[n];
                select_tiles(x, tiles, bits, filled);
                if (!x.count) continue;
                score_tiles<Math>(x, layout_.d_units, scores,
                                  [&](int slot) { return packed + x.tiles[slot].tile * layout_.k_tile; });
                softmax_step<Math>(terms_, x, scores);
                add_values<Math>(x, scores, values, layout_.v_steps, layout_.dv_vecs,
                                 [&](int slot) { return x.tiles[slot].tile * 64 / Math::kPair; });
            }
            filled = 0;
        };
        visit_tiles(b, h, i0, i1, [&](int64_t tile, int64_t words) {
            tiles[filled] = tile;
            bits[filled] = words;
            if (++filled == kSlots) flush();
        });
        if (filled) flush();
        for (int n = 0; n < count; ++n) {
            const Panel& x = panels[n];
            for (int r = 0; r < x.rows; ++r) finish_row(terms_, x, r, x.top[r], x.total[r], x.out + r * x.ldo);
        }
    }

    // visit(tile, words) for the key tiles rows [i0, i1) may see: those of the band, and of the plan if there is one.
    template <class Visit>
    void visit_tiles(int64_t b, int64_t h, int64_t i0, int64_t i1, Visit&& visit) const {
        const int64_t lowest = most<int64_t>(0, i0 + p_.lo), highest = least(p_.Lk() - 1, i1 - 1 + p_.hi);
        if (lowest > highest) return;
        const int64_t first = lowest / 64, last = highest / 64;
        if (!sight_.plan.row_start) {
            for (int64_t tile = first; tile <= last; ++tile) visit(tile, -1);
            return;
        }
        const TilePlanView& plan = sight_.plan;
        const int64_t at = plan.slice(b, h) * plan.q_tiles + i0 / 64;
        for (int64_t run = plan.row_start[at]; run < plan.row_start[at + 1]; ++run) {
            const TileRun& r = plan.rows[run];
            const int64_t end = least<int64_t>(last, r.first + r.count - 1);
            for (int64_t tile = most<int64_t>(first, r.first); tile <= end; ++tile) visit(tile, r.bits);
        }
    }

    void select_tiles(Panel& x, const int64_t* tiles, const int64_t* bits, int n) const {
        const int64_t i0 = x.i[0], i1 = x.i[x.rows - 1];
        x.count = 0;
        for (int slot = 0; slot < n; ++slot) {
            const int64_t j0 = tiles[slot] * 64;
            if (bits[slot] < 0 && j0 >= i1 + p_.lo && j0 + 63 <= i0 + p_.hi && j0 + 64 <= p_.Lk()) {
                x.add_full(tiles[slot]);
                continue;
            }
            const uint64_t* words = bits[slot] < 0 ? nullptr : sight_.plan.words + bits[slot] * kTile;
            for (int r = 0; r < x.rows; ++r) {
                const uint64_t band = band_word(p_.lo, p_.hi, p_.Lk(), x.i[r], tiles[slot]);
                x.tiles[x.count].bits[r] = words ? band & words[x.i[r] % 64] : band;
            }
            x.add(tiles[slot]);
        }
    }

    const SoftmaxParams& p_;
    const Terms terms_;
    const Layout<Math> layout_;
    const Sight sight_;
    const int64_t q_blocks_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
