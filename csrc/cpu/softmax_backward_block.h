// A block of queries against a block of keys: weights P and score gradients dS, one panel of keys at a time, and the
// five products of the backward pass.
#pragma once
#include <string.h>

#include "fastattn/tile_plan.h"
#include "pack.h"
#include "philox.h"
#include "softmax_logits.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows of a register tile: 24 sums, two of B and one of A fill the registers; matrix tiles come in pairs.
template <class Math>
constexpr int kTall = Math::kTiles ? 32
                      : W == 16    ? 12
                                   : kTileRows;
// Rows whose scores are made and used up while in the first-level cache.
template <class Math>
constexpr int kStrip = Math::kTiles ? 64 : 4 * kTall<Math>;
// Keys of a block at most. Processors with matrix tiles have twice the second-level cache of others.
template <class Math>
constexpr int64_t kMaxKeys = Math::kTiles ? 512 : 256;
template <class Math>
constexpr int kMaxPanels = static_cast<int>(kMaxKeys<Math>) / kPanel;

// Sizes of a call in elements, units, and blocks. They depend on the shape alone: so do all sums.
template <class Math>
struct BackwardSizes {
    static constexpr int kQueries = 128;                                      // of a block
    static constexpr int kUnits = kPanel / Math::kPair * Math::kParts;        // of a panel of keys
    static constexpr int64_t kSteps = kQueries / Math::kPair * Math::kParts;  // of a sum over queries, all parts
    static constexpr int kGroups = (kQueries + kTall<Math> - 1) / kTall<Math>;
    static_assert(kGroups < 64 && kTall<Math> % 2 == 0 && kQueries % kTile == 0, "");

    int64_t D, Dv, d_units, dv_units, ld_q, ld_o;  // ld_q, ld_o: units of a row of q and dout
    int64_t d_vecs, dv_vecs, ld_d, ld_dv;          // ld_d, ld_dv: floats of a row of sums
    int64_t keys, key_units, panels, q_blocks, k_blocks;
    bool capped;  // softcap

    explicit BackwardSizes(const SoftmaxParams& p)
        : D(p.D()),
          Dv(p.Dv()),
          d_units(units<Math>(D)),
          dv_units(units<Math>(Dv)),
          ld_q(round_up(d_units, W)),
          ld_o(round_up(dv_units, W)),
          d_vecs(ceil_div(D, W)),
          dv_vecs(ceil_div(Dv, W)),
          ld_d(d_vecs * W),
          ld_dv(dv_vecs * W),
          keys(block_keys(most(D, Dv), p.Hk(), p.Lk())),
          key_units(keys / Math::kPair * Math::kParts),
          panels(keys / kPanel),
          q_blocks(ceil_div(p.Lq(), kQueries)),
          k_blocks(ceil_div(p.Lk(), keys)),
          capped(p.softcap > 0) {}

    // Packed keys and their sums stay in a second-level cache. Few keys in all make narrow blocks: work for every
    // thread.
    static int64_t block_keys(int64_t widest, int64_t heads, int64_t Lk) {
        const int64_t most_keys = heads * Lk < 4096 ? 128 : widest > 64 ? kMaxKeys<Math> / 2 : kMaxKeys<Math>;
        return least(most_keys, round_up(Lk, 64));
    }
};

// What a block of queries and a block of keys share, in the layouts of the products.
template <class Math>
struct BackwardBuffers {
    using Sizes = BackwardSizes<Math>;
    float *k_columns, *v_columns, *k_rows;  // B operands of Q K^T, dO V^T, dS K
    // A operands of Q K^T, dO V^T; B of dS^T Q, P^T dO, or, by matrix tiles, A of Q^T dS, dO^T P.
    float *q, *o, *q_summed, *o_summed;
    float *dk, *dv, *dq;                           // sums; of matrix tiles dk and dv are transposed
    float *scores = nullptr, *dweights = nullptr;  // one strip of S and of dP, then of dS
    float* damp = nullptr;                         // of the same strip, see Strip
    float *weights, *dscores = nullptr;            // one panel of P and dS, units along queries
    float* dscores_by_key;                         // all panels of dS, units along keys
    uint64_t *visible, *keep;                      // bits of the query rows for one key tile

