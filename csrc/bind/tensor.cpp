#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
namespace {

DType dtype_of(py::handle tensor, const char* name) {
    // torch.dtype objects are singletons: the strings are looked up once.
    static PyObject* known[4] = {};
    if (!known[0]) {
        const py::module_ torch = py::module_::import("torch");
        const char* names[] = {"float32", "bfloat16", "float16", "bool"};
        for (int i = 3; i >= 0; --i) known[i] = py::object(torch.attr(names[i])).release().ptr();
    }
    const py::object dtype = tensor.attr("dtype");
    for (int i = 0; i < 4; ++i) {
        if (dtype.ptr() == known[i]) return static_cast<DType>(i);
    }
    throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(dtype)) +
                         "; the native kernels take float32, bfloat16, float16, and bool for masks");
}

}  // namespace

TensorView view_of(py::handle tensor, const char* name, int dims, bool optional) {
    TensorView view;
    if (tensor.is_none()) {
        if (!optional) refuse(std::string(name) + " is required");
        return view;
    }
    if (!py::hasattr(tensor, "data_ptr") || !py::hasattr(tensor, "stride")) {
        throw py::type_error(std::string(name) + " must be a torch.Tensor");
    }
    if (!tensor.attr("is_cpu").cast<bool>()) refuse(std::string(name) + " must be a CPU tensor");
    if (!tensor.attr("layout").is(py::module_::import("torch").attr("strided"))) {
        refuse(std::string(name) + " must be a dense strided tensor");
    }
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    if (static_cast<int>(shape.size()) != dims) {
        refuse(std::string(name) + " must have " + std::to_string(dims) + " dimensions, got " +
               std::string(py::str(tensor.attr("shape"))));
    }
    view.dtype = dtype_of(tensor, name);
    bool empty = false;
    for (int i = 0; i < 4; ++i) view.size[i] = 1;
    int64_t span = 0;
    for (int i = 0; i < dims; ++i) {
        const int64_t size = shape[i].cast<int64_t>(), stride = strides[i].cast<int64_t>();
        int64_t reach;
        if (size < 0 || stride < 0) refuse(std::string(name) + " has a negative size or stride");
        if (__builtin_mul_overflow(size > 0 ? size - 1 : 0, stride, &reach) ||
            __builtin_add_overflow(span, reach, &span)) {
            refuse(std::string(name) + " spans more than 2^63 elements");
        }
        empty |= size == 0;
        view.size[i + 4 - dims] = size;
        view.stride[i + 4 - dims] = stride;
    }
    if (__builtin_mul_overflow(span + 1, element_size(view.dtype), &span)) {
        refuse(std::string(name) + " spans more than 2^63 bytes");
    }
    view.data = reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    if (!view.data) {
        if (!empty) refuse(std::string(name) + " has no storage (freed or never allocated)");
        // An empty tensor is present, though it has no memory: the address is never read.
        static char nothing;
        view.data = &nothing;
    }
    return view;
}

}  // namespace fastattn
