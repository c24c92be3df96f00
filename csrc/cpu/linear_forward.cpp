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
            most<int64_t>(1, least(layout_.v_tiles, heads() && heads() < threads ? ceil_div(threads, heads()) : 1));
        const int64_t floats = place(nullptr, parts).used;
        run_tasks(threads, heads() * parts, floats, [&](int64_t task, float* memory) {
            const int64_t part = task % parts;
            Buffers x = place(memory, parts);
            x.first = part * layout_.v_tiles / parts;
            x.last = (part + 1) * layout_.v_tiles / parts;
            x.leads = part == 0;
            attend(head_of(task / parts), x);
        });
    }

   private:
    struct Buffers {
        float *q, *k, *v, *y, *factors, *scaled, *carry, *state, *wide, *inverse, *weight;
        FeatureSum z;
        int64_t used, first, last;  // lanes of v are tiles [first, last)
        bool leads;                 // the part that writes what all parts know
    };

    Buffers place(float* memory, int64_t parts) const {
        Arena arena(memory);
        const int64_t T = layout_.block;
        Buffers x{};
        x.q = arena.floats(T * layout_.ld_f);
        x.k = arena.floats(T * layout_.ld_f);
        x.v = arena.floats(T * layout_.ld_v);
        x.y = arena.floats(T * layout_.ld_v);
        x.factors = arena.floats(factor_floats());
        x.scaled = arena.floats(scaled_room());
        x.carry = arena.floats(carry_floats());
        x.state = arena.floats(ceil_div(layout_.v_tiles, parts) * layout_.F * W);
        x.z = place_sum(arena);
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(T);
        x.weight = arena.floats(T);
        x.used = arena.used();
        return x;
    }

    void attend(const LinearHead& head, const Buffers& x) const {
        const int64_t state = head.n * p_.Hs() + head.hs, F = layout_.F;
        load_state(p_.kv ? p_.kv + state * F * layout_.Dv : nullptr, x.first, x.last, x.state);
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
        store_state(x.state, x.first, x.last, p_.kv_out + state * F * layout_.Dv);
        if (p_.normalize && x.leads) memcpy(p_.z_out + state * F, x.z.base, sizeof(float) * static_cast<size_t>(F));
    }

    template <Factor factor>
    void causal(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        zero(x.carry, carry_floats());
        for (int64_t t0 = head.first; t0 < head.last; t0 += layout_.block) {
            const int64_t n = least(layout_.block, head.last - t0);
            pack_features(head, k, false, t0, n, 1, x.k, x.inverse, x.wide);
            pack_features(head, q, false, t0, n, 1, x.q, x.inverse, x.wide);
            pack_values(head, v, false, t0, n, 1, x.v);
            if (factor != Factor::kNone) pack_factors(head, t0, n, false, x.carry, x.factors);
            scan<factor, Mode::kScan>(block(x), round_up(n, kGroup), layout_.F, x.first, x.last, x.state);
            for (int64_t t = 0; t < n && p_.normalize; ++t) {
                const bool ends = t % kGroup == kGroup - 1 || t + 1 == n;
                add_token<factor, false>(x.z, t, t % kGroup == 0, ends, x.factors, 1, x.k + t * layout_.ld_f);
                x.weight[t] = denominator(x.q + t * layout_.ld_f, x.z.now);
            }
            finish(head, t0, n, x);
        }
    }

    // Every query sees every key.
    void whole(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        for (int64_t t0 = head.first; t0 < head.last; t0 += layout_.block) {
            const int64_t n = least(layout_.block, head.last - t0);
            pack_features(head, k, true, t0, n, 1, x.k, x.inverse, x.wide);
            pack_values(head, v, true, t0, n, 1, x.v);
            scan<Factor::kNone, Mode::kUpdate>(block(x), round_up(n, kGroup), layout_.F, x.first, x.last, x.state);
            for (int64_t t = 0; t < n && p_.normalize; ++t) add_features(1, x.k + t * layout_.ld_f, x.z.base);
        }
        const int64_t end = last_query(head);
        for (int64_t t0 = head.first; t0 < end; t0 += layout_.block) {
            const int64_t n = least(layout_.block, end - t0);
            pack_features(head, q, false, t0, n, 1, x.q, x.inverse, x.wide);
            scan<Factor::kNone, Mode::kRead>(block(x), round_up(n, kGroup), layout_.F, x.first, x.last, x.state);
            for (int64_t t = 0; t < n && p_.normalize; ++t) {
                x.weight[t] = denominator(x.q + t * layout_.ld_f, x.z.base);
            }
            finish(head, t0, n, x);
        }
    }

    ScanBlock block(const Buffers& x) const {
        return {x.k,     x.q, layout_.ld_f, x.v, x.y, layout_.ld_v, x.factors, factor_step(), group_factors(x.factors),
                x.scaled};
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
            ask_to_write(out, head.b, head.h, t0 + t + layout_.block);
            store_row(out.row(head.b, head.h, t0 + t), out.dtype, out.last_stride(), x.y + t * layout_.ld_v,
                      x.first * W, least(x.last * W, layout_.Dv), weight);
        }
    }
};

}  // namespace

void linear_forward(const LinearParams& p) { p.beta ? DeltaForward(p).run() : Forward(p).run(); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
