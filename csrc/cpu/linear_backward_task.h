// What the backward pass of linear attention shares: packed gradients, states with features as lanes, sums over heads.
#pragma once
#include <cmath>
#include <initializer_list>

#include "linear_task.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// A gradient as the tasks write it, one slice for each head of out, and as the caller gets it, summed over the heads
// that share a tensor. Both are the same memory where no head shares.
class HeadGradient {
   public:
    HeadGradient(const TensorView& target, int64_t heads)
        : target_(target),
          memory_(shared(heads) ? target.size[0] * heads * target.size[2] * target.size[3] * 4 : 0),
          slices_(target) {
        if (!shared(heads)) return;
        slices_.data = memory_.as<char>();
        slices_.dtype = DType::kFloat32;
        slices_.size[1] = heads;
        int64_t stride = 1;
        for (int i = 3; i >= 0; stride *= slices_.size[i--]) slices_.stride[i] = stride;
    }
    explicit operator bool() const { return target_.data != nullptr; }
    const TensorView& slices() const { return slices_; }

    void sum_heads(int threads) const {
        const int64_t heads = slices_.size[1];
        if (!target_ || slices_.data == target_.data || target_.size[1] == 0) return;
        const int64_t group = heads / target_.size[1], rows = target_.size[2], chunks = ceil_div(rows, kRowsOfTask);
        parallel_for(threads, target_.size[0] * target_.size[1] * chunks, [&](int64_t task) {
            const int64_t b = task / chunks / target_.size[1], h = task / chunks % target_.size[1];
            const int64_t first = task % chunks * kRowsOfTask, last = least(rows, first + kRowsOfTask);
            for (int64_t i = first; i < last; ++i) {
                each_vector(target_.size[3], [&](int64_t c, int n) {
                    Vec sum = vzero();
                    for (int64_t g = 0; g < group; ++g) {
                        const char* from = slices_.row(b, h * group + g, i) + c * 4;
                        sum = vadd(sum, vload_n(from, n));
                    }
                    store_floats(target_.row(b, h, i), target_.dtype, c, target_.last_stride(), sum, n);
                });
            }
        });
    }

    // A running sum back in time, one number a token, was `start` after token `last` and is off by `error` at `first`:
    // each value gives back its share, by the size of what had entered until then. A fast decay leaves numbers far
    // smaller than the first that entered, whose rounding a sum over the tokens would count once for each.
    void settle(int64_t b, int64_t h, int64_t first, int64_t last, double start, double error) const {
        const auto each = [&](auto&& use) {
            double before = start, entered = 0;
            for (int64_t t = last; t >= first; --t) {
                float* at = reinterpret_cast<float*>(slices_.row(b, h, t));
                entered += std::fabs(static_cast<double>(*at) - before);
                before = static_cast<double>(*at);
                use(at, entered);
            }
            return entered;
        };
        const double share = error / each([](float*, double) {});
        if (!std::isfinite(share)) return;
        each([&](float* at, double entered) { *at = static_cast<float>(static_cast<double>(*at) - share * entered); });
    }

    // Rows [first, last) of slices [h, h + count), whose sum is to be `total`: each gives back its share of what it is
    // off, by its size.
    void add_up_to(int64_t b, int64_t h, int64_t count, int64_t first, int64_t last, double total) const {
        const auto at = [&](int64_t slice, int64_t t) { return reinterpret_cast<float*>(slices_.row(b, slice, t)); };
        double sum = 0, size = 0;
        for (int64_t slice = h; slice < h + count; ++slice) {
            for (int64_t t = first; t < last; ++t) {
                sum += static_cast<double>(*at(slice, t));
                size += std::fabs(static_cast<double>(*at(slice, t)));
            }
        }
        const double share = (total - sum) / size;
        for (int64_t slice = h; slice < h + count && std::isfinite(share); ++slice) {
            for (int64_t t = first; t < last; ++t) {
                const double value = static_cast<double>(*at(slice, t));
                *at(slice, t) = static_cast<float>(value + share * std::fabs(value));
            }
        }
    }

   private:
    static constexpr int64_t kRowsOfTask = 64;
    bool shared(int64_t heads) const { return target_.data && target_.size[1] != heads; }

    const TensorView target_;
    const Scratch memory_;
    TensorView slices_;
};

class BackwardWork : protected LinearWork {
   protected:
    BackwardWork(const LinearParams& p, const LinearGradients& g)
        : LinearWork(p, &g),
          g_(g),
          dq_(g.dq, p.H()),
          dk_(g.dk, p.H()),
          dv_(g.dv, p.H()),
          ddecay_(g.ddecay, p.H()),
          dkv_(g.dkv_in, p.H()),
          dz_(g.dz_in, p.H()) {}

