// The one loop of linear attention, X <- factor X + a_t b_t^T, y_t = c_t^T X, by blocks of tokens: X is rounded once
// per block, and what tokens of a block bring each other is a triangle of products.
#pragma once
#include "gemm.h"
#include "linear_features.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int kBlock = 16;              // tokens: as many as the lanes of the widest vector
constexpr int kBlockVecs = kBlock / W;  // vectors whose lanes are the tokens of a block

enum class Factor { kNone, kScalar, kRows };

// X [rows][lanes] as panels of kPanel lanes, the last of W lanes where their vectors are odd.
struct Panels {
    float* x;  // panel `first`
    int64_t rows, first, last, vecs;

    // body(panel, its first lane, its vectors)
    template <class Body>
    void each(Body&& body) const {
        for (int64_t panel = first; panel < last; ++panel) {
            body(x + (panel - first) * rows * kPanel, panel * kPanel,
                 static_cast<int>(least<int64_t>(2, vecs - 2 * panel)));
        }
    }
};

// out [rows][kBlock] = A B or, unless it is the `first` part of a sum, += A B, with B [steps][kBlock].
inline void multiply(bool first, int64_t rows, const Rows& a, int64_t steps, const float* b, float* out) {
    const int count = static_cast<int>(rows);
    first ? gemm_unpacked<Fp32, Store::kWrite>(count, kBlockVecs, a, {0, 0, steps}, b, kBlock, out, kBlock)
          : gemm_unpacked<Fp32, Store::kAdd>(count, kBlockVecs, a, {0, 0, steps}, b, kBlock, out, kBlock);
}

// x [rows][cols] to out [cols][rows], both multiples of W.
inline void turn(const float* x, int64_t ldx, int64_t rows, int64_t cols, float* out, int64_t ld_out) {
    for (int64_t r = 0; r < rows; r += W) {
        for (int64_t c = 0; c < cols; c += W) {
            Vec tile[W];
            FASTATTN_UNROLL for (int i = 0; i < W; ++i) tile[i] = vload(x + (r + i) * ldx + c);
            transpose(tile);
            FASTATTN_UNROLL for (int i = 0; i < W; ++i) vstore(out + (c + i) * ld_out + r, tile[i]);
        }
    }
}

// out[i][j] = a_i . b_j, a [n][ld], b [length][kBlock]. Short sums keep the rounding small.
inline void inner_products(int64_t n, const float* a, int64_t ld, const float* b, int64_t length, float* out) {
    constexpr int64_t kShort = 32;
    for (int64_t at = 0; at < length; at += kShort) {
        multiply(at == 0, n, {a + at, ld, 1}, least(kShort, length - at), b + at * kBlock, out);
    }
}

// Rows of values of a block, packed or where the caller has them.
struct BlockLanes {
    const float* at;
    int64_t step;
};

// A block of tokens and X. What is null is not done. Past its last token a block is padded with zeros.
struct ScanBlock {
    const float *a, *c;  // [rows][kBlock]
    BlockLanes b;        // [kBlock][lanes]
    float* y;            // [kBlock][y_step]
    int64_t y_step;
    const float* pairs;  // [j][t]: a_j . c_t, decayed, of the j up to t, or (`backwards`) from t on
    bool backwards;
    const float* d;      // [lanes][kBlock]
    float* r;            // [rows][kBlock], X d
    const float* whole;  // [rows], what a block leaves of X; null is 1
};

constexpr int kTileTokens = W == 16 ? 16 : 8;  // as many sums as registers hold

