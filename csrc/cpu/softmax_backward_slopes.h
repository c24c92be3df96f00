// ALiBi in the backward pass: the gradient of the slopes, -dS * |i + zero(i) - j| summed over the rows of a head.
#pragma once
#include "softmax_backward_block.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Every query row has a sum of its own, over keys in their order; `finish` adds them up in a fixed order.
class SlopeGradient : public HeadSums {
   public:
    SlopeGradient(const SoftmaxParams& p, float* d) : HeadSums(p, d ? p.Lq() : 0), p_(p), d_(d) {}

    bool wanted() const { return d_; }

    // Adds a strip of dS [rows][kPanel] to the sums of its rows, until it is this block's turn.
    void add(int64_t i0, int64_t j0, int rows, const float* ds, float* rows_out) const {
        for (int r = 0; r < rows; ++r) {
            const Distance distance(p_, i0 + r);
            const Vec first = vmul(vload(ds + r * kPanel), distance(j0));
            rows_out[r] -= vsum(vfma(vload(ds + r * kPanel + W), distance(j0 + W), first));
        }
    }

    void finish() const {
        for (int64_t b = 0; d_ && b < (p_.slopes_batch ? p_.B() : 1); ++b) {
            for (int64_t h = 0; h < p_.Hq(); ++h) {
                double total = 0;
                for (int64_t bb = b; bb < (p_.slopes_batch ? b + 1 : p_.B()); ++bb) {
                    for (int64_t i = 0; i < p_.Lq(); ++i) total += static_cast<double>(sums(bb, h)[i]);
                }
                d_[b * p_.Hq() + h] = static_cast<float>(total);
            }
        }
    }

   private:
    const SoftmaxParams& p_;
    float* const d_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
