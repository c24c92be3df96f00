// Calls of linear attention without a state, a key mask or packed sequences, and single steps, read and checked here
// once: what a small model pays for each layer. Each answers None where anything is unusual; the general call then says
// what.
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <memory>

#include "fastattn/parallel.h"
#include "linear_params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

constexpr int64_t kGates = 1 << 16;  // numbers of a tensor of gates up to which one thread looks at them here

// q, k, v, decay, beta: the first fields of LinearTensors.
using Inputs = std::array<py::handle, 5>;

bool all_plain(const Inputs& x) {
    for (const py::handle& t : x) {
        if (!t.is_none() && !is_plain(t)) return false;
    }
    return is_on_cpu(x[kQ]);
}

int dims(py::handle tensor) { return tensor.is_none() ? 0 : tensor.attr("dim")().cast<int>(); }

// Of tensors that are plain; a decay of one number a head comes as [Hs].
bool read(const Inputs& x, const std::string& map, bool causal, bool normalize, py::handle scale, int threads,
          LinearParams* p) {
    const py::handle decay = x[kDecay], none = py::none();
    const bool constant = dims(decay) == 1;
    if (!x[kBeta].is_none() && dims(x[kBeta]) != 3) return false;
    const double D = static_cast<double>(view_of(x[kQ], "q", 4).size[3]);
    const double factor = scale.is_none() ? std::pow(D, -0.5) : scale.cast<double>();
    if (normalize && !(factor > 0)) return false;
    const py::tuple fields =
        py::make_tuple(x[kQ], x[kK], x[kV], constant ? none : decay, x[kBeta], none, none, none, none);
    *p = linear_params(fields, map, causal, normalize, factor, threads);
    if (constant) {
        const TensorView t = view_as(decay, "decay", 1, DType::kFloat32);
        expect(t, "decay", {1, 1, 1, p->Hs()});
        if (!causal) return false;
        p->decay = {t.data, {p->B(), p->Hs(), p->Lk(), 1}, {0, t.stride[3], 0, 1}, t.dtype};
    }
    if (dims(decay) == 4 && p->decay.size[3] != p->D()) return false;
    return p->D() == p->Dv() && p->q.size[1] == p->H() && p->B() * p->H() * p->Lq() * p->Lk() > 0 && is_usual(p->q);
}

int64_t numbers(const TensorView& t) { return t ? t.size[0] * t.size[1] * t.size[2] * t.size[3] : 0; }

// out; or, where a gradient is wanted, (out, saved).
py::object forward(py::handle q, py::handle k, py::handle v, py::handle decay, py::handle beta, const std::string& map,
                   bool causal, bool normalize, py::handle scale, bool grad_enabled, int threads) {
    const Inputs x{q, k, v, decay, beta};
    LinearParams p{};
    py::object out, saved;
    std::unique_ptr<Scratch> state;
    bool grad = false;
    try {
        if (!all_plain(x) || !read(x, map, causal, normalize, scale, threads, &p)) return py::none();
        if (numbers(p.decay) > kGates || numbers(p.beta) > kGates) return py::none();
        refuse_wrong_gates(p);
        for (const py::handle& t : x) grad |= grad_enabled && !t.is_none() && requires_grad(t);
        if (grad && (!is_usual(p.k) || !is_usual(p.v))) return py::none();
        // The gradient of what is one number is a sum, which the general call takes.
        const bool shared = p.decay && (dims(decay) == 1 || is_expanded(p.decay));
        if (grad && shared && requires_grad(decay)) return py::none();
        out = empty_like(q);
        p.out = view_of(out, "out", 4);
        check_linear_out(p, p.out, "out");
        // The last state, which nobody asked for.
        const int64_t rows = p.sequences * p.Hs() * p.F();
        state = std::make_unique<Scratch>(rows * (p.Dv() + 1) * 4);
        p.kv_out = state->as<float>();
        p.z_out = normalize ? p.kv_out + rows * p.Dv() : nullptr;
        saved = py::none();
        if (grad && p.saves()) {
            const int64_t sizes[] = {p.B(), p.H(), p.beta ? p.saved_rows() : p.Lq(), p.beta ? p.Dv() : 1};
            saved = empty_floats(q, {sizes[0], sizes[1], sizes[2], sizes[3]});
            const TensorView kept = view_of(saved, "saved", 4);
            p.saved = floats(kept, "saved", sizes);
            ask_for_large_pages(kept);
        }
    } catch (const std::exception&) {
        return py::none();
    }
    ask_for_large_pages(p.out);
    {
        const py::gil_scoped_release released;
        linear_forward(p);
    }
    return grad ? py::make_tuple(out, saved) : out;
}

