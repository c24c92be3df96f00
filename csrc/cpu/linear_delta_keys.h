// The backward delta rule, second half: gradients of q, k and the decay, with channels of k as lanes. A task walks its
// tiles of a head from the last stretch between kept states to the first, each on in time, keeping a and b, then back:
// what it keeps stays in a second-level cache.
#pragma once
#include "linear_backward_task.h"
#include "linear_delta_gate.h"
#include "linear_delta_scan.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Tokens after which the gradient of the decay, a running sum, starts again from exact states.
constexpr int64_t kDeltaRestart = 32;
constexpr int64_t kDeltaPanel = 64 / kDeltaLanes;  // tiles a task walks at once; they share the packed rows

class DeltaKeys : DeltaWork {
   public:
    // `du` [B, H, L, Dv] and `marks` [B, H, L / kLinearMark, D, Dv] of the first half.
    DeltaKeys(const LinearParams& p, const LinearGradients& g, const float* du, const float* marks)
        : DeltaWork(p, &g),
          g_(g),
          du_(du),
          marks_(marks),
          k_tiles_(ceil_div(p.D(), kDeltaLanes)),
          panels_(ceil_div(k_tiles_, kDeltaPanel)),
          dq_(g.dq, p.H()),
          dk_(g.dk, p.H()),
          ddecay_(g.ddecay, p.vector_decay() ? p.H() : p.H() * k_tiles_) {}

    void run() const {
        Arena size(nullptr);
        place(size);
        run_tasks(threads(), heads() * panels_, size.used(), [&](int64_t task, float* memory) {
            Arena arena(memory);
            const Buffers x = place(arena);
            const LinearHead head = head_of(task / panels_);
            const int64_t first = task % panels_ * kDeltaPanel, last = least(first + kDeltaPanel, k_tiles_);
            p_.decay ? differentiate<true>(head, x, first, last) : differentiate<false>(head, x, first, last);
        });
        DeltaGateTotal(p_, g_, du_).settle(ddecay_, k_tiles_);
        for (const HeadGradient* gradient : {&dq_, &dk_, &ddecay_}) gradient->sum_heads(threads());
    }

   private:
    static constexpr int64_t kPanelLanes = kDeltaPanel * kDeltaLanes;

    struct Buffers {
        float *r, *dout, *du;             // rows of Dv floats, those of a block
        float *q, *k, *dq, *dk, *ddecay;  // the same, of the lanes of the panel
        float *state, *dstate, *sums, *ends, *a, *b, *own;
        DeltaCarry* carry;
        int32_t* start;
    };
    Buffers place(Arena& arena) const {
        const int64_t tokens = least(p_.Lk(), kLinearMark + kGroup), ends = ddecay_ ? tokens / kDeltaRestart + 2 : 0;
        Buffers x;
        for (float** rows : {&x.r, &x.dout, &x.du}) *rows = arena.floats(kDeltaBlock * kGroup * p_.Dv() + W);
        for (float** rows : {&x.q, &x.k, &x.dq, &x.dk, &x.ddecay}) {
            *rows = arena.floats(kDeltaBlock * kGroup * kPanelLanes);
        }
        x.state = arena.floats(kPanelLanes * p_.Dv());
        x.dstate = arena.floats(kPanelLanes * p_.Dv());
        x.sums = arena.floats(most(kDeltaRow, 2 * kPanelLanes));
        x.ends = arena.floats(ends * kPanelLanes * p_.Dv());
        x.carry = reinterpret_cast<DeltaCarry*>(arena.floats(3 * kPanelLanes));
        x.a = arena.floats(tokens * kPanelLanes);
        x.b = arena.floats(tokens * kPanelLanes);
        x.own = arena.floats(tokens);
        x.start = reinterpret_cast<int32_t*>(arena.floats(p_.Lk() + 1));
        return x;
    }

    struct Pass {
        const LinearHead& head;
        const DeltaGates gates;
        DeltaWalk walk;
        const Source q, k, dout;
        const Buffers& x;
        int64_t origin;  // first token of the stretch
    };

