// The products of gemm.h by matrix tiles: blocks of 32 rows and one panel of columns.
#pragma once
#include "operands.h"

namespace fastattn {
namespace FASTATTN_ISA {

// An element is the sum of P bf16 numbers: 1 for bf16, 2 hold an fp16, 3 an fp32. Of the products of parts those of
// order 2^-25 and below are left out; the largest come last, since sums are short while the others are added. Each of
// the others shares a part with the one before it, which stays in its tiles.
template <int P>
struct Parts {
    static constexpr int kPair = 2;
    static constexpr int kParts = P;
    static constexpr bool kTiles = true;
    static constexpr bool kFastExp = P == 1;
    // W elements of a row of the dtype that P stands for
    static Vec load(const char* row, int64_t c) {
        return P == 3   ? vload(reinterpret_cast<const float*>(row) + c)
               : P == 2 ? load_fp16(reinterpret_cast<const uint16_t*>(row) + c)
                        : load_bf16(reinterpret_cast<const uint16_t*>(row) + c);
    }
    struct Product {
        int a, b;
    };
    static constexpr int kProducts = P == 3 ? 6 : P * P;
    static constexpr Product kOrder[3][6] = {
        {{0, 0}}, {{1, 0}, {1, 1}, {0, 1}, {0, 0}}, {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}}};
    static constexpr Product product(int i) { return kOrder[P - 1][i]; }
};

// Adds products [first, last) of the parts of A and B over a segment to R x N tiles of sums in registers 2 r + n; A
// goes through registers 4 and 5, B through 6 and 7.
template <class Math, int R, int N, int first, int last>
FASTATTN_INLINE void add_products(const Rows& x, const Segment& segment, const float* b, int64_t b_steps) {
    const int64_t a_bytes = x.row * 4, b_bytes = N * W * 4, b_part = b_steps / Math::kParts * N * W;
    const float *as = x.a + segment.a_at, *bs = b + segment.b_at * N * W;
    for (int64_t s = segment.steps; s > 0; s -= 16) {
        FASTATTN_UNROLL for (int i = first; i < last; ++i) {
            const auto [a_of, b_of] = Math::product(i);
            if (i == first || a_of != Math::product(i - 1).a) {
                FASTATTN_TILE_LOAD(4, as + a_of * x.part, a_bytes);
                if (R == 2) FASTATTN_TILE_LOAD(5, as + a_of * x.part + 16 * x.row, a_bytes);
            }
            if (i == first || b_of != Math::product(i - 1).b) {
                FASTATTN_TILE_LOAD(6, bs + b_of * b_part, b_bytes);
                if (N == 2) FASTATTN_TILE_LOAD(7, bs + b_of * b_part + W, b_bytes);
            }
            FASTATTN_TILE_DOT(0, 4, 6);
            if (N == 2) FASTATTN_TILE_DOT(1, 4, 7);
            if (R == 2) FASTATTN_TILE_DOT(2, 5, 6);
            if (R == 2 && N == 2) FASTATTN_TILE_DOT(3, 5, 7);
        }
        as += 16;
        bs += 16 * N * W;
    }
}

// Sums from zero or from `c`.
template <class Math, int R, int N, bool kFromC>
FASTATTN_INLINE void tile_sums(const Rows& x, const Segment* segments, int count, const float* b, int64_t b_steps,
                               const float* c, int64_t ldc) {
    if constexpr (kFromC) {
        FASTATTN_TILE_LOAD(0, c, ldc * 4);
        if (N == 2) FASTATTN_TILE_LOAD(1, c + W, ldc * 4);
        if (R == 2) FASTATTN_TILE_LOAD(2, c + W * ldc, ldc * 4);
        if (R == 2 && N == 2) FASTATTN_TILE_LOAD(3, c + W * ldc + W, ldc * 4);
    } else {
        FASTATTN_TILE_ZERO(0);
        if (N == 2) FASTATTN_TILE_ZERO(1);
        if (R == 2) FASTATTN_TILE_ZERO(2);
        if (R == 2 && N == 2) FASTATTN_TILE_ZERO(3);
    }
    constexpr int kLast = Math::kProducts - 1;
    if constexpr (kLast > 0) {
        for (int i = 0; i < count; ++i) add_products<Math, R, N, 0, kLast>(x, segments[i], b, b_steps);
    }
    for (int i = 0; i < count; ++i) add_products<Math, R, N, kLast, kLast + 1>(x, segments[i], b, b_steps);
}

template <int R, int N>
FASTATTN_INLINE void store_tiles(float* c, int64_t ldc) {
    FASTATTN_TILE_STORE(0, c, ldc * 4);
    if (N == 2) FASTATTN_TILE_STORE(1, c + W, ldc * 4);
    if (R == 2) FASTATTN_TILE_STORE(2, c + W * ldc, ldc * 4);
    if (R == 2 && N == 2) FASTATTN_TILE_STORE(3, c + W * ldc + W, ldc * 4);
}

// `rows` of the R * 16 rows of a block; A has all of them, C need not.
template <class Math, int R, int N, Store store>
inline void tile_block(int rows, const Rows& x, const Segment* segments, int count, const float* b, int64_t b_steps,
                       float* c, int64_t ldc, const float* decay) {
    const bool whole = rows == R * W;
    if (store == Store::kWrite && whole) {
        tile_sums<Math, R, N, false>(x, segments, count, b, b_steps, c, ldc);
        return store_tiles<R, N>(c, ldc);
    }
    if (store == Store::kAdd && whole && Math::kParts == 1) {
        tile_sums<Math, R, N, true>(x, segments, count, b, b_steps, c, ldc);
        return store_tiles<R, N>(c, ldc);
    }
    alignas(64) float sums[R * W][N * W];
    // A row's sums are made in the same order whether its block is whole or not.
    constexpr bool kFromC = store == Store::kAdd && Math::kParts == 1;
    for (int r = 0; kFromC && r < R * W; ++r) {
        FASTATTN_UNROLL for (int n = 0; n < N; ++n) {
            vstore(sums[r] + n * W, r < rows ? vload(c + r * ldc + n * W) : vzero());
        }
    }
    tile_sums<Math, R, N, kFromC>(x, segments, count, b, b_steps, sums[0], N * W);
    store_tiles<R, N>(sums[0], N * W);
    for (int r = 0; r < rows; ++r) {
        FASTATTN_UNROLL for (int n = 0; n < N; ++n) {
            float* at = c + r * ldc + n * W;
            Vec sum = vload(sums[r] + n * W);
            if (store == Store::kAdd && !kFromC) sum = vadd(vload(at), sum);
            if (store == Store::kRescale) sum = vfma(vload(at), vset(decay[r]), sum);
            vstore(at, sum);
        }
    }
}

template <class Math, int N, Store store>
inline void tile_blocks(int rows, Rows x, const Segment* segments, int count, const float* b, int64_t b_steps, float* c,
                        int64_t ldc, const float* decay) {
    for (; rows > 0; rows -= 2 * W) {
        if (rows > W) {
            tile_block<Math, 2, N, store>(least(rows, 2 * W), x, segments, count, b, b_steps, c, ldc, decay);
        } else {
            tile_block<Math, 1, N, store>(rows, x, segments, count, b, b_steps, c, ldc, decay);
        }
        x.a += 2 * W * x.row;
        c += 2 * W * ldc;
        if (store == Store::kRescale) decay += 2 * W;
    }
}

template <class Math, Store store>
inline void gemm_tiles(int rows, int vecs, const Rows& x, const Segment* segments, int count, const float* b,
                       int64_t b_steps, float* c, int64_t ldc, const float* decay) {
    for (; vecs >= 2; vecs -= 2) {
        tile_blocks<Math, 2, store>(rows, x, segments, count, b, b_steps, c, ldc, decay);
        b += b_steps * kPanel;
        c += kPanel;
    }
    if (vecs) tile_blocks<Math, 1, store>(rows, x, segments, count, b, b_steps, c, ldc, decay);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
