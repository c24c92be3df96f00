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

// Tokens, or rows, of a register tile of `vecs` vectors: as many as there are registers for their sums.
template <int vecs>
constexpr int kTileTokens = (W == 16 ? 16 : 8) / vecs;

// out [rows][kBlock] = A B or, unless it is the `first` part of a sum, += A B, with B [steps][kBlock].
template <Store store, int count>
FASTATTN_INLINE void multiply_rows(const float* a, int64_t ld, int64_t steps, const float* b, float* out) {
    const Segment all{0, 0, steps};
    register_tile<Fp32, count, kBlockVecs, store>({a, ld, 1}, &all, 1, b, kBlock, out, kBlock, nullptr);
}
template <Store store>
inline void multiply(int64_t rows, const float* a, int64_t ld, int64_t steps, const float* b, float* out) {
    constexpr int kRows = kTileTokens<kBlockVecs>;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
        multiply_rows<store, kRows>(a + row * ld, ld, steps, b, out + row * kBlock);
    }
    for (; row < rows; ++row) multiply_rows<store, 1>(a + row * ld, ld, steps, b, out + row * kBlock);
}
inline void multiply(bool first, int64_t rows, const float* a, int64_t ld, int64_t steps, const float* b, float* out) {
    first ? multiply<Store::kWrite>(rows, a, ld, steps, b, out) : multiply<Store::kAdd>(rows, a, ld, steps, b, out);
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

// out[i][j] = a_i . b_j, a [kBlock][ld], b [length][kBlock]. Short sums keep the rounding small.
inline void inner_products(const float* a, int64_t ld, const float* b, int64_t length, float* out) {
    constexpr int64_t kShort = 32;
    for (int64_t at = 0; at < length; at += kShort) {
        multiply(at == 0, kBlock, a + at, ld, least(kShort, length - at), b + at * kBlock, out);
    }
}

// Rows of values of a block, packed or where the caller has them.
struct BlockLanes {
    const float* at;
    int64_t step;
};

// The rows of a block that comes later, a cache line of each at a time, to be asked for during a scan: asked for all at
// once they would wait for each other, and the processor for them.
class RowsAhead {
   public:
    struct Column {
        const char* first;
        int64_t step;
    };
    // Rows [t, t + kBlock), some of which may lie outside the tensor, where no pointer may point.
    void add(const Source& x, int64_t t, int64_t cols) {
        const int64_t size = element_size(x.dtype);
        const uintptr_t first = reinterpret_cast<uintptr_t>(x.data) + static_cast<uintptr_t>(t * x.row * size);
        for (int64_t c = 0; c < cols * size && count_ < kMost; c += 64) {
            columns_[count_++] = {reinterpret_cast<const char*>(first + static_cast<uintptr_t>(c)), x.row * size};
        }
    }
    bool any() const { return asked_ < count_; }
    Column next() { return columns_[asked_++]; }
    void ask_rest() {
        for (; any(); ++asked_) {
            uintptr_t at = reinterpret_cast<uintptr_t>(columns_[asked_].first);
            for (int t = 0; t < kBlock; ++t, at += static_cast<uintptr_t>(columns_[asked_].step)) {
                __builtin_prefetch(reinterpret_cast<const char*>(at), 0, 2);
            }
        }
    }

   private:
    static constexpr int kMost = 64;
    Column columns_[kMost];
    int count_ = 0, asked_ = 0;
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
    RowsAhead* ahead;    // asked for while X is updated
};

// y_t += sum of pairs[j][t] b_j over j <= t, or (`backwards`) over j >= t, for the tokens of a tile from t0 on.
template <bool backwards, int vecs>
FASTATTN_INLINE void add_pairs(int t0, const float* pairs, const float* b, int64_t step,
                               Vec y[kTileTokens<vecs>][vecs]) {
    pairs += t0;
    FASTATTN_UNROLL for (int j = 0; j < kBlock; ++j, b += step, pairs += kBlock) {
        if (backwards ? t0 > j : t0 + kTileTokens<vecs> <= j) continue;
        Vec value[vecs];
        FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) value[n] = vload(b + n * W);
        FASTATTN_UNROLL for (int t = 0; t < kTileTokens<vecs>; ++t) {
            if (backwards ? t0 + t > j : t0 + t < j) continue;
            const Vec pair = vset(pairs[t]);
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) y[t][n] = vfma(pair, value[n], y[t][n]);
        }
    }
}
// The same for rows [kBlock][width] of x and y.
template <bool backwards, int vecs>
inline void add_pairs(const float* pairs, const float* x, int64_t width, float* y) {
    constexpr int T = kTileTokens<vecs>;
    FASTATTN_UNROLL for (int t0 = 0; t0 < kBlock; t0 += T) {
        Vec sums[T][vecs];
        FASTATTN_UNROLL for (int t = 0; t < T; ++t) {
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) sums[t][n] = vload(y + (t0 + t) * width + n * W);
        }
        add_pairs<backwards, vecs>(t0, pairs, x, width, sums);
        FASTATTN_UNROLL for (int t = 0; t < T; ++t) {
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) vstore(y + (t0 + t) * width + n * W, sums[t][n]);
        }
    }
}
template <bool backwards>
inline void add_pairs(const float* pairs, const float* x, int64_t width, float* y) {
    int64_t lane = 0;
    for (; lane + 2 * W <= width; lane += 2 * W) add_pairs<backwards, 2>(pairs, x + lane, width, y + lane);
    if (lane < width) add_pairs<backwards, 1>(pairs, x + lane, width, y + lane);
}