    template <bool fades>
    void differentiate(const LinearHead& head, const Buffers& x, int64_t first, int64_t last) const {
        const DeltaGates gates(p_, head);
        Pass pass{head,
                  gates,
                  plan_groups(gates, p_.D(), x.sums, x.start),
                  from(queries(head), head.first),
                  from(keys(head), head.first),
                  from(source_of(g_.dout, head.b, head.h), head.first),
                  x,
                  0};
        const int64_t state = (head.n * p_.Hs() + head.hs) * p_.D() * p_.Dv();
        load_transposed(head.leads && g_.dkv ? g_.dkv + state : nullptr, first, last, x.dstate);
        const int64_t count = pass.walk.count;
        for (int64_t end = count, from; end > 0; end = from) {
            for (from = end - 1; from > 0 && mark_before(head, pass.walk, from) < 0;) --from;
            if (from == 0) load_transposed(p_.kv ? p_.kv + state : nullptr, first, last, x.state);
            pass.origin = x.start[from];
            pass.walk.backward = false;
            walk<fades, false>(pass, from, end, first, last);
            pass.walk.backward = true;
            walk<fades, true>(pass, count - end, count - from, first, last);
        }
    }

    // Groups [from, to) of the walk, tiles [first, last).
    template <bool fades, bool backward>
    void walk(const Pass& pass, int64_t from, int64_t to, int64_t first, int64_t last) const {
        DeltaTerms terms[kDeltaBlock];
        DeltaFade fades_of[kDeltaBlock];
        reset(pass.x.carry, kPanelLanes / W);
        // Rows of Dv floats are stored by whole vectors, so the slots of a block are filled in order.
        for (int64_t n0 = from, n1; n0 < to; n0 = n1) {
            n1 = least(round_up(n0 + 1, kDeltaBlock), to);
            for (int64_t n = n0; n < n1; ++n) {
                terms[n - n0] = load_terms(pass, n);
                load_panel(pass.k, pass.walk.group(n), first, panel_rows(pass.x.k, n));
                if (backward) load_panel(pass.q, pass.walk.group(n), first, panel_rows(pass.x.q, n));
                if (!backward) note_own(pass, n, terms[n - n0]);
                if (fades && !pass.gates.by_channel)
                    fades_of[n - n0] = fade_of(pass.gates, pass.walk, n, 0, W, *pass.x.carry);
            }
            for (int64_t tile = first; tile < last; ++tile) {
                for (int64_t n = n0; n < n1; ++n) {
                    LaneFade fade;
                    if (fades) fade = lane_fade(pass, n, tile, tile - first, fades_of[n - n0]);
                    resume(pass, n, tile, tile - first, fade);
                    backward ? retreat<fades>(pass, n, terms[n - n0], fade, tile, tile - first)
                             : advance<fades>(pass, n, terms[n - n0], fade, tile - first);
                }
            }
            for (int64_t n = n0; n < n1 && backward; ++n) {
                store_panel(pass, dq_, n, first, pass.x.dq, static_cast<float>(p_.scale));
                store_panel(pass, dk_, n, first, pass.x.dk, 1);
                if (p_.vector_decay()) store_panel(pass, ddecay_, n, first, pass.x.ddecay, 1);
            }
        }
    }

    static float* panel_rows(float* x, int64_t n) { return x + n % kDeltaBlock * kGroup * kPanelLanes; }
    static float* panel_lanes(float* x, int64_t n, int64_t at, int j, int v) {
        return panel_rows(x, n) + j * kPanelLanes + at * kDeltaLanes + v * W;
    }
    // Columns from tile `first` on.
    void load_panel(Source x, const DeltaWalk::Group& group, int64_t first, float* out) const {
        const int64_t c = first * kDeltaLanes;
        x.data += c * x.col * element_size(x.dtype);
        load_group(x, group, least(kPanelLanes, p_.D() - c), kPanelLanes, kPanelLanes, out);
    }
    void store_panel(const Pass& pass, const HeadGradient& to, int64_t n, int64_t first, float* rows,
                     float factor) const {
        if (!to) return;
        const DeltaWalk::Group group = pass.walk.group(n);
        const TensorView& t = to.slices();
        const int64_t c = first * kDeltaLanes;
        for (int j = 0; j < group.size; ++j) {
            char* row = t.row(pass.head.b, pass.head.h, pass.head.first + group.token(j));
            store_row(row, t.dtype, t.last_stride(), panel_rows(rows, n) + j * kPanelLanes - c, c,
                      least(c + kPanelLanes, p_.D()), factor, past_caches_);
        }
    }