// y_t += sum of pairs[j][t] b_j over j <= t, or (`backwards`) over j >= t, for kTileTokens tokens from t0 on.
template <bool backwards>
inline void add_pairs(int t0, const float* pairs, const float* b, int64_t step, Vec y[kTileTokens]) {
    pairs += t0;
    FASTATTN_UNROLL for (int j = 0; j < kBlock; ++j, b += step, pairs += kBlock) {
        const Vec value = vload(b);
        FASTATTN_UNROLL for (int t = 0; t < kTileTokens; ++t) {
            if (backwards ? t0 + t <= j : t0 + t >= j) y[t] = vfma(vset(pairs[t]), value, y[t]);
        }
    }
}
// The same for rows [kBlock][width] of x and y.
template <bool backwards>
inline void add_pairs(const float* pairs, const float* x, int64_t width, float* y) {
    for (int64_t lane = 0; lane < width; lane += W) {
        FASTATTN_UNROLL for (int t0 = 0; t0 < kBlock; t0 += kTileTokens) {
            float* at = y + t0 * width + lane;
            Vec sums[kTileTokens];
            FASTATTN_UNROLL for (int t = 0; t < kTileTokens; ++t) sums[t] = vload(at + t * width);
            add_pairs<backwards>(t0, pairs, x + lane, width, sums);
            FASTATTN_UNROLL for (int t = 0; t < kTileTokens; ++t) vstore(at + t * width, sums[t]);
        }
    }
}

// y of one vector of lanes; x is [rows], ld floats apart.
template <bool backwards>
__attribute__((noinline)) void read_tile(const ScanBlock& s, int64_t rows, const float* x, int64_t ld, int64_t lane) {
    FASTATTN_UNROLL for (int t0 = 0; t0 < kBlock; t0 += kTileTokens) {
        Vec y[kTileTokens];
        FASTATTN_UNROLL for (int t = 0; t < kTileTokens; ++t) y[t] = vzero();
        const float *state = x, *c = s.c + t0;
        for (int64_t row = 0; row < rows; ++row, state += ld, c += kBlock) {
            const Vec value = vload(state);
            FASTATTN_UNROLL for (int t = 0; t < kTileTokens; ++t) y[t] = vfma(vset(c[t]), value, y[t]);
        }
        if (s.pairs) add_pairs<backwards>(t0, s.pairs, s.b.at + lane, s.b.step, y);
        float* out = s.y + t0 * s.y_step + lane;
        FASTATTN_UNROLL for (int t = 0; t < kTileTokens; ++t) vstore(out + t * s.y_step, y[t]);
    }
}

// What a block adds to `count` rows is summed first, so that X is rounded once.
template <int count, bool fades>
inline void update_rows(const ScanBlock& s, int64_t row, float* x, int64_t ld, int64_t lane) {
    Vec sums[count];
    FASTATTN_UNROLL for (int r = 0; r < count; ++r) sums[r] = vzero();
    const float *a = s.a + row * kBlock, *b = s.b.at + lane;
    FASTATTN_UNROLL for (int t = 0; t < kBlock; ++t, b += s.b.step) {
        const Vec value = vload(b);
        FASTATTN_UNROLL for (int r = 0; r < count; ++r) sums[r] = vfma(vset(a[r * kBlock + t]), value, sums[r]);
    }
    FASTATTN_UNROLL for (int r = 0; r < count; ++r) {
        float* at = x + (row + r) * ld;
        vstore(at, fades ? vfma(vset(s.whole[row + r]), vload(at), sums[r]) : vadd(vload(at), sums[r]));
    }
}
template <bool fades>
__attribute__((noinline)) void update_tile(const ScanBlock& s, int64_t rows, float* x, int64_t ld, int64_t lane) {
    constexpr int kRows = 8;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) update_rows<kRows, fades>(s, row, x, ld, lane);
    for (; row < rows; ++row) update_rows<1, fades>(s, row, x, ld, lane);
}

inline void scan(const Panels& state, const ScanBlock& s) {
    state.each([&](float* x, int64_t first, int vecs) {
        const int64_t ld = vecs * W;
        if (s.r) multiply(first == 0, state.rows, {x, ld, 1}, ld, s.d + first * kBlock, s.r);
        for (int64_t lane = first; lane < first + ld; lane += W, x += W) {
            if (s.y) {
                s.backwards ? read_tile<true>(s, state.rows, x, ld, lane)
                            : read_tile<false>(s, state.rows, x, ld, lane);
            }
            if (!s.a) continue;
            s.whole ? update_tile<true>(s, state.rows, x, ld, lane) : update_tile<false>(s, state.rows, x, ld, lane);
        }
    });
}

