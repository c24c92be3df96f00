// Products for a handful of query rows, read straight from the user's keys and values: packing would cost more than it
// saves.
#pragma once
#include "softmax_panel.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Dot products of one query row with W neighbouring keys, `step` bytes apart.
template <class Math>
FASTATTN_INLINE Vec direct_dots(const float* q, const char* keys, int64_t step, int64_t full, const Source& source,
                                int64_t j, int64_t D) {
    Vec sums[W];
    FASTATTN_UNROLL for (int n = 0; n < W; ++n) sums[n] = vzero();
    for (int64_t u = 0; u < full; u += W) {
        const Vec x = vload(q + u);
        // One pointer for every third key: base + {0, 1, 2} * step are addressing modes.
        const char* base = keys + 4 * u;
        FASTATTN_UNROLL for (int n = 0; n < W; n += 3) {
            FASTATTN_UNROLL for (int m = n; m < n + 3 && m < W; ++m) {
                sums[m] = Math::dot(x, vload(base + (m - n) * step), sums[m]);
            }
            base += 3 * step;
        }
    }
    if (full < units<Math>(D)) {
        const Vec x = vload(q + full);
        for (int n = 0; n < W; ++n) sums[n] = Math::dot(x, load_units<Math>(source, j + n, full, D), sums[n]);
    }
    return reduce_each(sums, vadd);
}

// scores [rows][Scores<Math>::kRow] of one tile. Past Lk they are 0: masked like any hidden key. Meanwhile memory is
// asked for 64 keys at `ahead`, if any.
template <class Math>
inline void direct_scores(const Panel& x, const Source& keys, const char* ahead, int64_t tile, int64_t D, int64_t Lk,
                          float* scores) {
    const int64_t full = D / (W * Math::kPair) * W, step = keys.row * element_size(keys.dtype);
    for (int c = 0; c < 64; c += W) {
        const int64_t j = tile * 64 + c;
        if (j + W <= Lk) {
            for (int n = 0; ahead && n < W; ++n) {
                const char* row = ahead + (c + n) * step;
                for (int64_t at = 0; at < 4 * full; at += 64) __builtin_prefetch(row + at, 0, 2);
            }
            for (int r = 0; r < x.rows; ++r) {
                vstore(scores + r * Scores<Math>::kRow + c,
                       direct_dots<Math>(x.q + r * x.ldq, keys.at(j), step, full, keys, j, D));
            }
            continue;
        }
        for (int r = 0; r < x.rows; ++r) {
            const float* q = x.q + r * x.ldq;
            float* row = scores + r * Scores<Math>::kRow + c;
            vstore(row, vzero());
            for (int n = 0; j + n < Lk; ++n) {
                Vec sum = vzero();
                for (int64_t u = 0; u < units<Math>(D); u += W) {
                    sum = Math::dot(vload(q + u), load_units<Math>(keys, j + n, u, D), sum);
                }
                row[n] = vsum(sum);
            }
        }
    }
}

// out [V * W] += weights * values over the keys of `seen`; value(n, v) is Vec v of key n, with its pair where units are
// pairs. A few columns have several sums each: one product would wait for the other.
template <class Math, int V, class Value>
inline void direct_columns(const float* weights, uint64_t seen, float* out, Value&& value) {
    constexpr int kSums = 8 / V;
    Vec acc[kSums][V];
    FASTATTN_UNROLL for (int s = 0; s < kSums; ++s) {
        FASTATTN_UNROLL for (int v = 0; v < V; ++v) acc[s][v] = s ? vzero() : vload(out + v * W);
    }
    for (int n0 = 0; n0 < 64; n0 += kSums * Math::kPair) {
        FASTATTN_UNROLL for (int s = 0; s < kSums; ++s) {
            const int n = n0 + s * Math::kPair;
            if (!(seen >> n & (Math::kPair == 2 ? 3 : 1))) continue;
            const Vec w = vset(weights[n / Math::kPair]);
            FASTATTN_UNROLL for (int v = 0; v < V; ++v) acc[s][v] = Math::dot(w, value(n, v), acc[s][v]);
        }
    }
    FASTATTN_UNROLL for (int step = 1; step < kSums; step *= 2) {
        FASTATTN_UNROLL for (int s = 0; s + step < kSums; s += 2 * step) {
            FASTATTN_UNROLL for (int v = 0; v < V; ++v) acc[s][v] = vadd(acc[s][v], acc[s + step][v]);
        }
    }
    FASTATTN_UNROLL for (int v = 0; v < V; ++v) vstore(out + v * W, acc[0][v]);
}

