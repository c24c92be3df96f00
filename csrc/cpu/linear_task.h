// What a task of linear attention works on: one head of one sequence, in blocks of tokens packed as fp32 rows.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cstring>
#include <initializer_list>

#include "fastattn/parallel.h"
#include "linear_features.h"
#include "linear_scan.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

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
    int64_t v_vecs, panels;

    explicit Layout(const LinearParams& p)
        : F(p.F()),
          Dv(p.Dv()),
          ld_f(round_up(F, W)),
          ld_v(round_up(Dv, W)),
          v_vecs(ld_v / W),
          panels(ceil_div(v_vecs, 2)) {}
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
    explicit LinearWork(const LinearParams& p, const LinearGradients* g = nullptr)
        : p_(p),
          layout_(p),
          features_(p),
          past_caches_(bytes({&p.q, &p.k, &p.v, &p.out}) + (g ? bytes({&g->dout, &g->dq, &g->dk, &g->dv}) : 0) >
                       kCaches) {}

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

    // Columns [first, last) of rows [t0, t0 + n) of a head of x, from rows of `ld` floats times `weights`, 1 where
    // null.
    void store_rows(const TensorView& x, int64_t b, int64_t h, int64_t t0, int64_t n, int64_t sense, const float* rows,
                    int64_t ld, int64_t first, int64_t last, const float* weights) const {
        for (int64_t t = 0; t < n; ++t) {
            if (!past_caches_) ask_to_write(x, b, h, t0 + t + sense * kBlock);
            store_row(x.row(b, h, t0 + t), x.dtype, x.last_stride(), rows + t * ld, first, last,
                      weights ? weights[t] : 1.0f, past_caches_);
        }
    }

    // Rows [t0, t0 + n) of phi(x), and zero rows up to kBlock. Blocks follow each other in the sense 1, forward in
    // time, or -1; 0: no row is asked for. `inverse`: of taylor1 alone; `wide`: round_up(D, W) floats.
    void pack_features(const LinearHead& head, const Source& x, bool masked, int64_t t0, int64_t n, int64_t sense,
                       float* out, float* inverse, float* wide) const {
        const int64_t ld = layout_.ld_f;
        const auto ahead = [&](int64_t t) {
            if (sense) ask_for(x, t + sense * kBlock, p_.D());
        };
        masked = masked && p_.key_mask;
        const bool at_once = !masked && features_.elementwise();
        if (at_once) features_.map_rows(x, t0, n, ld, out, ahead);
        for (int64_t t = 0; t < n && !at_once; ++t) {
            ahead(t0 + t);
            if (masked && !takes_part(head, t0 + t)) {
                zero(out + t * ld, ld);
                inverse[t] = 0;
            } else {
                inverse[t] = features_.row(x, t0 + t, ld, out + t * ld, wide);
            }
        }
        zero(out + n * ld, (kBlock - n) * ld);
    }
    // The same for rows without a map. A block that needs no packing stays where it is.
    BlockLanes pack_values(const LinearHead& head, const Source& x, bool masked, int64_t t0, int64_t n, int64_t sense,
                           float* out) const {
        const int64_t ld = layout_.ld_v;
        const bool fits = x.dtype == DType::kFloat32 && x.col == 1 && ld == layout_.Dv && n == kBlock && !masked;
        for (int64_t t = 0; t < n; ++t) {
            if (sense) ask_for(x, t0 + t + sense * kBlock, p_.Dv());
            if (fits) continue;
            if (masked && !takes_part(head, t0 + t)) {
                zero(out + t * ld, ld);
            } else {
                load_row(x, t0 + t, layout_.Dv, ld, out + t * ld);
            }
        }
        if (fits) return {reinterpret_cast<const float*>(x.at(t0)), x.row};
        zero(out + n * ld, (kBlock - n) * ld);
        return {out, ld};
    }

    // What decay does within a block; one number a token, or a row of them.
    struct Fading {
        float *factors, *start, *end;  // of each token; from the block's start to after it; from it to the block's end
        float* logs;                   // of a number a token
        float *whole, *carry;          // [ld_f]: from the block's start to its end; what rounding took off
    };
    Fading place_fading(Arena& arena) const {
        if (!p_.decay) return {};
        const int64_t n = kBlock * factor_step(), width = layout_.ld_f;
        return {arena.floats(n),      arena.floats(n),     arena.floats(n),
                arena.floats(kBlock), arena.floats(width), arena.floats(width)};
    }
    int64_t factor_step() const { return p_.vector_decay() ? layout_.ld_f : 1; }

    // Tokens t0 + t, t < n; padding has factor 1.
    void pack_fading(const LinearHead& head, int64_t t0, int64_t n, const Fading& x) const {
        p_.vector_decay() ? pack_rows_fading(head, t0, n, x) : pack_scalar_fading(head, t0, n, x);
    }
    void pack_scalar_fading(const LinearHead& head, int64_t t0, int64_t n, const Fading& x) const {
        float from_start[kBlock], to_end[kBlock], sum = 0;
        for (int64_t t = 0; t < kBlock; ++t) {
            x.logs[t] = t < n ? *reinterpret_cast<const float*>(log_factor(head, t0 + t).data) : 0;
            from_start[t] = sum += x.logs[t];
        }
        Vec carry = vset(*x.carry);
        const Vec whole = next_factor(vset(sum), &carry);
        for (int64_t c = 0; c < layout_.ld_f; c += W) vstore(x.whole + c, whole);
        vstore(x.carry, carry);
        sum = 0;
        for (int64_t t = kBlock - 1; t >= 0; sum += x.logs[t--]) to_end[t] = sum;
        for (int t = 0; t < kBlock; t += W) {
            vstore(x.factors + t, exp_nonpositive(vload(x.logs + t)));
            vstore(x.start + t, exp_nonpositive(vload(from_start + t)));
            vstore(x.end + t, exp_nonpositive(vload(to_end + t)));
        }
    }
    void pack_rows_fading(const LinearHead& head, int64_t t0, int64_t n, const Fading& x) const {
        const int64_t ld = layout_.ld_f;
        for (int64_t t = 0; t < n; ++t) {
            const Source log = log_factor(head, t0 + t);
            load_row(log, 0, layout_.F, ld, x.factors + t * ld);
        }
        for (int64_t c = 0; c < ld; c += W) {
            Vec sum = vzero(), fade = vset(1.0f);
            for (int64_t t = 0; t < kBlock; ++t) {
                Vec factor = vset(1.0f);
                if (t < n) {
                    const Vec log = vload(x.factors + t * ld + c);
                    sum = vadd(sum, log);
                    factor = exp_nonpositive(log);
                }
                fade = vmul(fade, factor);
                vstore(x.factors + t * ld + c, factor);
                vstore(x.start + t * ld + c, fade);
            }
            Vec carry = vload(x.carry + c);
            vstore(x.whole + c, next_factor(sum, &carry));
            vstore(x.carry + c, carry);
            fade = vset(1.0f);
            for (int64_t t = kBlock - 1; t >= 0; --t) {
                vstore(x.end + t * ld + c, fade);
                fade = vmul(fade, vload(x.factors + t * ld + c));
            }
        }
    }

    // Features of a block.
    struct BlockRows {
        float *q, *k;           // [kBlock][ld_f]
        float *reads, *enters;  // [ld_f][kBlock]: q faded from the block's start, k to its end
        float* pairs;           // [kBlock][kBlock]
        float* turned;          // of a vector of factors: these as [ld_f][kBlock], then pairs the other way
        Fading fading;
    };
    BlockRows place_rows(Arena& arena) const {
        const int64_t n = kBlock * layout_.ld_f;
        BlockRows x;
        x.q = arena.floats(n);
        x.k = arena.floats(n);
        x.reads = arena.floats(n);
        x.enters = arena.floats(n);
        x.turned = arena.floats(p_.vector_decay() ? n + kBlock * kBlock : 0);
        x.pairs = arena.floats(kBlock * kBlock);
        x.fading = place_fading(arena);
        return x;
    }
    template <Factor factor>
    static Vec factor_at(const float* row, int64_t c) {
        return factor == Factor::kRows ? vload(row + c) : vset(*row);
    }
    // x_t times factors of each token.
    template <Factor factor>
    void fade_rows(const float* factors, float* x) const {
        if (factor == Factor::kNone) return;
        const int64_t ld = layout_.ld_f;
        for (int64_t t = 0; t < kBlock; ++t, x += ld, factors += factor_step()) {
            for (int64_t c = 0; c < ld; c += W) vstore(x + c, vmul(vload(x + c), factor_at<factor>(factors, c)));
        }
    }
    // x [ld_f][kBlock] times [kBlock] or [kBlock][ld_f] factors.
    template <Factor factor>
    void fade_turned(const float* factors, float* x) const {
        if (factor == Factor::kNone) return;
        for (int64_t f = 0; f < layout_.F; f += factor == Factor::kRows ? W : 1) {
            for (int64_t t = 0; t < kBlock; t += W) {
                float* at = x + f * kBlock + t;
                if (factor == Factor::kScalar) vstore(at, vmul(vload(at), vload(factors + t)));
                if (factor != Factor::kRows) continue;
                Vec tile[W];
                FASTATTN_UNROLL for (int i = 0; i < W; ++i) tile[i] = vload(factors + (t + i) * layout_.ld_f + f);
                transpose(tile);
                FASTATTN_UNROLL for (int i = 0; i < W; ++i) {
                    vstore(at + i * kBlock, vmul(vload(at + i * kBlock), tile[i]));
                }
            }
        }
    }
    // reads, enters, and of both the pairs of a scan.
    template <Factor factor, bool backwards>
    void pair_up(int64_t n, bool reads, bool enters, const BlockRows& x) const {
        const int64_t ld = layout_.ld_f;
        if (enters) turn(x.k, ld, kBlock, ld, x.enters, kBlock);
        if (reads) turn(x.q, ld, kBlock, ld, x.reads, kBlock);
        if (reads && enters && factor == Factor::kRows) {
            turn(x.fading.factors, ld, kBlock, ld, x.turned, kBlock);
            float* pairs = backwards ? x.pairs : x.turned + ld * kBlock;
            pair_features(layout_.F, x.reads, x.enters, x.turned, pairs);
            if (!backwards) turn(pairs, kBlock, kBlock, kBlock, x.pairs, kBlock);
        } else {
            if (reads && enters) {
                inner_products(backwards ? x.q : x.k, ld, backwards ? x.enters : x.reads, layout_.F, x.pairs);
                fade_pairs<factor == Factor::kScalar, false, backwards>(n, x.fading.logs, x.pairs);
            }
            if (enters) fade_turned<factor>(x.fading.end, x.enters);
        }
        if (reads) fade_turned<factor>(x.fading.start, x.reads);
    }

    Panels panels(float* state, int64_t first, int64_t last) const {
        return {state, layout_.F, first, last, layout_.v_vecs};
    }
    int64_t panel_floats() const { return layout_.F * kPanel; }

    Source log_factor(const LinearHead& head, int64_t t) const {
        return {p_.decay.row(head.b, head.hs, t), DType::kFloat32, 0, p_.decay.last_stride()};
    }

    // Lanes of a state [F][Dv] of user memory; null is zero.
    void load_state(const float* kv, const Panels& state) const {
        state.each([&](float* x, int64_t lane, int vecs) {
            for (int64_t f = 0; f < layout_.F; ++f) {
                for (int64_t c = lane; c < lane + vecs * W; c += W, x += W) {
                    vstore(x, kv ? vload_n(kv + f * layout_.Dv + c, static_cast<int>(least<int64_t>(W, layout_.Dv - c)))
                                 : vzero());
                }
            }
        });
    }
    void store_state(const Panels& state, float* kv) const {
        state.each([&](const float* x, int64_t lane, int vecs) {
            for (int64_t f = 0; f < layout_.F; ++f) {
                for (int64_t c = lane; c < lane + vecs * W; c += W, x += W) {
                    vstore_n(kv + f * layout_.Dv + c, vload(x), static_cast<int>(least<int64_t>(W, layout_.Dv - c)));
                }
            }
        });
    }

    // Rows of features: x += factor * y, and x . y.
    void add_features(float factor, const float* y, float* x) const {
        const Vec weight = vset(factor);
        for (int64_t c = 0; c < layout_.ld_f; c += W) vstore(x + c, vfma(weight, vload(y + c), vload(x + c)));
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
            [[maybe_unused]] const FlushSubnormals mode;
            float* mine = memory.as<float>() + members.fetch_add(1) * floats;
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(task, mine);
            vstream_end();
        });
    }

    static int64_t bytes(std::initializer_list<const TensorView*> tensors) {
        int64_t sum = 0;
        for (const TensorView* t : tensors) {
            if (*t) sum += t->size[0] * t->size[1] * t->size[2] * t->size[3] * element_size(t->dtype);
        }
        return sum;
    }

    // What caches keep of a call, about. Of one that moves more, results written last are read from memory anyway, and
    // written to it directly they push out nothing and are not read first.
    static constexpr int64_t kCaches = int64_t{32} << 20;

    const LinearParams& p_;
    const Layout layout_;
    const Features features_;
    const bool past_caches_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
