#include "fastattn/linear.h"

#include <initializer_list>
#include <iterator>

#include "linear_params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

void set_initial(LinearParams& p, const LinearState& before) {
    if (before.z && !before.kv) refuse("the initial state needs its kv");
    p.kv = before.kv_floats(p, "the initial state");
    p.z = before.z_floats(p, "the initial state", p.kv != nullptr);
}

TensorView saved_view(const LinearParams& p, py::handle saved, float** data) {
    const TensorView t = view_of(saved, "saved", p.beta ? 4 : 3, true);
    if (t && !p.saves()) refuse("nothing is saved without a normaliser or beta");
    *data = p.beta ? floats(t, "saved", {p.B(), p.H(), p.saved_rows(), p.Dv()})
                   : floats(t, "saved", {1, p.B(), p.H(), p.Lq()});
    return t;
}

void forward(py::handle tensors, py::handle out, py::handle kv, py::handle z, py::handle saved, const std::string& map,
             bool causal, bool normalize, double scale, int threads) {
    const py::tuple x =
        tuple_of(tensors, kLinearFields, "the tensors of a call are a LinearTensors of fastattn.params");
    LinearParams p = linear_params(x, map, causal, normalize, scale, threads);
    const LinearState before(x[kKv], x[kZ], "the initial state", false), after(kv, z, "the final state", true);
    set_initial(p, before);
    p.kv_out = after.kv_floats(p, "the final state");
    p.z_out = after.z_floats(p, "the final state", true);
    p.out = view_of(out, "out", 4);
    check_linear_out(p, p.out, "out");
    const TensorView kept = saved_view(p, saved, &p.saved);
    ask_for_large_pages(p.out);
    ask_for_large_pages(kept);
    refuse_overlap(
        p.out, "out",
        {&p.q, &p.k, &p.v, &p.decay, &p.beta, &p.key_mask, &before.kv, &before.z, &after.kv, &after.z, &kept});
    refuse_overlap(after.kv, "the final state",
                   {&p.q, &p.k, &p.v, &p.decay, &p.beta, &p.key_mask, &before.kv, &before.z, &after.z, &kept});
    refuse_overlap(after.z, "the final state",
                   {&p.q, &p.k, &p.v, &p.decay, &p.beta, &p.key_mask, &before.kv, &before.z, &kept});
    refuse_overlap(kept, "saved", {&p.q, &p.k, &p.v, &p.decay, &p.beta, &p.key_mask, &before.kv, &before.z});
    const py::gil_scoped_release released;
    linear_forward(p);
}

void step(py::handle tensors, py::handle out, const std::string& map, bool normalize, double scale, int threads) {
    const py::tuple x =
        tuple_of(tensors, kLinearFields, "the tensors of a call are a LinearTensors of fastattn.params");
    LinearParams p = linear_params(x, map, true, normalize, scale, threads);
    set_step(p, x, out);
    const py::gil_scoped_release released;
    linear_step(p);
}

void backward(py::handle dout, py::handle dkv, py::handle dz, py::handle tensors, py::handle out, py::handle saved,
              py::handle gradients, const std::string& map, bool causal, bool normalize, double scale, int threads) {
    const py::tuple x =
        tuple_of(tensors, kLinearFields, "the tensors of a call are a LinearTensors of fastattn.params");
    const py::tuple wanted = tuple_of(gradients, kZ + 1, "the gradients of a call are seven tensors or None");
    LinearParams p = linear_params(x, map, causal, normalize, scale, threads);
    const LinearState before(x[kKv], x[kZ], "the initial state", false), after(dkv, dz, "the state's gradient", false);
    set_initial(p, before);
    p.out = view_of(out, "out", 4);
    check_linear_out(p, p.out, "out");
    const TensorView kept = saved_view(p, saved, &p.saved);
    if (p.saves() && !p.saved) refuse("saved is required with a normaliser or beta");
    LinearGradients g{};
    g.dkv = after.kv_floats(p, "the state's gradient");
    g.dz = after.z_floats(p, "the state's gradient", false);
    g.dout = view_of(dout, "dout", 4);
    check_linear_out(p, g.dout, "dout");
    const auto same = [&](int field, const char* name, const TensorView& like, DType dtype) {
        if (py::object(wanted[static_cast<size_t>(field)]).is_none()) return TensorView();
        if (!like) refuse(std::string(name) + " is the gradient of a tensor that is not there");
        const py::handle tensor = wanted[static_cast<size_t>(field)];
        const bool own = dtype == DType::kFloat32 && field >= kDecay && field != kKv;
        const TensorView t = own && field == kZ ? lifted(view_of(tensor, name, 3))
                             : own              ? token_view(tensor, name)
                                                : view_of(tensor, name, 4);
        expect(t, name, {like.size[0], like.size[1], like.size[2], like.size[3]});
        if (t.dtype != dtype) refuse(std::string(name) + " has the wrong dtype");
        if (field >= kDecay) refuse_unless_contiguous(t, name);
        return t;
    };
    g.dq = same(kQ, "dq", p.q, p.q.dtype);
    g.dk = same(kK, "dk", p.k, p.q.dtype);
    g.dv = same(kV, "dv", p.v, p.q.dtype);
    g.ddecay = same(kDecay, "ddecay", p.decay, DType::kFloat32);
    g.dbeta = same(kBeta, "dbeta", p.beta, DType::kFloat32);
    g.dkv_in = same(kKv, "dkv", before.kv, DType::kFloat32);
    g.dz_in = same(kZ, "dz", before.z ? lifted(before.z) : TensorView(), DType::kFloat32);
    const TensorView* const written[] = {&g.dq, &g.dk, &g.dv, &g.ddecay, &g.dbeta, &g.dkv_in, &g.dz_in};
    for (const TensorView* const& t : written) {
        ask_for_large_pages(*t);
        refuse_overlap(*t, "a gradient",
                       {&p.q, &p.k, &p.v, &p.decay, &p.beta, &p.key_mask, &p.out, &g.dout, &before.kv, &before.z,
                        &after.kv, &after.z, &kept});
        for (const TensorView* const* other = &t + 1; other != std::end(written); ++other) {
            refuse_overlap(*t, "a gradient", {*other});
        }
    }
    const py::gil_scoped_release released;
    linear_backward(p, g);
}

}  // namespace

void register_linear(py::module_& m) {
    m.def("linear_forward", &forward,
          "linear_forward(tensors, out, kv, z, saved, feature_map, causal, normalize, scale, threads): fills out, the "
          "state after the last token and, if not None, saved");
    m.def("linear_backward", &backward,
          "linear_backward(dout, dkv, dz, tensors, out, saved, gradients, feature_map, causal, normalize, scale, "
          "threads): fills the gradients that are not None");
    m.def("linear_step", &step,
          "linear_step(tensors, out, feature_map, normalize, scale, threads): fills out and advances the state of "
          "tensors in place");
}

}  // namespace fastattn
