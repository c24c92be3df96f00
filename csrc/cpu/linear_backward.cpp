// Linear attention, backward: dq scans forward in time, dk and dv backward, each as the forward pass does.
#include "linear_backward_gate.h"
#include "linear_backward_whole.h"
#include "linear_delta_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Tokens after which the gradient of the decay, a running sum of differences, starts again from exact states.
constexpr int64_t kRestart = 64;

// What of one head a task does.
struct Passes {
    bool q, k, v;
};

class CausalBackward : BackwardWork {
   public:
    CausalBackward(const LinearParams& p, const LinearGradients& g)
        : BackwardWork(p, g),
          gate_(p, g),
          wanted_{dq_ || ddecay_ || (p.normalize && (dk_ || dz_)), dk_ || ddecay_ || dz_, dv_ || dkv_} {}

    void run() {
        const double work = static_cast<double>(heads() * p_.Lk() * layout_.F) * static_cast<double>(3 * layout_.Dv);
        const int threads = work < kLinearSerialWork ? 1 : p_.threads;
        // The gradients of the decay and of denominators need dq and dk of a head in one place; else they are tasks of
        // their own where there are few heads.
        Passes kinds[3] = {wanted_};
        int count = 1;
        if (heads() < threads) {
            count = 0;
            if ((ddecay_ || p_.normalize) && wanted_.k) {
                kinds[count++] = {wanted_.q, wanted_.k, false};
            } else {
                if (wanted_.q) kinds[count++] = {true, false, false};
                if (wanted_.k) kinds[count++] = {false, true, false};
            }
            if (wanted_.v) kinds[count++] = {false, false, true};
        }
        const int64_t own = place(nullptr).used;
        run_tasks(threads, heads() * count, own + gate_.floats(), [&](int64_t task, float* memory) {
            const LinearHead head = head_of(task / count);
            const Buffers x = place(memory);
            const Passes& passes = kinds[task % count];
            if (!p_.decay) {
                differentiate<Factor::kNone>(head, passes, x);
            } else if (p_.vector_decay()) {
                differentiate<Factor::kRows>(head, passes, x);
            } else {
                differentiate<Factor::kScalar>(head, passes, x);
            }
            if (passes.k && gate_.wanted(head)) settle_gate(head, memory + own);
        });
        sum_heads(threads);
    }

   private:
    struct Buffers {
        BlockRows rows;
        float *v, *dn, *df, *dv, *turned, *products, *r, *state, *ends, *dsum, *own, *weight, *wide, *inverse, *other,
            *z, *sums;
        double* ddecay;
        int64_t used;
    };

    Buffers place(float* memory) const {
        Arena arena(memory);
        Buffers x{};
        x.rows = place_rows(arena);
        x.v = arena.floats(kBlock * layout_.ld_v);
        x.dn = arena.floats(kBlock * layout_.ld_v);
        x.df = arena.floats(kBlock * layout_.ld_f);
        x.dv = arena.floats(kBlock * layout_.ld_v);
        x.turned = arena.floats(kBlock * layout_.ld_v);
        x.products = arena.floats(kBlock * kBlock);
        x.r = arena.floats(kBlock * layout_.ld_f);
        x.state = arena.floats(state_floats());
        x.z = arena.floats(p_.normalize ? layout_.ld_f : 0);
        x.sums = arena.floats(p_.normalize ? kBlock * layout_.ld_f : 0);
        x.dsum = arena.floats(p_.normalize ? p_.Lk() : 0);
        x.own = arena.floats(p_.normalize ? p_.Lk() : kBlock);
        x.weight = arena.floats(kBlock);
        x.ends = arena.floats(ddecay_ ? (ceil_div(p_.Lk(), kRestart) + 2) * kept_floats() : 0);
        x.ddecay = reinterpret_cast<double*>(arena.floats(2 * layout_.ld_f));
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(kBlock);
        x.other = arena.floats(kBlock);
        x.used = arena.used();
        return x;
    }

    template <Factor factor>
    void differentiate(const LinearHead& head, const Passes& passes, const Buffers& x) const {
        zero(x.r, kBlock * layout_.ld_f);
        const float* ends = passes.q ? forward_in_time<factor>(head, x) : nullptr;
        if (passes.k || passes.v) backward_in_time<factor>(head, passes, ends, x);
    }

    // With a decay, dq and dk are read before their own token enters: what is left is as small as the decay makes it,
    // and so is the rounding of the decay's gradient.
    template <Factor factor>
    static constexpr bool kStrict = factor != Factor::kNone;