    void sum_heads(int threads) const {
        for (const HeadGradient* gradient : {&dq_, &dk_, &dv_, &ddecay_, &dkv_, &dz_}) gradient->sum_heads(threads);
    }

    // Rows [t0, t0 + n) of a gradient, from rows of `ld` floats; blocks follow as those of pack_features do.
    void store(const HeadGradient& gradient, const LinearHead& head, int64_t t0, int64_t n, int64_t sense,
               const float* rows, int64_t ld) const {
        const TensorView& x = gradient.slices();
        store_rows(x, head.b, head.h, t0, n, sense, rows, ld, 0, x.size[3], nullptr);
    }

    int64_t state_floats() const { return layout_.panels * panel_floats(); }
    int64_t state_of(const LinearHead& head) const { return head.n * p_.Hs() + head.hs; }
    Panels whole_state(float* x) const { return panels(x, 0, layout_.panels); }
    // State number `state` of kv, which may be null.
    const float* kv_of(const float* kv, int64_t state) const {
        return kv ? kv + state * layout_.F * layout_.Dv : nullptr;
    }
    // What scan() has left in r [ld_f][kBlock], as rows.
    void turn_back(const float* r, float* rows) const { turn(r, kBlock, layout_.ld_f, kBlock, rows, layout_.ld_f); }
    void load_z(int64_t state, const float* z, float* x) const {
        zero(x, layout_.ld_f);
        if (z) memcpy(x, z + state * layout_.F, sizeof(float) * static_cast<size_t>(layout_.F));
    }

    // Gradients of the state before the first token.
    void store_initial(const LinearHead& head, const Panels& state) const {
        store_state(state, reinterpret_cast<float*>(dkv_.slices().row(head.n, head.h, 0)));
    }
    void store_initial_z(const LinearHead& head, const float* dz) const {
        memcpy(dz_.slices().row(head.n, head.h, 0), dz, sizeof(float) * static_cast<size_t>(layout_.F));
    }

    // Rows of dout times `weight` = scale / den, the gradient of phi(q)^T S.
    void pack_dout(const LinearHead& head, int64_t t0, int64_t n, int64_t sense, float* out, float* weight) const {
        const int64_t ld = layout_.ld_v, Dv = layout_.Dv;
        const Source dout = source_of(g_.dout, head.b, head.h);
        for (int64_t t = 0; t < n; ++t) {
            weight[t] = static_cast<float>(p_.scale);
            if (p_.normalize) weight[t] /= std::fabs(denominator(head, t0 + t));
            if (sense) ask_for(dout, t0 + t + sense * kBlock, Dv);
            with_row(dout, t0 + t, Dv, [&](int64_t c, Vec a) { vstore(out + t * ld + c, vmul(a, vset(weight[t]))); });
        }
        zero(out + n * ld, (kBlock - n) * ld);
    }
    float denominator(const LinearHead& head, int64_t t) const {
        return p_.saved[(head.b * p_.H() + head.h) * p_.Lq() + t];
    }
    bool clamped(const LinearHead& head, int64_t t) const { return denominator(head, t) < 0; }

    // Adds the features of a block, times `weights` unless null, to a sum over tokens, faded and rounded as a scan does
    // its state, so that errors of one divide out against the other's. use(t, c, now): columns [c, c + W) of the sum
    // after token t; strict: of what was there before it, after its factor.
    template <Factor factor, bool strict, bool backwards, class Use>
    void walk_sum(int64_t n, const float* features, const float* weights, const Fading& fading, float* sum,
                  Use&& use) const {
        for (int64_t c = 0; c < layout_.ld_f; c += W) {
            const Vec base = vload(sum + c);
            Vec added = vzero(), fade = vset(1.0f);
            for (int64_t at = 0; at < n; ++at) {
                const int64_t t = backwards ? n - 1 - at : at;
                Vec old = added;
                if (factor != Factor::kNone && !(backwards && at == 0)) {
                    const Vec f = factor_at<factor>(fading.factors + (t + backwards) * factor_step(), c);
                    old = vmul(old, f);
                    fade = vmul(fade, f);
                }
                added = vfma(vset(weights ? weights[t] : 1.0f), vload(features + t * layout_.ld_f + c), old);
                use(t, c, vfma(fade, base, strict ? old : added));
            }
            if (factor == Factor::kNone) {
                vstore(sum + c, vadd(base, added));
                continue;
            }
            if (backwards) added = vmul(added, factor_at<factor>(fading.factors, c));
            vstore(sum + c, vfma(vload(fading.whole + c), base, added));
        }
    }

    const LinearGradients& g_;
    const HeadGradient dq_, dk_, dv_, ddecay_, dkv_, dz_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
