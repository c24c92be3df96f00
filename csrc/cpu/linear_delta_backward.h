// The delta rule, backward. With S' = e^g S_{t-1}, dn = scale do, u = beta r, and dS_t with or (dS*) without q_t
// dn_t^T:
//   values, back in time:   du = dS_t^T k,  dv = beta du,  dbeta = r . du,  dS*_{t-1} = e^g (dS_t - beta k du^T)
//   keys, on in time:       a = S' dn,  b = S' du;  back in time: e = dS* u
//   dq = a + k (u . dn),  dk = e + q (u . dn) - beta b,  dg_t = dg_{t+1} + q a - k (e + beta b)
// No term of dg holds what a token gives to itself: it would cancel, and under a strong decay it is all there is.
#pragma once
#include "linear_delta_keys.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class DeltaBackward : DeltaWork {
   public:
    DeltaBackward(const LinearParams& p, const LinearGradients& g)
        : DeltaWork(p, &g),
          g_(g),
          du_(p.B() * p.H() * p.Lk() * p.Dv() * 4),
          marks_(p.B() * p.H() * (p.Lk() / kLinearMark) * p.D() * p.Dv() * 4),
          dv_(g.dv, p.H()),
          dbeta_(g.dbeta, p.H() * tiles_),
          dkv_(g.dkv_in, p.H()) {}

    void run() const {
        each_part([&](const LinearHead& head, const Buffers& x, int64_t first, int64_t last) {
            p_.decay ? values<true>(head, x, first, last) : values<false>(head, x, first, last);
        });
        for (const HeadGradient* gradient : {&dv_, &dbeta_, &dkv_}) gradient->sum_heads(threads());
        if (g_.dq || g_.dk || g_.ddecay) DeltaKeys(p_, g_, du_.as<float>(), marks_.as<float>()).run();
    }

   private:
    // One head, tiles [first, last).
    template <bool fades>
    void values(const LinearHead& head, const Buffers& x, int64_t first, int64_t last) const {
        const int64_t D = p_.D(), Dv = p_.Dv(), state = head.n * p_.Hs() + head.hs;
        const DeltaGates gates(p_, head);
        DeltaWalk walk = plan_groups(gates, D, x.sums, x.start);
        walk.backward = true;
        const Source q = from(queries(head), head.first), k = from(keys(head), head.first);
        const Source dout = from(source_of(g_.dout, head.b, head.h), head.first);
        // Every head of out has the gradient of its own output, the first of a state that of the state too.
        load_tiles(g_.dkv && head.leads ? g_.dkv + state * D * Dv : nullptr, first, last, x.state);
        start(x, last - first);
        each_block(
            walk, first, last,
            [&](int64_t n) {
                load_operands<fades, false>(gates, walk, n, q, k, x);
                load_lanes(walk, n, dout, x.one);
                if (dbeta_) load_lanes(walk, n, rows_of(rest_of(head)), x.two);
            },
            [&](int64_t n, int64_t tile) { retreat<fades>(head, walk, n, x, tile, tile - first); },
            [&](int64_t n) { store_values(head, walk.group(n), block_rows(x.one, n), first, last); });
        if (dkv_) store_tiles(x.state, first, last, reinterpret_cast<float*>(dkv_.slices().row(head.n, head.h, 0)));
    }

    // du, and dv = beta du.
    void store_values(const LinearHead& head, const DeltaWalk::Group& group, const float* rows, int64_t first,
                      int64_t last) const {
        const int64_t from = first * kDeltaLanes, to = least(last * kDeltaLanes, p_.Dv());
        const TensorView& dv = dv_.slices();
        for (int j = 0; j < group.size; ++j, rows += width_) {
            const int64_t t = group.token(j);
            char* du = reinterpret_cast<char*>(du_.as<float>() + (slice(head) * p_.Lk() + head.first + t) * p_.Dv());
            store_row(du, DType::kFloat32, 1, rows, from, to, 1, false);
            if (!dv_) continue;
            store_row(dv.row(head.b, head.h, head.first + t), dv.dtype, dv.last_stride(), rows, from, to, beta(head, t),
                      past_caches_);
        }
    }

    // From group n - 1 to group n, which is earlier. The rows of dout become those of du.
    template <bool fades>
    void retreat(const LinearHead& head, const DeltaWalk& walk, int64_t n, const Buffers& x, int64_t tile,
                 int64_t at) const {
        const int64_t c = tile * kDeltaLanes;
        const DeltaWalk::Group group = walk.group(n);
        float* enter = x.enter + at * kGroup * kDeltaLanes;
        GroupLanes w, dn, none, seen;
        const Vec scale = vset(static_cast<float>(p_.scale));
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                w[j][v] = vload(enter + (j * kDeltaVecs + v) * W);
                dn[j][v] = vmul(scale, vload(block_rows(x.one, n) + j * width_ + c + v * W));
            }
        }
        const int64_t mark = mark_before(head, walk, walk.count - n);
        if (mark >= 0) keep<fades>(head, mark, w, x, n, tile, at);
        delta_pass<fades, false>(p_.D(), x.state + at * p_.D() * kDeltaLanes, x.group(n - 1), x.group(n), w, dn, none,
                                 seen);
        const float *gram = x.group(n).gram, *rest = block_rows(x.two, n) + c;
        float* du_rows = block_rows(x.one, n) + c;
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) w[j][v] = vzero();
            if (j < group.size) {
                const int64_t t = group.token(j);
                const Vec minus = vset(-beta(head, t));
                Vec product = vzero();
                FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                    Vec du = seen[j][v];
                    FASTATTN_UNROLL for (int i = 0; i < j; ++i) {
                        du = vfma(vset(gram[j * (j - 1) / 2 + i]), w[i][v], du);
                    }
                    vstore(du_rows + j * width_ + v * W, du);
                    if (dbeta_) product = vfma(vload(rest + j * width_ + v * W), du, product);
                    w[j][v] = vmul(minus, du);
                }
                if (dbeta_) {
                    const int64_t slice = head.h * tiles_ + tile;
                    *reinterpret_cast<float*>(dbeta_.slices().row(head.b, slice, head.first + t)) = vsum(product);
                }
            }
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) vstore(enter + (j * kDeltaVecs + v) * W, w[j][v]);
        }
    }

    // dS* on the way from group n - 1 to group n.
    template <bool fades>
    void keep(const LinearHead& head, int64_t mark, const GroupLanes& w, const Buffers& x, int64_t n, int64_t tile,
              int64_t at) const {
        const int64_t marks = p_.Lk() / kLinearMark, D = p_.D(), Dv = p_.Dv();
        const float *key = x.group(n - 1).enter(), *factor = x.group(n).factor();
        float* out = marks_.as<float>() + (slice(head) * marks + mark) * D * Dv;
        for (int64_t r = 0; r < D; ++r) {
            for (int v = 0; v < kDeltaVecs; ++v) {
                const int64_t c = tile * kDeltaLanes + v * W;
                Vec state = vload(x.state + (at * D + r) * kDeltaLanes + v * W);
                for (int j = 0; j < kGroup; ++j) state = vfma(vset(key[j * kDeltaRow + r]), w[j][v], state);
                if (fades) state = vmul(vset(factor[r]), state);
                vstore_n(out + r * Dv + c, state, lanes_of(Dv, c));
            }
        }
    }

    const LinearGradients& g_;
    const Scratch du_;     // [B, H, L, Dv]
    const Scratch marks_;  // dS* where forward keeps S, [B, H, L / kLinearMark, D, Dv]
    const HeadGradient dv_, dbeta_, dkv_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
