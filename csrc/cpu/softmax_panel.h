// One panel of query rows against a group of key tiles: scores, online softmax, weighted sum of values.
#pragma once
#include <math.h>
#include <string.h>

#include "fastattn/tile_plan.h"
#include "pack.h"
#include "philox.h"
#include "softmax_logits.h"

namespace fastattn {
namespace FASTATTN_ISA {

#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
constexpr int kRows = 32;  // query rows of a panel
constexpr int kTrim = 32;  // partial tiles are cut to multiples of this
constexpr int kSlots = 2;  // key tiles of a group: its scores stay in the first-level cache
#else
constexpr int kRows = 16;
constexpr int kTrim = 16;
constexpr int kSlots = 4;
#endif
constexpr int kGroupKeys = kSlots * 64;
constexpr int kPanelsPerTile = 64 / kPanel;
static_assert(kTrim % W == 0 && kRows % W == 0, "");

// A row of scores, slot by slot, and of the units of weights that take their place: each part of a slot's after the
// other, or, of one part, all slots' one after another.
template <class Math>
struct Scores {
    static constexpr int kPart = 64 / Math::kPair;  // units of a slot
    static constexpr int kSlot = kPart * Math::kParts > 64 ? kPart * Math::kParts : 64;
    static constexpr int kUnits = Math::kParts == 1 ? kPart : kSlot;
    static constexpr int kRow = kSlots * kSlot + 16;  // floats between rows: not a multiple of a cache page
    static constexpr int kFloats = kRows * kRow;
};

// A row's top is raised where the weights of a lane, of one group, sum up to this: larger ones have lost digits of
// their exponents, and take from the range that sums of values have.
constexpr float kMostWeight = 256.0f;

// Options of a call in the form the inner loops want them.
struct Terms {
    const SoftmaxParams& p;
    Dropout dropout;
    bool has_dropout;
    bool logits;       // scores are turned into logits before the online softmax
    float sign;        // folded into q so that the largest score is the largest logit
    float factor;      // logits in base 2 are score * factor, or, with `logits`, logit * factor
    float scale;       // without `logits`, logit = score * scale
    bool zero_logits;  // the scale is 0 or underflows: q is packed as zeros, and any factor will do

    explicit Terms(const SoftmaxParams& params)
        : p(params), dropout(params), has_dropout(params.dropout_p > 0), logits(makes_logits(params)) {
        const float wanted = static_cast<float>(p.scale);
        sign = wanted < 0 && !logits ? -1.0f : 1.0f;
        scale = sign * wanted;
        factor = logits ? kLog2e : scale * kLog2e;
        zero_logits = !logits && !(factor > 0);
        if (zero_logits) factor = kLog2e;
    }
};

// Columns of a tile that are worked on where `keys` are left from its first on.
inline int trimmed(int64_t keys) { return static_cast<int>(least<int64_t>(64, round_up(keys, kTrim))); }

struct PanelTile {
    int64_t tile;
    int c0, c1;  // columns in use, multiples of kTrim
    bool full;
    uint64_t bits[kRows];  // visible keys of each row, where not full
};

// Running state of up to kRows query rows; row r is query i[r] of head[r].
struct Panel {
    int rows = 0;
    int64_t b = 0;
    int64_t head[kRows], i[kRows];
    const float* q = nullptr;  // units [rows][ldq]
    int64_t ldq = 0;
    float* out = nullptr;  // [rows][ldo], unnormalised
    int64_t ldo = 0;
    alignas(64) float top[kRows];   // the logit whose weight is 1, -inf before any: the largest, or not far below
    alignas(64) float base[kRows];  // the same, or 0
    alignas(64) float decay[kRows];
    alignas(64) float total[kRows];  // sum of weights, once they are added up
    Vec totals[kRows];               // the same by lane
    uint32_t raised = 0;             // rows whose decay may not be 1
    bool blank = false;              // nothing has been written to out
    PanelTile tiles[kSlots];
    int count = 0;

