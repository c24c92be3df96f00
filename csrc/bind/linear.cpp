#include "fastattn/linear.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Order of the fields of LinearTensors; its first seven are those of the gradients.
enum Field { kQ, kK, kV, kDecay, kBeta, kKv, kZ, kKeyMask, kCuSeqlens, kFields };

py::tuple tuple_of(py::handle fields, size_t size, const char* what) {
    if (!py::isinstance<py::tuple>(fields) || py::len(fields) != size) throw py::type_error(what);
    return py::reinterpret_borrow<py::tuple>(fields);
}

FeatureMap map_of(const std::string& name) {
    const char* const names[] = {"identity", "relu", "elu1", "taylor1", "taylor2"};
    for (int i = 0; i < 5; ++i) {
        if (name == names[i]) return static_cast<FeatureMap>(i);
    }
    refuse("unknown feature map " + name);
}

// [.., n] as [.., n, 1].
TensorView lifted(TensorView t) {
    for (int i = 0; i < 3; ++i) {
        t.size[i] = t.size[i + 1];
        t.stride[i] = t.stride[i + 1];
    }
    t.size[3] = t.stride[3] = 1;
    return t;
}

// A tensor of numbers for each token, [B, Hs, L] or [B, Hs, L, D], as [B, Hs, L, 1 | D].
TensorView token_view(py::handle tensor, const char* name) {
    if (tensor.is_none()) return TensorView();
    const bool vector = py::hasattr(tensor, "dim") && tensor.attr("dim")().cast<int64_t>() == 4;
    const TensorView t = vector ? view_of(tensor, name, 4) : lifted(view_of(tensor, name, 3));
    if (t.dtype != DType::kFloat32) refuse(std::string(name) + " must be float32");
    return t;
}

void divides(int64_t heads, int64_t all, const char* name) {
    if (heads == 0 ? all != 0 : all % heads != 0) {
        refuse(std::string(name) + " has " + std::to_string(heads) + " heads, which do not divide " +
               std::to_string(all));
    }
}

// All but what is written.
LinearParams params(const py::tuple& x, const std::string& map, bool causal, bool normalize, double scale,
                    int threads) {
    LinearParams p{};
    p.q = view_of(x[kQ], "q", 4);
    p.k = view_of(x[kK], "k", 4);
    p.v = view_of(x[kV], "v", 4);
    p.map = map_of(map);
    p.causal = causal;
    p.normalize = normalize;
    p.scale = scale;
    p.threads = threads;
    const int64_t B = p.B(), D = p.D(), Lk = p.Lk(),
                  largest = p.map == FeatureMap::kTaylor2 ? kLinearLargestSquare : kLinearLargestHead;
    expect(p.k, "k", {B, p.k.size[1], Lk, D});
    expect(p.v, "v", {B, p.v.size[1], Lk, p.Dv()});
    if (p.k.dtype != p.q.dtype || p.v.dtype != p.q.dtype || p.q.dtype == DType::kBool) {
        refuse("q, k and v must share one floating dtype");
    }
    if (D < 1 || D > largest || p.Dv() < 1 || p.Dv() > kLinearLargestHead) {
        refuse("head dimensions must be in 1 .. " + std::to_string(largest) + ", v's in 1 .. " +
               std::to_string(kLinearLargestHead));
    }
    divides(p.q.size[1], p.H(), "q");
    divides(p.k.size[1], p.Hs(), "k");
    divides(p.v.size[1], p.Hs(), "v");
    divides(p.Hs(), p.H(), "the state");
    const int64_t Hs = p.Hs();
    p.decay = token_view(x[kDecay], "decay");
    p.beta = token_view(x[kBeta], "beta");
    if (p.decay) {
        if (p.decay.size[3] != 1 && p.F() != D) refuse("a decay per feature needs a feature map with D features");
        expect(p.decay, "decay", {B, Hs, Lk, p.decay.size[3] == 1 ? 1 : D});
    }
    if (p.beta) {
        expect(p.beta, "beta", {B, Hs, Lk, 1});
        if (p.map != FeatureMap::kIdentity || normalize) {
            refuse("beta needs the feature map identity and no normaliser");
        }
    }
    if (causal ? p.Lq() != Lk : p.decay || p.beta) {
        refuse(causal ? "causal needs as many queries as keys" : "decay and beta need causal");
    }
    if (!py::object(x[kKeyMask]).is_none()) {
        if (causal) refuse("key_mask and causal do not go together");
        p.key_mask = view_as(x[kKeyMask], "key_mask", 2, DType::kBool);
        expect(p.key_mask, "key_mask", {1, 1, B, Lk});
    }
    p.sequences = B;
    if (!py::object(x[kCuSeqlens]).is_none()) {
        const TensorView cu = view_as(x[kCuSeqlens], "cu_seqlens", 1, DType::kInt32);
        refuse_unless_contiguous(cu, "cu_seqlens");
        if (B != 1 || p.Lq() != Lk) refuse("cu_seqlens needs B = 1 and as many queries as keys");
        if (cu.size[3] < 1) refuse("cu_seqlens must have at least one element");
        p.sequences = cu.size[3] - 1;
        p.cu_seqlens = reinterpret_cast<const int32_t*>(cu.data);
        bool sorted = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.sequences] == Lk;
        for (int64_t n = 0; n < p.sequences; ++n) sorted &= p.cu_seqlens[n] <= p.cu_seqlens[n + 1];
        if (!sorted) refuse("cu_seqlens must rise from 0 to the number of tokens");
    }
    if (!std::isfinite(scale)) refuse("scale must be finite");
    if (threads < 1 || threads > 4096) refuse("threads must be in 1 .. 4096");
    return p;
}

