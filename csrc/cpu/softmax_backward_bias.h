// Logits of a strip in the backward pass, and the gradient of the bias, summed over what it broadcasts along.
#pragma once
#include "softmax_backward_block.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Scores of `rows` rows to logits, and the derivative of the softcap; a bias of -inf hides its key.
inline void make_logits(const SoftmaxParams& p, int64_t b, int64_t h, int64_t i0, int64_t j0, int rows, const Strip& x,
                        uint64_t* visible) {
    for (int r = 0; r < rows; ++r) {
        const RowLogits logits(p, b, h, i0 + r);
        for (int v = 0; v < 2; ++v) {
            const int at = r * kPanel + v * W;
            const RowLogits::Made made = logits(vload(x.scores + at), j0 + v * W);
            vstore(x.scores + at, made.z);
            if (x.damp) vstore(x.damp + at, made.damp);
            const uint64_t hidden = ~vnot_equal(made.added, vset(-kInfinity)) & ((uint64_t{1} << W) - 1);
            visible[r] &= ~(hidden << (x.shift + v * W));
        }
    }
}

// Gradient of the bias. One that spans queries and keys is summed where it lies; for one that broadcasts along them,
// every head has sums of its own (over keys by query, or over queries by key) that `finish` adds up in a fixed order.
class BiasGradient : public HeadSums {
   public:
    BiasGradient(const SoftmaxParams& p, const TensorView& d)
        : HeadSums(p, spans_row(d)      ? p.Lq()
                      : spans_column(d) ? p.Lk()
                                        : 0),
          p_(p),
          d_(d),
          by_row_(spans_row(d)),
          by_column_(spans_column(d)),
          dense_(d && !by_row_ && !by_column_) {}

    bool wanted() const { return bool(d_); }
    bool by_row() const { return by_row_; }
    // Batches or heads that add to the same tile: one task must take them all, in order.
    bool shares_batches() const { return dense_ && d_.size[0] == 1; }
    bool shares_heads() const { return dense_ && d_.size[1] == 1; }

    // Before the queries [i0, i0 + rows) and keys [j0, j0 + keys) of (b, h), in every block whether visible or not.
    void open(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t keys) const {
        if (!dense_ || (shares_batches() && b > 0) || (shares_heads() && h > 0)) return;
        for (int64_t i = i0; i < i0 + rows; ++i)
            memset(row(b, h, i) + j0, 0, sizeof(float) * static_cast<size_t>(keys));
    }
    void open_columns(int64_t b, int64_t h, int64_t j0, int64_t keys) const {
        if (by_column_) memset(sums(b, h) + j0, 0, sizeof(float) * static_cast<size_t>(keys));
    }

    // Adds a strip of dS [rows][kPanel]; row sums go to `rows_out` until it is this block's turn.
    void add(int64_t b, int64_t h, int64_t i0, int64_t j0, int rows, const float* ds, float* rows_out) const {
        const int64_t keys = least<int64_t>(kPanel, p_.Lk() - j0);
        if (by_column_) {
            Vec first = vzero(), second = vzero();
            for (int r = 0; r < rows; ++r) {
                first = vadd(first, vload(ds + r * kPanel));
                second = vadd(second, vload(ds + r * kPanel + W));
            }
            add_to(sums(b, h) + j0, first, second, keys);
        }
        for (int r = 0; r < rows; ++r) {
            const Vec first = vload(ds + r * kPanel), second = vload(ds + r * kPanel + W);
            if (dense_) add_to(row(b, h, i0 + r) + j0, first, second, keys);
            if (by_row_) rows_out[r] += vsum(vadd(first, second));
        }
    }

    // Adds up what the heads have found.
    void finish() const {
        if (!length()) return;
        float* out = reinterpret_cast<float*>(d_.data);
        const bool all_b = d_.size[0] == 1, all_h = d_.size[1] == 1, all_rows = by_row_ && d_.size[2] == 1;
        const int64_t count = all_rows ? 1 : length(), inner = all_rows ? length() : 1;
        for (int64_t b = 0; b < d_.size[0]; ++b) {
            for (int64_t h = 0; h < d_.size[1]; ++h) {
                for (int64_t x = 0; x < count; ++x) {
                    double total = 0;
                    for (int64_t bb = b; bb < (all_b ? p_.B() : b + 1); ++bb) {
                        for (int64_t hh = h; hh < (all_h ? p_.Hq() : h + 1); ++hh) {
                            for (int64_t i = x; i < x + inner; ++i) total += static_cast<double>(sums(bb, hh)[i]);
                        }
                    }
                    *out++ = static_cast<float>(total);
                }
            }
        }
    }

   private:
    static bool spans_row(const TensorView& d) { return d && d.size[3] == 1; }
    static bool spans_column(const TensorView& d) { return d && d.size[3] != 1 && d.size[2] == 1; }
    float* row(int64_t b, int64_t h, int64_t i) const { return reinterpret_cast<float*>(d_.row(b, h, i)); }
    static void add_to(float* out, Vec first, Vec second, int64_t keys) {
        if (keys == kPanel) {
            vstore(out, vadd(vload(out), first));
            vstore(out + W, vadd(vload(out + W), second));
            return;
        }
        float wide[kPanel];
        vstore(wide, first);
        vstore(wide + W, second);
        for (int64_t c = 0; c < keys; ++c) out[c] += wide[c];
    }

    const SoftmaxParams& p_;
    const TensorView d_;
    const bool by_row_, by_column_, dense_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