// Lanes of tokens before `token`, where lane 0 is token `first`.
inline uint32_t lanes_before(int64_t token, int64_t first) {
    return lane_bits(static_cast<int>(most<int64_t>(0, least<int64_t>(W, token - first))));
}

// pairs[j][t] of the j up to t, or (`backwards`) from t on, times the decay between them, of which `logs` are the
// logarithms by token; 0 elsewhere and, strict, where j = t.
template <bool fades, bool strict, bool backwards>
inline void fade_pairs(int64_t n, const float* logs, float* pairs) {
    for (int64_t t = 0; t < kBlock; t += W) {
        Vec log = vzero();
        for (int64_t at = 0; at < n; ++at) {
            const int64_t j = backwards ? at : n - 1 - at;
            const uint32_t others = backwards ? lanes_before(j, t) : ~lanes_before(j + 1, t);
            const uint32_t all = backwards ? lanes_before(j + 1, t) : ~lanes_before(j, t);
            float* row = pairs + j * kBlock + t;
            Vec pair = vload(row);
            if (fades && at > 0) {
                log = vselect(others, vadd(log, vset(logs[backwards ? j : j + 1])), log);
                pair = vmul(pair, exp_nonpositive(log));
            }
            vstore(row, vselect(strict ? others : all, pair, vzero()));
        }
    }
    for (int64_t i = n * kBlock; i < kBlock * kBlock; i += W) vstore(pairs + i, vzero());
}

// The same backwards from q, k and factors [F][kBlock] where each feature has its own decay: pairs[i][j] = sum of q_i
// k_j times the factors of tokens j + 1 .. i. Leaves k faded to the end of the block.
inline void pair_features(int64_t F, const float* q, float* k, const float* factors, float* pairs) {
    FASTATTN_UNROLL for (int64_t j = 0; j < kBlock; j += W) {
        Vec sums[kBlock];
        FASTATTN_UNROLL for (int i = 0; i < kBlock; ++i) sums[i] = vzero();
        for (int64_t f = 0; f < F * kBlock; f += kBlock) {
            Vec key = vload(k + f + j);
            FASTATTN_UNROLL for (int i = 0; i < kBlock; ++i) {
                key = vselect(lanes_before(i, j), vmul(key, vset(factors[f + i])), key);
                sums[i] = vfma(vset(q[f + i]), key, sums[i]);
            }
            vstore(k + f + j, key);
        }
        FASTATTN_UNROLL for (int i = 0; i < kBlock; ++i) {
            vstore(pairs + i * kBlock + j, vselect(lanes_before(i + 1, j), sums[i], vzero()));
        }
    }
}

// y_i += sum over the j before i, or (`backwards`) after it, of pairs[j][i] x_j times the factors between.
template <bool backwards>
inline void add_faded(int64_t width, const float* pairs, const float* x, const float* factors, int64_t ld, float* y) {
    for (int64_t c = 0; c < width; c += W) {
        Vec rows[kBlock];
        FASTATTN_UNROLL for (int at = 0; at < kBlock; ++at) {
            const int i = backwards ? kBlock - 1 - at : at;
            rows[at] = vload(x + i * ld + c);
            if (at == 0) continue;
            const Vec factor = vload(factors + (backwards ? i + 1 : i) * ld + c);
            Vec sum = vload(y + i * ld + c);
            FASTATTN_UNROLL for (int before = 0; before < at; ++before) {
                const int j = backwards ? kBlock - 1 - before : before;
                rows[before] = vmul(rows[before], factor);
                sum = vfma(vset(pairs[j * kBlock + i]), rows[before], sum);
            }
            vstore(y + i * ld + c, sum);
        }
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
