#include "softmax_params.h"

#include <cmath>
#include <initializer_list>

#include "plan.h"

namespace py = pybind11;

namespace fastattn {

constexpr int64_t kLargestHead = 512;

void check_softmax_shapes(const SoftmaxParams& p) {
    const int64_t B = p.B(), Hq = p.Hq(), Hk = p.Hk(), Lq = p.Lq(), Lk = p.Lk();
    expect(p.k, "k", {B, Hk, Lk, p.D()});
    expect(p.v, "v", {B, Hk, Lk, p.Dv()});
    expect(p.out, "out", {B, Hq, Lq, p.Dv()});
    if ((Hk == 0) != (Hq == 0) || (Hk && Hq % Hk)) {
        refuse("the heads of q must be a multiple of those of k: q " + text(p.q) + ", k " + text(p.k));
    }
    if (p.D() > kLargestHead || p.Dv() > kLargestHead)
        refuse("head dimension over 512: q " + text(p.q) + ", v " + text(p.v));
    if (p.q.dtype == DType::kBool || p.k.dtype != p.q.dtype || p.v.dtype != p.q.dtype || p.out.dtype != p.q.dtype) {
        refuse("q, k, v and out must share one floating dtype");
    }
}

namespace {

int64_t bound(py::handle value, int64_t missing) {
    if (value.is_none()) return missing;
    const int64_t x = value.cast<int64_t>();
    return x > kUnbounded ? kUnbounded : x < -kUnbounded ? -kUnbounded : x;
}

// Places in fastattn.params.SoftmaxTensors.
enum Field { kQ, kK, kV, kBias, kSlopes, kSinks, kMask, kDiagonal, kRng, kPlan, kFields };

// Contiguous data of `dtype` as [columns], or, with rows >= 0, as [rows | 1, columns]; null for None.
const char* small_data(py::handle tensor, const char* name, DType dtype, int64_t rows, int64_t columns, int device) {
    if (tensor.is_none()) return nullptr;
    const TensorView t = view_as(tensor, name, rows >= 0 ? 2 : 1, dtype, device);
    if (t.size[3] != columns || (rows >= 0 && t.size[2] != 1 && t.size[2] != rows)) {
        refuse(std::string(name) + " has the wrong shape");
    }
    refuse_unless_contiguous(t, name);
    return t.data;
}

}  // namespace

SoftmaxParams softmax_params(py::handle tensors, py::handle out, double scale, py::handle lo, py::handle hi,
                             double softcap, double dropout_p, TilePlanView* plan, int device) {
    if (!py::isinstance<py::tuple>(tensors) || py::len(tensors) != kFields) {
        throw py::type_error("the tensors of a call are a SoftmaxTensors of fastattn.params");
    }
    const auto x = py::reinterpret_borrow<py::tuple>(tensors);
    const py::handle rng = x[kRng];
    SoftmaxParams p{};
    p.q = view_of(x[kQ], "q", 4, false, device);
    p.k = view_of(x[kK], "k", 4, false, device);
    p.v = view_of(x[kV], "v", 4, false, device);
    p.mask = view_of(x[kMask], "mask", 4, true, device);
    p.bias = view_of(x[kBias], "bias", 4, true, device);
    p.out = view_of(out, "out", 4, false, device);
    check_softmax_shapes(p);
    const int64_t B = p.B(), Hq = p.Hq(), Lq = p.Lq(), Lk = p.Lk();
    if (p.mask) {
        expect(p.mask, "mask", {B, Hq, Lq, Lk}, true);
        if (p.mask.dtype != DType::kBool) refuse("mask must be bool");
    }
    if (p.bias) {
        expect(p.bias, "bias", {B, Hq, Lq, Lk}, true);
        if (p.bias.dtype != p.q.dtype && p.bias.dtype != DType::kFloat32)
            refuse("bias must be float32 or the dtype of q");
    }
    p.slopes = reinterpret_cast<const float*>(small_data(x[kSlopes], "slopes", DType::kFloat32, B, Hq, device));
    if (p.slopes) p.slopes_batch = view_of(x[kSlopes], "slopes", 2, false, device).size[2] == 1 ? 0 : Hq;
    p.sinks = reinterpret_cast<const float*>(small_data(x[kSinks], "sinks", DType::kFloat32, -1, Hq, device));
    p.diagonal = reinterpret_cast<const int32_t*>(small_data(x[kDiagonal], "diagonal", DType::kInt32, -1, Lq, device));
    if (!py::object(x[kPlan]).is_none()) {
        if (p.mask) refuse("a call has a mask or a plan, not both");
        *plan = plan_view(x[kPlan], device);
        if (plan->Lq != Lq || plan->Lk != Lk || (plan->batches != 1 && plan->batches != B) ||
            (plan->heads != 1 && plan->heads != Hq)) {
            refuse("the plan is for other lengths, batches or heads: q " + text(p.q) + ", k " + text(p.k));
        }
        p.plan = plan;
    }
    if (!(softcap >= 0.0) || !std::isfinite(softcap)) refuse("softcap must be finite and >= 0");
    p.softcap = softcap;
    if (!std::isfinite(scale)) refuse("scale must be finite");
    if (!(dropout_p >= 0.0 && dropout_p <= 1.0)) refuse("dropout_p must be in [0, 1]");
    p.scale = scale;
    p.lo = bound(lo, -kUnbounded);
    p.hi = bound(hi, kUnbounded);
    p.dropout_p = dropout_p;
    if (dropout_p > 0) {
        if (rng.is_none()) refuse("rng is required with dropout");
        p.rng = reinterpret_cast<const uint64_t*>(small_data(rng, "rng", DType::kInt64, -1, 2, device));
        if (device != kCpu) return p;
        const py::list words = rng.attr("tolist")();
        p.seed = static_cast<uint64_t>(words[0].cast<int64_t>());
        p.offset = static_cast<uint64_t>(words[1].cast<int64_t>());
    }
    return p;
}

SoftmaxGradients softmax_gradients(py::handle dout, py::handle dlse, py::handle tensors, const SoftmaxParams& p,
                                   py::handle dq, py::handle dk, py::handle dv, py::handle dbias, py::handle dslopes,
                                   py::object* dense, int device) {
    SoftmaxGradients g{};
    g.dout = view_of(dout, "dout", 4, false, device);
    g.dq = view_of(dq, "dq", 4, true, device);
    g.dk = view_of(dk, "dk", 4, true, device);
    g.dv = view_of(dv, "dv", 4, true, device);
    g.dbias = view_of(dbias, "dbias", 4, true, device);
    if (!dlse.is_none()) {
        *dense = dlse.attr("contiguous")();
        g.dlse = floats(view_of(*dense, "dlse", 3, false, device), "dlse", {1, p.B(), p.Hq(), p.Lq()});
    }
    expect(g.dout, "dout", {p.B(), p.Hq(), p.Lq(), p.Dv()});
    if (g.dout.dtype != p.q.dtype) refuse("dout must have the dtype of q");
    const auto same = [&](const TensorView& t, const char* name, const TensorView& like, DType dtype) {
        if (!t) return;
        expect(t, name, {like.size[0], like.size[1], like.size[2], like.size[3]});
        if (t.dtype != dtype) refuse(std::string(name) + " has the wrong dtype");
    };
    same(g.dq, "dq", p.q, p.q.dtype);
    same(g.dk, "dk", p.k, p.q.dtype);
    same(g.dv, "dv", p.v, p.q.dtype);
    if (g.dbias && !p.bias) refuse("dbias without bias");
    same(g.dbias, "dbias", p.bias, DType::kFloat32);
    if (g.dbias) refuse_unless_contiguous(g.dbias, "dbias");
    if (!dslopes.is_none()) {
        if (!p.slopes) refuse("dslopes without slopes");
        const TensorView t = view_as(dslopes, "dslopes", 2, DType::kFloat32, device);
        const TensorView slopes =
            view_of(py::reinterpret_borrow<py::tuple>(tensors)[kSlopes], "slopes", 2, false, device);
        expect(t, "dslopes", {1, 1, slopes.size[2], p.Hq()});
        refuse_unless_contiguous(t, "dslopes");
        g.dslopes = reinterpret_cast<float*>(t.data);
    }
    const std::initializer_list<const TensorView*> read = {&p.q, &p.k, &p.v, &p.out, &g.dout, &p.mask, &p.bias};
    refuse_overlap(g.dq, "dq", read);
    refuse_overlap(g.dk, "dk", read);
    refuse_overlap(g.dv, "dv", read);
    refuse_overlap(g.dbias, "dbias", read);
    refuse_overlap(g.dq, "dq", {&g.dk, &g.dv, &g.dbias});
    refuse_overlap(g.dk, "dk", {&g.dv, &g.dbias});
    refuse_overlap(g.dv, "dv", {&g.dbias});
    return g;
}

}  // namespace fastattn
