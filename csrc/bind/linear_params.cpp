#include "linear_params.h"

#include <cmath>
#include <limits>

namespace py = pybind11;

namespace fastattn {

py::tuple tuple_of(py::handle fields, size_t size, const char* what) {
    if (!py::isinstance<py::tuple>(fields) || py::len(fields) != size) throw py::type_error(what);
    return py::reinterpret_borrow<py::tuple>(fields);
}

TensorView lifted(TensorView t) {
    for (int i = 0; i < 3; ++i) {
        t.size[i] = t.size[i + 1];
        t.stride[i] = t.stride[i + 1];
    }
    t.size[3] = t.stride[3] = 1;
    return t;
}

TensorView token_view(py::handle tensor, const char* name) {
    if (tensor.is_none()) return TensorView();
    const bool vector = py::hasattr(tensor, "dim") && tensor.attr("dim")().cast<int64_t>() == 4;
    const TensorView t = vector ? view_of(tensor, name, 4) : lifted(view_of(tensor, name, 3));
    if (t.dtype != DType::kFloat32) refuse(std::string(name) + " must be float32");
    return t;
}

namespace {

FeatureMap map_of(const std::string& name) {
    const char* const names[] = {"identity", "relu", "elu1", "taylor1", "taylor2"};
    for (int i = 0; i < 5; ++i) {
        if (name == names[i]) return static_cast<FeatureMap>(i);
    }
    refuse("unknown feature map " + name);
}

void divides(int64_t heads, int64_t all, const char* name) {
    if (heads == 0 ? all != 0 : all % heads != 0) {
        refuse(std::string(name) + " has " + std::to_string(heads) + " heads, which do not divide " +
               std::to_string(all));
    }
}

// Of n numbers `step` apart, the first outside [least, most]; null where there is none.
const float* first_outside(const float* x, int64_t n, int64_t step, float least, float most) {
    const auto inside = [=](float value) { return value >= least && value <= most; };
    bool all = step == 1;
    for (int64_t i = 0; step == 1 && i < n; ++i) all &= inside(x[i]);
    for (int64_t i = 0; !all && i < n; ++i, x += step) {
        if (!inside(*x)) return x;
    }
    return nullptr;
}

// Refuses values outside [least, most] of [B, Hs, L, 1 | D].
void refuse_outside(const TensorView& t, float least, float most, const char* what) {
    const bool by_channel = t.size[3] > 1;
    const int64_t tokens = t.stride[2] == 0 && t.size[2] > 1 ? 1 : t.size[2];  // one value for all
    for (int64_t b = 0; b < t.size[0] && t; ++b) {
        for (int64_t h = 0; h < t.size[1]; ++h) {
            for (int64_t row = 0; row < (by_channel ? tokens : 1); ++row) {
                const float* wrong =
                    first_outside(reinterpret_cast<const float*>(t.row(b, h, row)), by_channel ? t.size[3] : tokens,
                                  t.stride[by_channel ? 3 : 2], least, most);
                if (wrong) refuse(what + (", got " + std::to_string(*wrong)));
            }
        }
    }
}

}  // namespace

LinearParams linear_params(const py::tuple& x, const std::string& map, bool causal, bool normalize, double scale,
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

LinearState::LinearState(py::handle kv_of, py::handle z_of, const char* name, bool required)
    : kv(view_of(kv_of, name, 4, !required)), z(view_of(z_of, name, 3, true)) {}

float* LinearState::kv_floats(const LinearParams& p, const char* name) const {
    return floats(kv, name, {p.sequences, p.Hs(), p.F(), p.Dv()});
}

float* LinearState::z_floats(const LinearParams& p, const char* name, bool required) const {
    if (z && !p.normalize) refuse(std::string(name) + " has a z, but nothing is normalised");
    if (required && p.normalize && !z) refuse(std::string(name) + " needs its z");
    return floats(z, name, {1, p.sequences, p.Hs(), p.F()});
}

void check_linear_out(const LinearParams& p, const TensorView& t, const char* name) {
    expect(t, name, {p.B(), p.H(), p.Lq(), p.Dv()});
    if (t.dtype != p.q.dtype) refuse(std::string(name) + " must have the dtype of q");
}

void refuse_wrong_gates(const LinearParams& p) {
    refuse_outside(p.decay, std::numeric_limits<float>::lowest(), 0,
                   "decay is the logarithm of a gate and must be finite and <= 0 (pass "
                   "torch.nn.functional.logsigmoid(x), or log(gate))");
    refuse_outside(p.beta, 0, 2, "beta must be in [0, 2] (pass beta.sigmoid(), or twice that)");
}

void set_step(LinearParams& p, const py::tuple& x, py::handle out) {
    if (p.Lk() != 1 || p.cu_seqlens) refuse("a step takes one token of each batch");
    refuse_wrong_gates(p);
    const LinearState state(x[kKv], x[kZ], "the state", true);
    p.kv_out = state.kv_floats(p, "the state");
    p.z_out = state.z_floats(p, "the state", true);
    p.out = view_of(out, "out", 4);
    check_linear_out(p, p.out, "out");
    refuse_overlap(p.out, "out", {&p.q, &p.k, &p.v, &p.decay, &p.beta, &state.kv, &state.z});
    refuse_overlap(state.kv, "the state", {&p.q, &p.k, &p.v, &p.decay, &p.beta, &state.z});
    refuse_overlap(state.z, "the state", {&p.q, &p.k, &p.v, &p.decay});
}

}  // namespace fastattn