    // Returns how many floats it takes from `base`, which may be null to ask just that. Fp32 makes P and dS in place: S
    // and dP need no buffers of their own.
    int64_t lay_out(const Sizes& s, float* base) {
        int64_t at = 0;
        const auto take = [&at, base](int64_t n) {
            float* const start = base ? base + at : nullptr;
            at += round_up(n, 16);
            return start;
        };
        constexpr int64_t rows = Sizes::kQueries, strip = kStrip<Math> * kPanel;
        k_columns = take(s.keys * s.d_units);
        v_columns = take(s.keys * s.dv_units);
        k_rows = take(s.key_units * s.ld_d);
        q = take(rows * s.ld_q);
        o = take(rows * s.ld_o);
        q_summed = take(Sizes::kSteps * s.ld_d);
        o_summed = take(Sizes::kSteps * s.ld_dv);
        dk = take(s.keys * s.ld_d);
        dv = take(s.keys * s.ld_dv);
        dq = take(rows * s.ld_d);
        weights = take(Sizes::kSteps * kPanel);
        dscores_by_key = take(rows * s.key_units);
        if constexpr (Math::kPair == 2) {
            scores = take(strip);
            dweights = take(strip);
            dscores = take(Sizes::kSteps * kPanel);
        }
        if (s.capped) damp = take(strip);
        visible = reinterpret_cast<uint64_t*>(take(2 * rows));
        keep = reinterpret_cast<uint64_t*>(take(2 * rows));
        return at;
    }
};

// Which key blocks a block of queries touches, and what it sees of a key tile.
class BackwardSight {
   public:
    enum Cover { kNothing, kPart, kAll };

    BackwardSight(const SoftmaxParams& p, int64_t queries, int64_t keys)
        : p_(p),
          sight_(p, Sight::kSeen | Sight::kRows),
          queries_(queries),
          keys_(keys),
          k_blocks_(ceil_div(p.Lk(), keys)) {}

    // The first key block from n on that query block m touches, or the number of key blocks.
    int64_t next(int64_t b, int64_t h, int64_t m, int64_t n) const {
        const int64_t rows = sight_.plan.row_start ? kTile : queries_;
        const int64_t i_end = least((m + 1) * queries_, p_.Lq());
        int64_t found = k_blocks_;
        for (int64_t i0 = m * queries_; i0 < i_end; i0 += rows) {
            found = least(found, first_block(b, h, i0, least(i0 + rows, i_end), n));
        }
        return found;
    }

    // Rows whose visibility is judged together: a register tile, or, so that the tiles of a plan are whole groups, 16.
    template <class Math>
    int judged_rows() const {
        return sight_.plan.row_start && !Math::kTiles ? 16 : kTall<Math>;
    }

    // Whether the tile of queries from i0 on may touch key block n.
    bool touches(int64_t b, int64_t h, int64_t i0, int64_t n) const {
        return first_block(b, h, i0, least(i0 + kTile, p_.Lq()), n) == n;
    }

    // Bits of key tile `tile` that the rows from i0 on see; they are written only where the answer is kPart, or
    // `always`.
    Cover look(int64_t b, int64_t h, int64_t i0, int rows, int64_t tile, bool always, uint64_t* bits) const {
        const int64_t j0 = tile * kTile, j1 = least(j0 + kTile, p_.Lk()), i1 = i0 + rows;
        if (j0 >= j1 || j0 > i1 - 1 + p_.hi || j1 - 1 < i0 + p_.lo) return kNothing;
        const bool in_band = j1 - j0 == kTile && j0 - (i1 - 1) >= p_.lo && j1 - 1 - i0 <= p_.hi;
        bool whole = in_band, nothing = true;
        const uint64_t* words[2] = {nullptr, nullptr};
        bool hole[2] = {false, false};
        if (sight_.plan.row_start) {
            for (int64_t t = 0; t * kTile < rows; ++t) {
                const TileRun* run = find_run(sight_.plan, b, h, i0 / kTile + t, tile);
                hole[t] = !run || run->first > tile;
                if (!hole[t] && run->bits >= 0) words[t] = sight_.plan.words + run->bits * kTile;
                nothing &= hole[t];
                whole &= !hole[t] && !words[t];
            }
            if (nothing) return kNothing;
        }
        if (whole && !always) return kAll;
        for (int r = 0; r < rows; ++r) {
            const uint64_t band = hole[r / kTile] ? 0
                                  : in_band       ? ~uint64_t{0}
                                                  : band_word(p_.lo, p_.hi, p_.Lk(), i0 + r, tile);
            bits[r] = words[r / kTile] ? band & words[r / kTile][r % kTile] : band;
        }
        return whole ? kAll : kPart;
    }