// The two parts of a state; z is there with kv, where normalised.
struct State {
    TensorView kv, z;

    State(py::handle kv_of, py::handle z_of, const char* name, bool required)
        : kv(view_of(kv_of, name, 4, !required)), z(view_of(z_of, name, 3, true)) {}
    float* kv_floats(const LinearParams& p, const char* name) const {
        return floats(kv, name, {p.sequences, p.Hs(), p.F(), p.Dv()});
    }
    float* z_floats(const LinearParams& p, const char* name, bool required) const {
        if (z && !p.normalize) refuse(std::string(name) + " has a z, but nothing is normalised");
        if (required && p.normalize && !z) refuse(std::string(name) + " needs its z");
        return floats(z, name, {1, p.sequences, p.Hs(), p.F()});
    }
};

void set_initial(LinearParams& p, const State& before) {
    if (before.z && !before.kv) refuse("the initial state needs its kv");
    p.kv = before.kv_floats(p, "the initial state");
    p.z = before.z_floats(p, "the initial state", p.kv != nullptr);
}

void check_out(const LinearParams& p, const TensorView& t, const char* name) {
    expect(t, name, {p.B(), p.H(), p.Lq(), p.Dv()});
    if (t.dtype != p.q.dtype) refuse(std::string(name) + " must have the dtype of q");
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
    const py::tuple x = tuple_of(tensors, kFields, "the tensors of a call are a LinearTensors of fastattn.params");
    LinearParams p = params(x, map, causal, normalize, scale, threads);
    const State before(x[kKv], x[kZ], "the initial state", false), after(kv, z, "the final state", true);
    set_initial(p, before);
    p.kv_out = after.kv_floats(p, "the final state");
    p.z_out = after.z_floats(p, "the final state", true);
    p.out = view_of(out, "out", 4);
    check_out(p, p.out, "out");
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

// Refuses values outside [least, most] of what holds a number or a row for the one token of a step.
void refuse_outside(const TensorView& t, float least, float most, const char* what) {
    for (int64_t b = 0; b < t.size[0] && t; ++b) {
        for (int64_t h = 0; h < t.size[1]; ++h) {
            const float* row = reinterpret_cast<const float*>(t.row(b, h, 0));
            for (int64_t c = 0; c < t.size[3]; ++c) {
                const float value = row[c * t.last_stride()];
                if (!(value >= least && value <= most)) refuse(what + (", got " + std::to_string(value)));
            }
        }
    }
}

// The rest of a step: its state, which it advances, and where it writes.
void set_step(LinearParams& p, const py::tuple& x, py::handle out) {
    if (p.Lk() != 1 || p.cu_seqlens) refuse("a step takes one token of each batch");
    refuse_outside(p.decay, std::numeric_limits<float>::lowest(), 0,
                   "decay is the logarithm of a gate and must be finite and <= 0 (pass "
                   "torch.nn.functional.logsigmoid(x), or log(gate))");
    refuse_outside(p.beta, 0, 2, "beta must be in [0, 2] (pass beta.sigmoid(), or twice that)");
    const State state(x[kKv], x[kZ], "the state", true);
    p.kv_out = state.kv_floats(p, "the state");
    p.z_out = state.z_floats(p, "the state", true);
    p.out = view_of(out, "out", 4);
    check_out(p, p.out, "out");
    refuse_overlap(p.out, "out", {&p.q, &p.k, &p.v, &p.decay, &p.beta, &state.kv, &state.z});
    refuse_overlap(state.kv, "the state", {&p.q, &p.k, &p.v, &p.decay, &p.beta, &state.z});
    refuse_overlap(state.z, "the state", {&p.q, &p.k, &p.v, &p.decay});
}

void step(py::handle tensors, py::handle out, const std::string& map, bool normalize, double scale, int threads) {
    const py::tuple x = tuple_of(tensors, kFields, "the tensors of a call are a LinearTensors of fastattn.params");
    LinearParams p = params(x, map, true, normalize, scale, threads);
    set_step(p, x, out);
    const py::gil_scoped_release released;
    linear_step(p);
}

// A step as it is called, without the general call's checks: out, or None where anything is unusual.
py::object plain_step(py::handle tensors, const std::string& map, bool normalize, py::handle scale, bool grad_enabled,
                      int threads) {
    LinearParams p{};
    py::object out;
    try {
        const py::tuple x = tuple_of(tensors, kFields, "a LinearTensors");
        for (int field = 0; field < kKeyMask; ++field) {
            const py::handle t = x[static_cast<size_t>(field)];
            if (!t.is_none() && (!is_plain(t) || (grad_enabled && requires_grad(t)))) return py::none();
        }
        if (!is_on_cpu(x[kQ])) return py::none();
        const double D = static_cast<double>(view_of(x[kQ], "q", 4).size[3]);
        const double factor = scale.is_none() ? std::pow(D, -0.5) : scale.cast<double>();
        if (normalize && !(factor > 0)) return py::none();
        p = params(x, map, true, normalize, factor, threads);
        if (p.D() != p.Dv() || p.q.size[1] != p.H() || p.B() == 0 || !is_usual(p.q)) return py::none();
        out = empty_like(x[kQ]);
        set_step(p, x, out);
    } catch (const std::exception&) {
        return py::none();
    }
    const py::gil_scoped_release released;
    linear_step(p);
    return out;
}

void backward(py::handle dout, py::handle dkv, py::handle dz, py::handle tensors, py::handle out, py::handle saved,
              py::handle gradients, const std::string& map, bool causal, bool normalize, double scale, int threads) {
    const py::tuple x = tuple_of(tensors, kFields, "the tensors of a call are a LinearTensors of fastattn.params");
    const py::tuple wanted = tuple_of(gradients, kZ + 1, "the gradients of a call are seven tensors or None");
    LinearParams p = params(x, map, causal, normalize, scale, threads);
    const State before(x[kKv], x[kZ], "the initial state", false), after(dkv, dz, "the state's gradient", false);
    set_initial(p, before);
    p.out = view_of(out, "out", 4);
    check_out(p, p.out, "out");
    const TensorView kept = saved_view(p, saved, &p.saved);
    if (p.saves() && !p.saved) refuse("saved is required with a normaliser or beta");
    LinearGradients g{};
    g.dkv = after.kv_floats(p, "the state's gradient");
    g.dz = after.z_floats(p, "the state's gradient", false);
    g.dout = view_of(dout, "dout", 4);
    check_out(p, g.dout, "dout");
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
    m.def("linear_plain_step", &plain_step,
          "linear_plain_step(tensors, feature_map, normalize, scale, grad_enabled, threads): the same, into a new "
          "tensor; None where it is unusual");
}

}  // namespace fastattn
