// The one loop of linear attention: X <- factor X + a_t b_t^T, y_t = c_t^T X over tokens t, with X [rows][lanes].
#pragma once
#include "simd/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Tokens that share one load and store of a row of X; blocks are padded to it with zero tokens of factor 1. Four reach
// the FMA peak on Zen 4, and eight do not.
constexpr int kGroup = 4;
constexpr int64_t kLongestBlock = 32;  // tokens

// X is multiplied, before token t enters, by 1 | factor[t] | factor[t][row] | factor[t][lane].
enum class Factor { kNone, kScalar, kRows, kLanes };
// kScan: y_t sees token t. kStrict: y_t sees what was there before it, after the factor. The others without factors.
enum class Mode { kScan, kStrict, kUpdate, kRead };

// Tokens of a block as packed rows; strides are negative where time runs backwards.
struct ScanBlock {
    const float *a, *c;  // [tokens][rows]
    int64_t row_step;    // floats from a token of a, c (and factor, by rows) to the next
    const float* b;      // [tokens][lanes]
    float* y;            // [tokens][lanes]
    int64_t lane_step;   // of b, y (and factor, by lanes)
    const float* factor;
    int64_t factor_step;
    const float* whole;  // the product of the factors of each group, factor_step apart
    float* scaled;       // by rows: room for what scaled_floats says
};

inline int64_t scaled_floats(int64_t tokens, int64_t width) { return 2 * tokens * width; }

// The same tokens from the last of `tokens` to the first.
inline ScanBlock reversed(ScanBlock s, int64_t tokens) {
    const int64_t last = tokens - 1;
    s.a += last * s.row_step;
    s.c += last * s.row_step;
    s.b += last * s.lane_step;
    s.y += last * s.lane_step;
    if (s.factor) {
        s.factor += last * s.factor_step;
        s.whole += (tokens / kGroup - 1) * s.factor_step;
    }
    s.row_step = -s.row_step;
    s.lane_step = -s.lane_step;
    s.factor_step = -s.factor_step;
    return s;
}

// kGroup tokens on one tile of W lanes; x is [rows][W]. A function of its own, or its pointers are spilled.
template <Mode mode>
__attribute__((noinline)) void scan_group(const ScanBlock& s, int64_t rows, float* x) {
    Vec b[kGroup], y[kGroup];
    FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
        b[t] = mode == Mode::kRead ? vzero() : vload(s.b + t * s.lane_step);
        y[t] = vzero();
    }
    // One pointer for every third token: base + {0, 1, 2} * step are addressing modes.
    constexpr int kPointers = (kGroup + 2) / 3;
    const int64_t step = s.row_step;
    const float *a[kPointers], *c[kPointers];
    FASTATTN_UNROLL for (int i = 0; i < kPointers; ++i) {
        a[i] = s.a + 3 * i * step;
        c[i] = s.c + 3 * i * step;
    }
    for (int64_t row = 0; row < rows; ++row, x += W) {
        Vec state = vload(x);
        FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
            if (mode != Mode::kRead) state = vfma(vset(a[t / 3][t % 3 * step + row]), b[t], state);
            if (mode != Mode::kUpdate) y[t] = vfma(vset(c[t / 3][t % 3 * step + row]), state, y[t]);
        }
        if (mode != Mode::kRead) vstore(x, state);
    }
    if (mode == Mode::kUpdate) return;
    FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) vstore(s.y + t * s.lane_step, y[t]);
}

