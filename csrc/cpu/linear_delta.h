// The delta rule on tiles of lanes, four tokens at a time: the corrections within a group need only the products of its
// keys, so that a row of the state is loaded and stored once per group.
//
// Within a group a state is kept as it was scaled at the first token: what enters later is divided by the decay since
// then, what is read is multiplied by it. Groups end where that decay would leave the range of a float.
#pragma once
#include "linear_task.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int kGroup = 4;  // tokens that share one load and store of a row of the state
constexpr int kDeltaVecs = 2;
constexpr int64_t kDeltaLanes = kDeltaVecs * W;
constexpr int64_t kDeltaRow = 256 + 16;  // floats from row to row of a group: a constant that avoids one set of L1
constexpr int64_t kDeltaOperand = kGroup * kDeltaRow;
constexpr int64_t kDeltaBlock = 16;    // groups
constexpr float kLeastDecay = -16.0f;  // log of the decay since the first token of a group
constexpr int kPairs = kGroup * (kGroup - 1) / 2;

using Lanes = Vec[kDeltaVecs];
using GroupLanes = Lanes[kGroup];

inline int lanes_of(int64_t columns, int64_t c) {
    return static_cast<int>(most<int64_t>(0, least<int64_t>(W, columns - c)));
}

// The log decay of a head; channels of a scalar are one.
struct DeltaGates {
    const char* data;
    int64_t token, channel, length;
    bool by_channel;

    DeltaGates(const LinearParams& p, const LinearHead& head)
        : data(p.decay ? p.decay.row(head.b, head.hs, head.first) : nullptr),
          token(p.decay.size[2] == 1 ? 0 : p.decay.stride[2]),
          channel(p.decay.last_stride()),
          length(head.last - head.first),
          by_channel(p.vector_decay()) {}

    Vec at(int64_t t, int64_t c, int n) const {
        if (t < 0 || t >= length) return vzero();
        if (!by_channel) return vset(reinterpret_cast<const float*>(data)[t * token]);
        return load_floats(data + t * token * 4, DType::kFloat32, c, channel, n);
    }
};

// The groups of a head, as they are walked: forward or backward in time. Group -1 and group `count` are empty.
struct DeltaWalk {
    const int32_t* start;  // [count + 1]
    int64_t count, length;
    bool backward;

    struct Group {
        int64_t first, step;  // token of slot j is first + j * step
        int size;
        int64_t token(int j) const { return first + j * step; }
    };
    Group group(int64_t n) const {
        if (n < 0 || n >= count) return {backward ? (n < 0 ? length : -1) : (n < 0 ? -1 : length), 0, 0};
        const int64_t i = backward ? count - 1 - n : n;
        const int size = static_cast<int>(start[i + 1] - start[i]);
        return backward ? Group{start[i + 1] - 1, -1, size} : Group{start[i], 1, size};
    }
    // The token whose gate stands before token t.
    int64_t gate(int64_t t) const { return backward ? t + 1 : t; }
};

// Cuts a head into groups; `sums`: kDeltaRow floats, start: length + 1.
inline DeltaWalk plan_groups(const DeltaGates& gates, int64_t channels, float* sums, int32_t* start) {
    int64_t count = 0, size = kGroup;
    for (int64_t t = 0; t < gates.length; ++t, ++size) {
        bool full = size == kGroup;
        if (gates.data && !full) {
            Vec least_sum = vzero();
            each_vector(gates.by_channel ? channels : 1, [&](int64_t c, int n) {
                const Vec sum = vadd(vload(sums + c), gates.at(t, c, n));
                vstore(sums + c, sum);
                least_sum = vmax(least_sum, vsub(vzero(), sum));
            });
            full = vmaximum(least_sum) > -kLeastDecay;
        }
        if (!full) continue;
        for (int64_t c = 0; c < kDeltaRow; c += W) vstore(sums + c, vzero());
        start[count++] = static_cast<int32_t>(t);
        size = 0;
    }
    start[count] = static_cast<int32_t>(gates.length);
    return {start, count, gates.length, false};
}