    // A sink is a key of weight 1 that comes before all others.
    void reset(const float* sinks) {
        for (int r = 0; r < kRows; ++r) {
            const bool sink = sinks && r < rows;
            top[r] = sink ? sinks[head[r]] : -kInfinity;
            base[r] = top[r] == -kInfinity ? 0.0f : top[r];
            totals[r] = sink ? vselect(1, vset(1.0f), vzero()) : vzero();
        }
        blank = true;
    }
    // Where it is blank, out is zero from here on.
    void clear_out() {
        if (blank) memset(out, 0, sizeof(float) * static_cast<size_t>(rows * ldo));
        blank = false;
    }
    void add_up() {
        FASTATTN_UNROLL for (int g = 0; g < kRows; g += W) vstore(total + g, reduce_each(totals + g, vadd));
    }
    // Adds a tile given its bits; a tile nobody sees is left out.
    void add(int64_t tile) {
        PanelTile& t = tiles[count];
        uint64_t any = 0, every = ~uint64_t{0};
        for (int r = 0; r < rows; ++r) {
            any |= t.bits[r];
            every &= t.bits[r];
        }
        if (!any) return;
        t.tile = tile;
        t.full = every == ~uint64_t{0};
        t.c0 = __builtin_ctzll(any) / kTrim * kTrim;
        t.c1 = (63 - __builtin_clzll(any)) / kTrim * kTrim + kTrim;
        ++count;
    }
    void add_full(int64_t tile) {
        PanelTile& t = tiles[count++];
        t.tile = tile;
        t.full = true;
        t.c0 = 0;
        t.c1 = 64;
    }
};

// Scores of the panel's tiles; keys(slot) is the packed K^T of the tile in that slot, `steps` of all parts.
template <class Math, class Keys>
inline void score_tiles(const Panel& x, int64_t steps, float* scores, Keys&& keys) {
    const Segment whole{0, 0, steps / Math::kParts};
    for (int slot = 0; slot < x.count;) {
        const PanelTile& t = x.tiles[slot];
        const int first = t.c0 / kPanel, last = (t.c1 + kPanel - 1) / kPanel;
        int vecs = 2 * (last - first), next = slot + 1;
        // Neighbours in memory and in the score buffer are one product.
        while (Scores<Math>::kSlot == 64 && last == kPanelsPerTile && next < x.count && x.tiles[next].c0 == 0 &&
               x.tiles[next - 1].c1 == 64 && keys(next) == keys(next - 1) + kPanelsPerTile * kPanel * steps) {
            vecs += 2 * ((x.tiles[next].c1 + kPanel - 1) / kPanel);
            ++next;
        }
        gemm<Math, Store::kWrite>(x.rows, vecs, {x.q, x.ldq, 1, x.ldq / Math::kParts}, &whole, 1,
                                  keys(slot) + first * kPanel * steps, steps,
                                  scores + slot * Scores<Math>::kSlot + first * kPanel, Scores<Math>::kRow);
        slot = next;
    }
}

// Scores of one row to logits.
template <class Math>
inline void make_logits(const Terms& terms, const Panel& x, int r, float* row) {
    const RowLogits logits(terms.p, x.b, x.head[r], x.i[r]);
    for (int slot = 0; slot < x.count; ++slot) {
        const PanelTile& t = x.tiles[slot];
        float* s = row + slot * Scores<Math>::kSlot;
        for (int c = t.c0; c < t.c1; c += W) vstore(s + c, logits(vload(s + c), t.tile * 64 + c).z);
    }
}

// The largest logit of each lane among those that the row sees.
template <class Math>
inline Vec largest(const Panel& x, int r, const float* row) {
    Vec top = vset(-kInfinity), other = top;
    for (int slot = 0; slot < x.count; ++slot) {
        const PanelTile& t = x.tiles[slot];
        const float* s = row + slot * Scores<Math>::kSlot;
        if (t.full) {
            for (int c = t.c0; c < t.c1; c += 2 * W) {
                top = vmax(vload(s + c), top);
                other = vmax(vload(s + c + W), other);
            }
            continue;
        }
        for (int c = t.c0; c < t.c1; c += W) {
            top = vmax(vselect(static_cast<uint32_t>(t.bits[r] >> c), vload(s + c), vset(-kInfinity)), top);
        }
    }
    return vmax(top, other);
}

// Weights of one row as units of the value product; returns their sum by lane.
template <class Math, bool kDropout>
class Weigher {
   public:
    Weigher(const Terms& terms, const Panel& x)
        : terms_(terms), x_(x), factor_(vset(terms.factor)), keep_factor_(vset(terms.dropout.factor)) {}

    // Row r, its units in place of the scores.
    FASTATTN_INLINE Vec operator()(int r, float* row) const {
        const Vec base = vset(x_.base[r]);
        Vec sum = vzero(), other = vzero();
        for (int slot = 0; slot < x_.count; ++slot) {
            const PanelTile& t = x_.tiles[slot];
            uint64_t keep = 0;
            if (kDropout) {
                keep = keep_word(terms_.dropout, x_.b * terms_.p.Hq() + x_.head[r], x_.i[r], t.tile);
            }
            float* units = row + slot * Scores<Math>::kUnits;
            const float* z = row + slot * Scores<Math>::kSlot;
            // Of several parts, the first keys' units lie where the last keys' scores are.
            if (t.full) {
                Vec all[64 / W];
                FASTATTN_UNROLL for (int n = 0; n < 64 / W && kApart; ++n) all[n] = vload(z + n * W);
                FASTATTN_UNROLL for (int c = 0; c < 64; c += 2 * W) {
                    const Vec first = kApart ? all[c / W] : vload(z + c);
                    const Vec second = kApart ? all[c / W + 1] : vload(z + c + W);
                    block<false>(c, true, first, second, base, 0, keep, units, sum, other);
                }
                continue;
            }
            alignas(64) float copy[64];
            if (kApart) z = static_cast<float*>(memcpy(copy, z, sizeof copy));
            for (int c = t.c0; c < t.c1; c += 2 * W) {
                const bool pair = c + W < t.c1;
                block<true>(c, pair, vload(z + c), pair ? vload(z + c + W) : vzero(), base, t.bits[r], keep, units, sum,
                            other);
            }
        }
        return vadd(sum, other);
    }