// The same with factors. X is faded once for the whole group: fewer instructions than at each token, and a long sum is
// rounded once, not eight times. y_t is then what X held before the group, faded to t, and what the group's own tokens
// bring: pairs[t][j] = c_t . a_j. By rows, a, c and pairs come faded.
template <Factor factor>
__attribute__((noinline)) void fading_group(const ScanBlock& s, const float* pairs, int64_t rows, float* x) {
    constexpr bool by_rows = factor == Factor::kRows;
    const auto factor_of = [&](int t) {
        const float* at = s.factor + t * s.factor_step;
        return factor == Factor::kScalar ? vset(*at) : vload(at);
    };
    Vec b[kGroup], y[kGroup];
    FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
        b[t] = vload(s.b + t * s.lane_step);
        y[t] = vzero();
        if (by_rows) continue;
        const Vec f = factor_of(t);
        FASTATTN_UNROLL for (int j = 0; j < t; ++j) b[j] = vmul(b[j], f);
    }
    const Vec whole = factor == Factor::kLanes ? vload(s.whole) : vset(*s.whole);
    constexpr int kPointers = (kGroup + 2) / 3;
    const int64_t step = s.row_step;
    const float *a[kPointers], *c[kPointers], *whole_rows = s.whole;
    FASTATTN_UNROLL for (int i = 0; i < kPointers; ++i) {
        a[i] = s.a + 3 * i * step;
        c[i] = s.c + 3 * i * step;
    }
    for (int64_t row = 0; row < rows; ++row, x += W) {
        const Vec state = vload(x);
        Vec sum = vmul(vset(a[0][row]), b[0]);
        FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
            y[t] = vfma(vset(c[t / 3][t % 3 * step + row]), state, y[t]);
            if (t > 0) sum = vfma(vset(a[t / 3][t % 3 * step + row]), b[t], sum);
        }
        vstore(x, vfma(by_rows ? vset(whole_rows[row]) : whole, state, sum));
    }
    Vec all = vset(1.0f);
    FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
        b[t] = vload(s.b + t * s.lane_step);
        if (!by_rows) {
            const Vec f = factor_of(t);
            all = vmul(all, f);
            y[t] = vmul(all, y[t]);
            FASTATTN_UNROLL for (int j = 0; j < t; ++j) b[j] = vmul(b[j], f);
        }
        FASTATTN_UNROLL for (int j = 0; j <= t; ++j) y[t] = vfma(vset(pairs[t * kGroup + j]), b[j], y[t]);
        vstore(s.y + t * s.lane_step, y[t]);
    }
}

// pairs of a group, [kGroup][kGroup], the own one 0 where `strict`. By rows, also a faded to the end of the group, c
// faded from before it, [kGroup][width] each.
template <Factor factor, bool strict>
inline void pair_up(const ScanBlock& s, int64_t width, float* a, float* c, float* pairs) {
    Vec sums[kGroup][kGroup];
    FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) sums[t][j] = vzero();
    }
    for (int64_t row = 0; row < width; row += W) {
        Vec entered[kGroup], all = vset(1.0f);
        FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
            entered[t] = vload(s.a + t * s.row_step + row);
            const Vec reads = vload(s.c + t * s.row_step + row);
            if (factor == Factor::kRows) {
                const Vec f = vload(s.factor + t * s.factor_step + row);
                all = vmul(all, f);
                vstore(c + t * width + row, vmul(reads, all));
                FASTATTN_UNROLL for (int j = 0; j < t; ++j) entered[j] = vmul(entered[j], f);
            }
            FASTATTN_UNROLL for (int j = 0; j <= t; ++j) {
                if (j < t || !strict) sums[t][j] = vfma(reads, entered[j], sums[t][j]);
            }
        }
        if (factor != Factor::kRows) continue;
        FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) vstore(a + t * width + row, entered[t]);
    }
    FASTATTN_UNROLL for (int t = 0; t < kGroup; ++t) {
        FASTATTN_UNROLL for (int j = 0; j <= t; ++j) pairs[t * kGroup + j] = j < t || !strict ? vsum(sums[t][j]) : 0;
    }
}

inline void advance(ScanBlock& s) {
    s.a += kGroup * s.row_step;
    s.c += kGroup * s.row_step;
    s.b += kGroup * s.lane_step;
    s.y += kGroup * s.lane_step;
    if (s.factor) {
        s.factor += kGroup * s.factor_step;
        s.whole += s.factor_step;
    }
}

// Tiles [first, last) of W lanes; x is [last - first][rows][W], tokens a multiple of kGroup.
template <Factor factor, Mode mode>
inline void scan(const ScanBlock& s, int64_t tokens, int64_t rows, int64_t first, int64_t last, float* x) {
    constexpr int64_t kPairs = kGroup * kGroup;
    float pairs[kLongestBlock / kGroup * kPairs];
    const int64_t width = round_up(rows, W);
    float *a = s.scaled, *c = a + tokens * width;
    if constexpr (factor != Factor::kNone) {
        ScanBlock at = s;
        for (int64_t t = 0; t < tokens; t += kGroup, advance(at)) {
            pair_up<factor, mode == Mode::kStrict>(at, width, a + t * width, c + t * width,
                                                   pairs + t / kGroup * kPairs);
        }
    }
    for (int64_t tile = first; tile < last; ++tile, x += rows * W) {
        ScanBlock at = s;
        at.b += tile * W;
        at.y += tile * W;
        if (factor == Factor::kLanes) {
            at.factor += tile * W;
            at.whole += tile * W;
        }
        if (factor == Factor::kRows) {
            at.a = a;
            at.c = c;
            at.row_step = width;
        }
        for (int64_t t = 0; t < tokens; t += kGroup, advance(at)) {
            if constexpr (factor == Factor::kNone) {
                scan_group<mode>(at, rows, x);
            } else {
                fading_group<factor>(at, pairs + t / kGroup * kPairs, rows, x);
            }
        }
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
