// Copies rows of a tensor into the operand layouts of gemm.h, converting the dtype on the way.
#pragma once
#include "parts.h"

namespace fastattn {
namespace FASTATTN_ISA {

// A matrix in user memory, element (r, c) at data + (r * row + c * col) * size. Rows outside [first, last) and rows
// whose bit in `seen` is 0 are read as zeros: nobody sees those keys, and they may hold NaN.
struct Source {
    const char* data;
    DType dtype;
    int64_t row, col;
    const uint64_t* seen = nullptr;  // the word of rows 64 * seen_from and on comes first
    int64_t first = 0, last = kUnbounded, seen_from = 0;
    std::atomic<bool>* large = nullptr;  // of split_nearest

    bool visible(int64_t r) const {
        return r >= first && r < last && (!seen || (seen[(r >> 6) - seen_from] >> (r & 63) & 1));
    }
    bool all_visible(int64_t r, int64_t n) const {
        if (r < first || r + n > last) return false;
        for (const int64_t end = r + n; seen && r < end;) {
            const int64_t next = least(end, (r | 63) + 1);
            const uint64_t bits = ~uint64_t{0} >> (64 - (next - r)) << (r & 63);
            if (bits & ~seen[(r >> 6) - seen_from]) return false;
            r = next;
        }
        return true;
    }
    const char* at(int64_t r) const { return data + r * row * element_size(dtype); }
    Vec load(int64_t r, int64_t c, int n) const { return load_floats(at(r), dtype, c, col, n); }
};

inline Source source_of(const TensorView& t, int64_t b, int64_t h, std::atomic<bool>* large = nullptr) {
    Source s{t.row(b, h, 0), t.dtype, t.stride[2], t.stride[3]};
    s.large = large;
    return s;
}

// Calls body with a function (row address, column) -> W consecutive elements as floats, chosen once for the dtype.
template <class Body>
inline void with_loader(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kBFloat16:
            return body(
                [](const char* row, int64_t c) { return load_bf16(reinterpret_cast<const uint16_t*>(row) + c); });
        case DType::kFloat16:
            return body(
                [](const char* row, int64_t c) { return load_fp16(reinterpret_cast<const uint16_t*>(row) + c); });
        default:
            return body([](const char* row, int64_t c) { return vload(reinterpret_cast<const float*>(row) + c); });
    }
}

// The same with a function (row address, column, W floats) that stores them as consecutive elements.
template <class Body>
inline void with_storer(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kBFloat16:
            return body([](char* row, int64_t c, Vec a) { store_bf16(reinterpret_cast<uint16_t*>(row) + c, a); });
        case DType::kFloat16:
            return body([](char* row, int64_t c, Vec a) { store_fp16(reinterpret_cast<uint16_t*>(row) + c, a); });
        default:
            return body([](char* row, int64_t c, Vec a) { vstore(reinterpret_cast<float*>(row) + c, a); });
    }
}

// Steps of a sum over `elements`: matrix tiles take 16 at once, the missing ones zero.
template <class Math>
inline int64_t steps_of(int64_t elements) {
    return Math::kTiles ? round_up(ceil_div(elements, 2), 16) : ceil_div(elements, Math::kPair);
}
// Units of a row of `elements`, all parts.
template <class Math>
inline int64_t units(int64_t elements) {
    return Math::kParts * steps_of<Math>(elements);
}

