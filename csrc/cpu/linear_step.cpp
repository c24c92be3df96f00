// Linear attention, one token: each state is read and written once, in place.
#include <type_traits>

#include "linear_task.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

class Step : LinearWork {
   public:
    explicit Step(const LinearParams& p) : LinearWork(p) {}

    void run() {
        const int64_t states = p_.sequences * p_.Hs(), group = p_.Hs() ? p_.H() / p_.Hs() : 1;
        const double work = static_cast<double>(states * layout_.F) * static_cast<double>(layout_.Dv);
        const int64_t row = layout_.ld_f,
                      floats = (group + 5) * row + (group + 1) * layout_.ld_v + round_up(p_.D(), W) + 64;
        run_tasks(work < kLinearSerialWork ? 1 : p_.threads, states, floats,
                  [&](int64_t task, float* memory) { advance(task, group, memory); });
    }

   private:
    void advance(int64_t state, int64_t group, float* memory) const {
        const int64_t F = layout_.F, Dv = layout_.Dv, ld_f = layout_.ld_f, ld_v = layout_.ld_v;
        const LinearHead head = head_of(state * group);
        Arena arena(memory);
        float *k = arena.floats(ld_f), *factors = arena.floats(ld_f), *less = arena.floats(ld_f);
        float* q = arena.floats(group * ld_f);
        float *v = arena.floats(ld_v), *y = arena.floats(group * ld_v), *wide = arena.floats(round_up(p_.D(), W));
        features_.row(keys(head), 0, ld_f, k, wide);
        load_row(values(head), 0, Dv, ld_v, v);
        for (int64_t h = 0; h < group; ++h) {
            features_.row(queries(head_of(state * group + h)), 0, ld_f, q + h * ld_f, wide);
        }
        if (p_.decay) {
            // A factor near 1 is applied as what it takes off: the same rounded number would drift over thousands of
            // steps.
            load_row(log_factor(head, 0), 0, F, ld_f, factors);
            for (int64_t c = 0; c < ld_f; c += W) {
                Vec high, rest;
                exp_nonpositive(vload(factors + c), &high, &rest);
                vstore(factors + c, high);
                vstore(less + c, vadd(vsub(high, vset(1.0f)), rest));
            }
        }
        zero(y, group * ld_v);
        float* kv = p_.kv_out + state * F * Dv;
        if (p_.beta) correct(head, k, p_.decay ? factors : nullptr, kv, arena.floats(ld_f), v);
        const Rows rows{k, q, factors, less, v, y, ld_f, ld_v, group};
        for (int64_t f = 0; f < F; f += kRows) {
            const int64_t n = least<int64_t>(kRows, F - f);
            p_.decay ? block<true>(rows, f, n, kv) : block<false>(rows, f, n, kv);
        }
        float* z = p_.normalize ? p_.z_out + state * F : nullptr;
        for (int64_t f = 0; f < F && z; ++f) {
            const float faded = !p_.decay ? z[f] : factors[f] > 0.5f ? z[f] + less[f] * z[f] : factors[f] * z[f];
            z[f] = faded + k[f];
        }
        for (int64_t h = 0; h < group; ++h) finish(head_of(state * group + h), q + h * ld_f, z, y + h * ld_v);
    }

    static constexpr int64_t kRows = 16;  // of the state, that stay in L1 for every head that reads them

    struct Rows {
        const float *k, *q, *factors, *less, *v;
        float* y;
        int64_t ld_f, ld_v, group;
    };

    // body(N, c, count): the columns from c on, N vectors (a constant) of `count` lanes each.
    template <class Body>
    void each_lanes(Body&& body) const {
        constexpr int wide = W == 16 ? 8 : 4;  // as many as registers hold
        int64_t c = 0;
        for (; c + wide * W <= layout_.Dv; c += wide * W) body(std::integral_constant<int, wide>(), c, W);
        for (; c < layout_.Dv; c += W) {
            body(std::integral_constant<int, 1>(), c, static_cast<int>(least<int64_t>(W, layout_.Dv - c)));
        }
    }
    // Rows [f, f + n) of the state: new, and added to out.
    template <bool fades>
    void block(const Rows& x, int64_t f, int64_t n, float* kv) const {
        each_lanes([&](auto vecs, int64_t c, int count) {
            advance_lanes<vecs, fades>(x, f, n, c, count, kv);
            for (int64_t h = 1; h < x.group; ++h) {
                read_lanes<vecs>(x.q + h * x.ld_f, f, n, c, count, kv, x.y + h * x.ld_v);
            }
        });
    }