   private:
    static constexpr bool kApart = Math::kParts > 1;

    // 2^((z - base) * factor)
    template <bool kHidden>
    FASTATTN_INLINE Vec weight(Vec z, Vec base, uint64_t seen, uint64_t keep, Vec& sum) const {
        Vec p = exp2_of<Math::kFastExp>(vmul(vsub(z, base), factor_));
        if (kHidden) p = vselect(static_cast<uint32_t>(seen), p, vzero());
        sum = vadd(sum, p);
        return kDropout ? vselect(static_cast<uint32_t>(keep), vmul(p, keep_factor_), vzero()) : p;
    }
    // The 2 W keys from c on, or, unless `pair`, W.
    template <bool kHidden>
    FASTATTN_INLINE void block(int c, bool pair, Vec z, Vec next, Vec base, uint64_t seen, uint64_t keep, float* units,
                               Vec& sum, Vec& other) const {
        const Vec first = weight<kHidden>(z, base, seen >> c, keep >> c, sum);
        const Vec second = pair ? weight<kHidden>(next, base, seen >> (c + W), keep >> (c + W), other) : vzero();
        if constexpr (Math::kPair == 1) {
            vstore(units + c, first);
            if (pair) vstore(units + c + W, second);
        } else {
#ifdef FASTATTN_HAS_BF16_DOT
            store_neighbours<Math>(units + c / 2, Scores<Math>::kPart, first, second);
#endif
        }
    }

