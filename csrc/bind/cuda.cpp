// The door to the CUDA library, a file beside this module: loaded when first asked for, by absolute path.
#include "fastattn/cuda.h"

#include <dlfcn.h>

#include "softmax_params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

struct Library {
    decltype(&fastattn_cuda_softmax_workspace) workspace;
    decltype(&fastattn_cuda_softmax_why_not) why_not;
    decltype(&fastattn_cuda_softmax_forward) forward;
    decltype(&fastattn_cuda_softmax_backward) backward;
};

Library library{};

template <class Function>
void find(void* handle, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(handle, name));
    if (!*function) throw py::import_error(std::string("the CUDA library lacks ") + name);
}

void load(const std::string& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw py::import_error(dlerror());
    decltype(&fastattn_cuda_abi) abi;
    find(handle, "fastattn_cuda_abi", &abi);
    if (abi() != kCudaAbi) {
        throw py::import_error(path + " is of another version (interface " + std::to_string(abi()) + ", expected " +
                               std::to_string(kCudaAbi) + ")");
    }
    decltype(&fastattn_cuda_problem) problem;
    find(handle, "fastattn_cuda_problem", &problem);
    if (const char* what = problem()) throw py::import_error(what);
    Library found{};
    find(handle, "fastattn_cuda_softmax_workspace", &found.workspace);
    find(handle, "fastattn_cuda_softmax_why_not", &found.why_not);
    find(handle, "fastattn_cuda_softmax_forward", &found.forward);
    find(handle, "fastattn_cuda_softmax_backward", &found.backward);
    library = found;
}

// (kernel family, stream, device or -1 for the emulator, multiprocessors, deterministic) as a call.
CudaCall call_of(const py::tuple& launch) {
    if (!library.forward) refuse("the CUDA library is not loaded");
    if (launch.size() != 5) refuse("a launch is (family, stream, device, multiprocessors, deterministic)");
    CudaCall call{};
    const int family = launch[0].cast<int>();
    if (family != static_cast<int>(CudaKernel::kPortable) && family != static_cast<int>(CudaKernel::kHopper)) {
        refuse("there is no kernel family " + std::to_string(family));
    }
    call.kernel = static_cast<CudaKernel>(family);
    call.stream = reinterpret_cast<void*>(launch[1].cast<uintptr_t>());
    call.device = launch[2].cast<int>();
    call.processors = launch[3].cast<int>();
    call.deterministic = launch[4].cast<bool>();
    if (call.processors < 1) refuse("a device has at least one multiprocessor");
    return call;
}

// The tensor that `allocate` makes of the bytes a call needs, whose memory the call then has; None where it needs none.
py::object give_workspace(CudaCall* call, int64_t bytes, const py::function& allocate) {
    if (bytes == 0) return py::none();
    const py::object tensor = allocate(bytes);
    const TensorView view = view_of(tensor, "workspace", 1, false, call->device);
    if (view.size[3] * element_size(view.dtype) < bytes || reinterpret_cast<uintptr_t>(view.data) % 256) {
        refuse("the workspace is too small or not aligned to 256 bytes");
    }
    refuse_unless_contiguous(view, "workspace");
    call->workspace = view.data;
    return tensor;
}

void raise(const char* error) {
    if (error) throw std::runtime_error(error);
}

py::object why_not(py::handle tensors, py::handle out, double scale, py::handle lo, py::handle hi, double softcap,
                   double dropout_p, const py::tuple& launch) {
    const CudaCall call = call_of(launch);
    TilePlanView plan;
    const SoftmaxParams p = softmax_params(tensors, out, scale, lo, hi, softcap, dropout_p, &plan, call.device);
    const char* reason = library.why_not(&p, nullptr, &call);
    return reason ? py::str(reason) : py::object(py::none());
}

void forward(py::handle tensors, py::handle out, py::handle lse, py::handle lse_parts, double scale, py::handle lo,
             py::handle hi, double softcap, double dropout_p, const py::tuple& launch, const py::function& allocate) {
    CudaCall call = call_of(launch);
    TilePlanView plan;
    SoftmaxParams p = softmax_params(tensors, out, scale, lo, hi, softcap, dropout_p, &plan, call.device);
    const TensorView whole = view_of(lse, "lse", 3, false, call.device);
    const TensorView parts = view_of(lse_parts, "lse_parts", 4, true, call.device);
    p.lse = floats(whole, "lse", {1, p.B(), p.Hq(), p.Lq()});
    p.lse_parts = floats(parts, "lse_parts", {p.B(), p.Hq(), p.Lq(), 2});
    refuse_overlap(p.out, "out", {&p.q, &p.k, &p.v, &p.bias, &whole, &parts});
    const py::object workspace = give_workspace(&call, library.workspace(&p, nullptr, &call), allocate);
    const py::gil_scoped_release released;
    raise(library.forward(&p, &call));
}

void backward(py::handle dout, py::handle dlse, py::handle tensors, py::handle out, py::handle lse_parts, py::handle dq,
              py::handle dk, py::handle dv, py::handle dbias, double scale, py::handle lo, py::handle hi,
              double softcap, double dropout_p, const py::tuple& launch, const py::function& allocate) {
    CudaCall call = call_of(launch);
    TilePlanView plan;
    SoftmaxParams p = softmax_params(tensors, out, scale, lo, hi, softcap, dropout_p, &plan, call.device);
    p.lse_parts =
        floats(view_of(lse_parts, "lse_parts", 4, false, call.device), "lse_parts", {p.B(), p.Hq(), p.Lq(), 2});
    py::object dense;
    const SoftmaxGradients g =
        softmax_gradients(dout, dlse, tensors, p, dq, dk, dv, dbias, py::none(), &dense, call.device);
    const py::object workspace = give_workspace(&call, library.workspace(&p, &g, &call), allocate);
    const py::gil_scoped_release released;
    raise(library.backward(&p, &g, &call));
}

}  // namespace

void register_cuda(py::module_& m) {
    m.def("cuda_load", &load, "cuda_load(path): loads the CUDA library, or ImportError");
    m.def("cuda_softmax_why_not", &why_not,
          "cuda_softmax_why_not(tensors, out, scale, lo, hi, softcap, dropout_p, launch): the library's own reason");
    m.def("cuda_softmax_forward", &forward,
          "cuda_softmax_forward(tensors, out, lse, lse_parts, scale, lo, hi, softcap, dropout_p, launch, allocate)");
    m.def("cuda_softmax_backward", &backward,
          "cuda_softmax_backward(dout, dlse, tensors, out, lse_parts, dq, dk, dv, dbias, scale, lo, hi, softcap, "
          "dropout_p, launch, allocate)");
}

}  // namespace fastattn
