// The gradient of a fast gate that all tokens share. As a sum over them of <e^g S_{t-1}, dS_t>, each from a running sum
// of differences, it holds a rounding error once for every token that sees it; and a fast gate leaves little beside
// these. Here it is summed by pairs. Of a query i and a key j before it the gradient has (i - j) times their share of
// out, so with
//   T_t = e^g (T_{t-1} + S_{t-1})  beside  S_t = e^g S_{t-1} + k_t v_t^T
// it is the sum over tokens of q_t^T T_t dn_t, and <T, dS> after the last.
#pragma once
#include <cmath>

#include "linear_task.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class GateTotal : LinearWork {
   public:
    // Rows of a block, [kBlock][ld_f] and [kBlock][ld_v], zero past its tokens. The delta rule reads S twice: with
    // q_t dn_t^T, and with -beta_t k_t du_t^T.
    struct Rows {
        float *k, *v;
        float *q[2], *dn[2];
        float *den, *weight;    // of each token: of the normaliser, as forward saved it; for the caller
        float *inverse, *wide;  // for pack_features
    };

    GateTotal(const LinearParams& p, const LinearGradients& g) : LinearWork(p), g_(g) {}

    bool wanted() const { return g_.ddecay && p_.decay.stride[2] == 0 && p_.decay.size[2] > 1 && !p_.vector_decay(); }
    // T forgets no faster than S, so what rounding leaves in it grows with slow gates, and where the delta rule has S
    // forget more, its two reads take most of T from each other. There the running sum is better.
    bool wanted(const LinearHead& head) const { return wanted() && head.first < head.last && log_of(head) < kFast; }
    int64_t floats() const { return wanted() ? place(nullptr).used : 0; }

    // pack(t0, n, rows) fills the rows of tokens [t0, t0 + n), dn without the gradient of denominators, and returns how
    // often they read.
    template <class Pack>
    double of(const LinearHead& head, float* memory, Pack&& pack) const {
        const Buffers x = place(memory);
        const int64_t ld = layout_.ld_f, state = head.n * p_.Hs() + head.hs, F = layout_.F;
        const Panels s = panels(x.state, 0, layout_.panels);
        for (float* sum : {x.state, x.far})
            zero(sum, state_floats());  // a panel of one vector leaves some of its floats
        load_state(p_.kv ? p_.kv + state * F * layout_.Dv : nullptr, s);
        zero(x.z, 2 * ld);
        if (p_.normalize && p_.z) memcpy(x.z, p_.z + state * F, sizeof(float) * static_cast<size_t>(F));
        const float log = log_of(head);
        float fade[kBlock + 1];
        for (int i = 0; i <= kBlock; ++i) fade[i] = std::exp(log * static_cast<float>(i));
        zero(x.r, 2 * kBlock * ld);
        double total = 0;
        for (int64_t t0 = head.first; t0 < head.last; t0 += kBlock) {
            const int n = static_cast<int>(least<int64_t>(kBlock, head.last - t0));
            const int reads = pack(t0, n, x.rows);
            turn(x.rows.k, ld, kBlock, ld, x.keys, kBlock);
            turn(x.rows.v, layout_.ld_v, kBlock, layout_.ld_v, x.values, kBlock);
            for (int i = 0; i < reads; ++i) total += read(n, x.rows.q[i], x.rows.dn[i], fade, x);
            advance(n, fade, x);
        }
        if (!head.leads) return total;
        if (g_.dkv) {
            load_state(g_.dkv + state * F * layout_.Dv, s);
            for (int64_t i = 0; i < state_floats(); i += W) {
                total += static_cast<double>(dot(x.state + i, x.far + i, W));
            }
        }
        for (int64_t f = 0; f < F && g_.dz; ++f) {
            total += static_cast<double>(g_.dz[state * F + f]) * static_cast<double>(x.z[ld + f]);
        }
        return total;
    }

   private:
    static constexpr float kFast = -0.1f;  // log of a gate

    float log_of(const LinearHead& head) const {
        return *reinterpret_cast<const float*>(log_factor(head, head.first).data);
    }

    struct Buffers {
        Rows rows;
        float *state, *far, *z;        // S and T, and of both what stands for the denominator: [2][ld_f]
        float *keys, *values, *enter;  // [ld_f][kBlock], [ld_v][kBlock], keys times their factors
        float *turned, *r, *df;        // dn as [ld_v][kBlock]; S dn and T dn: [2][ld_f][kBlock], [2][kBlock][ld_f]
        float *seen, *shares;          // [kBlock][kBlock]: q_i . k_j, dn_i . v_j
        float* whole;                  // [ld_f]
        int64_t used;
    };
    Buffers place(float* memory) const {
        Arena arena(memory);
        const int64_t f = kBlock * layout_.ld_f, v = kBlock * layout_.ld_v;
        Buffers x{};
        x.rows.k = arena.floats(f);
        x.rows.v = arena.floats(v);
        for (int i = 0; i < 2; ++i) {
            x.rows.q[i] = arena.floats(f);
            x.rows.dn[i] = arena.floats(v);
        }
        x.rows.den = arena.floats(kBlock);
        x.rows.weight = arena.floats(kBlock);
        x.rows.inverse = arena.floats(kBlock);
        x.rows.wide = arena.floats(round_up(p_.D(), W));
        x.state = arena.floats(state_floats());
        x.far = arena.floats(state_floats());
        x.z = arena.floats(2 * layout_.ld_f);
        x.keys = arena.floats(f);
        x.values = arena.floats(v);
        x.enter = arena.floats(f);
        x.turned = arena.floats(v);
        x.r = arena.floats(2 * f);
        x.df = arena.floats(2 * f);
        x.seen = arena.floats(kBlock * kBlock);
        x.shares = arena.floats(kBlock * kBlock);
        x.whole = arena.floats(layout_.ld_f);
        x.used = arena.used();
        return x;
    }
    int64_t state_floats() const { return layout_.panels * panel_floats(); }

    // The sum over a block's tokens of q_t^T T_t dn_t.
    double read(int n, const float* q, const float* dn, const float* fade, const Buffers& x) const {
        const int64_t ld = layout_.ld_f;
        turn(dn, layout_.ld_v, kBlock, layout_.ld_v, x.turned, kBlock);
        for (int part = 0; part < 2; ++part) {
            ScanBlock block{};
            block.d = x.turned;
            block.r = x.r + part * kBlock * ld;
            scan(panels(part ? x.far : x.state, 0, layout_.panels), block);
            turn(block.r, kBlock, ld, kBlock, x.df + part * kBlock * ld, ld);
        }
        inner_products(q, ld, x.keys, layout_.F, x.seen);
        inner_products(dn, layout_.ld_v, x.values, layout_.Dv, x.shares);
        float sum = 0;
        for (int i = 0; i < n; ++i) {
            const float *qi = q + i * ld, *seen = x.seen + i * kBlock, *shares = x.shares + i * kBlock;
            float before = dot(qi, x.df + i * ld, ld), far = dot(qi, x.df + (kBlock + i) * ld, ld), dsum = 0;
            if (p_.normalize) {
                float along = fade[i + 1] * before;
                for (int j = 0; j <= i; ++j) along += fade[i - j] * seen[j] * shares[j];
                const float den = x.rows.den[i];
                if (den > 0) dsum = -along * static_cast<float>(p_.scale) / den;
                before += dsum * dot(qi, x.z, ld);
                far += dsum * dot(qi, x.z + ld, ld);
            }
            float own = fade[i + 1] * (far + static_cast<float>(i + 1) * before);
            for (int j = 0; j < i; ++j) own += static_cast<float>(i - j) * fade[i - j] * seen[j] * (shares[j] + dsum);
            sum += own;
        }
        return static_cast<double>(sum);
    }

    // S and T after a block.
    void advance(int n, const float* fade, const Buffers& x) const {
        const int64_t ld = layout_.ld_f;
        const Vec tokens = vset(static_cast<float>(n));
        for (int64_t c = 0; c < ld; c += W) vstore(x.whole + c, vset(fade[n]));
        for (int64_t i = 0; i < state_floats(); i += W) {
            vstore(x.far + i, vfma(tokens, vload(x.state + i), vload(x.far + i)));
        }
        for (int64_t c = 0; c < ld; c += W) vstore(x.z + ld + c, vfma(tokens, vload(x.z + c), vload(x.z + ld + c)));
        for (int part = 0; part < 2; ++part) {
            float weights[kBlock] = {};
            for (int j = 0; j < n; ++j) weights[j] = fade[n - 1 - j] * (part ? static_cast<float>(n - 1 - j) : 1.0f);
            for (int64_t f = 0; f < ld; ++f) {
                for (int t = 0; t < kBlock; t += W) {
                    vstore(x.enter + f * kBlock + t, vmul(vload(weights + t), vload(x.keys + f * kBlock + t)));
                }
            }
            ScanBlock block{};
            block.a = x.enter;
            block.b = {x.rows.v, layout_.ld_v};
            block.whole = x.whole;
            scan(panels(part ? x.far : x.state, 0, layout_.panels), block);
            float* z = x.z + part * ld;
            for (int64_t f = 0; f < ld && p_.normalize; ++f) {
                float sum = 0;
                for (int t = 0; t < n; ++t) sum += x.enter[f * kBlock + t];
                z[f] = fade[n] * z[f] + sum;
            }
        }
    }

    const LinearGradients& g_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
