// Softmax attention, backward, in one pass over the scores. A task holds a block of keys and goes over all queries: dK
// and dV are its own sums. dQ is summed over tasks in the order of the keys: a task adds to a block of queries after
// the task before it has. Tasks are claimed in that order too, so whoever is waited for is running, on any number of
// threads.
#include "fastattn/parallel.h"
#include "fastattn/softmax.h"
#include "softmax_backward_bias.h"
#include "softmax_backward_operands.h"
#include "softmax_backward_slopes.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class Math>
class Backward {
   public:
    Backward(const SoftmaxParams& p, const SoftmaxGradients& g)
        : p_(p),
          g_(g),
          sizes_(p),
          sight_(p, Sizes::kQueries, sizes_.keys),
          dropout_(p),
          bias_(p, g.dbias),
          slopes_(p, g.dslopes),
          logits_(makes_logits(p)),
          scale_(static_cast<float>(p.scale)),
          factor_(logits_ ? kLog2e : scale_ * kLog2e),
          rows_(sizes_.q_blocks * Sizes::kQueries),
          words_(ceil_div(p.Lq(), 64)),
          judged_(sight_.template judged_rows<Math>()),
          dq_in_place_(g.dq && g.dq.dtype == DType::kFloat32 && g.dq.stride[3] == 1 && p.D() % W == 0),
          needs_ds_(g.dq || g.dk || g.dbias || g.dslopes),
          in_turn_(g.dq || bias_.by_row() || slopes_.wanted()),
          top_(p.B() * p.Hq() * rows_ * 4),
          tail_(p.B() * p.Hq() * rows_ * 4),
          delta_(p.B() * p.Hq() * rows_ * 4),
          live_(p.B() * p.Hq() * words_ * 8),
          turn_(p.B() * p.Hq() * sizes_.q_blocks * 8),
          dq_(g.dq && !dq_in_place_ && sizes_.k_blocks > 1 ? p.B() * p.Hq() * rows_ * sizes_.ld_d * 4 : 0) {}

    // False where numbers are too large for their parts: then nothing it has written counts.
    bool run() {
        work();
        return !large_;
    }