    // Where the exact state on the way into group n was kept, it is taken.
    void resume(const Pass& pass, int64_t n, int64_t tile, int64_t at, LaneFade& fade) const {
        const bool backward = pass.walk.backward;
        const int64_t mark = mark_before(pass.head, pass.walk, backward ? pass.walk.count - n : n);
        if (mark < 0) return;
        const int64_t marks = p_.Lk() / kLinearMark;
        load_transposed(
            backward ? marks_ + (slice(pass.head) * marks + mark) * p_.D() * p_.Dv() : kept_state(pass.head, mark),
            tile, tile + 1, state(pass, at));
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) fade.of[v].factor = vset(1.0f);
    }

    LaneFade lane_fade(const Pass& pass, int64_t n, int64_t tile, int64_t at, const DeltaFade& scalar) const {
        LaneFade fade;
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            const int64_t c = tile * kDeltaLanes + v * W;
            fade.of[v] = scalar;
            if (!pass.gates.by_channel) continue;
            fade.of[v] = fade_of(pass.gates, pass.walk, n, c, lanes_of(p_.D(), c), pass.x.carry[at * kDeltaVecs + v]);
        }
        return fade;
    }

    DeltaTerms load_terms(const Pass& pass, int64_t n) const {
        const int64_t Dv = p_.Dv(), at = n % kDeltaBlock * kGroup * Dv;
        const Source r = rows_of(rest_of(pass.head));
        const Source du = rows_of(du_ + (slice(pass.head) * p_.Lk() + pass.head.first) * Dv);
        return {slots(pass, n, r, pass.x.r + at), slots(pass, n, pass.dout, pass.x.dout + at),
                slots(pass, n, du, pass.x.du + at), pass.walk.backward ? -Dv : Dv};
    }
    // The slots of a group as rows of floats in the order of time, Dv floats apart, where they lie if they can be read
    // there and else at `out`, where they are stored by whole vectors, in order; returns that of slot 0. Back in time
    // none is asked for ahead: the pass on in time has left them in the second-level cache.
    const float* slots(const Pass& pass, int64_t n, const Source& x, float* out) const {
        const DeltaWalk::Group group = pass.walk.group(n);
        const int64_t Dv = p_.Dv(), ahead = pass.walk.backward ? 0 : kDeltaBlock * kGroup;
        if (group.size == kGroup && x.dtype == DType::kFloat32 && x.col == 1 && x.row == Dv) {
            for (int j = 0; j < kGroup && ahead; ++j) ask_for(x, group.token(j) + ahead, Dv);
            return reinterpret_cast<const float*>(x.at(group.first));
        }
        const int64_t empty = (kGroup - group.size) * Dv;
        if (!pass.walk.backward) {
            load_rows(x, group.first, 1, group.size, ahead, Dv, Dv, Dv, out);
            zero(out + group.size * Dv, empty);
            return out;
        }
        zero(out, empty);
        load_rows(x, group.token(group.size - 1), 1, group.size, ahead, Dv, Dv, Dv, out + empty);
        return out + (kGroup - 1) * Dv;
    }

    // u . dout of each token.
    void note_own(const Pass& pass, int64_t n, const DeltaTerms& terms) const {
        const DeltaWalk::Group group = pass.walk.group(n);
        for (int j = 0; j < group.size; ++j) {
            Vec sum = vzero();
            each_vector(p_.Dv(), [&](int64_t c, int lanes) {
                sum = vfma(vload_n(terms.r + j * terms.step + c, lanes),
                           vload_n(terms.dout + j * terms.step + c, lanes), sum);
            });
            own(pass, group.token(j)) = beta(pass.head, group.token(j)) * vsum(sum);
        }
    }

    static float* kept(const Pass& pass, float* x, int64_t t, int64_t at) {
        return x + (t - pass.origin) * kPanelLanes + at * kDeltaLanes;
    }
    static float& own(const Pass& pass, int64_t t) { return pass.x.own[t - pass.origin]; }
    float* state(const Pass& pass, int64_t at) const {
        return (pass.walk.backward ? pass.x.dstate : pass.x.state) + at * p_.Dv() * kDeltaLanes;
    }
    // The running sum starts again at the last token of the last group, counted on in time, of kDeltaRestart tokens.
    static bool restarts(const DeltaWalk& walk, int64_t i) {
        return i + 1 == walk.count || walk.start[i + 1] / kDeltaRestart > walk.start[i] / kDeltaRestart;
    }
    float* end(const Pass& pass, int64_t i, int64_t at) const {
        const int64_t slot = pass.walk.start[i] / kDeltaRestart - pass.origin / kDeltaRestart;
        return pass.x.ends + (slot * kDeltaPanel + at) * p_.Dv() * kDeltaLanes;
    }

    template <bool fades>
    void advance(const Pass& pass, int64_t n, const DeltaTerms& terms, const LaneFade& fade, int64_t at) const {
        const DeltaWalk::Group group = pass.walk.group(n);
        GroupLanes key, a, b;
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            const Vec factor = vset(j < group.size ? beta(pass.head, group.token(j)) : 0);
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                key[j][v] = vmul(factor, vload(panel_lanes(pass.x.k, n, at, j, v)));
                if (fades) key[j][v] = vmul(key[j][v], fade.of[v].inverse[j]);
            }
        }
        if (ddecay_ && restarts(pass.walk, n)) keep(terms, group.size, fade, key, state(pass, at), end(pass, n, at));
        delta_scan<fades, false>(p_.Dv(), state(pass, at), terms, fade, key, key, a, b);
        for (int j = 0; j < group.size; ++j) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                vstore(kept(pass, pass.x.a, group.token(j), at) + v * W, a[j][v]);
                vstore(kept(pass, pass.x.b, group.token(j), at) + v * W, b[j][v]);
            }
        }
    }

    // S' of the last token of a group: the state without what that token adds.
    void keep(const DeltaTerms& terms, int size, const LaneFade& fade, const GroupLanes& key, const float* from,
              float* to) const {
        for (int64_t r = 0; r < p_.Dv(); ++r) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                Vec sum = vmul(fade.of[v].factor, vload(from + r * kDeltaLanes + v * W));
                for (int j = 0; j < size - 1; ++j) sum = vfma(vset(terms.r[j * terms.step + r]), key[j][v], sum);
                vstore(to + r * kDeltaLanes + v * W, vmul(fade.of[v].past[size - 1], sum));
            }
        }
    }

    template <bool fades>
    void retreat(const Pass& pass, int64_t n, const DeltaTerms& terms, const LaneFade& fade, int64_t tile,
                 int64_t at) const {
        const int64_t i = pass.walk.count - 1 - n;
        const DeltaWalk::Group group = pass.walk.group(n);
        const bool restarted = ddecay_ && restarts(pass.walk, i);
        const float error = restarted ? restart(pass, fade, i, at) : 0;  // of the running sum, but for the first token
        const Vec scale = vset(static_cast<float>(p_.scale));
        GroupLanes q, k, query, key, e, none;
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            const Vec minus = vset(j < group.size ? -beta(pass.head, group.token(j)) : 0);
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                q[j][v] = vmul(scale, vload(panel_lanes(pass.x.q, n, at, j, v)));
                k[j][v] = vload(panel_lanes(pass.x.k, n, at, j, v));
                query[j][v] = fades ? vmul(q[j][v], fade.of[v].inverse[j]) : q[j][v];
                key[j][v] = vmul(minus, fades ? vmul(k[j][v], fade.of[v].inverse[j]) : k[j][v]);
            }
        }
        delta_scan<fades, true>(p_.Dv(), state(pass, at), terms, fade, query, key, e, none);
        for (int j = 0; j < group.size; ++j) {
            const int64_t t = group.token(j);
            const Vec own_t = vset(own(pass, t)), factor = vset(beta(pass.head, t));
            Vec total = vzero(), left_out = vzero();
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                const Vec a = vload(kept(pass, pass.x.a, t, at) + v * W),
                          b = vload(kept(pass, pass.x.b, t, at) + v * W);
                vstore(panel_lanes(pass.x.dq, n, at, j, v), vfma(own_t, k[j][v], a));
                vstore(panel_lanes(pass.x.dk, n, at, j, v), vfma(own_t, q[j][v], vmul(factor, vsub(e[j][v], b))));
                if (!ddecay_) continue;
                const Vec seen = restarted && j == 0 ? b : vadd(e[j][v], b);
                left_out = vfma(vmul(factor, k[j][v]), e[j][v], left_out);
                const Vec term = vsub(vmul(q[j][v], a), vmul(k[j][v], vmul(factor, seen)));
                const Vec sum = accumulate(pass.x.sums + (at * kDeltaVecs + v) * 2 * W, term);
                vstore(panel_lanes(pass.x.ddecay, n, at, j, v), sum);
                total = vadd(total, sum);
            }
            if (ddecay_ && !p_.vector_decay()) {
                const int64_t slice = pass.head.h * k_tiles_ + tile;
                const auto row = [&](int64_t token) {
                    return reinterpret_cast<float*>(ddecay_.slices().row(pass.head.b, slice, pass.head.first + token));
                };
                *row(t) = vsum(total);
                if (restarted && j == 0 && i + 1 < pass.walk.count) {
                    const float exact = *row(t), off = error - vsum(left_out);
                    *row(t) = exact + off;
                    const int64_t before = restarted_before(pass.walk, i);
                    ddecay_.settle(pass.head.b, slice, pass.head.first + t, pass.head.first + before - 1,
                                   static_cast<double>(*row(before)), static_cast<double>(off));
                    *row(t) = exact;
                }
            }
        }
    }

    // A running sum in two floats a lane, sum[0] + sum[1].
    static Vec accumulate(float* sum, Vec term) {
        const Vec high = vload(sum), next = vadd(high, term), part = vsub(next, high);
        const Vec lost = vadd(vsub(high, vsub(next, part)), vsub(term, part));
        const Vec low = vadd(vload(sum + W), lost);
        vstore(sum, next);
        vstore(sum + W, low);
        return vadd(next, low);
    }

    // The token at which the running sum started again before group i.
    static int64_t restarted_before(const DeltaWalk& walk, int64_t i) {
        do ++i;
        while (!restarts(walk, i));
        return walk.start[i + 1] - 1;
    }

    // <S', dS*> of each lane at the last token of group i, to which dS* is what comes from later ones. Returns what the
    // running sum, over all lanes, was larger.
    float restart(const Pass& pass, const LaneFade& fade, int64_t i, int64_t at) const {
        const float *s = end(pass, i, at), *ds = state(pass, at);
        Vec larger = vzero();
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            Vec sum = vzero();
            for (int64_t r = 0; r < p_.Dv(); ++r) {
                sum = vfma(vload(s + r * kDeltaLanes + v * W), vload(ds + r * kDeltaLanes + v * W), sum);
            }
            float* to = pass.x.sums + (at * kDeltaVecs + v) * 2 * W;
            sum = vmul(sum, fade.of[v].factor);
            larger = vadd(larger, vadd(vsub(vload(to), sum), vload(to + W)));
            vstore(to, sum);
            vstore(to + W, vzero());
        }
        return vsum(larger);
    }

    // kv [D][Dv] as [tile][Dv][kDeltaLanes]; null is zero.
    void load_transposed(const float* kv, int64_t first, int64_t last, float* x) const {
        const int64_t D = p_.D(), Dv = p_.Dv();
        for (int64_t c = first * kDeltaLanes; c < last * kDeltaLanes; ++c) {
            float* lane = x + (c / kDeltaLanes - first) * Dv * kDeltaLanes + c % kDeltaLanes;
            for (int64_t r = 0; r < Dv; ++r) lane[r * kDeltaLanes] = kv && c < D ? kv[c * Dv + r] : 0;
        }
    }

    const LinearGradients& g_;
    const float *du_, *marks_;
    const int64_t k_tiles_, panels_;
    const HeadGradient dq_, dk_, ddecay_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