// The five gradients, None for what is not needed.
py::object backward(py::handle dout, py::handle q, py::handle k, py::handle v, py::handle decay, py::handle beta,
                    py::handle out, py::handle saved, const std::array<bool, 5>& needs, const std::string& map,
                    bool causal, bool normalize, py::handle scale, int threads) {
    const Inputs x{q, k, v, decay, beta};
    LinearParams p{};
    LinearGradients g{};
    std::array<py::object, 5> gradients{py::none(), py::none(), py::none(), py::none(), py::none()};
    try {
        if (!is_plain(dout) || !is_plain(out) || !all_plain(x)) return py::none();
        if (!read(x, map, causal, normalize, scale, threads, &p)) return py::none();
        p.out = view_of(out, "out", 4);
        g.dout = view_of(dout, "dout", 4);
        check_linear_out(p, p.out, "out");
        check_linear_out(p, g.dout, "dout");
        if (p.saves()) {
            if (!is_plain(saved)) return py::none();
            p.saved = floats(view_of(saved, "saved", 4), "saved",
                             {p.B(), p.H(), p.beta ? p.saved_rows() : p.Lq(), p.beta ? p.Dv() : 1});
        }
        const TensorView* const like[] = {&p.q, &p.k, &p.v, &p.decay, &p.beta};
        TensorView* const views[] = {&g.dq, &g.dk, &g.dv, &g.ddecay, &g.dbeta};
        for (size_t i = 0; i < 5; ++i) {
            if (!needs[i]) continue;
            if (i < kDecay ? !is_usual(*like[i]) : is_expanded(*like[i])) return py::none();
            gradients[i] = empty_like(x[i]);
            *views[i] = i < kDecay ? view_of(gradients[i], "a gradient", 4) : token_view(gradients[i], "a gradient");
            const int64_t* size = like[i]->size;
            expect(*views[i], "a gradient", {size[0], size[1], size[2], size[3]});
            if (views[i]->dtype != like[i]->dtype) return py::none();
            if (i >= kDecay) refuse_unless_contiguous(*views[i], "a gradient");
            ask_for_large_pages(*views[i]);
        }
    } catch (const std::exception&) {
        return py::none();
    }
    {
        const py::gil_scoped_release released;
        linear_backward(p, g);
    }
    return py::make_tuple(gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]);
}

// out of a step, whose state is advanced in place.
py::object step(py::handle tensors, const std::string& map, bool normalize, py::handle scale, bool grad_enabled,
                int threads) {
    LinearParams p{};
    py::object out;
    try {
        const py::tuple x = tuple_of(tensors, kLinearFields, "a LinearTensors");
        for (int field = 0; field < kKeyMask; ++field) {
            const py::handle t = x[static_cast<size_t>(field)];
            if (!t.is_none() && (!is_plain(t) || (grad_enabled && requires_grad(t)))) return py::none();
        }
        const Inputs inputs{x[kQ], x[kK], x[kV], x[kDecay], x[kBeta]};
        if (!is_on_cpu(x[kQ]) || !read(inputs, map, true, normalize, scale, threads, &p)) return py::none();
        out = empty_like(x[kQ]);
        set_step(p, x, out);
    } catch (const std::exception&) {
        return py::none();
    }
    const py::gil_scoped_release released;
    linear_step(p);
    return out;
}

}  // namespace

void register_linear_plain(py::module_& m) {
    m.def("linear_plain_forward", &forward,
          "linear_plain_forward(q, k, v, decay, beta, feature_map, causal, normalize, scale, grad_enabled, threads): "
          "out, or (out, saved) for a backward pass, or None");
    m.def("linear_plain_backward", &backward,
          "linear_plain_backward(dout, q, k, v, decay, beta, out, saved, needs, feature_map, causal, normalize, scale, "
          "threads): the gradients of the first five, or None");
    m.def("linear_plain_step", &step,
          "linear_plain_step(tensors, feature_map, normalize, scale, grad_enabled, threads): out, the state of tensors "
          "advanced in place; or None");
}

}  // namespace fastattn
