// Small matrix products on packed operands, the only arithmetic of attention that counts. One step multiplies one unit
// of A, broadcast, with W units of B.
#pragma once
#include "operands.h"
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
#include "gemm_tiles.h"
#endif

namespace fastattn {
namespace FASTATTN_ISA {

template <class Math, int R, int N, Store store>
inline void register_tile(const Rows& x, const Segment* segments, int count, const float* b, int64_t b_step, float* c,
                          int64_t ldc, const float* decay) {
    Vec acc[R][N];
    FASTATTN_UNROLL for (int r = 0; r < R; ++r) {
        FASTATTN_UNROLL for (int n = 0; n < N; ++n) { acc[r][n] = vzero(); }
    }
    const int64_t row = x.row, step = x.step;
    for (int i = 0; i < count; ++i) {
        // One pointer for every third row: base + {0, 1, 2} * row are addressing modes.
        const float* a[(R + 2) / 3];
        FASTATTN_UNROLL for (int r = 0; r < R; r += 3) a[r / 3] = x.a + segments[i].a_at * step + r * row;
        const float* bs = b + segments[i].b_at * b_step;
        for (int64_t s = segments[i].steps; s > 0; --s) {
            // A panel streams from the second-level cache, faster than the hardware prefetcher follows.
            FASTATTN_UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(bs + 12 * b_step + n * W);
            Vec bv[N];
            FASTATTN_UNROLL for (int n = 0; n < N; ++n) bv[n] = vload(bs + n * W);
            FASTATTN_UNROLL for (int r = 0; r < R; ++r) {
                const Vec av = vset(a[r / 3][r % 3 * row]);
                FASTATTN_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = Math::dot(av, bv[n], acc[r][n]);
            }
            FASTATTN_UNROLL for (int r = 0; r < R; r += 3) a[r / 3] += step;
            bs += b_step;
        }
    }
    FASTATTN_UNROLL for (int r = 0; r < R; ++r) {
        FASTATTN_UNROLL for (int n = 0; n < N; ++n) {
            // What was there is added last: short sums first keep the rounding small.
            float* at = c + r * ldc + n * W;
            if (store == Store::kAdd) acc[r][n] = vadd(vload(at), acc[r][n]);
            if (store == Store::kRescale) acc[r][n] = vfma(vload(at), vset(decay[r]), acc[r][n]);
            vstore(at, acc[r][n]);
        }
    }
}

template <class Math, int N, Store store, int kHeight>
inline void tile_rows(int rows, Rows x, const Segment* segments, int count, const float* b, int64_t b_step, float* c,
                      int64_t ldc, const float* decay) {
    for (; rows >= kHeight; rows -= kHeight) {
        register_tile<Math, kHeight, N, store>(x, segments, count, b, b_step, c, ldc, decay);
        x.a += kHeight * x.row;
        c += kHeight * ldc;
        if (store == Store::kRescale) decay += kHeight;
    }
#define FASTATTN_TILE(R)                                                                                           \
    case R:                                                                                                        \
        if constexpr (R < kHeight) register_tile<Math, R, N, store>(x, segments, count, b, b_step, c, ldc, decay); \
        break;
    switch (rows) {
        FASTATTN_TILE(1)
        FASTATTN_TILE(2)
        FASTATTN_TILE(3)
        FASTATTN_TILE(4)
        FASTATTN_TILE(5)
        FASTATTN_TILE(6)
        FASTATTN_TILE(7) FASTATTN_TILE(8) FASTATTN_TILE(9) FASTATTN_TILE(10) FASTATTN_TILE(11) default : break;
    }
#undef FASTATTN_TILE
}

// kHeight is the rows of a register tile.
// C [rows, vecs * W] with B packed as panels of kPanel columns [panel][b_steps][kPanel]; an odd last Vec is a panel of
// W.
template <class Math, Store store, int kHeight = kTileRows>
inline void gemm(int rows, int vecs, const Rows& x, const Segment* segments, int count, const float* b, int64_t b_steps,
                 float* c, int64_t ldc, const float* decay = nullptr) {
    if constexpr (Math::kTiles) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
        gemm_tiles<Math, store>(rows, vecs, x, segments, count, b, b_steps, c, ldc, decay);
#endif
    } else {
        for (; vecs >= 2; vecs -= 2) {
            tile_rows<Math, 2, store, kHeight>(rows, x, segments, count, b, kPanel, c, ldc, decay);
            b += b_steps * kPanel;
            c += kPanel;
        }
        if (vecs) tile_rows<Math, 1, store, kHeight>(rows, x, segments, count, b, W, c, ldc, decay);
    }
}

// C += AB with B unpacked: whole vectors of rows `b_step` units apart.
template <class Math>
inline void gemm_unpacked(int rows, int vecs, const Rows& x, const Segment& segment, const float* b, int64_t b_step,
                          float* c, int64_t ldc) {
    for (; vecs >= 2; vecs -= 2) {
        tile_rows<Math, 2, Store::kAdd, kTileRows>(rows, x, &segment, 1, b, b_step, c, ldc, nullptr);
        b += kPanel;
        c += kPanel;
    }
    if (vecs) tile_rows<Math, 1, Store::kAdd, kTileRows>(rows, x, &segment, 1, b, b_step, c, ldc, nullptr);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
