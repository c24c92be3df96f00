// Scores to logits: z = softcap(scale * s) + bias - slope * |i + zero(i) - j|, W keys of one query row at a time.
#pragma once
#include "simd/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Whether logits are made before the top is found; else scores are scaled after it is taken off.
FASTATTN_INLINE bool makes_logits(const SoftmaxParams& p) { return p.bias || p.slopes || p.sinks || p.softcap > 0; }

// c * tanh(x / c) and its derivative.
class Softcap {
   public:
    explicit Softcap(const SoftmaxParams& p)
        : cap_(static_cast<float>(least<double>(p.softcap, kLargest))), inverse_(least(1.0f / cap_, kLargest)) {}

    explicit operator bool() const { return cap_ > 0; }
    // With e = exp(-2 |y|), y = x / c: tanh |y| = 1 - 2 e / (1 + e) and 1 - tanh^2 = 4 e / (1 + e)^2. Where the first
    // would cancel, tanh y = y + y^3 P(y^2) with the polynomial of Cephes' tanhf.
    FASTATTN_INLINE Vec operator()(Vec x, Vec& derivative) const {
        const Vec y = vmul(x, vset(inverse_)), size = vabs(y), square = vmul(y, y), one = vset(1.0f);
        const Vec e = exp2_normal<false>(vmul(size, vset(-2.0f * kLog2e)));
        const Vec share = vdiv(one, vadd(one, e)), twice = vmul(vset(2.0f), vmul(e, share));
        derivative = vmul(vmul(twice, vset(2.0f)), share);
        Vec p = vfma(vset(-5.70498872745e-3f), square, vset(2.06390887954e-2f));
        p = vfma(p, square, vset(-5.37397155531e-2f));
        p = vfma(p, square, vset(1.33314422036e-1f));
        p = vfma(p, square, vset(-3.33332819422e-1f));
        const Vec small = vfma(vmul(x, square), p, x);
        const Vec large = vmul(vsub(one, twice), vselect(vless(y, vzero()), vset(-cap_), vset(cap_)));
        return vselect(vless(size, vset(0.625f)), small, large);
    }

   private:
    static constexpr float kLargest = 3.402823466e38f;
    const float cap_, inverse_;
};

// |i + zero(i) - j| of one query row.
class Distance {
   public:
    Distance(const SoftmaxParams& p, int64_t i) : place_(i + (p.diagonal ? p.diagonal[i] : p.Lk() - p.Lq())) {}

    FASTATTN_INLINE Vec operator()(int64_t j) const {
        return vabs(vsub(vset(static_cast<float>(place_ - j)), vload(kLane)));
    }

   private:
    static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t place_;
};

// One query row's way from scores to logits.
class RowLogits {
   public:
    struct Made {
        Vec z, added, damp;  // logits; what was added, -inf where the bias hides; derivative of the softcap, if any
    };

    RowLogits(const SoftmaxParams& p, int64_t b, int64_t h, int64_t i)
        : scale_(static_cast<float>(p.scale)),
          cap_(p),
          bias_(p.bias ? p.bias.row(b, h, i) : nullptr),
          dtype_(p.bias.dtype),
          stride_(p.bias.last_stride()),
          Lk_(p.Lk()),
          sloped_(p.slopes),
          slope_(p.slopes ? p.slopes[b * p.slopes_batch + h] : 0.0f),
          distance_(p, i) {}

    // Of the keys [j, j + W); past the last key, anything.
    FASTATTN_INLINE Made operator()(Vec scores, int64_t j) const {
        Made made{vzero(), vzero(), vzero()};
        if (bias_) {
            made.added = stride_ == 1 && j + W <= Lk_ ? load_vector(j) : load_few(j);
        }
        if (sloped_) made.added = vfma(vset(-slope_), distance_(j), made.added);
        if (cap_) {
            made.z = vadd(cap_(vmul(scores, vset(scale_)), made.damp), made.added);
        } else {
            made.z = vfma(scores, vset(scale_), made.added);
        }
        return made;
    }

   private:
    FASTATTN_INLINE Vec load_vector(int64_t j) const {
        if (dtype_ == DType::kFloat32) return vload(reinterpret_cast<const float*>(bias_) + j);
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(bias_) + j;
        return dtype_ == DType::kBFloat16 ? load_bf16(halves) : load_fp16(halves);
    }
    Vec load_few(int64_t j) const {
        const int n = static_cast<int>(most<int64_t>(0, least<int64_t>(W, Lk_ - j)));
        return stride_ == 0 ? vset(load_one(bias_, dtype_, 0)) : load_floats(bias_, dtype_, j, stride_, n);
    }

    const float scale_;
    const Softcap cap_;
    const char* const bias_;
    const DType dtype_;
    const int64_t stride_, Lk_;
    const bool sloped_;
    const float slope_;
    const Distance distance_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