// value(n, v) for whole vectors from column c on: keys of the tile one after another in memory at `step` bytes. With
// each, memory is asked for the same of the tile at `ahead`.
template <class Math, int V, class Load>
inline void direct_block(const float* weights, uint64_t seen, float* out, const char* rows, const char* ahead,
                         int64_t step, int64_t c, int64_t size, Load&& load) {
    direct_columns<Math, V>(weights, seen, out, [&](int n, int v) {
        if constexpr (Math::kPair == 1) {
            __builtin_prefetch(ahead + n * step + (c + v * W) * size, 0, 2);
            return load(rows + n * step, c + v * W);
        } else {
#ifdef FASTATTN_HAS_BF16_DOT
            __builtin_prefetch(ahead + (n + v % 2) * step + (c + v / 2 * 2 * W) * size, 0, 2);
            const __m256i* even = reinterpret_cast<const __m256i*>(rows + n * step + (c + v * W) * 2);
            const __m256i* odd = reinterpret_cast<const __m256i*>(rows + (n + 1) * step + (c + v * W) * 2);
            const __m256i low = seen >> n & 1 ? _mm256_loadu_si256(even) : __m256i{};
            const __m256i high = seen >> (n + 1) & 1 ? _mm256_loadu_si256(odd) : __m256i{};
            return pair_bits(low, high);
#endif
        }
    });
}

// out [rows][ldo] += weights * values of one tile; keys outside `seen` are not read. Meanwhile memory is asked for 64
// keys at `ahead`, if any.
template <class Math>
inline void direct_values(const Panel& x, const float* weights, const Source& values, const char* ahead, uint64_t seen,
                          int64_t tile, int64_t cols) {
    const char* rows = values.at(tile * 64);
    const int64_t size = element_size(values.dtype), step = values.row * size;
    if (!ahead) ahead = rows;
    for (int r = 0; r < x.rows; ++r) {
        const float* w = weights + r * Scores<Math>::kRow;
        float* out = x.out + r * x.ldo;
        int64_t c = 0;
        with_loader(values.dtype, [&](auto load) {
            for (; c + 8 * W <= cols; c += 8 * W)
                direct_block<Math, 8>(w, seen, out + c, rows, ahead, step, c, size, load);
            for (; c + 4 * W <= cols; c += 4 * W)
                direct_block<Math, 4>(w, seen, out + c, rows, ahead, step, c, size, load);
            for (; c + 2 * W <= cols; c += 2 * W)
                direct_block<Math, 2>(w, seen, out + c, rows, ahead, step, c, size, load);
            for (; c + W <= cols; c += W) direct_block<Math, 1>(w, seen, out + c, rows, ahead, step, c, size, load);
        });
        if (c == cols) continue;
        direct_columns<Math, 1>(w, seen, out + c, [&](int n, int) {
            const int lanes_left = static_cast<int>(cols - c);
            const Vec even = seen >> n & 1 ? values.load(tile * 64 + n, c, lanes_left) : vzero();
            if constexpr (Math::kPair == 1) {
                return even;
            } else {
#ifdef FASTATTN_HAS_BF16_DOT
                return pair_bf16(even, seen >> (n + 1) & 1 ? values.load(tile * 64 + n + 1, c, lanes_left) : vzero());
#endif
            }
        });
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
