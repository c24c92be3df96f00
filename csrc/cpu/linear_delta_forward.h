// The delta rule, forward: r_t = v_t - k_t^T e^g S_{t-1}, S_t = e^g S_{t-1} + beta_t k_t r_t^T, o_t = scale q_t^T S_t.
#pragma once
#include "linear_delta.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class DeltaForward : DeltaWork {
   public:
    explicit DeltaForward(const LinearParams& p) : DeltaWork(p) {}

    void run() const {
        each_part([&](const LinearHead& head, const Buffers& x, int64_t first, int64_t last) {
            p_.decay ? attend<true>(head, x, first, last) : attend<false>(head, x, first, last);
        });
    }

   private:
    // One head, tiles [first, last).
    template <bool fades>
    void attend(const LinearHead& head, const Buffers& x, int64_t first, int64_t last) const {
        const int64_t D = p_.D(), Dv = p_.Dv(), state = head.n * p_.Hs() + head.hs;
        const DeltaGates gates(p_, head);
        const DeltaWalk walk = plan_groups(gates, D, x.sums, x.start);
        const Source q = from(queries(head), head.first), k = from(keys(head), head.first);
        const Source v = from(values(head), head.first);
        load_tiles(p_.kv ? p_.kv + state * D * Dv : nullptr, first, last, x.state);
        start(x, last - first);
        each_block(
            walk, first, last,
            [&](int64_t n) {
                load_operands<fades, true>(gates, walk, n, q, k, x);
                load_lanes(walk, n, v, x.one);
            },
            [&](int64_t n, int64_t tile) { advance<fades>(head, walk, n, x, tile, tile - first); },
            [&](int64_t n) { store_out(head, walk.group(n - 1), block_rows(x.two, n - 1), first, last); });
        if (head.leads) store_tiles(x.state, first, last, p_.kv_out + state * D * Dv);
    }

    void store_out(const LinearHead& head, const DeltaWalk::Group& group, const float* rows, int64_t first,
                   int64_t last) const {
        for (int j = 0; j < group.size; ++j) {
            store_row(p_.out.row(head.b, head.h, head.first + group.token(j)), p_.out.dtype, p_.out.last_stride(),
                      rows + j * width_, first * kDeltaLanes, least(last * kDeltaLanes, p_.Dv()),
                      static_cast<float>(p_.scale), past_caches_);
        }
    }

    // From group n - 1, whose out is known then, to group n.
    template <bool fades>
    void advance(const LinearHead& head, const DeltaWalk& walk, int64_t n, const Buffers& x, int64_t tile,
                 int64_t at) const {
        const int64_t c = tile * kDeltaLanes;
        float* enter = x.enter + at * kGroup * kDeltaLanes;
        const float* values = block_rows(x.one, n) + c;
        GroupLanes u, out, seen;
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) u[j][v] = vload(enter + (j * kDeltaVecs + v) * W);
        }
        delta_pass<fades, true>(p_.D(), x.state + at * p_.D() * kDeltaLanes, x.group(n - 1), x.group(n), u, u, out,
                                seen);
        const int64_t mark = p_.saved ? mark_before(head, walk, n) : -1;
        if (mark >= 0) store_tiles(x.state + at * p_.D() * kDeltaLanes, tile, tile + 1, kept_state(head, mark));
        const DeltaWalk::Group group = walk.group(n);
        float* seen_rows = block_rows(x.two, n - 1) + c;
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) vstore(seen_rows + j * width_ + v * W, out[j][v]);
        }
        const float* gram = x.group(n).gram;
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) u[j][v] = vzero();
            if (j < group.size) {
                const int64_t t = group.token(j);
                float* saved = rest_of(head);
                FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                    const int lanes = lanes_of(p_.Dv(), c + v * W);
                    Vec sum = seen[j][v];
                    FASTATTN_UNROLL for (int i = 0; i < j; ++i) {
                        sum = vfma(vset(gram[j * (j - 1) / 2 + i]), u[i][v], sum);
                    }
                    const Vec rest = vsub(vload(values + j * width_ + v * W), sum);
                    if (saved) vstore_n(saved + t * p_.Dv() + c + v * W, rest, lanes);
                    u[j][v] = vmul(vset(beta(head, t)), rest);
                }
            }
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) vstore(enter + (j * kDeltaVecs + v) * W, u[j][v]);
        }
    }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