    // Rows of k or v; keys nobody sees are read as zeros.
    Source keys(const TensorView& t, int64_t b, int64_t hk, std::atomic<bool>* large) const {
        Source s = source_of(t, b, hk, large);
        s.first = sight_.first;
        s.last = least(sight_.last, p_.Lk());
        if (sight_.seen) s.seen = sight_.seen + (b * p_.Hk() + hk) * sight_.words;
        return s;
    }

   private:
    // The same for queries [i0, i1), one tile of them where there is a plan.
    int64_t first_block(int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t n) const {
        const int64_t first = most(most<int64_t>(0, i0 + p_.lo), n * keys_), last = least(p_.Lk(), i1 + p_.hi);
        if (first >= last) return k_blocks_;
        int64_t tile = first / kTile;
        if (sight_.plan.row_start) {
            const TileRun* run = find_run(sight_.plan, b, h, i0 / kTile, tile);
            if (!run) return k_blocks_;
            tile = most<int64_t>(tile, run->first);
        }
        return tile * kTile < last ? tile * kTile / keys_ : k_blocks_;
    }

    const SoftmaxParams& p_;
    const Sight sight_;
    const int64_t queries_, keys_, k_blocks_;
};

// Sums along the queries or keys of each head, in an order of their own; what heads share is added up afterwards.
class HeadSums {
   public:
    HeadSums(const SoftmaxParams& p, int64_t length)
        : heads_(p.Hq()), length_(length), sums_(p.B() * p.Hq() * length * 4) {}

    // Of queries [i0, i0 + rows) of (b, h), in turn.
    void add_rows(int64_t b, int64_t h, int64_t i0, int64_t rows, const float* added, bool first) const {
        float* out = sums(b, h) + i0;
        for (int64_t r = 0; r < rows; ++r) out[r] = first ? added[r] : out[r] + added[r];
    }
    void zero_rows(int64_t b, int64_t h, int64_t i0, int64_t rows) const {
        memset(sums(b, h) + i0, 0, sizeof(float) * static_cast<size_t>(rows));
    }

   protected:
    int64_t length() const { return length_; }
    float* sums(int64_t b, int64_t h) const { return sums_.as<float>() + (b * heads_ + h) * length_; }

   private:
    const int64_t heads_, length_;
    const Scratch sums_;
};

// Rows of S and dP that become P and dS.
struct Strip {
    float *scores, *dweights;         // [rows][kPanel]; dweights receives dS where it is not the output itself
    float* damp;                      // [rows][kPanel], or null: derivative of the softcap, then dS without it
    const float *top, *tail, *delta;  // [rows]
    const uint64_t *visible, *keep;   // [rows]
    int shift;                        // the panel's first key in those words
    float *weights, *dscores;         // units along queries
    float* dscores_by_key;            // units along keys
};

