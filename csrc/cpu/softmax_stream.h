// Scores of a few query rows by matrix tiles that read the user's keys where they lie: the keys are the rows of the
// product, so nothing of them is packed.
#pragma once
#include "softmax_panel.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows of q, units [rows][ldq], as columns [units][16 or 32]; missing rows are zero.
inline void pack_query_columns(const float* q, int rows, int64_t ldq, int64_t units, float* out) {
    const int64_t width = rows > W ? 2 * W : W;
    for (int64_t first = 0; first < width; first += W) {
        for (int64_t u = 0; u < units; u += W) {
            Vec block[W];
            for (int i = 0; i < W; ++i) block[i] = first + i < rows ? vload(q + (first + i) * ldq + u) : vzero();
            transpose(block);
            for (int i = 0; i < W; ++i) vstore(out + (u + i) * width + first, block[i]);
        }
    }
}

// scores [rows][Scores<Math>::kRow] of the 64 keys from `keys` on, `row` units apart, none hidden; `units` a multiple
// of 16.
template <class Math>
inline void stream_scores(const float* columns, int rows, const float* keys, int64_t row, int64_t units,
                          float* scores) {
    const int vecs = rows > W ? 2 : 1;
    const Segment whole{0, 0, units};
    alignas(64) float sums[64 * kPanel];
    gemm<Math, Store::kWrite>(64, vecs, {keys, row, 1}, &whole, 1, columns, units, sums, vecs * W);
    for (int first = 0; first < rows; first += W) {
        for (int c = 0; c < 64; c += W) {
            Vec block[W];
            FASTATTN_UNROLL for (int i = 0; i < W; ++i) block[i] = vload(sums + (c + i) * vecs * W + first);
            transpose(block);
            for (int i = 0; i < W && first + i < rows; ++i)
                vstore(scores + (first + i) * Scores<Math>::kRow + c, block[i]);
        }
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