// W units of each part of row r from unit u on, of a row of `cols` elements; zero past its end.
template <class Math>
FASTATTN_INLINE void load_units(const Source& x, int64_t r, int64_t u, int64_t cols, Vec out[Math::kParts]) {
    const auto lanes_left = [cols](int64_t c) {
        return static_cast<int>(most<int64_t>(0, least<int64_t>(W, cols - c)));
    };
    if constexpr (Math::kPair == 1) {
        out[0] = x.load(r, u, lanes_left(u));
    } else {
#ifdef FASTATTN_HAS_BF16_DOT
        const int64_t c = 2 * u;
        const bool whole = x.col == 1 && c + 2 * W <= cols;
        if (Math::kParts == 1 && whole) {
            out[0] = vload(reinterpret_cast<const uint16_t*>(x.at(r)) + c);
            return;
        }
        Vec first, second;
        if constexpr (Math::kTiles) {
            if (whole) {
                first = Math::load(x.at(r), c);
                second = Math::load(x.at(r), c + W);
            }
        }
        if (!Math::kTiles || !whole) {
            const int left = lanes_left(c), right = lanes_left(c + W);
            first = left ? x.load(r, c, left) : vzero();
            second = right ? x.load(r, c + W, right) : vzero();
        }
        if constexpr (Math::kParts == 1) {
            out[0] = narrow_bf16(first, second);
        } else {
            Vec a[Math::kParts], b[Math::kParts];
            split_nearest<Math::kParts>(first, x.large, a);
            split_nearest<Math::kParts>(second, x.large, b);
            FASTATTN_UNROLL for (int part = 0; part < Math::kParts; ++part) {
                out[part] = pair_high_halves(a[part], b[part]);  // partners as in store_neighbours
            }
        }
#endif
    }
}
template <class Math>
FASTATTN_INLINE Vec load_units(const Source& x, int64_t r, int64_t u, int64_t cols) {
    static_assert(Math::kParts == 1, "");
    Vec out[1];
    load_units<Math>(x, r, u, cols, out);
    return out[0];
}

// A operand: n rows from r0 as [n][ld] units, each row part by part, ld = round_up(units(cols), W); times `sign` (1 or
// -1).
template <class Math>
inline void pack_rows(const Source& x, int64_t r0, int64_t n, int64_t cols, float sign, float* out) {
    const int64_t count = steps_of<Math>(cols), ld = round_up(units<Math>(cols), W);
    // Where every row is seen and already made of units, the loop asks nothing row by row.
    const bool plain =
        sign > 0 && x.col == 1 && Math::kParts == 1 && Math::kPair * element_size(x.dtype) == 4 && x.all_visible(r0, n);
    const int64_t copied = plain ? cols / Math::kPair / W * W : 0, step = x.row * element_size(x.dtype);
    const char* row = x.at(r0);
    for (int64_t r = 0; r < n; ++r, row += step) {
        for (int64_t u = 0; u < copied; u += W) vstore(out + r * ld + u, vload(row + 4 * u));
    }
    for (int64_t r = 0; r < n && copied < count; ++r) {
        const bool visible = x.visible(r0 + r);
        for (int64_t u = copied; u < count; u += W) {
            Vec parts[Math::kParts];
            if (visible) load_units<Math>(x, r0 + r, u, cols, parts);
            FASTATTN_UNROLL for (int part = 0; part < Math::kParts; ++part) {
                Vec a = visible ? parts[part] : vzero();
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
                vstore(out + r * ld + part * count + u, a);
            }
        }
    }
}

// Columns [u, u + W) of W rows as units, transposed, to rows of `out`.
template <class Load>
FASTATTN_INLINE void transpose_block(int64_t rows, float* out, Load&& load) {
    Vec block[W];
    FASTATTN_UNROLL for (int i = 0; i < W; ++i) block[i] = load(i);
    transpose(block);
    if (rows == W) {
        FASTATTN_UNROLL for (int i = 0; i < W; ++i) vstore(out + i * kPanel, block[i]);
    } else {
        for (int64_t i = 0; i < rows; ++i) vstore(out + i * kPanel, block[i]);
    }
}

