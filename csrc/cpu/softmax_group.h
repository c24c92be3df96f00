// Products of the 3 to 8 query rows of a key-value head, read straight from the user's keys and values. Memory is the
// limit here, so while one operand is multiplied the next is asked for, line by line.
#pragma once
#include "simd/eight.h"
#include "softmax_panel.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Rows of memory asked for ahead of their use, four cache lines a call.
struct Ahead {
    const char* row;
    int64_t step, bytes, left, at = 0;

    // n rows of `cols` elements from `first` on, laid out like those of `source`; none where first is null.
    Ahead(const char* first, const Source& source, int64_t n, int64_t cols)
        : row(first),
          step(source.row * element_size(source.dtype)),
          bytes(cols * element_size(source.dtype)),
          left(first ? n : 0) {
        if (step != bytes || !left) return;
        bytes *= n;
        left = 1;
    }
    FASTATTN_INLINE void ask() {
        if (left <= 0) return;
        FASTATTN_UNROLL for (int line = 0; line < 256; line += 64) __builtin_prefetch(row + at + line, 0, 2);
        at += 256;
        if (at < bytes) return;
        at = 0;
        row += step;
        --left;
    }
};

// q [rows][ldq] units -> [units][8], a row to a lane; missing rows are zero.
inline void pack_lanes(const float* q, int rows, int64_t ldq, int64_t units, float* out) {
    for (int64_t u = 0; u < units; ++u) {
        for (int r = 0; r < 8; ++r) out[u * 8 + r] = r < rows ? q[r * ldq + u] : 0.0f;
    }
}

// scores [rows][Scores<Math>::kRow] of the 64 keys from `keys` on, `step` bytes apart: W keys at a time against 8 rows,
// which are the lanes. No sum over lanes, no copy of the keys.
template <class Math>
inline void group_scores(const float* q_lanes, int rows, const char* keys, int64_t step, int64_t units, Ahead& ahead,
                         float* scores) {
    constexpr int kUnits = 4;
    for (int c = 0; c < 64; c += W, keys += W * step) {
        Eight sums[W];
        FASTATTN_UNROLL for (int n = 0; n < W; ++n) sums[n] = eight_zero();
        // One pointer for every third key: base + {0, 1, 2} * step are addressing modes.
        const char* base[(W + 2) / 3];
        FASTATTN_UNROLL for (int n = 0; n < W; n += 3) base[n / 3] = keys + n * step;
        for (int64_t u = 0; u < units; u += kUnits) {
            for (int64_t i = u; i < least(u + kUnits, units); ++i) {
                const Eight x = eight_load(q_lanes + i * 8);
                FASTATTN_UNROLL for (int n = 0; n < W; ++n) {
                    sums[n] = eight_dot<Math::kPair>(x, base[n / 3] + n % 3 * step, sums[n]);
                }
                FASTATTN_UNROLL for (int n = 0; n < W; n += 3) base[n / 3] += 4;
            }
            ahead.ask();
        }
        store_transposed(sums, rows, scores + c, Scores<Math>::kRow);
    }
}

// out [R][ldo] += weights [R][Scores<Math>::kRow] * values of one tile, its 64 keys seen; 2 Vec of columns at a time.
template <class Math, int R, class Load>
inline void group_columns(const float* weights, const char* rows, int64_t step, Ahead& ahead, float* out, int64_t ldo,
                          Load&& load) {
    Vec acc[R][2];
    FASTATTN_UNROLL for (int r = 0; r < R; ++r) {
        acc[r][0] = vload(out + r * ldo);
        acc[r][1] = vload(out + r * ldo + W);
    }
    for (int n = 0; n < 64 / Math::kPair; ++n, rows += Math::kPair * step) {
        Vec value[2];
        load(rows, step, value);
        FASTATTN_UNROLL for (int r = 0; r < R; ++r) {
            const Vec w = vset(weights[r * Scores<Math>::kRow + n]);
            acc[r][0] = Math::dot(w, value[0], acc[r][0]);
            acc[r][1] = Math::dot(w, value[1], acc[r][1]);
        }
        if (n % 2) ahead.ask();
    }
    FASTATTN_UNROLL for (int r = 0; r < R; ++r) {
        vstore(out + r * ldo, acc[r][0]);
        vstore(out + r * ldo + W, acc[r][1]);
    }
}

template <class Math, int R>
inline void group_rows(const float* weights, const char* values, int64_t step, int64_t cols, Ahead& ahead, float* out,
                       int64_t ldo) {
    for (int64_t c = 0; c < cols; c += kPanel) {
        if constexpr (Math::kPair == 1) {
            group_columns<Math, R>(weights, values + c * 4, step, ahead, out + c, ldo,
                                   [](const char* row, int64_t, Vec v[2]) {
                                       v[0] = vload(row);
                                       v[1] = vload(row + W * 4);
                                   });
        } else {
#ifdef FASTATTN_HAS_BF16_DOT
            group_columns<Math, R>(weights, values + c * 2, step, ahead, out + c, ldo,
                                   [](const char* row, int64_t s, Vec v[2]) { interleave_rows(row, row + s, v); });
#endif
        }
    }
}

template <class Math>
inline void group_values(const float* weights, int rows, const char* values, int64_t step, int64_t cols, Ahead& ahead,
                         float* out, int64_t ldo) {
    switch (rows) {
        case 3:
            return group_rows<Math, 3>(weights, values, step, cols, ahead, out, ldo);
        case 4:
            return group_rows<Math, 4>(weights, values, step, cols, ahead, out, ldo);
        case 5:
            return group_rows<Math, 5>(weights, values, step, cols, ahead, out, ldo);
        case 6:
            return group_rows<Math, 6>(weights, values, step, cols, ahead, out, ldo);
        case 7:
            return group_rows<Math, 7>(weights, values, step, cols, ahead, out, ldo);
        default:
            return group_rows<Math, 8>(weights, values, step, cols, ahead, out, ldo);
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