    // One block of a scan forward in time over keys and values, or back in time over queries and rows of dout. `rows`:
    // df_t = X read_t with what tokens of the block bring, read_t the rows of values of the other side. Returns own[t],
    // the product of both rows of a token. `lanes`: dv.
    template <Factor factor, bool backwards>
    void scan_block(int64_t n, const BlockLanes& v, const Buffers& x, bool rows, bool lanes, RowsAhead&& ahead,
                    float* own) const {
        const int64_t ld_f = layout_.ld_f, ld_v = layout_.ld_v;
        const BlockLanes dn{x.dn, ld_v}, enter = backwards ? dn : v, read = backwards ? v : dn;
        ScanBlock block{};
        block.a = backwards ? x.rows.reads : x.rows.enters;
        block.c = x.rows.enters;
        block.b = enter;
        block.y_step = ld_v;
        block.backwards = backwards;
        block.whole = x.rows.fading.whole;
        block.ahead = &ahead;
        if (lanes) {
            block.y = x.dv;
            block.pairs = x.rows.pairs;
        }
        if (rows) {
            turn(read.at, read.step, kBlock, ld_v, x.turned, kBlock);
            block.d = x.turned;
            block.r = x.r;
        }
        scan(whole_state(x.state), block);
        ahead.ask_rest();
        if (!rows) return;
        turn_back(x.r, x.df);
        inner_products(enter.at, enter.step, x.turned, layout_.Dv, x.products);
        for (int64_t t = 0; t < n; ++t) own[t] = x.products[t * kBlock + t];
        const Fading& fading = x.rows.fading;
        const float* features = backwards ? x.rows.q : x.rows.k;
        fade_rows<factor>(backwards ? fading.end : fading.start, x.df);
        if constexpr (factor == Factor::kRows) {
            zero(x.products + n * kBlock, (kBlock - n) * kBlock);
            add_faded<backwards>(ld_f, x.products, features, fading.factors, ld_f, x.df);
        } else {
            fade_pairs<factor == Factor::kScalar, kStrict<factor>, backwards>(n, fading.logs, x.products);
            add_pairs<backwards>(x.products, features, ld_f, x.df);
        }
    }

    // What a block from token t on packs.
    RowsAhead ahead_of(const LinearHead& head, int64_t t, bool with_values) const {
        RowsAhead ahead;
        ahead.add(keys(head), t, p_.D());
        ahead.add(queries(head), t, p_.D());
        if (with_values) ahead.add(values(head), t, p_.Dv());
        ahead.add(source_of(g_.dout, head.b, head.h), t, p_.Dv());
        return ahead;
    }

    // Returns the end of the states it kept: that before the first token, and those after which ddecay starts again.
    template <Factor factor>
    const float* forward_in_time(const LinearHead& head, const Buffers& x) const {
        constexpr bool strict = kStrict<factor>;
        const Source q = queries(head), k = keys(head), v = values(head);
        const BlockRows& rows = x.rows;
        const int64_t ld = layout_.ld_f;
        load_state(kv_of(p_.kv, state_of(head)), whole_state(x.state));
        if (p_.normalize) load_z(state_of(head), p_.z, x.z);
        if (p_.decay) zero(rows.fading.carry, ld);
        float* end = x.ends;
        const auto keep_state = [&] {
            memcpy(end, x.state, sizeof(float) * static_cast<size_t>(state_floats()));
            if (p_.normalize) memcpy(end + state_floats(), x.z, sizeof(float) * static_cast<size_t>(ld));
            end += kept_floats();
        };
        if (ddecay_) keep_state();
        for (int64_t block = 0; block < blocks(head); ++block) {
            const int64_t t0 = start(head, block), n = start(head, block + 1) - t0;
            pack_features(head, k, false, t0, n, 0, rows.k, x.other, x.wide);
            pack_features(head, q, false, t0, n, 0, rows.q, x.inverse, x.wide);
            const BlockLanes lanes = pack_values(head, v, false, t0, n, 0, x.v);
            pack_dout(head, t0, n, 0, x.dn, x.weight);
            if (factor != Factor::kNone) pack_fading(head, t0, n, rows.fading);
            pair_up<factor, false>(n, false, true, rows);
            float owns[kBlock];
            scan_block<factor, false>(n, lanes, x, true, false, ahead_of(head, t0 + kBlock, true), owns);
            if (p_.normalize) {
                walk_sum<factor, strict, false>(
                    n, rows.k, nullptr, rows.fading, x.z,
                    [&](int64_t t, int64_t c, Vec now) { vstore(x.sums + t * ld + c, now); });
            }
            for (int64_t t = 0; t < n; ++t) {
                float *d = x.df + t * ld, own = strict ? owns[t] : 0;
                const float *tq = rows.q + t * ld, *tk = rows.k + t * ld;
                if (p_.normalize) {
                    const float weight = x.weight[t], value = own;
                    const float* sum = x.sums + t * ld;
                    // dout . out, not from out itself, which may be rounded to 16 bits.
                    float along = dot(tq, d, ld), dsum = 0;
                    if (!clamped(head, t0 + t)) {
                        // own + dsum, without the difference of two numbers that a fast decay makes equal.
                        if (strict) own = weight * (value * dot(tq, sum, ld) - along);
                        if (strict) along += value * dot(tq, tk, ld);
                        dsum = -along * weight;
                    }
                    add_features(dsum, sum, d);
                    x.dsum[t0 + t - head.first] = dsum;
                    x.own[t0 + t - head.first] = own;
                }
                if (ddecay_) note_query(head, t0 + t, tq, d);
                if (!dq_) continue;
                if (strict) add_features(own, tk, d);
                features_.gradient(tq, x.inverse[t], d);
            }
            if (dq_) store(dq_, head, t0, n, 1, x.df, ld);
            if (ddecay_ && restarts(head, block)) keep_state();
        }
        return end;
    }