// What decay does to W channels in a group: past[j] since its first token, and `factor` on the way into it.
struct DeltaFade {
    Vec past[kGroup], inverse[kGroup], factor;
};
// The decay of the group before, to its last token, as a factor and as a log; what rounding took off its `factor`.
struct DeltaCarry {
    float past[W], log[W], lost[W];
};
inline void reset(DeltaCarry* carry, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        vstore(carry[i].past, vset(1.0f));
        vstore(carry[i].log, vzero());
        vstore(carry[i].lost, vzero());
    }
}
inline DeltaFade fade_of(const DeltaGates& gates, const DeltaWalk& walk, int64_t n, int64_t c, int lanes,
                         DeltaCarry& carry) {
    const DeltaWalk::Group group = walk.group(n);
    const Vec into = gates.at(walk.gate(group.first), c, lanes);
    Vec log = vadd(vload(carry.log), into), lost = vload(carry.lost), high, low;
    // A factor near 1 is wanted to the last bit. A far one must match what the group before was divided by.
    const uint32_t far = vless(log, vset(-0.5f));
    exp_nonpositive(log, &high, &low);
    high = vselect(far, vmul(vload(carry.past), exp_nonpositive(into)), high);
    low = vselect(far, vzero(), low);
    DeltaFade fade;
    fade.factor = next_factor(high, low, &lost);
    log = vzero();
    fade.past[0] = fade.inverse[0] = vset(1.0f);
    FASTATTN_UNROLL for (int j = 1; j < kGroup; ++j) {
        fade.past[j] = fade.past[j - 1];
        fade.inverse[j] = fade.inverse[j - 1];
        if (j >= group.size) continue;
        const Vec gate = gates.at(walk.gate(group.token(j)), c, lanes);
        fade.past[j] = vmul(fade.past[j], exp_nonpositive(gate));
        fade.inverse[j] = vdiv(vset(1.0f), fade.past[j]);
        log = vadd(log, gate);
    }
    vstore(carry.past, fade.past[kGroup - 1]);
    vstore(carry.log, log);
    vstore(carry.lost, lost);
    return fade;
}

// Keys and queries of a group as rows of kDeltaRow floats, and the products of its keys.
struct DeltaRows {
    static constexpr int64_t kFloats = 3 * kDeltaOperand + kDeltaRow;
    float* at;
    float* gram;  // [kPairs] k_i . k_j, j < i, decayed

    float* enter() const { return at; }  // k over past
    // k times past
    float* read(bool fades) const { return at + (fades ? kDeltaOperand : 0); }
    float* query() const { return at + 2 * kDeltaOperand; }
    float* factor() const { return at + 3 * kDeltaOperand; }
};

// Group n of a walk, from its keys and queries: these are multiplied by past where they read, else divided by it.
template <bool fades, bool reads>
inline void scale_rows(const DeltaGates& gates, const DeltaWalk& walk, int64_t n, int64_t D, DeltaCarry* carry,
                       const DeltaRows& rows) {
    Vec gram[kPairs];
    FASTATTN_UNROLL for (int i = 0; i < kPairs; ++i) gram[i] = vzero();
    DeltaFade fade;
    for (int64_t c = 0; c < D; c += W) {
        if (fades && (c == 0 || gates.by_channel)) fade = fade_of(gates, walk, n, c, lanes_of(D, c), carry[c / W]);
        Vec enter[kGroup], read[kGroup];
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            enter[j] = read[j] = vload(rows.enter() + j * kDeltaRow + c);
            if (!fades) continue;
            read[j] = vmul(enter[j], fade.past[j]);
            enter[j] = vmul(enter[j], fade.inverse[j]);
            float* query = rows.query() + j * kDeltaRow + c;
            vstore(query, vmul(vload(query), reads ? fade.past[j] : fade.inverse[j]));
            vstore(rows.enter() + j * kDeltaRow + c, enter[j]);
            vstore(rows.read(fades) + j * kDeltaRow + c, read[j]);
        }
        FASTATTN_UNROLL for (int i = 1; i < kGroup; ++i) {
            FASTATTN_UNROLL for (int j = 0; j < i; ++j) {
                Vec& sum = gram[i * (i - 1) / 2 + j];
                sum = vfma(read[i], enter[j], sum);
            }
        }
        if (fades) vstore(rows.factor() + c, fade.factor);
    }
    FASTATTN_UNROLL for (int i = 0; i < kPairs; ++i) rows.gram[i] = vsum(gram[i]);
}

