// The gradient of a fast gate that all tokens share, under the delta rule: with du from the first half of the backward
// pass, S_{t-1} gets e^g (dS_t - beta k du^T), so it is read by q dn^T and by -beta k du^T.
#pragma once
#include "linear_backward_gate.h"
#include "linear_backward_task.h"
#include "linear_delta.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class DeltaGateTotal : DeltaWork {
   public:
    // `du` [B, H, L, Dv]
    DeltaGateTotal(const LinearParams& p, const LinearGradients& g, const float* du)
        : DeltaWork(p), g_(g), gate_(p, g), du_(du) {}

    // Makes the rows of a gradient of `tiles` slices a head add up to what they should.
    void settle(const HeadGradient& ddecay, int64_t tiles) const {
        if (!gate_.wanted()) return;
        run_tasks(threads(), heads(), gate_.floats(), [&](int64_t task, float* memory) {
            const LinearHead head = head_of(task);
            if (!gate_.wanted(head)) return;
            ddecay.add_up_to(head.b, head.h * tiles, tiles, head.first, head.last, total(head, memory));
        });
    }

   private:
    double total(const LinearHead& head, float* memory) const {
        const Source q = queries(head), k = keys(head), dout = source_of(g_.dout, head.b, head.h);
        const Source r = rows_of(rest_of(head)), du = rows_of(du_ + (slice(head) * p_.Lk() + head.first) * p_.Dv());
        const int64_t D = p_.D(), Dv = p_.Dv(), ld_f = layout_.ld_f, ld_v = layout_.ld_v;
        return gate_.of(head, memory, [&](int64_t t0, int64_t n, const GateTotal::Rows& rows) {
            for (int64_t t = 0; t < n; ++t) {
                const int64_t at = t0 + t - head.first;
                float *key = rows.k + t * ld_f, *u = rows.v + t * ld_v, *dn = rows.dn[0] + t * ld_v;
                load_row(k, t0 + t, D, ld_f, key);
                load_row(q, t0 + t, D, ld_f, rows.q[0] + t * ld_f);
                load_row(r, at, Dv, ld_v, u);
                load_row(dout, t0 + t, Dv, ld_v, dn);
                load_row(du, at, Dv, ld_v, rows.dn[1] + t * ld_v);
                scale(-beta(head, at), key, ld_f, rows.q[1] + t * ld_f);
                scale(beta(head, at), u, ld_v, u);
                scale(static_cast<float>(p_.scale), dn, ld_v, dn);
            }
            for (float* x : {rows.k, rows.q[0], rows.q[1]}) zero(x + n * ld_f, (kBlock - n) * ld_f);
            for (float* x : {rows.v, rows.dn[0], rows.dn[1]}) zero(x + n * ld_v, (kBlock - n) * ld_v);
            return 2;
        });
    }
    static void scale(float factor, const float* from, int64_t count, float* to) {
        for (int64_t c = 0; c < count; c += W) vstore(to + c, vmul(vset(factor), vload(from + c)));
    }

    const LinearGradients& g_;
    const GateTotal gate_;
    const float* du_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
