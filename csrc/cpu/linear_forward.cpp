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
        float *v, *y, *z, *wide, *inverse, *weight, *dens;
        Panels state;
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
        x.z = arena.floats(p_.normalize ? layout_.ld_f : 0);
        x.wide = arena.floats(round_up(p_.D(), W));
        x.inverse = arena.floats(kBlock);
        x.weight = arena.floats(kBlock);
        x.dens = arena.floats(kBlock);
        x.used = arena.used();
        return x;
    }

    void attend(const LinearHead& head, const Buffers& x) const {
        const int64_t state = head.n * p_.Hs() + head.hs, F = layout_.F;
        load_state(p_.kv ? p_.kv + state * F * layout_.Dv : nullptr, x.state);
        if (p_.normalize) {
            zero(x.z, layout_.ld_f);
            if (p_.z) memcpy(x.z, p_.z + state * F, sizeof(float) * static_cast<size_t>(F));
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
        if (p_.normalize && x.leads) memcpy(p_.z_out + state * F, x.z, sizeof(float) * static_cast<size_t>(F));
    }

    template <Factor factor>
    void causal(const LinearHead& head, const Buffers& x) const {
        const Source q = queries(head), k = keys(head), v = values(head);
        const BlockRows& rows = x.rows;
        if (p_.decay) zero(rows.fading.carry, layout_.ld_f);
        for (int64_t t0 = head.first; t0 < head.last; t0 += kBlock) {
            const int64_t n = least<int64_t>(kBlock, head.last - t0);
            pack_features(head, k, false, t0, n, 1, rows.k, x.inverse, x.wide);
            pack_features(head, q, false, t0, n, 1, rows.q, x.inverse, x.wide);
            const BlockLanes lanes = pack_values(head, v, false, t0, n, 1, x.v);
            if (factor != Factor::kNone) pack_fading(head, t0, n, rows.fading);
            pair_up<factor, false>(n, true, true, rows);
            // First, since these additions wait for one another: they go on during the scan.
            if (p_.normalize) {
                denominators(rows.reads, rows.pairs, x);
                add_keys<factor>(rows, x.z);
            }
            ScanBlock block = block_of(lanes, x);
            block.y = x.y;
            block.pairs = rows.pairs;
            block.a = rows.enters;
            block.whole = rows.fading.whole;
            scan(x.state, block);
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
            if (p_.normalize) add_keys<Factor::kNone>(x.rows, x.z);
        }
        const int64_t end = last_query(head);
        for (int64_t t0 = head.first; t0 < end; t0 += kBlock) {
            const int64_t n = least<int64_t>(kBlock, end - t0);
            pack_features(head, q, false, t0, n, 1, x.rows.q, x.inverse, x.wide);
            turn(x.rows.q, ld, kBlock, ld, x.rows.reads, kBlock);
            ScanBlock block = block_of({}, x);
            block.y = x.y;
            scan(x.state, block);
            if (p_.normalize) denominators(x.rows.reads, nullptr, x);
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

    // z is a column of the state whose values are 1, and rounded like one, so that errors of one divide out against the
    // other's.
    void denominators(const float* reads, const float* pairs, const Buffers& x) const {
        for (int64_t t = 0; t < kBlock; t += W) {
            Vec sum = vzero();
            for (int64_t f = 0; f < layout_.F; ++f) sum = vfma(vset(x.z[f]), vload(reads + f * kBlock + t), sum);
            for (int64_t j = 0; j < kBlock && pairs; ++j) sum = vadd(sum, vload(pairs + j * kBlock + t));
            vstore(x.dens + t, vmul(vset(static_cast<float>(p_.scale)), sum));
        }
    }
    // The sum of the keys as they enter a state, in its order.
    template <Factor factor>
    void add_keys(const BlockRows& rows, float* z) const {
        const float* whole = rows.fading.whole;
        for (int64_t c = 0; c < layout_.ld_f; c += W) {
            Vec sum = vzero();
            FASTATTN_UNROLL for (int64_t t = 0; t < kBlock; t += W) {
                Vec keys[W];
                FASTATTN_UNROLL for (int i = 0; i < W; ++i) {
                    keys[i] = vload(factor == Factor::kRows ? rows.enters + (c + i) * kBlock + t
                                                            : rows.k + (t + i) * layout_.ld_f + c);
                    if (factor == Factor::kScalar) keys[i] = vmul(keys[i], vset(rows.fading.end[t + i]));
                }
                if (factor == Factor::kRows) transpose(keys);
                FASTATTN_UNROLL for (int i = 0; i < W; ++i) sum = vadd(sum, keys[i]);
            }
            vstore(z + c, whole ? vfma(vload(whole + c), vload(z + c), sum) : vadd(vload(z + c), sum));
        }
    }

    // Rows [t0, t0 + n) of out, and what the backward pass needs of their denominators.
    void finish(const LinearHead& head, int64_t t0, int64_t n, const Buffers& x) const {
        const Vec scale = vset(static_cast<float>(p_.scale)), least_sum = vset(kLinearEps);
        for (int64_t t = 0; t < kBlock; t += W) {
            if (!p_.normalize) {
                vstore(x.weight + t, scale);
                continue;
            }
            const Vec sum = vload(x.dens + t);
            const uint32_t clamped = vless(sum, least_sum);
            const Vec den = vselect(clamped, least_sum, sum);
            vstore(x.weight + t, vdiv(scale, den));
            vstore(x.dens + t, vselect(clamped, vsub(vzero(), den), den));
        }
        if (p_.normalize && p_.saved && x.leads) {
            float* saved = p_.saved + (head.b * p_.H() + head.h) * p_.Lq() + t0;
            memcpy(saved, x.dens, sizeof(float) * static_cast<size_t>(n));
        }
        const int64_t first = x.state.first * kPanel, last = least(x.state.last * kPanel, layout_.Dv);
        store_rows(p_.out, head.b, head.h, t0, n, 1, x.y, layout_.ld_v, first, last, x.weight);
    }
};

}  // namespace

void linear_forward(const LinearParams& p) { p.beta ? DeltaForward(p).run() : Forward(p).run(); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