   private:
    void work() {
        const int64_t batches = bias_.shares_batches() ? 1 : p_.B(), heads = bias_.shares_heads() ? 1 : p_.Hk();
        const int64_t owners = batches * heads, tasks = owners * sizes_.k_blocks;
        const int64_t preparations = p_.B() * p_.Hq() * sizes_.q_blocks;
        const int threads = team_of(p_, most(tasks, preparations));
        const int64_t size = Buffers().lay_out(sizes_, nullptr);
        const Scratch memory(threads * size * 4);
        std::atomic<int64_t> next{0}, members{0}, prepared{0};
        run_team(threads, [&] {
            const MatrixUnit<Math::kTiles> unit;
            Buffers buffers;
            buffers.lay_out(sizes_, memory.as<float>() + members.fetch_add(1) * size);
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < preparations + tasks;) {
                if (task < preparations) {
                    prepare(task / sizes_.q_blocks, task % sizes_.q_blocks);
                    prepared.fetch_add(1, std::memory_order_release);
                    continue;
                }
                wait_until(prepared, preparations);
                // Neighbouring tasks belong to different heads where there are several: then nobody waits.
                const int64_t at = task - preparations, wave = at / (threads * sizes_.k_blocks);
                const int64_t width = least<int64_t>(threads, owners - wave * threads),
                              rest = at - wave * threads * sizes_.k_blocks;
                const int64_t owner = wave * threads + rest % width, n = rest / width;
                const int64_t b0 = owner / heads, hk0 = owner % heads;
                for (int64_t b = b0; b < (batches == 1 ? p_.B() : b0 + 1); ++b) {
                    for (int64_t hk = hk0; hk < (heads == 1 ? p_.Hk() : hk0 + 1); ++hk) key_block(buffers, b, hk, n);
                }
            }
        });
        bias_.finish();
        slopes_.finish();
    }

    using Sizes = BackwardSizes<Math>;
    using Buffers = BackwardBuffers<Math>;

    // Sums over keys of a block of queries, until it is its turn to add them.
    struct RowSums {
        float bias[Sizes::kQueries] = {}, slopes[Sizes::kQueries] = {};
    };
    // Queries [i0, i0 + rows) of (b, h), block m.
    struct Queries {
        int64_t b, h, m, i0;
        int rows;
    };
    Queries queries(int64_t b, int64_t h, int64_t m) const {
        const int64_t i0 = m * Sizes::kQueries;
        return {b, h, m, i0, static_cast<int>(least<int64_t>(Sizes::kQueries, p_.Lq() - i0))};
    }
    std::atomic<int64_t>& turn(const Queries& x) const {
        return turn_.as<std::atomic<int64_t>>()[(x.b * p_.Hq() + x.h) * sizes_.q_blocks + x.m];
    }
    Source query_rows(const TensorView& t, const Queries& x) const {
        Source s = source_of(t, x.b, x.h, &large_);
        s.seen = live_.as<uint64_t>() + (x.b * p_.Hq() + x.h) * words_;
        s.last = p_.Lq();
        return s;
    }

    // The parts of lse, the log in base 2; delta = rowsum(dO * O) - dlse; rows that see nothing get no weight.
    void prepare(int64_t head, int64_t m) const {
        const Queries x = queries(head / p_.Hq(), head % p_.Hq(), m);
        float* top = top_.as<float>() + head * rows_ + x.i0;
        float* tail = tail_.as<float>() + head * rows_ + x.i0;
        float* delta = delta_.as<float>() + head * rows_ + x.i0;
        uint64_t* live = live_.as<uint64_t>() + head * words_ + x.i0 / 64;
        for (int64_t w = 0; w * 64 < x.rows; ++w) live[w] = 0;
        const Source out = source_of(p_.out, x.b, x.h), dout = source_of(g_.dout, x.b, x.h);
        for (int r = 0; r < Sizes::kQueries; ++r) {
            const int64_t at = head * p_.Lq() + x.i0 + r;
            const float log_total = r < x.rows ? p_.lse_parts[2 * at + 1] : -kInfinity;
            top[r] = delta[r] = 0.0f;
            tail[r] = -kInfinity;
            if (log_total == -kInfinity) continue;
            top[r] = p_.lse_parts[2 * at];
            tail[r] = -log_total * kLog2e;
            live[r / 64] |= uint64_t{1} << r % 64;
            Vec sum = vzero();
            for (int64_t c = 0; c < p_.Dv(); c += W) {
                const int n = static_cast<int>(least<int64_t>(W, p_.Dv() - c));
                sum = vfma(out.load(x.i0 + r, c, n), dout.load(x.i0 + r, c, n), sum);
            }
            delta[r] = vsum(sum) - (g_.dlse ? g_.dlse[at] : 0.0f);
        }
        const int64_t first = sight_.next(x.b, x.h, m, 0);
        turn(x).store(first, std::memory_order_relaxed);
        if (first < sizes_.k_blocks) return;
        if (g_.dq) store_rows(g_.dq, x.b, x.h, x.i0, x.rows, nullptr, 0, 1.0f);
        if (bias_.by_row()) bias_.zero_rows(x.b, x.h, x.i0, x.rows);
        if (slopes_.wanted()) slopes_.zero_rows(x.b, x.h, x.i0, x.rows);
    }

    // All queries of the group of (b, hk) against key block n.
    void key_block(Buffers& x, int64_t b, int64_t hk, int64_t n) const {
        const int64_t j0 = n * sizes_.keys, keys = least(sizes_.keys, p_.Lk() - j0);
        memset(x.dk, 0, sizeof(float) * static_cast<size_t>(sizes_.keys * sizes_.ld_d));
        memset(x.dv, 0, sizeof(float) * static_cast<size_t>(sizes_.keys * sizes_.ld_dv));
        bool packed = false;
        for (int64_t h = hk * p_.group(); h < (hk + 1) * p_.group(); ++h) {
            bias_.open_columns(b, h, j0, keys);
            // The last queries first: under a causal band they are the ones that the key block before began with.
            for (int64_t m = sizes_.q_blocks - 1; m >= 0; --m) {
                const Queries q = queries(b, h, m);
                bias_.open(b, h, q.i0, q.rows, j0, keys);
                if (sight_.next(b, h, m, n) != n) continue;
                if (!packed) {
                    pack_keys(x, sizes_, sight_.keys(p_.k, b, hk, &large_), sight_.keys(p_.v, b, hk, &large_), j0,
                              p_.Lk(), needs_ds_, bool(g_.dq));
                }
                packed = true;
                query_block(x, q, n);
            }
        }
        if (g_.dk) store_keys<Math>(g_.dk, b, hk, j0, keys, x.dk, sizes_.keys, scale_);
        if (g_.dv) store_keys<Math>(g_.dv, b, hk, j0, keys, x.dv, sizes_.keys, 1.0f);
    }

    void query_block(Buffers& x, const Queries& q, int64_t n) const {
        pack_queries(x, q, n);
        RowSums row_sums;
        uint64_t used[kMaxPanels<Math>] = {};  // row groups of each panel that see anything
        for (int64_t panel = 0; panel < sizes_.panels;) {
            const int64_t tile = (n * sizes_.keys + panel * kPanel) / kTile;
            const int64_t end = panel + kTile / kPanel;
            const auto cover = sight_.look(q.b, q.h, q.i0, q.rows, tile, logits_, x.visible);
            if (cover == BackwardSight::kNothing) {
                panel = end;
                continue;
            }
            for (int r = 0; p_.dropout_p > 0 && r < q.rows; ++r) {
                x.keep[r] = keep_word(dropout_, q.b * p_.Hq() + q.h, q.i0 + r, tile);
            }
            for (; panel < end; ++panel) {
                bool masked = logits_;
                used[panel] =
                    cover == BackwardSight::kAll ? ~uint64_t{0} >> (64 - groups(q)) : seen_groups(x, q, panel, masked);
                if (used[panel]) key_panel(x, q, n, panel, used[panel], masked, row_sums);
            }
        }
        if (in_turn_) add_in_turn(x, q, n, used, row_sums);
    }

    // Tiles of rows that see nothing of key block n are left out at both ends, but for their part of a group.
    void pack_queries(Buffers& x, const Queries& q, int64_t n) const {
        int r0 = 0, r1 = q.rows;
        while (r0 + kTile < r1 && !sight_.touches(q.b, q.h, q.i0 + r0, n)) r0 += kTile;
        while (r1 > r0 + kTile && !sight_.touches(q.b, q.h, q.i0 + (r1 - 1) / kTile * kTile, n))
            r1 = (r1 - 1) / kTile * kTile;
        r0 -= r0 % judged_;
        r1 = static_cast<int>(least<int64_t>(padded(q.rows), round_up(r1, judged_)));
        pack_query_rows(x, sizes_, query_rows(p_.q, q), query_rows(g_.dout, q), q.i0, r0, r1, needs_ds_, bool(g_.dk),
                        bool(g_.dv));
    }

    // Rows that whole steps of a sum over queries take; those past the last query have weight 0.
    static int padded(int rows) { return Math::kTiles ? static_cast<int>(round_up(rows, kTall<Math>)) : rows; }
    int groups(const Queries& q) const { return (q.rows + judged_ - 1) / judged_; }
    static int shift_of(int64_t panel) { return static_cast<int>(panel * kPanel % kTile); }

    // Row groups that see some key of the panel; `masked` if one of them does not see all.
    uint64_t seen_groups(const Buffers& x, const Queries& q, int64_t panel, bool& masked) const {
        const uint64_t all = ~uint64_t{0} >> (64 - kPanel) << shift_of(panel);
        uint64_t found = 0;
        for (int g = 0; g * judged_ < q.rows; ++g) {
            uint64_t any = 0, every = all;
            for (int r = g * judged_; r < least(q.rows, (g + 1) * judged_); ++r) {
                any |= x.visible[r];
                every &= x.visible[r];
            }
            if (!(any & all)) continue;
            found |= uint64_t{1} << g;
            masked |= every != all;
        }
        return found;
    }

    // One panel of keys: scores to weights and their gradients, strip by strip, then what they add to dV and dK.
    void key_panel(Buffers& x, const Queries& q, int64_t n, int64_t panel, uint64_t used, bool masked,
                   RowSums& row_sums) const {
        constexpr int kMaxRuns = Sizes::kGroups / 2 + 1;
        Segment runs[kMaxRuns];
        int count = 0;
        for (uint64_t left = used; left;) {
            const int first = __builtin_ctzll(left), length = __builtin_ctzll(~(left >> first));
            left &= ~uint64_t{0} << (first + length);
            const int r1 = least(q.rows, (first + length) * judged_);
            for (int r = first * judged_; r < r1; r += kStrip<Math>) {
                strip(x, q, n, panel, r, least(kStrip<Math>, r1 - r), masked, row_sums);
            }
            const int64_t at = first * judged_ / Math::kPair;
            runs[count++] = {at, at, ceil_div(padded(r1), Math::kPair) - at};
        }
        const int64_t key = panel * kPanel;
        const int keys = static_cast<int>(least<int64_t>(kPanel, p_.Lk() - n * sizes_.keys - key));
        const float* dscores = Math::kPair == 1 ? x.dscores_by_key + panel * Sizes::kQueries * kPanel : x.dscores;
        if (g_.dv) add_keys<Math>(runs, count, x.weights, x.o_summed, sizes_.dv_vecs, keys, key, sizes_.keys, x.dv);
        if (g_.dk) add_keys<Math>(runs, count, dscores, x.q_summed, sizes_.d_vecs, keys, key, sizes_.keys, x.dk);
    }

    // P and dS of rows [r0, r0 + rows) of the block and one panel of keys.
    void strip(Buffers& x, const Queries& q, int64_t n, int64_t panel, int r0, int rows, bool masked,
               RowSums& row_sums) const {
        Strip s;
        const int64_t head = (q.b * p_.Hq() + q.h) * rows_ + q.i0 + r0, j0 = n * sizes_.keys + panel * kPanel;
        s.top = top_.as<float>() + head;
        s.tail = tail_.as<float>() + head;
        s.delta = delta_.as<float>() + head;
        s.damp = x.damp;
        s.visible = x.visible + r0;
        s.keep = x.keep + r0;
        s.shift = shift_of(panel);
        s.weights = x.weights + r0 / Math::kPair * kPanel;
        s.dscores_by_key = x.dscores_by_key + (panel * Sizes::kQueries + r0) * Sizes::kUnits;
        if constexpr (Math::kPair == 1) {
            s.scores = s.weights;
            s.dweights = s.dscores = s.dscores_by_key;
        } else {
            s.scores = x.scores;
            s.dweights = x.dweights;
            s.dscores = x.dscores + r0 / Math::kPair * kPanel;
        }
        const Segment d{0, 0, sizes_.d_units / Math::kParts}, dv{0, 0, sizes_.dv_units / Math::kParts};
        gemm<Math, Store::kWrite, kTall<Math>>(
            rows, 2, {x.q + r0 * sizes_.ld_q, sizes_.ld_q, 1, sizes_.ld_q / Math::kParts}, &d, 1,
            x.k_columns + panel * kPanel * sizes_.d_units, sizes_.d_units, s.scores, kPanel);
        if (needs_ds_) {
            gemm<Math, Store::kWrite, kTall<Math>>(
                rows, 2, {x.o + r0 * sizes_.ld_o, sizes_.ld_o, 1, sizes_.ld_o / Math::kParts}, &dv, 1,
                x.v_columns + panel * kPanel * sizes_.dv_units, sizes_.dv_units, s.dweights, kPanel);
        }
        // The missing rows of the last units, to which `prepare` has given weight 0.
        const int filled = static_cast<int>(round_up(padded(rows), Math::kPair)), missing = filled - rows;
        if (missing) {
            const size_t bytes = sizeof(float) * static_cast<size_t>(missing * kPanel);
            memset(s.scores + rows * kPanel, 0, bytes);
            memset(s.dweights + rows * kPanel, 0, bytes);
            if (s.damp) memset(s.damp + rows * kPanel, 0, bytes);
            for (int r = r0 + rows; r < r0 + filled; ++r) x.visible[r] = x.keep[r] = 0;
        }
        if (logits_) make_logits(p_, q.b, q.h, q.i0 + r0, j0, rows, s, x.visible + r0);
        const bool keep_sums = bias_.wanted() || slopes_.wanted();
        if (p_.dropout_p > 0) {
            weigh_strip<Math, true>(s, filled, masked, factor_, dropout_.factor, keep_sums);
        } else {
            weigh_strip<Math, false>(s, filled, masked, factor_, 1.0f, keep_sums);
        }
        const float* ds = s.damp ? s.damp : s.dweights;
        if (bias_.wanted()) bias_.add(q.b, q.h, q.i0 + r0, j0, rows, ds, row_sums.bias + r0);
        if (slopes_.wanted()) slopes_.add(q.i0 + r0, j0, rows, ds, row_sums.slopes + r0);
    }

    // Adds to the sums over keys of these queries, after the key block before n and before the one after it.
    void add_in_turn(Buffers& x, const Queries& q, int64_t n, const uint64_t* used, const RowSums& row_sums) const {
        const int64_t after = sight_.next(q.b, q.h, q.m, n + 1);
        const bool first = sight_.next(q.b, q.h, q.m, 0) == n, last = after == sizes_.k_blocks;
        wait_until(turn(q), n);
        if (bias_.by_row()) bias_.add_rows(q.b, q.h, q.i0, q.rows, row_sums.bias, first);
        if (slopes_.wanted()) slopes_.add_rows(q.b, q.h, q.i0, q.rows, row_sums.slopes, first);
        if (g_.dq) {
            float* dq = x.dq;
            int64_t ld = sizes_.ld_d;
            if (dq_in_place_) {
                dq = reinterpret_cast<float*>(g_.dq.row(q.b, q.h, q.i0));
                ld = g_.dq.size[2] == 1 ? ld : g_.dq.stride[2];
            } else if (sizes_.k_blocks > 1) {
                dq = dq_.as<float>() + ((q.b * p_.Hq() + q.h) * rows_ + q.i0) * ld;
            }
            if (first) {
                add_dq<Store::kWrite>(x, q, used, dq, ld);
            } else {
                add_dq<Store::kAdd>(x, q, used, dq, ld);
            }
            if (last) store_rows(g_.dq, q.b, q.h, q.i0, q.rows, dq, ld, scale_);
        }
        turn(q).store(after, std::memory_order_release);
    }

    // dQ += dS K: neighbouring row groups that see the same panels are one product.
    template <Store store>
    void add_dq(const Buffers& x, const Queries& q, const uint64_t* used, float* dq, int64_t ld) const {
        const auto panels_of = [&](int g) {
            uint32_t set = 0;
            for (int panel = 0; panel < sizes_.panels; ++panel)
                set |= static_cast<uint32_t>(used[panel] >> g & 1) << panel;
            return set;
        };
        const int count = groups(q);
        for (int g = 0; g < count;) {
            const uint32_t set = panels_of(g);
            int end = g + 1;
            while (end < count && panels_of(end) == set) ++end;
            Segment segments[kMaxPanels<Math>];
            int segment_count = 0;
            for (int panel = 0; panel < sizes_.panels; ++panel) {
                if (!(set >> panel & 1)) continue;
                constexpr int64_t steps = Sizes::kUnits / Math::kParts;
                segments[segment_count++] = {int64_t{panel} * Sizes::kQueries * Sizes::kUnits, panel * steps, steps};
            }
            const int64_t r0 = g * judged_;
            const int rows = static_cast<int>(least<int64_t>(end * judged_, q.rows) - r0);
            const Rows dscores{x.dscores_by_key + r0 * Sizes::kUnits, Sizes::kUnits, 1, Sizes::kUnits / Math::kParts};
            gemm<Math, store, kTall<Math>>(rows, static_cast<int>(sizes_.d_vecs), dscores, segments, segment_count,
                                           x.k_rows, sizes_.key_units, dq + r0 * ld, ld);
            g = end;
        }
    }

    const SoftmaxParams& p_;
    const SoftmaxGradients& g_;
    const Sizes sizes_;
    const BackwardSight sight_;
    const Dropout dropout_;
    const BiasGradient bias_;
    const SlopeGradient slopes_;
    const bool logits_;           // scores are turned into logits first
    const float scale_, factor_;  // the logit in base 2 is score * factor, or, with `logits_`, logit * factor
    const int64_t rows_, words_;  // of a head: query rows in whole blocks, words of their bits
    const int judged_;            // rows whose visibility is judged together
    const bool dq_in_place_, needs_ds_, in_turn_;
    const Scratch top_, tail_, delta_, live_, turn_, dq_;
    mutable std::atomic<bool> large_{false};
};

}  // namespace

void softmax_backward(const SoftmaxParams& p, const SoftmaxGradients& g) {
    if (p.B() == 0 || p.Hq() == 0 || p.Lq() == 0 || p.Lk() == 0) {
        for (const TensorView* t : {&g.dq, &g.dk, &g.dv, &g.dbias}) store_zeros(*t);
        for (int64_t n = 0; g.dslopes && n < p.Hq() * (p.slopes_batch ? p.B() : 1); ++n) g.dslopes[n] = 0;
        return;
    }
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
    const bool done = is_small(p)                     ? false
                      : p.q.dtype == DType::kBFloat16 ? Backward<Parts<1>>(p, g).run()
                      : p.q.dtype == DType::kFloat16  ? Backward<Parts<2>>(p, g).run()
                                                      : Backward<Parts<3>>(p, g).run();
    if (!done) avx512_bf16::softmax_backward(p, g);
#elif FASTATTN_RANK_OF(FASTATTN_ISA) == 3
    if (p.q.dtype != DType::kBFloat16) return avx512::softmax_backward(p, g);
    Backward<Bf16>(p, g).run();
#else
    Backward<Fp32>(p, g).run();
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