    template <Factor factor>
    void backward_in_time(const LinearHead& head, const Passes& passes, const float* end, const Buffers& x) const {
        constexpr bool strict = kStrict<factor>;
        const Source q = queries(head), k = keys(head), v = values(head);
        const BlockRows& rows = x.rows;
        const int64_t ld = layout_.ld_f;
        load_state(kv_of(head.leads ? g_.dkv : nullptr, state_of(head)), whole_state(x.state));
        // From here on z is its own gradient.
        if (passes.k && p_.normalize) load_z(state_of(head), head.leads ? g_.dz : nullptr, x.z);
        if (p_.decay) zero(rows.fading.carry, ld);
        int64_t exact = head.last;  // token where ddecay started again
        for (int64_t block = blocks(head) - 1; block >= 0; --block) {
            const int64_t t0 = start(head, block), n = start(head, block + 1) - t0;
            pack_features(head, k, false, t0, n, 0, rows.k, x.inverse, x.wide);
            pack_features(head, q, false, t0, n, 0, rows.q, x.other, x.wide);
            const BlockLanes lanes = passes.k ? pack_values(head, v, false, t0, n, 0, x.v) : BlockLanes{};
            pack_dout(head, t0, n, 0, x.dn, x.weight);
            if (factor != Factor::kNone) pack_fading(head, t0, n, rows.fading);
            pair_up<factor, true>(n, true, passes.v, rows);
            if (passes.k && ddecay_ && restarts(head, block)) {
                restart_decay(head, t0 + n, exact, end -= kept_floats(), x);
                exact = t0 + n;
            }
            float owns[kBlock];
            scan_block<factor, true>(n, lanes, x, passes.k, passes.v, ahead_of(head, t0 - kBlock, passes.k), owns);
            if (passes.k && p_.normalize) {
                walk_sum<factor, strict, true>(n, rows.q, x.dsum + t0 - head.first, rows.fading, x.z,
                                               [&](int64_t t, int64_t c, Vec now) {
                                                   float* d = x.df + t * ld + c;
                                                   vstore(d, vadd(vload(d), now));
                                               });
            }
            for (int64_t t = n - 1; t >= 0 && passes.k; --t) {
                float *d = x.df + t * ld, own = strict ? owns[t] : 0;
                const float *tq = rows.q + t * ld, *tk = rows.k + t * ld;
                if (p_.normalize) own = x.own[t0 + t - head.first];
                if (ddecay_) add_key(head, t0 + t, tk, d, x.ddecay);
                if (!dk_) continue;
                if (strict) add_features(own, tq, d);
                features_.gradient(tk, x.inverse[t], d);
            }
            if (passes.k && dk_) store(dk_, head, t0, n, -1, x.df, ld);
            if (passes.v && dv_) store(dv_, head, t0, n, -1, x.dv, layout_.ld_v);
        }
        if (passes.k && ddecay_ && head.first < head.last) {
            restart_decay(head, head.first, exact, end - kept_floats(), x);
        }
        if (passes.v && dkv_) store_initial(head, whole_state(x.state));
        if (passes.k && dz_) store_initial_z(head, x.z);
    }

    // A state as forward_in_time keeps it, and z.
    int64_t kept_floats() const { return state_floats() + (p_.normalize ? layout_.ld_f : 0); }

