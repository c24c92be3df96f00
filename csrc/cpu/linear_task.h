// What a task of linear attention works on: one head of one sequence, in blocks of tokens packed as fp32 rows.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cstring>

#include "fastattn/parallel.h"
#include "linear_features.h"
#include "linear_scan.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockFloats = 2048;         // packed rows of one operand: two of them and a tile of X stay in L1
constexpr double kLinearSerialWork = 1 << 17;  // multiply-adds under which waking a team costs more than it saves

// A state that fades passes through subnormal numbers, which some processors leave to microcode (not Zen 4).
class FlushSubnormals {
   public:
#if defined(__SSE__)
    FlushSubnormals() : mode_(_mm_getcsr()) { _mm_setcsr(mode_ | 0x8000); }
    ~FlushSubnormals() { _mm_setcsr(mode_); }

   private:
    unsigned mode_;
#endif
};

// Tokens [first, last) of batch b, head h of out; n is the row of the state.
struct LinearHead {
    int64_t n, b, h, hs;
    int64_t first, last;
    bool leads;  // the first head of out that reads this state: it alone returns the state
};

struct Layout {
    int64_t F, Dv;
    int64_t ld_f, ld_v;  // floats of a packed row of features and of values
    int64_t block;       // tokens of a block, a multiple of kGroup
    int64_t f_tiles, v_tiles;

    explicit Layout(const LinearParams& p) : F(p.F()), Dv(p.Dv()), ld_f(round_up(F, W)), ld_v(round_up(Dv, W)) {
        const int64_t fit = kBlockFloats / most(ld_f, ld_v) / kGroup * kGroup;
        block = least(kLongestBlock, most<int64_t>(kGroup, fit));
        f_tiles = ceil_div(F, W);
        v_tiles = ceil_div(Dv, W);
    }
};

// Hands out aligned pieces of a task's scratch memory; with no memory it only counts.
class Arena {
   public:
    explicit Arena(float* memory) : memory_(memory) {}
    float* floats(int64_t n) {
        float* at = memory_ ? memory_ + used_ : nullptr;
        used_ += round_up(n, 16);
        return at;
    }
    int64_t used() const { return used_; }

   private:
    float* memory_;
    int64_t used_ = 0;
};

// Common to forward and backward: heads, and the packing of their rows.
class LinearWork {
   public:
    explicit LinearWork(const LinearParams& p) : p_(p), layout_(p), features_(p) {}

   protected:
    LinearHead head_of(int64_t index) const {
        const int64_t H = p_.H(), n = index / H, h = index % H, group = H / p_.Hs();
        LinearHead head{n, p_.cu_seqlens ? 0 : n, h, h / group, 0, p_.Lk(), h % group == 0};
        if (p_.cu_seqlens) {
            head.first = p_.cu_seqlens[n];
            head.last = p_.cu_seqlens[n + 1];
        }
        return head;
    }
    int64_t heads() const { return p_.sequences * p_.H(); }
    // [first, last) of the queries of a head whose queries are not its keys.
    int64_t last_query(const LinearHead& head) const { return p_.cu_seqlens ? head.last : p_.Lq(); }

    Source queries(const LinearHead& head) const { return source_of(p_.q, head.b, head.h / (p_.H() / p_.q.size[1])); }
    Source keys(const LinearHead& head) const { return source_of(p_.k, head.b, head.hs / (p_.Hs() / p_.k.size[1])); }
    Source values(const LinearHead& head) const { return source_of(p_.v, head.b, head.hs / (p_.Hs() / p_.v.size[1])); }

    bool takes_part(const LinearHead& head, int64_t t) const {
        return !p_.key_mask || *(p_.key_mask.row(0, 0, head.b) + t * p_.key_mask.last_stride());
    }

    // A row needed a block later: between two blocks the hardware prefetcher forgets where it was.
    static void ask_for(const Source& x, int64_t t, int64_t cols) { ask<0>(x.data, t * x.row, cols, x.dtype); }
    static void ask_to_write(const TensorView& x, int64_t b, int64_t h, int64_t t) {
        ask<1>(x.row(b, h, 0), t * x.stride[2], x.size[3], x.dtype);
    }
    template <int write>
    static void ask(const char* first, int64_t offset, int64_t cols, DType dtype) {
        const int64_t size = element_size(dtype);
        // The row may lie outside the tensor, where no pointer may point.
        const uintptr_t at = reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(offset * size);
        for (int64_t c = 0; c < cols * size; c += 64) {
            __builtin_prefetch(reinterpret_cast<const char*>(at + static_cast<uintptr_t>(c)), write, write ? 3 : 2);
        }
    }

