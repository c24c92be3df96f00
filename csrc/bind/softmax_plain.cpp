// Calls without options but a mask or a bias, read and checked here once: what decoding a token, or training a small
// model, pays for each layer. Each answers None where anything is unusual; the general call then says what.
#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "fastattn/softmax.h"
#include "softmax_params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Scores up to which forward and backward look through a mask by themselves; the general call keeps a plan for both.
constexpr int64_t kMaskScores = 1 << 18;

// q, k, v and `mask`, which is a bool mask, a bias or None; causal is 0, 1 (top-left) or 2 (bottom-right).
bool read(py::handle q, py::handle k, py::handle v, py::handle mask, py::handle scale, int causal, int threads,
          SoftmaxParams* p) {
    if (!is_plain(q) || !is_on_cpu(q) || !is_plain(k) || !is_plain(v)) return false;
    p->q = view_of(q, "q", 4);
    p->k = view_of(k, "k", 4);
    p->v = view_of(v, "v", 4);
    if (p->D() == 0 || p->Dv() != p->D() || !is_usual(p->q)) return false;
    p->scale = scale.is_none() ? std::pow(static_cast<double>(p->D()), -0.5) : scale.cast<double>();
    p->lo = -kUnbounded;
    p->hi = causal == 0 ? kUnbounded : causal == 1 ? 0 : p->Lk() - p->Lq();
    p->threads = threads;
    if (!mask.is_none()) {
        const int dims = is_plain(mask) ? mask.attr("dim")().cast<int>() : 5;
        if (dims > 4) return false;
        const TensorView view = view_of(mask, "mask", dims);
        expect(view, "mask", {p->B(), p->Hq(), p->Lq(), p->Lk()}, true);
        if (view.dtype != DType::kBool && view.dtype != DType::kFloat32 && view.dtype != p->q.dtype) return false;
        (view.dtype == DType::kBool ? p->mask : p->bias) = view;
    }
    return std::isfinite(p->scale) && threads >= 1 && threads <= 4096;
}

// out; or, where a gradient is wanted, (out, lse_parts).
py::object forward(py::handle q, py::handle k, py::handle v, py::handle mask, py::handle scale, int causal,
                   bool grouped, bool grad_enabled, int threads) {
    SoftmaxParams p{};
    py::object out, parts;
    try {
        if (!read(q, k, v, mask, scale, causal, threads, &p) || (p.Hk() != p.Hq() && !grouped)) return py::none();
        if (grad_enabled && p.bias && requires_grad(mask)) return py::none();
        if (grad_enabled && (requires_grad(q) || requires_grad(k) || requires_grad(v))) {
            const bool long_mask = (p.mask || p.bias) && p.Lq() * p.Lk() > kMaskScores;
            if (long_mask || !is_usual(p.k) || !is_usual(p.v)) return py::none();
            parts = empty_floats(q, {p.B(), p.Hq(), p.Lq(), 2});
            p.lse_parts = floats(view_of(parts, "lse_parts", 4), "lse_parts", {p.B(), p.Hq(), p.Lq(), 2});
        }
        out = empty_like(q);
        p.out = view_of(out, "out", 4);
        check_softmax_shapes(p);
    } catch (const std::exception&) {
        return py::none();
    }
    ask_for_large_pages(p.out);
    {
        const py::gil_scoped_release released;
        softmax_forward(p);
    }
    return parts ? py::make_tuple(out, parts) : out;
}

// (dq, dk, dv), None for what is not needed.
py::object backward(py::handle dout, py::handle q, py::handle k, py::handle v, py::handle mask, py::handle out,
                    py::handle parts, const std::array<bool, 3>& needs, py::handle scale, int causal, int threads) {
    SoftmaxParams p{};
    SoftmaxGradients g{};
    py::object gradients[3] = {py::none(), py::none(), py::none()};
    try {
        if (!is_plain(dout) || !is_plain(out) || !is_plain(parts)) return py::none();
        if (!read(q, k, v, mask, scale, causal, threads, &p)) return py::none();
        if (!is_usual(p.k) || !is_usual(p.v)) return py::none();
        p.out = view_of(out, "out", 4);
        p.lse_parts = floats(view_of(parts, "lse_parts", 4), "lse_parts", {p.B(), p.Hq(), p.Lq(), 2});
        g.dout = view_of(dout, "dout", 4);
        check_softmax_shapes(p);
        expect(g.dout, "dout", {p.B(), p.Hq(), p.Lq(), p.Dv()});
        if (g.dout.dtype != p.q.dtype) return py::none();
        const py::handle inputs[] = {q, k, v};
        const TensorView* const like[] = {&p.q, &p.k, &p.v};
        TensorView* const views[] = {&g.dq, &g.dk, &g.dv};
        for (int i = 0; i < 3; ++i) {
            if (!needs[static_cast<size_t>(i)]) continue;
            gradients[i] = empty_like(inputs[i]);
            *views[i] = view_of(gradients[i], "a gradient", 4);
            expect(*views[i], "a gradient", like[i]->size);
            if (views[i]->dtype != p.q.dtype) return py::none();
            ask_for_large_pages(*views[i]);
        }
    } catch (const std::exception&) {
        return py::none();
    }
    {
        const py::gil_scoped_release released;
        softmax_backward(p, g);
    }
    return py::make_tuple(gradients[0], gradients[1], gradients[2]);
}

}  // namespace

void register_softmax_plain(py::module_& m) {
    m.def("softmax_plain_forward", &forward,
          "softmax_plain_forward(q, k, v, mask, scale, causal, grouped, grad_enabled, threads): out, or (out, "
          "lse_parts) for a backward pass, or None");
    m.def("softmax_plain_backward", &backward,
          "softmax_plain_backward(dout, q, k, v, mask, out, lse_parts, needs, scale, causal, threads): (dq, dk, dv), "
          "or None");
}

}  // namespace fastattn
