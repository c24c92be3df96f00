// What the backward pass packs of keys and queries, and the sums of keys made of it. By vectors they lie
// [keys][columns]; by matrix tiles transposed, since then P and dS are the operands of panels and nothing of them has
// to be turned.
#pragma once
#include "softmax_backward_block.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Keys and values of the block from j0 on.
template <class Math>
inline void pack_keys(BackwardBuffers<Math>& x, const BackwardSizes<Math>& sizes, const Source& k, const Source& v,
                      int64_t j0, int64_t Lk, bool needs_ds, bool needs_dq) {
    // No panel past the last key is used.
    const int64_t panels = least(sizes.panels, ceil_div(Lk - j0, kPanel));
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t j = j0 + panel * kPanel, n = least<int64_t>(kPanel, Lk - j);
        pack_transposed<Math>(k, j, n, sizes.D, x.k_columns + panel * kPanel * sizes.d_units);
        if (needs_ds) pack_transposed<Math>(v, j, n, sizes.Dv, x.v_columns + panel * kPanel * sizes.dv_units);
    }
    if (needs_dq) pack_summed<Math>(k, j0, panels * kPanel, sizes.D, x.k_rows, sizes.key_units, 0);
    if (needs_ds) return;
    // Without dP there is no dS; what is made of these zeros is not read.
    if constexpr (Math::kPair == 1) {
        memset(x.dscores_by_key, 0, sizeof(float) * static_cast<size_t>(sizes.kQueries * sizes.key_units));
    } else {
        memset(x.dweights, 0, sizeof(float) * kStrip<Math> * kPanel);
    }
}

// Rows [r0, r1) of the block of queries from i0 on.
template <class Math>
inline void pack_query_rows(BackwardBuffers<Math>& x, const BackwardSizes<Math>& sizes, const Source& q,
                            const Source& dout, int64_t i0, int r0, int r1, bool needs_ds, bool needs_dk,
                            bool needs_dv) {
    constexpr int64_t kSteps = BackwardSizes<Math>::kSteps;
    const int64_t first = i0 + r0, count = r1 - r0, at = r0 / Math::kPair;
    pack_rows<Math>(q, first, count, sizes.D, 1.0f, x.q + r0 * sizes.ld_q);
    if (needs_ds) pack_rows<Math>(dout, first, count, sizes.Dv, 1.0f, x.o + r0 * sizes.ld_o);
    if constexpr (Math::kTiles) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
        if (needs_dk) pack_columns<Math>(q, first, count, sizes.D, x.q_summed, kSteps, at);
        if (needs_dv) pack_columns<Math>(dout, first, count, sizes.Dv, x.o_summed, kSteps, at);
#endif
    } else {
        if (needs_dk) pack_summed<Math>(q, first, count, sizes.D, x.q_summed, kSteps, at);
        if (needs_dv) pack_summed<Math>(dout, first, count, sizes.Dv, x.o_summed, kSteps, at);
    }
}

// sums += weights^T summed for the `keys` keys of a panel, the first of which is `key` of the `ld` keys of the block.
template <class Math>
inline void add_keys(const Segment* runs, int count, const float* weights, const float* summed, int64_t vecs, int keys,
                     int64_t key, int64_t ld, float* sums) {
    constexpr int64_t kSteps = BackwardSizes<Math>::kSteps;
    if constexpr (Math::kTiles) {
        gemm<Math, Store::kAdd>(static_cast<int>(vecs * W), 2, {summed, kSteps, 1, kSteps / Math::kParts}, runs, count,
                                weights, kSteps, sums + key, ld);
    } else {
        gemm<Math, Store::kAdd, kTall<Math>>(keys, static_cast<int>(vecs), {weights, 1, kPanel}, runs, count, summed,
                                             kSteps, sums + key * vecs * W, vecs * W);
    }
}

// Writes the sums of `keys` keys from j0 on.
template <class Math>
inline void store_keys(const TensorView& t, int64_t b, int64_t hk, int64_t j0, int64_t keys, const float* sums,
                       [[maybe_unused]] int64_t ld, float factor) {
    if constexpr (Math::kTiles) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
        store_columns(t, b, hk, j0, keys, sums, ld, factor);
#endif
    } else {
        store_rows(t, b, hk, j0, keys, sums, round_up(t.size[3], W), factor);
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