    // The gradient of the state after the last token may be far larger than what a fast decay leaves of it. The last
    // token is then a block of its own: no other's gradient is a difference of numbers so large. So it is without that
    // gradient too: blocks are what the others' rounding depends on.
    int64_t alone(const LinearHead& head) const { return p_.decay && g_.dkv && head.first < head.last ? 1 : 0; }
    int64_t blocks(const LinearHead& head) const {
        return ceil_div(head.last - head.first - alone(head), kBlock) + alone(head);
    }
    int64_t start(const LinearHead& head, int64_t block) const {
        const int64_t shared = head.last - alone(head);
        return block == blocks(head) ? head.last : least(shared, head.first + block * kBlock);
    }
    bool restarts(const LinearHead& head, int64_t block) const {
        return (block + 1) * kBlock % kRestart == 0 || block + 1 + alone(head) >= blocks(head);
    }

    // The gradient of g_t is <e^g_t S_{t-1}, dS_t> = q dq + (the gradient of g_{t+1}) - k dk, with dq and dk without
    // token t. q dq waits in the result's place for the pass backward in time.
    void note_query(const LinearHead& head, int64_t t, const float* q, const float* d) const {
        float* at = reinterpret_cast<float*>(ddecay_.slices().row(head.b, head.h, t));
        if (p_.vector_decay()) {
            for (int64_t c = 0; c < layout_.F; ++c) at[c] = q[c] * d[c];
            return;
        }
        *at = dot(q, d, layout_.ld_f);
    }
    void add_key(const LinearHead& head, int64_t t, const float* k, const float* d, double* sum) const {
        float* at = reinterpret_cast<float*>(ddecay_.slices().row(head.b, head.h, t));
        if (p_.vector_decay()) {
            for (int64_t c = 0; c < layout_.F; ++c) {
                sum[c] += static_cast<double>(at[c]) - static_cast<double>(k[c] * d[c]);
                at[c] = static_cast<float>(sum[c]);
            }
            return;
        }
        sum[0] += static_cast<double>(*at) - static_cast<double>(dot(k, d, layout_.ld_f));
        *at = static_cast<float>(sum[0]);
    }

    // The gradient of g_t from the states themselves, <e^g_t S_{t-1}, dS_t>, for each feature or, of a scalar, over
    // all. The running sum was that at token `exact` before.
    void restart_decay(const LinearHead& head, int64_t t, int64_t exact, const float* before, const Buffers& x) const {
        const bool vector = p_.vector_decay();
        const double running = x.ddecay[0];
        zero(reinterpret_cast<float*>(x.ddecay), 2 * layout_.ld_f);
        double total = 0;
        const auto add = [&](int64_t f, float product) {
            x.ddecay[f] += static_cast<double>(product);
            total += static_cast<double>(product);
        };
        whole_state(x.state).each([&](const float* state, int64_t, int vecs) {
            for (int64_t f = 0; f < layout_.F; ++f, state += vecs * W) {
                add(f, dot(before + (state - x.state), state, vecs * W));
            }
        });
        for (int64_t f = 0; f < layout_.F && p_.normalize; ++f) add(f, before[state_floats() + f] * x.z[f]);
        if (!vector) x.ddecay[0] = total;
        if (t == head.last) return;
        const auto row = [&](int64_t at) { return reinterpret_cast<float*>(ddecay_.slices().row(head.b, head.h, at)); };
        if (!vector) {
            const double start = exact == head.last ? 0 : static_cast<double>(*row(exact));
            ddecay_.settle(head.b, head.h, t, exact - 1, start, running - total);
        }
        for (int64_t c = 0; c < (vector ? layout_.F : 1); ++c) row(t)[c] = static_cast<float>(x.ddecay[c]);
    }

    void settle_gate(const LinearHead& head, float* memory) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        const double total = gate_.of(head, memory, [&](int64_t t0, int64_t n, const GateTotal::Rows& rows) {
            pack_features(head, k, false, t0, n, 0, rows.k, rows.inverse, rows.wide);
            pack_features(head, q, false, t0, n, 0, rows.q[0], rows.inverse, rows.wide);
            pack_dout(head, t0, n, 0, rows.dn[0], rows.weight);
            for (int64_t t = 0; t < n; ++t) {
                load_row(v, t0 + t, layout_.Dv, layout_.ld_v, rows.v + t * layout_.ld_v);
                if (p_.normalize) rows.den[t] = denominator(head, t0 + t);
            }
            zero(rows.v + n * layout_.ld_v, (kBlock - n) * layout_.ld_v);
            return 1;
        });
        ddecay_.add_up_to(head.b, head.h, 1, head.first, head.last, total);
    }

    const GateTotal gate_;
    const Passes wanted_;
};

}  // namespace

void linear_backward(const LinearParams& p, const LinearGradients& g) {
    if (p.beta) {
        DeltaBackward(p, g).run();
    } else if (p.causal) {
        CausalBackward(p, g).run();
    } else {
        WholeBackward(p, g).run();
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