// The state of a tile, x [rows][kDeltaLanes], from group `old` to group `next`: old keys enter with `enter`; where
// `reads`, old queries read what they see; then the decay; else the queries of `next` enter with `add`; the keys of
// `next` read into `seen`.
template <bool fades, bool reads>
inline void delta_pass(int64_t count, float* x, const DeltaRows& old, const DeltaRows& next, const GroupLanes& enter,
                       const GroupLanes& add, GroupLanes& out, GroupLanes& seen) {
    const float *key = old.enter(), *query = reads ? old.query() : next.query(), *reader = next.read(fades);
    const float* factor = next.factor();
    Vec b[kGroup][kDeltaVecs], d[kGroup][kDeltaVecs], y[kGroup][kDeltaVecs], s[kGroup][kDeltaVecs];
    FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            b[j][v] = enter[j][v];
            if (!reads) d[j][v] = add[j][v];
            y[j][v] = s[j][v] = vzero();
        }
    }
    for (int64_t r = 0; r < count; ++r, x += kDeltaLanes) {
        Vec state[kDeltaVecs];
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) state[v] = vload(x + v * W);
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            const Vec a = vset(key[j * kDeltaRow + r]);
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) state[v] = vfma(a, b[j][v], state[v]);
            if (reads) {
                const Vec c = vset(query[j * kDeltaRow + r]);
                FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) y[j][v] = vfma(c, state[v], y[j][v]);
            }
        }
        if (fades) {
            const Vec f = vset(factor[r]);
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) state[v] = vmul(f, state[v]);
        }
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            if (!reads) {
                const Vec a = vset(query[j * kDeltaRow + r]);
                FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) state[v] = vfma(a, d[j][v], state[v]);
            }
            const Vec c = vset(reader[j * kDeltaRow + r]);
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) s[j][v] = vfma(c, state[v], s[j][v]);
        }
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) vstore(x + v * W, state[v]);
    }
    FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            if (reads) out[j][v] = y[j][v];
            seen[j][v] = s[j][v];
        }
    }
}

// What forward and backward have in common: tiles of kDeltaLanes columns of v, groups in a ring.
class DeltaWork : protected LinearWork {
   public:
    explicit DeltaWork(const LinearParams& p, const LinearGradients* g = nullptr)
        : LinearWork(p, g), tiles_(ceil_div(p.Dv(), kDeltaLanes)), width_(tiles_ * kDeltaLanes) {}

   protected:
    struct Buffers {
        float *rows, *gram, *state, *enter, *sums;
        float *one, *two;  // rows of width_ floats, those of a block
        DeltaCarry* carry;
        int32_t* start;

        DeltaRows group(int64_t n) const {
            const int64_t i = (n + kDeltaBlock + 1) % (kDeltaBlock + 1);
            return {rows + i * DeltaRows::kFloats, gram + i * kPairs};
        }
    };
    Buffers place(Arena& arena, int64_t tiles) const {
        Buffers x;
        x.rows = arena.floats((kDeltaBlock + 1) * DeltaRows::kFloats);
        x.gram = arena.floats((kDeltaBlock + 1) * kPairs);
        x.state = arena.floats(tiles * p_.D() * kDeltaLanes);
        x.enter = arena.floats(tiles * kGroup * kDeltaLanes);
        x.sums = arena.floats(kDeltaRow);
        x.one = arena.floats(kDeltaBlock * kGroup * width_);
        x.two = arena.floats(kDeltaBlock * kGroup * width_);
        x.carry = reinterpret_cast<DeltaCarry*>(arena.floats(3 * kDeltaRow));
        x.start = reinterpret_cast<int32_t*>(arena.floats(p_.Lk() + 1));
        return x;
    }

    int threads() const {
        const double work = static_cast<double>(heads() * p_.Lk() * p_.D()) * static_cast<double>(p_.Dv());
        return work < kLinearSerialWork ? 1 : p_.threads;
    }
    // body(head, buffers, first, last) for the tiles [first, last) of every head. Heads are enough tasks as a rule;
    // where they are not, each is cut into ranges of its tiles.
    template <class Body>
    void each_part(Body&& body) const {
        const int64_t wanted = heads() && heads() < threads() ? ceil_div(threads(), heads()) : 1;
        const int64_t parts = most<int64_t>(1, least(tiles_, wanted)), tiles = ceil_div(tiles_, parts);
        Arena size(nullptr);
        place(size, tiles);
        run_tasks(threads(), heads() * parts, size.used(), [&](int64_t task, float* memory) {
            const int64_t part = task % parts;
            Arena arena(memory);
            body(head_of(task / parts), place(arena, tiles), part * tiles_ / parts, (part + 1) * tiles_ / parts);
        });
    }