// B operand of a product summed over columns: rows [r0, r0 + n) become the columns of one panel [part][steps][kPanel],
// n <= kPanel.
template <class Math>
inline void pack_transposed(const Source& x, int64_t r0, int64_t n, int64_t cols, float* out) {
    const int64_t count = steps_of<Math>(cols);
    for (int half = 0; half < 2; ++half) {
        const int64_t first = r0 + half * W;
        if (n <= half * W) {
            for (int64_t u = 0; u < count * Math::kParts; ++u) vstore(out + u * kPanel + half * W, vzero());
            continue;
        }
        const bool whole = n >= (half + 1) * W && x.col == 1 && x.all_visible(first, W);
        int64_t u = 0;
        if (whole) {
            const char* rows = x.at(first);
            const int64_t step = x.row * element_size(x.dtype);
            if constexpr (Math::kPair == 1) {
                with_loader(x.dtype, [&](auto load) {
                    for (; u + W <= cols; u += W) {
                        transpose_block(W, out + u * kPanel + half * W, [&](int i) {
                            // Strided reads defeat the hardware prefetcher: ask for the panel after this one.
                            __builtin_prefetch(rows + (i + kPanel) * step + u * element_size(x.dtype), 0, 2);
                            return load(rows + i * step, u);
                        });
                    }
                });
            } else if constexpr (Math::kParts == 1) {
                for (; 2 * (u + W) <= cols; u += W) {
                    transpose_block(W, out + u * kPanel + half * W, [&](int i) {
                        __builtin_prefetch(rows + (i + 2 * kPanel) * step + 4 * u, 0, 2);
                        return vload(rows + i * step + 4 * u);
                    });
                }
            }
        }
        if constexpr (Math::kParts == 1) {
            for (; u < count; u += W) {
                transpose_block(least<int64_t>(W, count - u), out + u * kPanel + half * W, [&](int i) {
                    return half * W + i < n && x.visible(first + i) ? load_units<Math>(x, first + i, u, cols) : vzero();
                });
            }
        } else {
            for (; u < count; u += W) {
                Vec block[W][Math::kParts];
                for (int i = 0; i < W; ++i) {
                    const bool visible = half * W + i < n && x.visible(first + i);
                    for (int part = 0; part < Math::kParts; ++part) block[i][part] = vzero();
                    if (visible) load_units<Math>(x, first + i, u, cols, block[i]);
                }
                for (int part = 0; part < Math::kParts; ++part) {
                    transpose_block(W, out + (part * count + u) * kPanel + half * W,
                                    [&](int i) { return block[i][part]; });
                }
            }
        }
    }
}

#ifdef FASTATTN_HAS_BF16_DOT
// Units of rows r and `partner`, each zero unless asked for, over the W columns from c on.
template <class Math>
FASTATTN_INLINE void load_row_pair(const Source& x, int64_t r, bool even, int64_t partner, bool odd, int64_t c,
                                   int64_t cols, Vec out[Math::kParts]) {
    Vec first = vzero(), second = first;
    if (x.col == 1 && c + W <= cols) {
        if (even) first = Math::load(x.at(r), c);
        if (odd) second = Math::load(x.at(partner), c);
    } else {
        const int n = static_cast<int>(least<int64_t>(W, cols - c));
        if (even) first = x.load(r, c, n);
        if (odd) second = x.load(partner, c, n);
    }
    if constexpr (Math::kParts == 1) {
        out[0] = pair_bf16(first, second);
    } else {
        Vec a[Math::kParts], b[Math::kParts];
        split_nearest<Math::kParts>(first, x.large, a);
        split_nearest<Math::kParts>(second, x.large, b);
        FASTATTN_UNROLL for (int part = 0; part < Math::kParts; ++part) out[part] = pair_high_halves(a[part], b[part]);
    }
}

// A operand of a product summed over rows, for matrix tiles: column c of rows [r0, r0 + n) is row c of units, part by
// part, [round_up(cols, W)][parts][ld / parts], from step `at` on. Neighbouring rows are partners. n is a multiple
// of 32.
template <class Math>
inline void pack_columns(const Source& x, int64_t r0, int64_t n, int64_t cols, float* out, int64_t ld, int64_t at) {
    for (int64_t c = 0; c < cols; c += W) {
        for (int64_t s = 0; s < n / 2; s += W) {
            Vec block[Math::kParts][W];
            for (int i = 0; i < W; ++i) {
                const int64_t r = r0 + 2 * (s + i);
                Vec parts[Math::kParts];
                load_row_pair<Math>(x, r, x.visible(r), r + 1, x.visible(r + 1), c, cols, parts);
                FASTATTN_UNROLL for (int part = 0; part < Math::kParts; ++part) block[part][i] = parts[part];
            }
            for (int part = 0; part < Math::kParts; ++part) {
                transpose(block[part]);
                for (int i = 0; i < W; ++i) {
                    vstore(out + (c + i) * ld + part * (ld / Math::kParts) + at + s, block[part][i]);
                }
            }
        }
    }
}
#endif

