// Linear attention, forward: one scan over the tokens of a head, its lanes the columns of v.
#include "linear_delta_forward.h"
#include "linear_task.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class Forward : LinearWork {
   public:
    explicit Forward(const LinearParams& p) : LinearWork(p) {}

    void run() {
        const double work =
            static_cast<double>(heads() * (p_.Lk() + p_.Lq()) * layout_.F) * static_cast<double>(p_.Dv());
        const int threads = work < kLinearSerialWork ? 1 : p_.threads;
        // Heads are enough tasks as a rule; where they are not, each is cut into ranges of lanes.
        const int64_t parts =
            most<int64_t>(1, least(layout_.panels, heads() && heads() < threads ? ceil_div(threads, heads()) : 1));
        const int64_t floats = place(nullptr, parts).used;
        run_tasks(threads, heads() * parts, floats, [&](int64_t task, float* memory) {
            const int64_t part = task % parts;
            Buffers x = place(memory, parts);
            x.state = panels(x.state.x, part * layout_.panels / parts, (part + 1) * layout_.panels / parts);
            x.leads = part == 0;
            attend(head_of(task / parts), x);
        });
    }

   private:
    struct Buffers {
        BlockRows rows;
        float *v, *y, *wide, *inverse, *weight;
        Panels state;
        FeatureSum z;
        int64_t used;
        bool leads;  // the part that writes what all parts know
    };

    Buffers place(float* memory, int64_t parts) const {
        Arena arena(memory);
        Buffers x{};
        x.rows = place_rows(arena);
        x.v = arena.floats(kBlock * layout_.ld_v);
        x.y = arena.floats(kBlock * layout_.ld_v);
        x.state.x = arena.floats(ceil_div(layout_.panels, parts) * panel_floats());
        x.z = place_sum(arena);
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(kBlock);
        x.weight = arena.floats(kBlock);
        x.used = arena.used();
        return x;
    }

    void attend(const LinearHead& head, const Buffers& x) const {
        const int64_t state = head.n * p_.Hs() + head.hs, F = layout_.F;
        load_state(p_.kv ? p_.kv + state * F * layout_.Dv : nullptr, x.state);
        if (p_.normalize) {
            zero(x.z.base, layout_.ld_f);
            if (p_.z) memcpy(x.z.base, p_.z + state * F, sizeof(float) * static_cast<size_t>(F));
        }
        if (p_.causal) {
            if (!p_.decay) {
                causal<Factor::kNone>(head, x);
            } else if (p_.vector_decay()) {
                causal<Factor::kRows>(head, x);
            } else {
                causal<Factor::kScalar>(head, x);
            }
        } else {
            whole(head, x);
        }
        if (!head.leads) return;
        store_state(x.state, p_.kv_out + state * F * layout_.Dv);
        if (p_.normalize && x.leads) memcpy(p_.z_out + state * F, x.z.base, sizeof(float) * static_cast<size_t>(F));
    }

    template <Factor factor>
    void causal(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        const BlockRows& rows = x.rows;
        const int64_t ld = layout_.ld_f;
        if (p_.decay) zero(rows.fading.carry, ld);
        for (int64_t t0 = head.first; t0 < head.last; t0 += kBlock) {
            const int64_t n = least<int64_t>(kBlock, head.last - t0);
            pack_features(head, k, false, t0, n, 1, rows.k, x.inverse, x.wide);
            pack_features(head, q, false, t0, n, 1, rows.q, x.inverse, x.wide);
            const BlockLanes lanes = pack_values(head, v, false, t0, n, 1, x.v);
            if (factor != Factor::kNone) pack_fading(head, t0, n, rows.fading);
            pair_up<factor, false>(n, true, true, rows);
            ScanBlock block = block_of(lanes, x);
            block.y = x.y;
            block.pairs = rows.pairs;
            block.a = rows.enters;
            block.whole = rows.fading.whole;
            scan(x.state, block);
            for (int64_t t = 0; t < n && p_.normalize; ++t) {
                add_token<factor, false>(x.z, t == 0, rows.fading.factors + t * factor_step(), 1, rows.k + t * ld);
                x.weight[t] = denominator(rows.q + t * ld, x.z.now);
            }
            if (p_.normalize) end_block<factor>(x.z, nullptr, rows.fading.whole);
            finish(head, t0, n, x);
        }
    }

    // Every query sees every key.
    void whole(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        const int64_t ld = layout_.ld_f;
        for (int64_t t0 = head.first; t0 < head.last; t0 += kBlock) {
            const int64_t n = least<int64_t>(kBlock, head.last - t0);
            pack_features(head, k, true, t0, n, 1, x.rows.k, x.inverse, x.wide);
            const BlockLanes lanes = pack_values(head, v, static_cast<bool>(p_.key_mask), t0, n, 1, x.v);
            turn(x.rows.k, ld, kBlock, ld, x.rows.enters, kBlock);
            ScanBlock block = block_of(lanes, x);
            block.a = x.rows.enters;
            scan(x.state, block);
            if (!p_.normalize) continue;
            for (int64_t t = 0; t < n; ++t) {
                add_token<Factor::kNone, false>(x.z, t == 0, nullptr, 1, x.rows.k + t * ld);
            }
            end_block<Factor::kNone>(x.z, nullptr, nullptr);
        }
        const int64_t end = last_query(head);
        for (int64_t t0 = head.first; t0 < end; t0 += kBlock) {
            const int64_t n = least<int64_t>(kBlock, end - t0);
            pack_features(head, q, false, t0, n, 1, x.rows.q, x.inverse, x.wide);
            turn(x.rows.q, ld, kBlock, ld, x.rows.reads, kBlock);
            ScanBlock block = block_of({}, x);
            block.y = x.y;
            scan(x.state, block);
            for (int64_t t = 0; t < n && p_.normalize; ++t) {
                x.weight[t] = denominator(x.rows.q + t * ld, x.z.base);
            }
            finish(head, t0, n, x);
        }
    }

    ScanBlock block_of(const BlockLanes& values, const Buffers& x) const {
        ScanBlock block{};
        block.c = x.rows.reads;
        block.b = values;
        block.y_step = layout_.ld_v;
        return block;
    }

    float denominator(const float* q, const float* z) const {
        return static_cast<float>(p_.scale) * dot(q, z, layout_.ld_f);
    }

    // Rows [t0, t0 + n) of out, and what the backward pass needs of their denominators.
    void finish(const LinearHead& head, int64_t t0, int64_t n, const Buffers& x) const {
        const TensorView& out = p_.out;
        float* saved = p_.saved && x.leads ? p_.saved + (head.b * p_.H() + head.h) * p_.Lq() + t0 : nullptr;
        for (int64_t t = 0; t < n; ++t) {
            float weight = static_cast<float>(p_.scale);
            if (p_.normalize) {
                const bool clamped = x.weight[t] < kLinearEps;
                const float den = clamped ? kLinearEps : x.weight[t];
                weight /= den;
                if (saved) saved[t] = clamped ? -den : den;
            }
            ask_to_write(out, head.b, head.h, t0 + t + kBlock);
            store_row(out.row(head.b, head.h, t0 + t), out.dtype, out.last_stride(), x.y + t * layout_.ld_v,
                      x.state.first * kPanel, least(x.state.last * kPanel, layout_.Dv), weight);
        }
    }
};

}  // namespace

void linear_forward(const LinearParams& p) { p.beta ? DeltaForward(p).run() : Forward(p).run(); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