    // The tokens of a group as [kGroup][stride] floats, zero past `cols` and where there is no token.
    static void load_group(const Source& x, const DeltaWalk::Group& group, int64_t cols, int64_t width, int64_t stride,
                           float* out) {
        load_rows(x, group.first, group.step, group.size, group.step * kDeltaBlock * kGroup, cols, width, stride, out);
        for (int j = group.size; j < kGroup; ++j) zero(out + j * stride, width);
    }
    // Keys and queries of group n.
    template <bool fades, bool reads>
    void load_operands(const DeltaGates& gates, const DeltaWalk& walk, int64_t n, const Source& q, const Source& k,
                       const Buffers& x) const {
        const int64_t D = p_.D(), width = round_up(D, W);
        const DeltaRows rows = x.group(n);
        load_group(k, walk.group(n), D, width, kDeltaRow, rows.enter());
        load_group(q, walk.group(n), D, width, kDeltaRow, rows.query());
        scale_rows<fades, reads>(gates, walk, n, D, x.carry, rows);
    }
    // Columns of v of group n, to where they lie in `one` or `two`.
    void load_lanes(const DeltaWalk& walk, int64_t n, const Source& v, float* x) const {
        load_group(v, walk.group(n), p_.Dv(), width_, width_, block_rows(x, n));
    }
    float* block_rows(float* x, int64_t n) const { return x + (n + kDeltaBlock) % kDeltaBlock * kGroup * width_; }

    // A head's rows from its first token on.
    static Source from(Source x, int64_t first) {
        x.data += first * x.row * element_size(x.dtype);
        return x;
    }
    float beta(const LinearHead& head, int64_t t) const {
        return *reinterpret_cast<const float*>(p_.beta.row(head.b, head.hs, head.first + t));
    }
    // [tokens of the head][Dv] of r, in what forward saved; null where it saves nothing.
    float* rest_of(const LinearHead& head) const {
        return p_.saved ? p_.saved + (slice(head) * p_.saved_rows() + head.first) * p_.Dv() : nullptr;
    }
    // The state [D][Dv] number `mark` that it kept.
    float* kept_state(const LinearHead& head, int64_t mark) const {
        return p_.saved + (slice(head) * p_.saved_rows() + p_.Lk() + mark * p_.D()) * p_.Dv();
    }
    int64_t slice(const LinearHead& head) const { return head.b * p_.H() + head.h; }
    // Number of the state that is kept before group i, counted on in time, or -1. What is summed without feedback
    // drifts by the root of the tokens, so it starts again there.
    static int64_t mark_before(const LinearHead& head, const DeltaWalk& walk, int64_t i) {
        if (i < 1 || i >= walk.count) return -1;
        const int64_t next = (head.first + walk.start[i]) / kLinearMark;
        return next > (head.first + walk.start[i - 1]) / kLinearMark ? next - 1 : -1;
    }
    Source rows_of(const float* x) const { return {reinterpret_cast<const char*>(x), DType::kFloat32, p_.Dv(), 1}; }

    // kv [D][Dv] of user memory as tiles; null is zero.
    void load_tiles(const float* kv, int64_t first, int64_t last, float* x) const {
        for (int64_t tile = first; tile < last; ++tile) {
            for (int64_t r = 0; r < p_.D(); ++r) {
                for (int64_t c = tile * kDeltaLanes; c < (tile + 1) * kDeltaLanes; c += W, x += W) {
                    vstore(x, kv ? vload_n(kv + r * p_.Dv() + c, lanes_of(p_.Dv(), c)) : vzero());
                }
            }
        }
    }
    void store_tiles(const float* x, int64_t first, int64_t last, float* kv) const {
        for (int64_t tile = first; tile < last; ++tile) {
            for (int64_t r = 0; r < p_.D(); ++r) {
                for (int64_t c = tile * kDeltaLanes; c < (tile + 1) * kDeltaLanes; c += W, x += W) {
                    vstore_n(kv + r * p_.Dv() + c, vload(x), lanes_of(p_.Dv(), c));
                }
            }
        }
    }

    // Nothing before the first group.
    void start(const Buffers& x, int64_t tiles) const {
        zero(x.group(-1).at, DeltaRows::kFloats);
        zero(x.enter, tiles * kGroup * kDeltaLanes);
        reset(x.carry, kDeltaRow / W);
    }

    // By blocks of groups, the empty one after the last included: load(n) for each, body(n, tile) for each and every
    // tile, store(n) for each.
    template <class Load, class Body, class Store>
    static void each_block(const DeltaWalk& walk, int64_t first, int64_t last, Load&& load, Body&& body,
                           Store&& store) {
        for (int64_t n0 = 0; n0 <= walk.count; n0 += kDeltaBlock) {
            const int64_t n1 = least(n0 + kDeltaBlock, walk.count + 1);
            for (int64_t n = n0; n < n1; ++n) load(n);
            for (int64_t tile = first; tile < last; ++tile) {
                for (int64_t n = n0; n < n1; ++n) body(n, tile);
            }
            for (int64_t n = n0; n < n1; ++n) store(n);
        }
    }

    const int64_t tiles_, width_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