// B operand of a product summed over rows: rows [r0, r0 + n) as steps [at, at + steps_of(n)) of each part of panels
// [panel][b_steps][kPanel] over round_up(cols, W) columns; missing rows and columns are zero. By matrix tiles n is a
// multiple of 32; of several parts, rows of 32 are partners as in store_neighbours.
template <class Math>
inline void pack_summed(const Source& x, int64_t r0, int64_t n, int64_t cols, float* out, int64_t b_steps, int64_t at) {
    // Whole units of rows that exist are packed by themselves: then nobody asks row by row.
    constexpr int64_t kUnit = Math::kTiles ? 32 : Math::kPair;
    const int64_t whole = most<int64_t>(0, x.last - r0) / kUnit * kUnit;
    if (whole > 0 && whole < n) {
        pack_summed<Math>(x, r0, whole, cols, out, b_steps, at);
        return pack_summed<Math>(x, r0 + whole, n - whole, cols, out, b_steps, at + steps_of<Math>(whole));
    }
    const int64_t vecs = ceil_div(cols, W), count = steps_of<Math>(n);
    [[maybe_unused]] const int64_t step = x.row * element_size(x.dtype);
    const int64_t direct = x.col == 1 && x.all_visible(r0, n) ? cols / W : 0;
    const auto target = [=](int64_t s, int64_t c, int part = 0) {
        const int64_t width = c / 2 * 2 + 1 == vecs ? W : kPanel;
        return out + c / 2 * kPanel * b_steps + (part * (b_steps / Math::kParts) + at + s) * width + c % 2 * W;
    };
    if constexpr (Math::kPair == 1) {
        with_loader(x.dtype, [&](auto load) {
            for (int64_t s = 0; s < count && direct; ++s) {
                const char* row = x.at(r0 + s);
                for (int64_t c = 0; c < direct; ++c) vstore(target(s, c), load(row, c * W));
            }
        });
        for (int64_t s = 0; s < count; ++s) {
            const bool visible = x.visible(r0 + s);
            for (int64_t c = direct; c < vecs; ++c) {
                const int lanes_left = static_cast<int>(least<int64_t>(W, cols - c * W));
                vstore(target(s, c), visible ? x.load(r0 + s, c * W, lanes_left) : vzero());
            }
        }
    } else {
#ifdef FASTATTN_HAS_BF16_DOT
        if constexpr (Math::kParts > 1) {
            for (int64_t s = 0; s < count; ++s) {
                const int64_t r = r0 + s / W * 2 * W + s % W, partner = r + kPartner<Math>;
                const bool even = x.visible(r), odd = x.visible(partner);
                for (int64_t c = 0; c < vecs; ++c) {
                    Vec parts[Math::kParts];
                    load_row_pair<Math>(x, r, even, partner, odd, c * W, cols, parts);
                    FASTATTN_UNROLL for (int part = 0; part < Math::kParts; ++part) {
                        vstore(target(s, c, part), parts[part]);
                    }
                }
            }
            return;
        }
        for (int64_t s = 0; s < count; ++s) {
            const int64_t r = r0 + 2 * s;
            const bool has_odd = 2 * s + 1 < n, even = x.visible(r), odd = has_odd && x.visible(r + 1);
            const char* row = x.at(r);
            int64_t c = 0;
            for (; c + 2 <= direct && has_odd; c += 2) {
                Vec pairs[2];
                for (const char* ahead : {row, row + step}) __builtin_prefetch(ahead + 64 * step + c * W * 2, 0, 2);
                interleave_rows(row + c * W * 2, row + step + c * W * 2, pairs);
                vstore(target(s, c), pairs[0]);
                vstore(target(s, c + 1), pairs[1]);
            }
            for (; c < vecs; ++c) {
                if (c < direct) {
                    const __m256i* p = reinterpret_cast<const __m256i*>(row + c * W * 2);
                    const __m256i* q = reinterpret_cast<const __m256i*>(row + step + c * W * 2);
                    vstore(target(s, c), pair_bits(_mm256_loadu_si256(p), has_odd ? _mm256_loadu_si256(q) : __m256i{}));
                    continue;
                }
                const int lanes_left = static_cast<int>(least<int64_t>(W, cols - c * W));
                vstore(target(s, c), pair_bf16(even ? x.load(r, c * W, lanes_left) : vzero(),
                                               odd ? x.load(r + 1, c * W, lanes_left) : vzero()));
            }
        }
#endif
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
