// Copies rows of a tensor into the operand layouts of gemm.h, converting the dtype on the way.
#pragma once
#include "gemm.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A matrix in user memory, element (r, c) at data + (r * row + c * col) * size. Rows outside [first, last) and rows whose
// bit in `seen` is 0 are read as zeros: nobody sees those keys, and they may hold NaN.
struct Source {
    const char* data;
    DType dtype;
    int64_t row, col;
    const uint64_t* seen = nullptr;  // the word of rows 64 * seen_from and on comes first
    int64_t first = 0, last = kUnbounded, seen_from = 0;

    bool visible(int64_t r) const { return r >= first && r < last && (!seen || (seen[(r >> 6) - seen_from] >> (r & 63) & 1)); }
    const char* at(int64_t r) const { return data + r * row * element_size(dtype); }
    Vec load(int64_t r, int64_t c, int n) const { return load_floats(at(r), dtype, c, col, n); }
};

inline Source source_of(const TensorView& t, int64_t b, int64_t h) {
    return {t.row(b, h, 0), t.dtype, t.stride[2], t.stride[3]};
}

template <class Math>
inline int64_t units(int64_t elements) {
    return ceil_div(elements, Math::kPair);
}

// W units of row r from unit u on, of a row of `cols` elements; zero past its end.
template <class Math>
inline Vec load_units(const Source& x, int64_t r, int64_t u, int64_t cols) {
    const auto lanes_left = [cols](int64_t c) { return static_cast<int>(most<int64_t>(0, least<int64_t>(W, cols - c))); };
    if constexpr (Math::kPair == 1) {
        return x.load(r, u, lanes_left(u));
    } else {
#ifdef FASTATTN_HAS_BF16_DOT
        const int64_t c = 2 * u;
        if (x.col == 1 && c + 2 * W <= cols) return vload(reinterpret_cast<const uint16_t*>(x.at(r)) + c);
        const int first = lanes_left(c), second = lanes_left(c + W);
        return narrow_bf16(first ? x.load(r, c, first) : vzero(), second ? x.load(r, c + W, second) : vzero());
#endif
    }
}

// A operand: n rows from r0 as [n][ld] units, ld = round_up(units(cols), W); times `sign` (1 or -1).
template <class Math>
inline void pack_rows(const Source& x, int64_t r0, int64_t n, int64_t cols, float sign, float* out) {
    const int64_t count = units<Math>(cols), ld = round_up(count, W);
    for (int64_t r = 0; r < n; ++r) {
        const bool visible = x.visible(r0 + r);
        for (int64_t u = 0; u < count; u += W) {
            Vec a = visible ? load_units<Math>(x, r0 + r, u, cols) : vzero();
            if (sign < 0) {
                if constexpr (Math::kPair == 1) {
                    a = vmul(a, vset(-1.0f));
                } else {
#ifdef FASTATTN_HAS_BF16_DOT
                    a = _mm512_castsi512_ps(
                        _mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(static_cast<int>(0x80008000u))));
#endif
                }
            }
            vstore(out + r * ld + u, a);
        }
    }
}

// B operand of a product summed over columns: rows [r0, r0 + n) become the columns of one panel [units][kPanel], n <= kPanel.
template <class Math>
inline void pack_transposed(const Source& x, int64_t r0, int64_t n, int64_t cols, float* out) {
    const int64_t count = units<Math>(cols);
    for (int half = 0; half < 2; ++half) {
        for (int64_t u = 0; u < count; u += W) {
            Vec block[W];
            for (int i = 0; i < W; ++i) {
                const int64_t r = half * W + i;
                block[i] = r < n && x.visible(r0 + r) ? load_units<Math>(x, r0 + r, u, cols) : vzero();
            }
            transpose(block);
            const int64_t rows = least<int64_t>(W, count - u);
            for (int64_t i = 0; i < rows; ++i) vstore(out + (u + i) * kPanel + half * W, block[i]);
        }
    }
}

// B operand of a product summed over rows: rows [r0, r0 + n) as steps [at, at + units(n)) of panels
// [panel][b_steps][kPanel] over round_up(cols, W) columns; missing rows and columns are zero.
template <class Math>
inline void pack_summed(const Source& x, int64_t r0, int64_t n, int64_t cols, float* out, int64_t b_steps, int64_t at) {
    const int64_t vecs = ceil_div(cols, W), count = units<Math>(n);
    for (int64_t s = 0; s < count; ++s) {
        const int64_t r = r0 + s * Math::kPair;
        const bool even = x.visible(r), odd = Math::kPair == 2 && s * 2 + 1 < n && x.visible(r + 1);
        for (int64_t c = 0; c < vecs; ++c) {
            const int64_t width = c / 2 * 2 + 1 == vecs ? W : kPanel;
            const int lanes_left = static_cast<int>(least<int64_t>(W, cols - c * W));
            Vec a;
            if constexpr (Math::kPair == 1) {
                a = even ? x.load(r, c * W, lanes_left) : vzero();
            } else {
#ifdef FASTATTN_HAS_BF16_DOT
                const __m256i zero = _mm256_setzero_si256();
                const bool direct = x.col == 1 && lanes_left == W;
                const auto bits = [&](int64_t row) {
                    const uint16_t* p = reinterpret_cast<const uint16_t*>(x.at(row)) + c * W;
                    return direct ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                  : bf16_bits(x.load(row, c * W, lanes_left));
                };
                const __m512i low = _mm512_cvtepu16_epi32(even ? bits(r) : zero);
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd ? bits(r + 1) : zero), 16);
                a = _mm512_castsi512_ps(_mm512_or_si512(low, high));
#endif
            }
            vstore(out + c / 2 * kPanel * b_steps + (at + s) * width + c % 2 * W, a);
        }
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