    // Rows [t0, t0 + n) of phi(x), and zero rows up to a multiple of kGroup. Blocks follow each other in the
    // sense 1, forward in time, or -1. `wide`: round_up(D, W) floats.
    void pack_features(const LinearHead& head, const Source& x, bool masked, int64_t t0, int64_t n, int64_t sense,
                       float* out, float* inverse, float* wide) const {
        const int64_t ld = layout_.ld_f;
        for (int64_t t = 0; t < n; ++t) {
            ask_for(x, t0 + t + sense * layout_.block, p_.D());
            if (masked && !takes_part(head, t0 + t)) {
                zero(out + t * ld, ld);
                inverse[t] = 0;
            } else {
                inverse[t] = features_.row(x, t0 + t, ld, out + t * ld, wide);
            }
        }
        zero(out + n * ld, (round_up(n, kGroup) - n) * ld);
    }
    // The same for rows without a map.
    void pack_values(const LinearHead& head, const Source& x, bool masked, int64_t t0, int64_t n, int64_t sense,
                     float* out) const {
        const int64_t ld = layout_.ld_v;
        for (int64_t t = 0; t < n; ++t) {
            ask_for(x, t0 + t + sense * layout_.block, p_.Dv());
            if (masked && !takes_part(head, t0 + t)) {
                zero(out + t * ld, ld);
                continue;
            }
            load_row(x, t0 + t, layout_.Dv, ld, out + t * ld);
        }
        zero(out + n * ld, (round_up(n, kGroup) - n) * ld);
    }

    // Factors e^g of tokens t0 + t, t < n, in the order of a scan: [n], or [n][ld_f] for a vector. Padding has
    // factor 1. `backwards`: of the tokens after these, the last first, as X meets them on its way back; after the last
    // token of the head the factor is 1. `carry`, carry_floats(), is zero before the first.
    void pack_factors(const LinearHead& head, int64_t t0, int64_t n, bool backwards, float* carry, float* out) const {
        const int64_t step = factor_step(), groups = ceil_div(n, kGroup);
        t0 += backwards ? 1 : 0;
        for (int64_t c = 0; c < round_up(n, kGroup) * step; ++c) out[c] = 1;
        if (backwards && t0 + n > head.last) --n;
        if (step == 1) pack_scalars(head, t0, n, backwards, carry, out);
        for (int64_t i = 0; i < n && step > 1; ++i) {
            const int64_t t = backwards ? n - 1 - i : i;
            float* row = out + t * step;
            load_row(log_factor(head, t0 + t), 0, layout_.F, step, row);
            for (int64_t c = 0; c < step; c += W) {
                Vec left = vload(carry + c);
                vstore(row + c, next_factor(vload(row + c), &left));
                vstore(carry + c, left);
            }
        }
        pack_group_factors(groups, backwards, carry + step, out);
    }