// y of a panel of `vecs` vectors of lanes from `lane` on.
template <bool backwards, int vecs>
__attribute__((noinline)) void read_panel(const ScanBlock& s, int64_t rows, const float* x, int64_t lane) {
    constexpr int T = kTileTokens<vecs>;
    FASTATTN_UNROLL for (int t0 = 0; t0 < kBlock; t0 += T) {
        Vec y[T][vecs];
        FASTATTN_UNROLL for (int t = 0; t < T; ++t) {
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) y[t][n] = vzero();
        }
        const float *state = x, *c = s.c + t0;
        for (int64_t row = 0; row < rows; ++row, state += vecs * W, c += kBlock) {
            Vec value[vecs];
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) value[n] = vload(state + n * W);
            FASTATTN_UNROLL for (int t = 0; t < T; ++t) {
                const Vec ct = vset(c[t]);
                FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) y[t][n] = vfma(ct, value[n], y[t][n]);
            }
        }
        if (s.pairs) add_pairs<backwards, vecs>(t0, s.pairs, s.b.at + lane, s.b.step, y);
        float* out = s.y + t0 * s.y_step + lane;
        FASTATTN_UNROLL for (int t = 0; t < T; ++t) {
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) vstore(out + t * s.y_step + n * W, y[t][n]);
        }
    }
}

// What a block adds to `count` rows is summed first, so that X is rounded once.
template <int count, int vecs, bool fades, bool asks>
FASTATTN_INLINE void update_rows(const ScanBlock& s, int64_t row, float* x, int64_t lane) {
    Vec sums[count][vecs];
    FASTATTN_UNROLL for (int r = 0; r < count; ++r) {
        FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) sums[r][n] = vzero();
    }
    const float *a = s.a + row * kBlock, *b = s.b.at + lane;
    RowsAhead::Column ahead{reinterpret_cast<const char*>(a), 0};  // a line at hand, for want of another
    if (asks && s.ahead->any()) ahead = s.ahead->next();
    uintptr_t asked = reinterpret_cast<uintptr_t>(ahead.first);
    FASTATTN_UNROLL for (int t = 0; t < kBlock; ++t, b += s.b.step, asked += static_cast<uintptr_t>(ahead.step)) {
        if (asks) __builtin_prefetch(reinterpret_cast<const char*>(asked), 0, 2);
        Vec value[vecs];
        FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) value[n] = vload(b + n * W);
        FASTATTN_UNROLL for (int r = 0; r < count; ++r) {
            const Vec at = vset(a[r * kBlock + t]);
            FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) sums[r][n] = vfma(at, value[n], sums[r][n]);
        }
    }
    FASTATTN_UNROLL for (int r = 0; r < count; ++r) {
        FASTATTN_UNROLL for (int n = 0; n < vecs; ++n) {
            float* at = x + (row + r) * vecs * W + n * W;
            vstore(at, fades ? vfma(vset(s.whole[row + r]), vload(at), sums[r][n]) : vadd(vload(at), sums[r][n]));
        }
    }
}
template <int vecs, bool fades, bool asks>
__attribute__((noinline)) void update_panel(const ScanBlock& s, int64_t rows, float* x, int64_t lane) {
    constexpr int kRows = kTileTokens<vecs> < 8 ? kTileTokens<vecs> : 8;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) update_rows<kRows, vecs, fades, asks>(s, row, x, lane);
    for (; row < rows; ++row) update_rows<1, vecs, fades, asks>(s, row, x, lane);
}

template <int vecs>
inline void scan_panel(const ScanBlock& s, int64_t rows, float* x, int64_t lane) {
    if (s.y) s.backwards ? read_panel<true, vecs>(s, rows, x, lane) : read_panel<false, vecs>(s, rows, x, lane);
    if (!s.a) return;
    if (s.ahead) {
        s.whole ? update_panel<vecs, true, true>(s, rows, x, lane) : update_panel<vecs, false, true>(s, rows, x, lane);
    } else {
        s.whole ? update_panel<vecs, true, false>(s, rows, x, lane)
                : update_panel<vecs, false, false>(s, rows, x, lane);
    }
}

inline void scan(const Panels& state, const ScanBlock& s) {
    state.each([&](float* x, int64_t lane, int vecs) {
        const int64_t ld = vecs * W;
        if (s.r) multiply(lane == 0, state.rows, x, ld, ld, s.d + lane * kBlock, s.r);
        vecs == 2 ? scan_panel<2>(s, state.rows, x, lane) : scan_panel<1>(s, state.rows, x, lane);
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