// P = 2^((s - top) * factor + tail), dS = P (dP - delta); both 0 where hidden. Dropout keeps some weights, times
// keep_factor. With a softcap, dS is that of the scores: times `damp`.
template <class Math, bool kMasked, bool kDropout, bool kDamped>
inline void weigh(const Strip& x, int rows, float factor, float keep_factor, bool keep_sums) {
    const Vec factors = vset(factor), keep_factors = vset(keep_factor);
    const auto term = [&](int r, int v, Vec& p, Vec& ds) {
        const int at = r * kPanel + v * W;
        const Vec below = vsub(vload(x.scores + at), vset(x.top[r]));
        p = exp2_normal<Math::kFastExp>(vfma(below, factors, vset(x.tail[r])));
        Vec dp = vload(x.dweights + at), kept = p;
        if (kDropout) {
            const uint32_t keep = static_cast<uint32_t>(x.keep[r] >> (x.shift + v * W));
            dp = vselect(keep, vmul(dp, keep_factors), vzero());
            kept = vselect(keep, vmul(p, keep_factors), vzero());
        }
        ds = vmul(p, vsub(dp, vset(x.delta[r])));
        p = kept;
        if (kMasked) {
            const uint32_t seen = static_cast<uint32_t>(x.visible[r] >> (x.shift + v * W));
            p = vselect(seen, p, vzero());
            ds = vselect(seen, ds, vzero());
        }
        if (kDamped) {
            const Vec damp = vload(x.damp + at);
            vstore(x.damp + at, ds);
            ds = vmul(ds, damp);
        }
    };
    if constexpr (Math::kPair == 1) {
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < 2; ++v) {
                Vec p, ds;
                term(r, v, p, ds);
                vstore(x.weights + r * kPanel + v * W, p);
                vstore(x.dscores + r * kPanel + v * W, ds);
            }
        }
    } else {
#ifdef FASTATTN_HAS_BF16_DOT
        constexpr int64_t part = BackwardSizes<Math>::kSteps / Math::kParts * kPanel;
        constexpr int64_t units = BackwardSizes<Math>::kUnits, key_part = units / Math::kParts;
        for (int r = 0; r < rows; r += 2) {
            Vec p[2][2], ds[2][2];
            for (int i = 0; i < 2; ++i) {
                for (int v = 0; v < 2; ++v) term(r + i, v, p[i][v], ds[i][v]);
            }
            for (int v = 0; v < 2; ++v) {
                store_pairs<Math>(x.weights + r / 2 * kPanel + v * W, part, p[0][v], p[1][v]);
                store_pairs<Math>(x.dscores + r / 2 * kPanel + v * W, part, ds[0][v], ds[1][v]);
            }
            for (int i = 0; i < 2; ++i) {
                store_neighbours<Math>(x.dscores_by_key + (r + i) * units, key_part, ds[i][0], ds[i][1]);
                for (int v = 0; keep_sums && v < 2; ++v) vstore(x.dweights + (r + i) * kPanel + v * W, ds[i][v]);
            }
        }
#endif
    }
    (void)keep_sums;
}

template <class Math, bool kDropout>
inline void weigh_strip(const Strip& x, int rows, bool masked, float factor, float keep_factor, bool keep_sums) {
    if (x.damp) {
        weigh<Math, true, kDropout, true>(x, rows, factor, keep_factor, false);
    } else if (masked) {
        weigh<Math, true, kDropout, false>(x, rows, factor, keep_factor, keep_sums);
    } else {
        weigh<Math, false, kDropout, false>(x, rows, factor, keep_factor, keep_sums);
    }
}

inline void store_row(const TensorView& t, int64_t b, int64_t h, int64_t i, int64_t cols, const float* row,
                      float factor) {
    char* target = t.row(b, h, i);
    const Vec factors = vset(factor);
    int64_t c = 0;
    if (row && t.stride[3] == 1) {
        with_storer(t.dtype, [&](auto store) {
            for (; c + W <= cols; c += W) store(target, c, vmul(vload(row + c), factors));
        });
    }
    for (; c < cols; c += W) {
        const Vec a = row ? vmul(vload(row + c), factors) : vzero();
        store_floats(target, t.dtype, c, t.stride[3], a, static_cast<int>(least<int64_t>(W, cols - c)));
    }
}

// Rows [i0, i0 + n) of a gradient: `rows` times factor, or zeros where rows is null.
inline void store_rows(const TensorView& t, int64_t b, int64_t h, int64_t i0, int64_t n, const float* rows, int64_t ld,
                       float factor) {
    for (int64_t r = 0; r < n; ++r) store_row(t, b, h, i0 + r, t.size[3], rows ? rows + r * ld : nullptr, factor);
}

#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
// The same of sums that lie transposed, [round_up(cols, W)][ld].
inline void store_columns(const TensorView& t, int64_t b, int64_t h, int64_t i0, int64_t n, const float* columns,
                          int64_t ld, float factor) {
    for (int64_t r = 0; r < n; r += W) {
        for (int64_t c = 0; c < t.size[3]; c += W) {
            Vec block[W];
            FASTATTN_UNROLL for (int i = 0; i < W; ++i) block[i] = vload(columns + (c + i) * ld + r);
            transpose(block);
            const int lanes_left = static_cast<int>(least<int64_t>(W, t.size[3] - c));
            for (int64_t i = 0; i < least<int64_t>(W, n - r); ++i) {
                store_floats(t.row(b, h, i0 + r + i), t.dtype, c, t.stride[3], vmul(block[i], vset(factor)),
                             lanes_left);
            }
        }
    }
}
#endif

inline void store_zeros(const TensorView& t) {
    for (int64_t b = 0; t && b < t.size[0]; ++b) {
        for (int64_t h = 0; h < t.size[1]; ++h) store_rows(t, b, h, 0, t.size[2], nullptr, 0, 1.0f);
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
