#include "fastattn/softmax.h"

#include "softmax_params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

int checked(int threads) {
    if (threads < 1 || threads > 4096) refuse("threads must be in 1 .. 4096");
    return threads;
}

void forward(py::handle tensors, py::handle out, py::handle lse, py::handle lse_parts, double scale, py::handle lo,
             py::handle hi, double softcap, double dropout_p, int threads) {
    TilePlanView plan;
    SoftmaxParams p = softmax_params(tensors, out, scale, lo, hi, softcap, dropout_p, &plan);
    p.threads = checked(threads);
    const TensorView whole = view_of(lse, "lse", 3), parts = view_of(lse_parts, "lse_parts", 4, true);
    p.lse = floats(whole, "lse", {1, p.B(), p.Hq(), p.Lq()});
    p.lse_parts = floats(parts, "lse_parts", {p.B(), p.Hq(), p.Lq(), 2});
    refuse_overlap(p.out, "out", {&p.q, &p.k, &p.v, &p.mask, &p.bias, &whole, &parts});
    ask_for_large_pages(p.out);
    const py::gil_scoped_release released;
    softmax_forward(p);
}

void backward(py::handle dout, py::handle dlse, py::handle tensors, py::handle out, py::handle lse_parts, py::handle dq,
              py::handle dk, py::handle dv, py::handle dbias, py::handle dslopes, double scale, py::handle lo,
              py::handle hi, double softcap, double dropout_p, int threads) {
    TilePlanView plan;
    SoftmaxParams p = softmax_params(tensors, out, scale, lo, hi, softcap, dropout_p, &plan);
    p.threads = checked(threads);
    p.lse_parts = floats(view_of(lse_parts, "lse_parts", 4), "lse_parts", {p.B(), p.Hq(), p.Lq(), 2});
    py::object dense;
    const SoftmaxGradients g = softmax_gradients(dout, dlse, tensors, p, dq, dk, dv, dbias, dslopes, &dense);
    for (const TensorView* t : {&g.dq, &g.dk, &g.dv, &g.dbias}) ask_for_large_pages(*t);
    const py::gil_scoped_release released;
    softmax_backward(p, g);
}

}  // namespace

void register_softmax(py::module_& m) {
    m.def("softmax_forward", &forward,
          "softmax_forward(tensors, out, lse, lse_parts, scale, lo, hi, softcap, dropout_p, threads): fills out, lse "
          "and, "
          "if not None, lse_parts");
    m.def("softmax_backward", &backward,
          "softmax_backward(dout, dlse, tensors, out, lse_parts, dq, dk, dv, dbias, dslopes, scale, lo, hi, softcap, "
          "dropout_p, threads): fills the gradients that are not None");
    m.def(
        "is_decode", [](int64_t Lq, int64_t group, int64_t Lk) { return is_decode(Lq, group, Lk); },
        "whether the keys are split instead of the queries");
}

}  // namespace fastattn
