// From q.k to the exponents of weights: softcap, bias, ALiBi, what is hidden, and which weights dropout keeps.
// A weight is 2^(s * slope - top): s is the score q.k, or with EXTRAS the logit. Rows of accumulators are queries, or
// keys (TRANSPOSED).
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/arguments.h"
#include "cuda/tile_sm80.h"

namespace fastattn::cuda {

constexpr float kLog2eF = static_cast<float>(kLog2e);
// Below every score: a row that has seen nothing yet has this in place of -inf, and differences of it are no NaN.
constexpr float kLowest = -3.4e38f;
// From here on the rounding of a largest exponent could pass for a weight: scaled scores are rounded like it first.
constexpr float kHuge = 67108864.0f;

__device__ __forceinline__ bool is_huge(float top) { return fabsf(top) >= kHuge && fabsf(top) < -kLowest; }

// s * slope + minus_top; HUGE: minus_top may be huge. Forward and backward agree on every weight of a row.
template <bool HUGE>
__device__ __forceinline__ float exponent(float s, float slope, float minus_top) {
    if (HUGE && is_huge(minus_top)) return multiply(s, slope) + minus_top;
    return fused_multiply_add(s, slope, minus_top);
}

// Index in the tile of element r of an accumulator: its row and column.
__device__ __forceinline__ int row_of(int m, int r) { return m * 16 + r / 2 * 8 + lane_index() / 4; }
__device__ __forceinline__ int column_of(int n, int r) { return n * 8 + lane_index() % 4 * 2 + r % 2; }

// tanh(x), and 1 - tanh(x)^2 without cancellation. Near 0 a polynomial (Cephes), where 1 - e loses digits.
__device__ __forceinline__ float tanh_of(float x, float& derivative) {
    const float square = x * x, e = exp2_approx(fabsf(x) * -2.8853900817779268f);
    float poly = 2.06390887954e-2f - 5.70498872745e-3f * square;
    poly = (poly * square - 5.37397155531e-2f) * square + 1.33314422036e-1f;
    const float small = x + x * square * (poly * square - 3.33332819422e-1f), inverse = reciprocal_approx(1.0f + e);
    const float large = (1.0f - e) * inverse;
    derivative = 4.0f * e * inverse * inverse;
    return fabsf(x) < 0.625f ? small : x < 0.0f ? -large : large;
}

// The options of one head that change scores.
template <DType dtype>
struct Options {
    const Arguments& a;
    const char* bias;
    float slope;

    __device__ Options(const Arguments& arguments, int b, int h) : a(arguments), bias(nullptr), slope(0.0f) {
        if (a.bias) bias = a.bias + (b * a.bias_stride[0] + h * a.bias_stride[1]) * (a.bias_fp32 ? 4 : 2);
        if (a.slopes) slope = a.slopes[b * a.slopes_batch + h];
    }