    // N vectors from lane c on, of `count` lanes each; the first head reads them as they pass.
    template <int N, bool fades>
    void advance_lanes(const Rows& x, int64_t f, int64_t n, int64_t c, int count, float* kv) const {
        Vec value[N], sum[N];
        FASTATTN_UNROLL for (int i = 0; i < N; ++i) {
            value[i] = vload(x.v + c + i * W);
            sum[i] = vload(x.y + c + i * W);
        }
        for (int64_t r = f; r < f + n; ++r) {
            float* row = kv + r * layout_.Dv + c;
            const bool slow = fades && x.factors[r] > 0.5f;
            FASTATTN_UNROLL for (int i = 0; i < N; ++i) {
                Vec state = N > 1 ? vload(row + i * W) : vload_n(row, count);
                if (fades) state = slow ? vfma(vset(x.less[r]), state, state) : vmul(vset(x.factors[r]), state);
                state = vfma(vset(x.k[r]), value[i], state);
                N > 1 ? vstore(row + i * W, state) : vstore_n(row, state, count);
                sum[i] = vfma(vset(x.q[r]), state, sum[i]);
            }
        }
        FASTATTN_UNROLL for (int i = 0; i < N; ++i) vstore(x.y + c + i * W, sum[i]);
    }
    // y += the sum of rows [f, f + n) times q.
    template <int N>
    void read_lanes(const float* q, int64_t f, int64_t n, int64_t c, int count, const float* kv, float* y) const {
        Vec sum[N];
        FASTATTN_UNROLL for (int i = 0; i < N; ++i) sum[i] = vload(y + c + i * W);
        for (int64_t r = f; r < f + n; ++r) {
            const float* row = kv + r * layout_.Dv + c;
            FASTATTN_UNROLL for (int i = 0; i < N; ++i) {
                sum[i] = vfma(vset(q[r]), N > 1 ? vload(row + i * W) : vload_n(row, count), sum[i]);
            }
        }
        FASTATTN_UNROLL for (int i = 0; i < N; ++i) vstore(y + c + i * W, sum[i]);
    }

    // Delta rule: v becomes beta times what of it the faded state does not hold. `minus`: room for -k.
    void correct(const LinearHead& head, const float* k, const float* factors, const float* kv, float* minus,
                 float* v) const {
        for (int64_t f = 0; f < layout_.F; ++f) minus[f] = factors ? -k[f] * factors[f] : -k[f];
        each_lanes([&](auto vecs, int64_t c, int count) { read_lanes<vecs>(minus, 0, layout_.F, c, count, kv, v); });
        const Vec beta = vset(*reinterpret_cast<const float*>(p_.beta.row(head.b, head.hs, 0)));
        for (int64_t c = 0; c < layout_.Dv; c += W) vstore(v + c, vmul(beta, vload(v + c)));
    }

    void finish(const LinearHead& head, const float* q, const float* z, const float* y) const {
        float weight = static_cast<float>(p_.scale);
        if (z) {
            Vec sum = vzero();
            each_vector(layout_.F, [&](int64_t c, int n) { sum = vfma(vload(q + c), vload_n(z + c, n), sum); });
            const float den = weight * vsum(sum);
            weight /= den < kLinearEps ? kLinearEps : den;
        }
        char* row = p_.out.row(head.b, head.h, 0);
        each_vector(layout_.Dv, [&](int64_t c, int n) {
            store_floats(row, p_.out.dtype, c, p_.out.last_stride(), vmul(vload(y + c), vset(weight)), n);
        });
    }
};

}  // namespace

void linear_step(const LinearParams& p) { Step(p).run(); }

}  // namespace FASTATTN_ISA
}  // namespace fastattn