    // Products of the factors of a group, behind the factors. They take over each other's rounding as factors do.
    void pack_group_factors(int64_t groups, bool backwards, float* carry, float* factors) const {
        const int64_t step = factor_step();
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t group = backwards ? groups - 1 - i : i;
            const float* from = factors + group * kGroup * step;
            float* to = group_factors(factors) + group * step;
            for (int64_t c = 0; c < step; ++c) {
                double product = 1 + static_cast<double>(carry[c]);
                for (int t = 0; t < kGroup; ++t) product *= static_cast<double>(from[t * step + c]);
                to[c] = static_cast<float>(product);
                const double rounded = static_cast<double>(to[c]);
                // 2 - x is 1 / x where it matters: near 1.
                carry[c] = rounded > 0.5 ? static_cast<float>((product - rounded) * (2 - rounded)) : 0.0f;
            }
        }
    }
    float* group_factors(float* factors) const { return factors + layout_.block * factor_step(); }
    int64_t carry_floats() const { return 2 * factor_step(); }
    int64_t scaled_room() const { return p_.vector_decay() ? scaled_floats(layout_.block, layout_.ld_f) : 0; }
    int64_t factor_step() const { return p_.vector_decay() ? layout_.ld_f : 1; }
    int64_t factor_floats() const { return p_.decay ? (layout_.block + layout_.block / kGroup) * factor_step() : 0; }

    Source log_factor(const LinearHead& head, int64_t t) const {
        return {p_.decay.row(head.b, head.hs, t), DType::kFloat32, 0, p_.decay.last_stride()};
    }

    // Tiles [first, last) of the lanes of a state [F][Dv] of user memory; null is zero.
    void load_state(const float* kv, int64_t first, int64_t last, float* x) const {
        const int64_t F = layout_.F, Dv = layout_.Dv;
        for (int64_t tile = first; tile < last; ++tile) {
            const int n = static_cast<int>(least<int64_t>(W, Dv - tile * W));
            for (int64_t f = 0; f < F; ++f, x += W) vstore(x, kv ? vload_n(kv + f * Dv + tile * W, n) : vzero());
        }
    }
    void store_state(const float* x, int64_t first, int64_t last, float* kv) const {
        const int64_t F = layout_.F, Dv = layout_.Dv;
        for (int64_t tile = first; tile < last; ++tile) {
            const int n = static_cast<int>(least<int64_t>(W, Dv - tile * W));
            for (int64_t f = 0; f < F; ++f, x += W) vstore_n(kv + f * Dv + tile * W, vload(x), n);
        }
    }

    void pack_scalars(const LinearHead& head, int64_t t0, int64_t n, bool backwards, float* carry, float* out) const {
        float low[kLongestBlock + W];
        for (int64_t t = 0; t < n; ++t) out[t] = *reinterpret_cast<const float*>(log_factor(head, t0 + t).data);
        each_vector(n, [&](int64_t t, int lanes) {
            Vec high, rest;
            exp_nonpositive(vload_n(out + t, lanes), &high, &rest);
            vstore_n(out + t, high, lanes);
            vstore(low + t, rest);
        });
        for (int64_t i = 0; i < n; ++i) {
            const int64_t t = backwards ? n - 1 - i : i;
            out[t] = next_factor(out[t], low[t], carry);
        }
    }

    // Rows of features: x += factor * y, and x . y.
    void add_features(float factor, const float* y, float* x) const {
        const Vec weight = vset(factor);
        for (int64_t c = 0; c < layout_.ld_f; c += W) vstore(x + c, vfma(weight, vload(y + c), vload(x + c)));
    }
    // A sum of features over tokens, faded and rounded as a scan rounds its state, so that errors of one divide out
    // against the other's: `now` after each token, `base` after each group.
    struct FeatureSum {
        float *base, *added, *fade, *now;
    };
    FeatureSum place_sum(Arena& arena) const {
        const int64_t n = p_.normalize ? layout_.ld_f : 0;
        float* base = arena.floats(n);
        // Without a decay nothing but the sum itself is needed.
        return p_.decay ? FeatureSum{base, arena.floats(n), arena.floats(n), arena.floats(n)}
                        : FeatureSum{base, nullptr, nullptr, base};
    }
    // Adds weight * features of token t of a block, of which a group `begins` or `ends` at t. Strict: `now` is what was
    // there before, after the factor.
    template <Factor factor, bool strict>
    void add_token(const FeatureSum& sum, int64_t t, bool begins, bool ends, float* factors, float weight,
                   const float* features) const {
        if (factor == Factor::kNone) return add_features(weight, features, sum.base);
        const float *of_token = factors + t * factor_step(),
                    *of_group = group_factors(factors) + t / kGroup * factor_step();
        for (int64_t c = 0; c < layout_.ld_f; c += W) {
            const Vec f = factor == Factor::kRows ? vload(of_token + c) : vset(*of_token);
            const Vec fade = begins ? f : vmul(f, vload(sum.fade + c)), base = vload(sum.base + c);
            const Vec old = begins ? vzero() : vmul(f, vload(sum.added + c));
            const Vec added = vfma(vset(weight), vload(features + c), old);
            vstore(sum.now + c, vfma(fade, base, strict ? old : added));
            vstore(sum.fade + c, fade);
            vstore(sum.added + c, added);
            if (!ends) continue;
            const Vec whole = factor == Factor::kRows ? vload(of_group + c) : vset(*of_group);
            vstore(sum.base + c, vfma(whole, base, added));
        }
    }
    static float dot(const float* x, const float* y, int64_t n) {
        Vec sum = vzero();
        for (int64_t c = 0; c < n; c += W) sum = vfma(vload(x + c), vload(y + c), sum);
        return vsum(sum);
    }

    static void zero(float* x, int64_t n) {
        if (n > 0) memset(x, 0, sizeof(float) * static_cast<size_t>(n));
    }

    // body(task, scratch) for every task, with `floats` of scratch for each thread.
    template <class Body>
    static void run_tasks(int threads, int64_t count, int64_t floats, Body&& body) {
        threads = static_cast<int>(least<int64_t>(threads, most<int64_t>(count, 1)));
        const Scratch memory(threads * floats * 4);
        std::atomic<int> members{0};
        std::atomic<int64_t> next{0};
        run_team(threads, [&] {
            const FlushSubnormals mode;
            float* mine = memory.as<float>() + members.fetch_add(1) * floats;
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task, mine);
        });
    }

    const LinearParams& p_;
    const Layout layout_;
    const Features features_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
