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
        float *features, *rows, *values, *df, *dv, *turned, *r, *sum, *dsum, *z, *dz, *weight, *wide, *inverse;
        int64_t used;
    };

    Buffers place(float* memory) const {
        Arena arena(memory);
        Buffers x{};
        x.features = arena.floats(kBlock * layout_.ld_f);
        x.rows = arena.floats(kBlock * layout_.ld_f);
        x.values = arena.floats(kBlock * layout_.ld_v);
        x.df = arena.floats(kBlock * layout_.ld_f);
        x.dv = arena.floats(kBlock * layout_.ld_v);
        x.turned = arena.floats(kBlock * layout_.ld_v);
        x.r = arena.floats(kBlock * layout_.ld_f);
        x.sum = arena.floats(state_floats());
        x.dsum = arena.floats(state_floats());
        x.z = arena.floats(layout_.ld_f);
        x.dz = arena.floats(layout_.ld_f);
        x.weight = arena.floats(kBlock);
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(kBlock);
        x.used = arena.used();
        return x;
    }

    // body(t0, n) for blocks of tokens [first, last).
    template <class Body>
    void each_block(int64_t first, int64_t last, Body&& body) const {
        for (int64_t t0 = first; t0 < last; t0 += kBlock) body(t0, least<int64_t>(kBlock, last - t0));
    }
    // The packed features and values of a block enter a sum.
    void add_block(const Buffers& x, float* sum) const {
        turn(x.features, layout_.ld_f, kBlock, layout_.ld_f, x.rows, kBlock);
        ScanBlock block = block_of(x);
        block.a = x.rows;
        scan(whole_state(sum), block);
    }
    // df = the sum times the packed values.
    void read_rows(const Buffers& x, float* sum) const {
        turn(x.values, layout_.ld_v, kBlock, layout_.ld_v, x.turned, kBlock);
        ScanBlock block = block_of(x);
        block.d = x.turned;
        block.r = x.r;
        scan(whole_state(sum), block);
        turn_back(x.r, x.df);
    }
    ScanBlock block_of(const Buffers& x) const {
        ScanBlock block{};
        block.c = x.rows;
        block.b = {x.values, layout_.ld_v};
        block.y_step = layout_.ld_v;
        return block;
    }

    void differentiate(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        const int64_t ld = layout_.ld_f, state = state_of(head);
        zero(x.r, kBlock * ld);
        load_state(kv_of(p_.kv, state), whole_state(x.sum));
        load_z(state, p_.z, x.z);
        const bool reads = dq_ || p_.normalize;
        if (reads) {
            each_block(head.first, head.last, [&](int64_t t0, int64_t n) {
                pack_features(head, k, true, t0, n, 1, x.features, x.inverse, x.wide);
                pack_values(head, v, true, t0, n, 1, x.values);
                add_block(x, x.sum);
                for (int64_t t = 0; t < n && p_.normalize; ++t) add_features(1, x.features + t * ld, x.z);
            });
        }
        load_state(kv_of(head.leads ? g_.dkv : nullptr, state), whole_state(x.dsum));
        load_z(state, head.leads ? g_.dz : nullptr, x.dz);
        each_block(head.first, last_query(head), [&](int64_t t0, int64_t n) {
            pack_features(head, q, false, t0, n, 1, x.features, x.inverse, x.wide);
            pack_dout(head, t0, n, 1, x.values, x.weight);
            add_block(x, x.dsum);
            if (!reads) return;
            read_rows(x, x.sum);
            for (int64_t t = 0; t < n; ++t) {
                float *tq = x.features + t * ld, *d = x.df + t * ld;
                if (p_.normalize) {
                    const float dsum = clamped(head, t0 + t) ? 0 : -dot(tq, d, ld) * x.weight[t];
                    add_features(dsum, x.z, d);
                    add_features(dsum, tq, x.dz);
                }
                if (dq_) features_.gradient(tq, x.inverse[t], d);
            }
            if (dq_) store(dq_, head, t0, n, 1, x.df, ld);
        });
        each_block(head.first, dk_ || dv_ ? head.last : head.first, [&](int64_t t0, int64_t n) {
            pack_features(head, k, true, t0, n, 1, x.features, x.inverse, x.wide);
            pack_values(head, v, true, t0, n, 1, x.values);
            if (dk_) read_rows(x, x.dsum);
            for (int64_t t = 0; t < n && dk_; ++t) {
                if (p_.normalize && takes_part(head, t0 + t)) add_features(1, x.dz, x.df + t * ld);
                features_.gradient(x.features + t * ld, x.inverse[t], x.df + t * ld);
            }
            if (dk_) store(dk_, head, t0, n, 1, x.df, ld);
            if (!dv_) return;
            turn(x.features, ld, kBlock, ld, x.rows, kBlock);
            ScanBlock block = block_of(x);
            block.y = x.dv;
            scan(whole_state(x.dsum), block);
            store(dv_, head, t0, n, 1, x.dv, layout_.ld_v);
        });
        if (dkv_) store_initial(head, whole_state(x.dsum));
        if (dz_) store_initial_z(head, x.dz);
    }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
