// Backward where every query sees every key: two sums over the tokens, each read by the other side.
#pragma once
#include "linear_backward_task.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class WholeBackward : BackwardWork {
   public:
    WholeBackward(const LinearParams& p, const LinearGradients& g) : BackwardWork(p, g) {}

    void run() {
        const double work = static_cast<double>(heads() * (p_.Lk() + p_.Lq()) * layout_.F);
        const int threads = work * static_cast<double>(p_.Dv()) < kLinearSerialWork ? 1 : p_.threads;
        run_tasks(threads, heads(), place(nullptr).used,
                  [&](int64_t task, float* memory) { differentiate(head_of(task), place(memory)); });
        sum_heads(threads);
    }

   private:
    struct Buffers {
        float *features, *values, *df, *dv, *sum, *dsum, *dstate, *z, *dz, *weight, *wide, *inverse;
        int64_t used;
    };

    Buffers place(float* memory) const {
        Arena arena(memory);
        const int64_t T = layout_.block;
        Buffers x{};
        x.features = arena.floats(T * layout_.ld_f);
        x.values = arena.floats(T * layout_.ld_v);
        x.df = arena.floats(T * layout_.ld_f);
        x.dv = arena.floats(T * layout_.ld_v);
        x.sum = arena.floats(transposed_floats());
        x.dsum = arena.floats(transposed_floats());
        x.dstate = arena.floats(state_floats());
        x.z = arena.floats(layout_.ld_f);
        x.dz = arena.floats(layout_.ld_f);
        x.weight = arena.floats(T);
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(T);
        x.used = arena.used();
        return x;
    }

    // body(t0, n) for blocks of tokens [first, last).
    template <class Body>
    void each_block(int64_t first, int64_t last, Body&& body) const {
        for (int64_t t0 = first; t0 < last; t0 += layout_.block) body(t0, least(layout_.block, last - t0));
    }

    void differentiate(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        const int64_t ld = layout_.ld_f, state = state_of(head);
        // Features are lanes: values as rows either enter a sum or read one.
        const ScanBlock feature_lanes{x.values, x.values, layout_.ld_v, x.features, x.df, ld,
                                      nullptr,  0,        nullptr,      nullptr};
        const ScanBlock value_lanes{x.features,   x.features, ld, x.values, x.dv,
                                    layout_.ld_v, nullptr,    0,  nullptr,  nullptr};

        load_transposed(state, p_.kv, x.sum);
        load_z(state, p_.z, x.z);
        const bool reads = dq_ || p_.normalize;
        if (reads) {
            each_block(head.first, head.last, [&](int64_t t0, int64_t n) {
                pack_features(head, k, true, t0, n, 1, x.features, x.inverse, x.wide);
                pack_values(head, v, true, t0, n, 1, x.values);
                scan<Factor::kNone, Mode::kUpdate>(feature_lanes, round_up(n, kGroup), layout_.Dv, 0, layout_.f_tiles,
                                                   x.sum);
                for (int64_t t = 0; t < n && p_.normalize; ++t) add_features(1, x.features + t * ld, x.z);
            });
        }
        load_transposed(state, head.leads ? g_.dkv : nullptr, x.dsum);
        load_z(state, head.leads ? g_.dz : nullptr, x.dz);
        each_block(head.first, last_query(head), [&](int64_t t0, int64_t n) {
            const int64_t padded = round_up(n, kGroup);
            pack_features(head, q, false, t0, n, 1, x.features, x.inverse, x.wide);
            pack_dout(head, t0, n, 1, x.values, x.weight);
            scan<Factor::kNone, Mode::kUpdate>(feature_lanes, padded, layout_.Dv, 0, layout_.f_tiles, x.dsum);
            if (!reads) return;
            scan<Factor::kNone, Mode::kRead>(feature_lanes, padded, layout_.Dv, 0, layout_.f_tiles, x.sum);
            for (int64_t t = 0; t < n; ++t) {
                float *tq = x.features + t * ld, *d = x.df + t * ld;
                if (p_.normalize) {
                    const float dsum = clamped(head, t0 + t) ? 0 : -dot(tq, d, ld) * x.weight[t];
                    add_features(dsum, x.z, d);
                    add_features(dsum, tq, x.dz);
                }
                if (!dq_) continue;
                features_.gradient(tq, x.inverse[t], d);
                store(dq_, head, t0 + t, 1, d);
            }
        });
        for (int64_t f = 0; f < layout_.F; ++f) {
            for (int64_t c = 0; c < layout_.v_tiles * W; ++c) {
                x.dstate[(c / W * layout_.F + f) * W + c % W] =
                    c < layout_.Dv ? x.dsum[(f / W * layout_.Dv + c) * W + f % W] : 0;
            }
        }
        each_block(head.first, dk_ || dv_ ? head.last : head.first, [&](int64_t t0, int64_t n) {
            const int64_t padded = round_up(n, kGroup);
            pack_features(head, k, true, t0, n, 1, x.features, x.inverse, x.wide);
            pack_values(head, v, true, t0, n, 1, x.values);
            if (dk_) scan<Factor::kNone, Mode::kRead>(feature_lanes, padded, layout_.Dv, 0, layout_.f_tiles, x.dsum);
            if (dv_) scan<Factor::kNone, Mode::kRead>(value_lanes, padded, layout_.F, 0, layout_.v_tiles, x.dstate);
            for (int64_t t = 0; t < n && dk_; ++t) {
                if (p_.normalize && takes_part(head, t0 + t)) add_features(1, x.dz, x.df + t * ld);
                features_.gradient(x.features + t * ld, x.inverse[t], x.df + t * ld);
                store(dk_, head, t0 + t, 1, x.df + t * ld);
            }
            for (int64_t t = 0; t < n && dv_; ++t) store(dv_, head, t0 + t, 1, x.dv + t * layout_.ld_v);
        });
        if (dkv_) store_initial(head, nullptr, x.dstate);
        if (dz_) store_initial_z(head, nullptr, x.dz);
    }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