    const Terms& terms_;
    const Panel& x_;
    const Vec factor_, keep_factor_;
};

// Tops of the rows in `which` become the largest logits of the group, or stay; decays are what that makes of earlier
// weights.
template <class Math>
inline void raise_tops(const Terms& terms, Panel& x, uint32_t which, const float* scores) {
    const Vec minus_inf = vset(-kInfinity), factor = vset(terms.factor);
    Vec lanes_by_row[kRows];
    for (int r = 0; r < kRows; ++r) {
        lanes_by_row[r] = which >> r & 1 ? largest<Math>(x, r, scores + r * Scores<Math>::kRow) : minus_inf;
    }
    FASTATTN_UNROLL for (int g = 0; g < kRows; g += W) {
        const Vec before = vload(x.top + g), decay = vload(x.decay + g);
        const Vec top = vselect(which >> g, vmax(reduce_each(lanes_by_row + g, vmax), before), before);
        const Vec base = vselect(vnot_equal(top, minus_inf), top, vzero());
        vstore(x.top + g, top);
        vstore(x.base + g, base);
        vstore(x.decay + g, vselect(which >> g, exp2_of<false>(vmul(vsub(before, base), factor)), decay));
    }
    x.raised |= which;
}

// Weights of all rows, and their sums by lane; returns the rows whose weights are too large.
template <class Math, bool kDropout>
inline uint32_t weigh(const Terms& terms, const Panel& x, float* scores, Vec sums[kRows]) {
    const Weigher<Math, kDropout> weigher(terms, x);
    Vec all = vzero();
    for (int r = 0; r < x.rows; ++r) {
        sums[r] = weigher(r, scores + r * Scores<Math>::kRow);
        all = vadd(all, sums[r]);
        if (r == kRows / 2) MatrixUnit<Math::kTiles>::stay_awake();
    }
    const auto small = [](Vec sum) { return vless(sum, vset(kMostWeight)) == (1u << W) - 1; };
    uint32_t large = 0;
    for (int r = 0; r < x.rows && !small(all); ++r) large |= static_cast<uint32_t>(!small(sums[r])) << r;
    return large;
}

// One step of the online softmax: weights are made of the scores that `make_scores` makes, totals move on. A row's top
// is found in the first keys it sees. It is raised only where weights have become too large for exact sums: then the
// scores, in whose place they are, are made once more. Whether that happens to a row depends on no other.
template <class Math, class Make>
inline void softmax_step(const Terms& terms, Panel& x, float* scores, Make&& make_scores) {
    uint32_t raise = 0;
    FASTATTN_UNROLL for (int g = 0; g < kRows; g += W) {
        raise |= vless(vabs(vload(x.top + g)), vset(kInfinity)) << g;
        vstore(x.decay + g, vset(1.0f));
    }
    raise = ~raise & ~uint32_t{0} >> (32 - x.rows);
    Vec sums[kRows];
    x.raised = 0;
    do {
        make_scores();
        for (int r = 0; terms.logits && r < x.rows; ++r)
            make_logits<Math>(terms, x, r, scores + r * Scores<Math>::kRow);
        const FlushSubnormals flush;
        if (raise) raise_tops<Math>(terms, x, raise, scores);
        raise =
            terms.has_dropout ? weigh<Math, true>(terms, x, scores, sums) : weigh<Math, false>(terms, x, scores, sums);
        raise &= ~x.raised;
    } while (raise);
    for (int r = 0; r < x.rows; ++r) x.totals[r] = vfma(x.totals[r], vset(x.decay[r]), sums[r]);
}

// out *= decay, which the packed product does on its way.
inline void rescale(const Panel& x) {
    for (int r = 0; r < x.rows && x.raised; ++r) {
        if (x.decay[r] == 1.0f) continue;
        const Vec decay = vset(x.decay[r]);
        for (int64_t c = 0; c < x.ldo; c += W) vstore(x.out + r * x.ldo + c, vmul(vload(x.out + r * x.ldo + c), decay));
    }
}

// out = decay * out + weights * values, or, where it is blank, weights * values; at(slot) is the first step of that
// slot's tile in each part of the packed values.
template <class Math, class At>
inline void add_values(Panel& x, float* scores, const float* values, int64_t steps, int64_t vecs, At&& at) {
    Segment segments[kSlots];
    int count = 0;
    for (int slot = 0; slot < x.count; ++slot) {
        const PanelTile& t = x.tiles[slot];
        const Segment s{slot * Scores<Math>::kUnits + t.c0 / Math::kPair, at(slot) + t.c0 / Math::kPair,
                        (t.c1 - t.c0) / Math::kPair};
        Segment* last = count ? segments + count - 1 : nullptr;
        if (last && last->a_at + last->steps == s.a_at && last->b_at + last->steps == s.b_at) {
            last->steps += s.steps;
        } else {
            segments[count++] = s;
        }
    }
    const Rows weights{scores, Scores<Math>::kRow, 1, Scores<Math>::kPart};
    if (x.blank) {
        x.blank = false;
        return gemm<Math, Store::kWrite>(x.rows, static_cast<int>(vecs), weights, segments, count, values, steps, x.out,
                                         x.ldo);
    }
    if constexpr (Math::kTiles && Math::kParts == 1) {
        // Most rows keep their top, and tiles of sums are loaded faster than added by vectors.
        rescale(x);
        gemm<Math, Store::kAdd>(x.rows, static_cast<int>(vecs), weights, segments, count, values, steps, x.out, x.ldo);
    } else {
        gemm<Math, Store::kRescale>(x.rows, static_cast<int>(vecs), weights, segments, count, values, steps, x.out,
                                    x.ldo, x.decay);
    }
}

// Writes out / total of row r, its lse, and the parts of it.
inline void finish_row(const Terms& terms, const Panel& x, int r, float top, float total, const float* out) {
    const SoftmaxParams& p = terms.p;
    const bool nothing = top == -kInfinity;
    const Vec inverse = vset(nothing ? 0.0f : 1.0f / total);
    char* target = p.out.row(x.b, x.head[r], x.i[r]);
    int64_t c = 0;
    if (p.out.stride[3] == 1) {
        with_storer(p.out.dtype, [&](auto store) {
            for (; c + W <= p.Dv(); c += W) store(target, c, vmul(vload(out + c), inverse));
        });
    }
    for (; c < p.Dv(); c += W) {
        const int n = static_cast<int>(least<int64_t>(W, p.Dv() - c));
        store_floats(target, p.out.dtype, c, p.out.stride[3], vmul(vload(out + c), inverse), n);
    }
    if (!p.lse && !p.lse_parts) return;
    const int64_t at = (x.b * p.Hq() + x.head[r]) * p.Lq() + x.i[r];
    const float log_total = nothing ? -kInfinity : logf(total);
    const float largest = nothing || terms.zero_logits ? 0.0f : terms.logits ? top : top * terms.scale;
    if (p.lse) p.lse[at] = largest + log_total;
    if (!p.lse_parts) return;
    p.lse_parts[2 * at] = nothing ? 0.0f : terms.sign * top;
    p.lse_parts[2 * at + 1] = log_total;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
