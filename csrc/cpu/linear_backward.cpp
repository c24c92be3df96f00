// Linear attention, backward: dq scans forward in time, dk and dv backward, each as the forward pass does.
#include "linear_backward_whole.h"
#include "linear_delta_backward.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Tokens after which the gradient of the decay, a running sum of differences, starts again from exact states.
constexpr int64_t kRestart = 256;

// What of one head a task does.
struct Passes {
    bool q, k, v;
};

class CausalBackward : BackwardWork {
   public:
    CausalBackward(const LinearParams& p, const LinearGradients& g)
        : BackwardWork(p, g),
          restart_(most<int64_t>(1, kRestart / layout_.block)),
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
        run_tasks(threads, heads() * count, place(nullptr).used, [&](int64_t task, float* memory) {
            const LinearHead head = head_of(task / count);
            const Buffers x = place(memory);
            if (!p_.decay) {
                differentiate<Factor::kNone>(head, kinds[task % count], x);
            } else if (p_.vector_decay()) {
                differentiate<Factor::kRows>(head, kinds[task % count], x);
            } else {
                differentiate<Factor::kScalar>(head, kinds[task % count], x);
            }
        });
        sum_heads(threads);
    }

   private:
    struct Buffers {
        float *q, *k, *v, *dn, *df, *dv, *factors, *scaled, *carry, *state, *transposed, *ends, *dsum, *own, *weight,
            *wide, *inverse, *other;
        FeatureSum z;
        double* ddecay;
        int64_t used;
    };

    Buffers place(float* memory) const {
        Arena arena(memory);
        const int64_t T = layout_.block;
        Buffers x{};
        x.q = arena.floats(T * layout_.ld_f);
        x.k = arena.floats(T * layout_.ld_f);
        x.v = arena.floats(T * layout_.ld_v);
        x.dn = arena.floats(T * layout_.ld_v);
        x.df = arena.floats(T * layout_.ld_f);
        x.dv = arena.floats(T * layout_.ld_v);
        x.factors = arena.floats(factor_floats());
        x.scaled = arena.floats(scaled_room());
        x.carry = arena.floats(carry_floats());
        x.state = arena.floats(state_floats());
        x.transposed = arena.floats(transposed_floats());
        x.z = place_sum(arena);
        x.dsum = arena.floats(p_.normalize ? p_.Lk() : 0);
        x.own = arena.floats(p_.normalize ? p_.Lk() : 0);
        x.weight = arena.floats(T);
        x.ends = arena.floats(ddecay_ ? (ceil_div(p_.Lk(), restart_ * T) + 2) * kept_floats() : 0);
        x.ddecay = reinterpret_cast<double*>(arena.floats(2 * layout_.ld_f));
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(T);
        x.other = arena.floats(T);
        x.used = arena.used();
        return x;
    }

    template <Factor factor>
    void differentiate(const LinearHead& head, const Passes& passes, const Buffers& x) const {
        const float* ends = passes.q ? forward_in_time<factor>(head, x) : nullptr;
        if (passes.k || passes.v) backward_in_time<factor>(head, passes, ends, x);
    }

    // With a decay, dq and dk are read before their own token enters: what is left is as small as the decay makes it,
    // and so is the rounding of the decay's gradient.
    template <Factor factor>
    static constexpr Mode kMode = factor == Factor::kNone ? Mode::kScan : Mode::kStrict;
    template <Factor factor>
    static constexpr Factor kLanes = factor == Factor::kRows ? Factor::kLanes : factor;

    ScanBlock feature_lanes(const Buffers& x, const float* a, const float* c, const float* b) const {
        return {a,       c, layout_.ld_v, b, x.df, layout_.ld_f, x.factors, factor_step(), group_factors(x.factors),
                x.scaled};
    }

    // Returns the end of the states it kept: that before the first token, and those after which ddecay starts again.
    template <Factor factor>
    const float* forward_in_time(const LinearHead& head, const Buffers& x) const {
        constexpr bool strict = kMode<factor> == Mode::kStrict;
        const Source q = queries(head), k = keys(head), v = values(head);
        const int64_t ld = layout_.ld_f;
        load_transposed(state_of(head), p_.kv, x.transposed);
        if (p_.normalize) load_z(state_of(head), p_.z, x.z.base);
        zero(x.carry, carry_floats());
        float* end = x.ends;
        const auto keep_state = [&] {
            memcpy(end, x.transposed, sizeof(float) * static_cast<size_t>(transposed_floats()));
            if (p_.normalize) memcpy(end + transposed_floats(), x.z.base, sizeof(float) * static_cast<size_t>(ld));
            end += kept_floats();
        };
        if (ddecay_) keep_state();
        for (int64_t block = 0; block < blocks(head); ++block) {
            const int64_t t0 = start(head, block), n = start(head, block + 1) - t0;
            pack_features(head, k, false, t0, n, 1, x.k, x.other, x.wide);
            pack_features(head, q, false, t0, n, 1, x.q, x.inverse, x.wide);
            pack_values(head, v, false, t0, n, 1, x.v);
            pack_dout(head, t0, n, 1, x.dn, x.weight);
            if (factor != Factor::kNone) pack_factors(head, t0, n, false, x.carry, x.factors);
            scan<kLanes<factor>, kMode<factor>>(feature_lanes(x, x.v, x.dn, x.k), round_up(n, kGroup), layout_.Dv, 0,
                                                layout_.f_tiles, x.transposed);
            for (int64_t t = 0; t < n; ++t) {
                float *d = x.df + t * ld, own = 0;
                const float *tq = x.q + t * ld, *tk = x.k + t * ld;
                if (strict) own = dot(x.v + t * layout_.ld_v, x.dn + t * layout_.ld_v, layout_.ld_v);
                if (p_.normalize) {
                    const float weight = x.weight[t], value = own;
                    const bool ends = t % kGroup == kGroup - 1 || t + 1 == n;
                    add_token<factor, strict>(x.z, t, t % kGroup == 0, ends, x.factors, 1, tk);
                    // dout . out, not from out itself, which may be rounded to 16 bits.
                    float along = dot(tq, d, ld), dsum = 0;
                    if (!clamped(head, t0 + t)) {
                        // own + dsum, without the difference of two numbers that a fast decay makes equal.
                        if (strict) own = weight * (value * dot(tq, x.z.now, ld) - along);
                        if (strict) along += value * dot(tq, tk, ld);
                        dsum = -along * weight;
                    }
                    add_features(dsum, x.z.now, d);
                    x.dsum[t0 + t - head.first] = dsum;
                    x.own[t0 + t - head.first] = own;
                }
                if (ddecay_) note_query(head, t0 + t, tq, d);
                if (!dq_) continue;
                if (strict) add_features(own, tk, d);
                features_.gradient(tq, x.inverse[t], d);
                store(dq_, head, t0 + t, 1, d);
            }
            if (ddecay_ && restarts(head, block)) keep_state();
        }
        return end;
    }

    template <Factor factor>
    void backward_in_time(const LinearHead& head, const Passes& passes, const float* end, const Buffers& x) const {
        constexpr bool strict = kMode<factor> == Mode::kStrict;
        const Source q = queries(head), k = keys(head), v = values(head);
        const int64_t ld = layout_.ld_f, state = state_of(head);
        const float* dkv = head.leads ? g_.dkv : nullptr;
        if (passes.k) load_transposed(state, dkv, x.transposed);
        // From here on z is its own gradient.
        if (passes.k && p_.normalize) load_z(state, head.leads ? g_.dz : nullptr, x.z.base);
        if (passes.v) load_state(dkv ? dkv + state * layout_.F * layout_.Dv : nullptr, 0, layout_.v_tiles, x.state);
        const ScanBlock value_lanes{
            x.q, x.k, ld, x.dn, x.dv, layout_.ld_v, x.factors, factor_step(), group_factors(x.factors), x.scaled};
        zero(x.carry, carry_floats());
        for (int64_t block = blocks(head) - 1; block >= 0; --block) {
            const int64_t t0 = start(head, block), n = start(head, block + 1) - t0, padded = round_up(n, kGroup);
            pack_features(head, k, false, t0, n, -1, x.k, x.inverse, x.wide);
            pack_features(head, q, false, t0, n, -1, x.q, x.other, x.wide);
            if (passes.k) pack_values(head, v, false, t0, n, -1, x.v);
            pack_dout(head, t0, n, -1, x.dn, x.weight);
            if (factor != Factor::kNone) pack_factors(head, t0, n, true, x.carry, x.factors);
            if (passes.k) {
                if (ddecay_ && restarts(head, block)) {
                    restart_decay(head, t0 + n, end -= kept_floats(), x.factors + (n - 1) * factor_step(), x);
                }
                scan<kLanes<factor>, kMode<factor>>(reversed(feature_lanes(x, x.dn, x.v, x.q), padded), padded,
                                                    layout_.Dv, 0, layout_.f_tiles, x.transposed);
                for (int64_t t = n - 1; t >= 0; --t) {
                    float *d = x.df + t * ld, own = 0;
                    const float *tq = x.q + t * ld, *tk = x.k + t * ld;
                    if (p_.normalize) {
                        const float dsum = x.dsum[t0 + t - head.first];
                        own = x.own[t0 + t - head.first];
                        const bool begins = t % kGroup == kGroup - 1 || t + 1 == n;
                        add_token<factor, strict>(x.z, t, begins, t % kGroup == 0, x.factors, dsum, tq);
                        add_features(1, x.z.now, d);
                    } else if (strict) {
                        own = dot(x.v + t * layout_.ld_v, x.dn + t * layout_.ld_v, layout_.ld_v);
                    }
                    if (ddecay_) add_key(head, t0 + t, tk, d, x.ddecay);
                    if (!dk_) continue;
                    if (strict) add_features(own, tq, d);
                    features_.gradient(tk, x.inverse[t], d);
                    store(dk_, head, t0 + t, -1, d);
                }
            }
            if (passes.v) {
                scan<factor, Mode::kScan>(reversed(value_lanes, padded), padded, layout_.F, 0, layout_.v_tiles,
                                          x.state);
                for (int64_t t = 0; t < n && dv_; ++t) {
                    store(dv_, head, t0 + t, -1, x.dv + t * layout_.ld_v);
                }
            }
        }
        const float* factors = nullptr;
        if (factor != Factor::kNone && head.first < head.last) {
            pack_factors(head, head.first - 1, 1, true, x.carry, x.factors);
            factors = x.factors;
            if (passes.k && ddecay_) restart_decay(head, head.first, end - kept_floats(), factors, x);
        }
        if (passes.v && dkv_) store_initial(head, factors, x.state);
        if (passes.k && dz_) store_initial_z(head, factors, x.z.base);
    }

    // A state as forward_in_time keeps it: transposed, and z.
    int64_t kept_floats() const { return transposed_floats() + (p_.normalize ? layout_.ld_f : 0); }

    // The gradient of the state after the last token may be far larger than what a fast decay leaves of it. The last
    // token is then a block of its own: no other's gradient is a difference of numbers so large. So it is without that
    // gradient too: blocks are what the others' rounding depends on.
    int64_t alone(const LinearHead& head) const { return p_.decay && g_.dkv && head.first < head.last ? 1 : 0; }
    int64_t blocks(const LinearHead& head) const {
        return ceil_div(head.last - head.first - alone(head), layout_.block) + alone(head);
    }
    int64_t start(const LinearHead& head, int64_t block) const {
        const int64_t shared = head.last - alone(head);
        return block == blocks(head) ? head.last : least(shared, head.first + block * layout_.block);
    }
    bool restarts(const LinearHead& head, int64_t block) const {
        return (block + 1) % restart_ == 0 || block + 1 + alone(head) >= blocks(head);
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

    // The gradient of g_t from the states themselves: <S_{t-1}, e^g_t dS_t>, for each feature or, of a scalar, over
    // all.
    void restart_decay(const LinearHead& head, int64_t t, const float* before, const float* factors,
                       const Buffers& x) const {
        const bool vector = p_.vector_decay();
        double total = 0;
        for (int64_t tile = 0; tile < layout_.f_tiles; ++tile) {
            Vec sum = vzero();
            for (int64_t at = tile * layout_.Dv * W; at < (tile + 1) * layout_.Dv * W; at += W) {
                sum = vfma(vload(before + at), vload(x.transposed + at), sum);
            }
            if (p_.normalize) {
                sum = vfma(vload(before + transposed_floats() + tile * W), vload(x.z.base + tile * W), sum);
            }
            float products[W];
            vstore(products, vmul(sum, vector ? vload(factors + tile * W) : vset(*factors)));
            for (int lane = 0; lane < W; ++lane) {
                x.ddecay[tile * W + lane] = static_cast<double>(products[lane]);
                total += static_cast<double>(products[lane]);
            }
        }
        if (!vector) x.ddecay[0] = total;
        if (t == head.last) return;
        float* at = reinterpret_cast<float*>(ddecay_.slices().row(head.b, head.h, t));
        for (int64_t c = 0; c < (vector ? layout_.F : 1); ++c) at[c] = static_cast<float>(x.ddecay[c]);
    }

    const int64_t restart_;  // blocks
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