    // Scores s of the tile at query i0 and key j0 become logits; damp: the derivative of the softcap. What lies past
    // the ends of the sequences is hidden later and takes the values of the last query and key.
    template <bool TRANSPOSED, int MB, int NB>
    __device__ void apply(float (&s)[MB][NB][4], float (&damp)[MB][NB][4], int i0, int j0) const {
        if (a.softcap > 0.0f) {
            for_each(
                s, [&](float& x, int m, int n, int r) { x = a.softcap * tanh_of(x * a.scale_by_cap, damp[m][n][r]); });
        } else {
            for_each(s, [&](float& x, int m, int n, int r) {
                x = multiply(x, a.size);
                damp[m][n][r] = 1.0f;
            });
        }
        const auto query = [&](int m, int n, int r) {
            const int i = i0 + (TRANSPOSED ? column_of(n, r) : row_of(m, r));
            return i < a.Lq ? i : a.Lq - 1;
        };
        const auto key = [&](int m, int n, int r) {
            const int j = j0 + (TRANSPOSED ? row_of(m, r) : column_of(n, r));
            return j < a.Lk ? j : a.Lk - 1;
        };
        if (a.slopes) {
            for_each(s, [&](float& x, int m, int n, int r) {
                const int i = query(m, n, r), zero = i + (a.diagonal ? a.diagonal[i] : a.Lk - a.Lq);
                x = fused_multiply_add(-slope, fabsf(static_cast<float>(zero - key(m, n, r))), x);
            });
        }
        if (a.bias) {
            for_each(s, [&](float& x, int m, int n, int r) {
                const int64_t at = query(m, n, r) * a.bias_stride[2] + key(m, n, r) * a.bias_stride[3];
                const float y = a.bias_fp32 ? reinterpret_cast<const float*>(bias)[at]
                                            : unpack_low<dtype>(reinterpret_cast<const uint16_t*>(bias)[at]);
                // Hidden keys may hold NaN: replaced, not added to. The most negative finite bias hides nothing.
                x = y == -infinity() ? y : fmaxf(x + y, kLowest / 2);
            });
        }
    }
};

// -inf for the scores that band, plan, or the ends of the sequences hide. i0, j0: query and key of element (0, 0), in
// the tile of the plan with these bits. Rows are queries.
template <int MB, int NB>
__device__ __forceinline__ void hide(float (&s)[MB][NB][4], const Arguments& a, int i0, int j0, int bits) {
    const uint64_t* words = bits < 0 ? nullptr : a.words + int64_t{bits} * kTile;
#pragma unroll
    for (int m = 0; m < MB; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + row_of(m, 2 * half);
            uint64_t seen = i < a.Lq ? band_bits(i, a.lo, a.hi, a.Lk, j0) : 0;
            if (words) seen &= words[i % kTile] >> j0 % kTile;
            seen >>= column_of(0, 0);
#pragma unroll
            for (int n = 0; n < NB; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (!(seen >> (8 * n + e) & 1)) s[m][n][2 * half + e] = -infinity();
        }
}

// The same where rows are keys.
template <int NB>
__device__ __forceinline__ void hide_keys(float (&s)[1][NB][4], const Arguments& a, int i0, int j0, int bits) {
    const uint64_t* words = bits < 0 ? nullptr : a.words + int64_t{bits} * kTile + i0 % kTile;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = column_of(n, e), i = i0 + column;
            const uint64_t word = words ? words[column] : ~uint64_t{0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int j = j0 + row_of(0, 2 * half);
                const bool visible = (j >= i + a.lo) & (j <= i + a.hi) & (i < a.Lq) & (j < a.Lk) & (word >> j % kTile);
                if (!visible) s[0][n][2 * half + e] = -infinity();
            }
        }
}

// Bits 2n and 2n + 1: whether any of the warp's rows sees the two columns of accumulator n that the lane holds.
template <int MB, int NB>
__device__ __forceinline__ uint32_t alive_columns(const float (&s)[MB][NB][4]) {
    uint32_t alive = 0;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            bool any = false;
#pragma unroll
            for (int m = 0; m < MB; ++m) any = any || s[m][n][e] != -infinity() || s[m][n][2 + e] != -infinity();
            alive |= uint32_t{any} << (2 * n + e);
        }
    for (int lanes = 4; lanes < 32; lanes *= 2) alive |= shuffle_xor(alive, lanes);
    return alive;
}

// Philox4x32-10 (Salmon et al., SC 2011): bit l is set iff weight (i, 4 * keys + l) is kept.
__device__ __forceinline__ uint32_t kept_of_four(const Arguments& a, uint64_t seed, uint32_t offset, int head, int i,
                                                 int keys) {
    uint32_t c0 = keys, c1 = i, c2 = head, c3 = offset;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        const uint32_t high = multiply_high(0xCD9E8D57u, c2) ^ c1 ^ k0, low = 0xCD9E8D57u * c2;
        c2 = multiply_high(0xD2511F53u, c0) ^ c3 ^ k1;
        c3 = 0xD2511F53u * c0;
        c0 = high;
        c1 = low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return uint32_t{c0 >= a.threshold} | uint32_t{c1 >= a.threshold} << 1 | uint32_t{c2 >= a.threshold} << 2 |
           uint32_t{c3 >= a.threshold} << 3;
}

// Bit 4n + r of kept[m]: element r of accumulator [m][n] is kept. 16 x 8 elements are 32 draws of four: one per lane.
template <bool TRANSPOSED, int MB, int NB>
__device__ __forceinline__ void kept_elements(uint32_t (&kept)[MB], const Arguments& a, int head, int i0, int j0) {
    static_assert(NB <= 8, "a word has room for 8 accumulators");
    const uint64_t seed = a.rng ? a.rng[0] : a.seed;
    const uint32_t offset = static_cast<uint32_t>(a.rng ? a.rng[1] : a.offset);
    const int lane = lane_index();
#pragma unroll 1
    for (int m = 0; m < MB; ++m) {
        // Lane l draws for query l / 2 and four of 8 keys, or (transposed) for query l / 4 and four of 16 keys.
        uint32_t drawn = 0;
#pragma unroll 1
        for (int n = 0; n < NB; ++n) {
            const int i = TRANSPOSED ? i0 + 8 * n + lane / 4 : i0 + 16 * m + lane / 2;
            const int j = TRANSPOSED ? j0 + 16 * m + lane % 4 * 4 : j0 + 8 * n + lane % 2 * 4;
            drawn |= kept_of_four(a, seed, offset, head, i, j / 4) << (4 * n);
        }
        kept[m] = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int row = row_of(0, r), column = column_of(0, r);
            const int source = TRANSPOSED ? column * 4 + row / 4 : row * 2 + column / 4;
            const uint32_t bits = from_lane(static_cast<int>(drawn), source) >> (TRANSPOSED ? row : column) % 4;
            kept[m] |= (bits & 0x11111111u) << r;
        }
    }
}

}  // namespace fastattn::cuda
