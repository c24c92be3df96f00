#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace fastattn {
namespace {

// Attribute names and dtype objects, made once: looking a tensor up is most of the cost of a small call.
struct Names {
    PyObject *is_cpu, *is_cuda, *get_device, *is_neg, *dtype, *shape, *stride, *data_ptr, *dtypes[6];
    Names() {
        is_cpu = PyUnicode_InternFromString("is_cpu");
        is_cuda = PyUnicode_InternFromString("is_cuda");
        get_device = PyUnicode_InternFromString("get_device");
        is_neg = PyUnicode_InternFromString("is_neg");
        dtype = PyUnicode_InternFromString("dtype");
        shape = PyUnicode_InternFromString("shape");
        stride = PyUnicode_InternFromString("stride");
        data_ptr = PyUnicode_InternFromString("data_ptr");
        const py::module_ torch = py::module_::import("torch");
        const char* names[] = {"float32", "bfloat16", "float16", "bool", "int32", "int64"};
        for (int i = 0; i < 6; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
    }
};

const Names& known() {
    // Not a plain static: its guard and the interpreter's lock, taken in both orders, would deadlock.
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> names;
    return names.call_once_and_store_result([] { return Names(); }).get_stored();
}

py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

py::object get(py::handle tensor, PyObject* name, const char* argument) {
    PyObject* result = PyObject_GetAttr(tensor.ptr(), name);
    if (!result) {
        PyErr_Clear();
        throw py::type_error(std::string(argument) + " must be a torch.Tensor");
    }
    return py::reinterpret_steal<py::object>(result);
}

DType dtype_of(py::handle tensor, const char* name) {
    const py::object dtype = get(tensor, known().dtype, name);
    for (int i = 0; i < 4; ++i) {
        if (dtype.ptr() == known().dtypes[i]) return static_cast<DType>(i);
    }
    throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(dtype)) +
                         "; the native kernels take float32, bfloat16, float16, and bool for masks");
}

void refuse_elsewhere(py::handle tensor, const char* name, int device) {
    if (device == kCpu) {
        if (get(tensor, known().is_cpu, name).ptr() != Py_True) refuse(std::string(name) + " must be a CPU tensor");
    } else if (get(tensor, known().is_cuda, name).ptr() != Py_True ||
               checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().get_device)).cast<int>() != device) {
        refuse(std::string(name) + " must be a tensor on cuda:" + std::to_string(device));
    }
}

int64_t item(const py::object& tuple, int i) {
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

}  // namespace

// All but the dtype, which decides how many bytes an element has.
static TensorView read_view(py::handle tensor, const char* name, int dims, DType dtype, int device) {
    TensorView view;
    view.dtype = dtype;
    refuse_elsewhere(tensor, name, device);
    if (checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().is_neg)).ptr() == Py_True) {
        refuse(std::string(name) + " has the negative bit set; call resolve_neg() on it");
    }
    const py::object shape = get(tensor, known().shape, name);
    const py::object strides = checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().stride));
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr()) ||
        PyTuple_GET_SIZE(shape.ptr()) != PyTuple_GET_SIZE(strides.ptr())) {
        throw py::type_error(std::string(name) + " must be a torch.Tensor");
    }
    if (PyTuple_GET_SIZE(shape.ptr()) != dims) {
        refuse(std::string(name) + " must have " + std::to_string(dims) + " dimensions, got " +
               std::string(py::str(shape)));
    }
    bool empty = false;
    for (int i = 0; i < 4; ++i) view.size[i] = 1;
    int64_t span = 0;
    for (int i = 0; i < dims; ++i) {
        const int64_t size = item(shape, i), stride = item(strides, i);
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
    const py::object address = checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().data_ptr));
    view.data = static_cast<char*>(PyLong_AsVoidPtr(address.ptr()));
    if (!view.data && PyErr_Occurred()) throw py::error_already_set();
    if (!view.data) {
        if (!empty) refuse(std::string(name) + " has no storage (freed or never allocated)");
        // An empty tensor is present, though it has no memory: the address is never read.
        static char nothing;
        view.data = &nothing;
    }
    return view;
}

TensorView view_of(py::handle tensor, const char* name, int dims, bool optional, int device) {
    if (!tensor.is_none()) return read_view(tensor, name, dims, dtype_of(tensor, name), device);
    if (!optional) refuse(std::string(name) + " is required");
    return TensorView();
}

TensorView view_as(py::handle tensor, const char* name, int dims, DType dtype, int device) {
    const py::object found = get(tensor, known().dtype, name);
    const py::handle wanted = known().dtypes[static_cast<int>(dtype)];
    if (!found.is(wanted)) {
        throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(found)) + ", expected " +
                             std::string(py::str(wanted)));
    }
    return read_view(tensor, name, dims, dtype, device);
}

std::string text(const TensorView& t) {
    std::string s = "[";
    for (int i = 0; i < 4; ++i) s += (i ? ", " : "") + std::to_string(t.size[i]);
    return s + "]";
}

void expect(const TensorView& t, const char* name, const int64_t (&sizes)[4], bool broadcast) {
    for (int i = 0; i < 4; ++i) {
        if (t.size[i] != sizes[i] && !(broadcast && t.size[i] == 1)) {
            TensorView wanted;
            for (int d = 0; d < 4; ++d) wanted.size[d] = sizes[d];
            refuse(std::string(name) + " has shape " + text(t) + ", expected " + (broadcast ? "to broadcast to " : "") +
                   text(wanted));
        }
    }
}

static bool is_empty(const TensorView& t) { return !t.size[0] || !t.size[1] || !t.size[2] || !t.size[3]; }

void refuse_unless_contiguous(const TensorView& t, const char* name) {
    int64_t dense = 1;
    for (int i = 3; i >= 0 && !is_empty(t); dense *= t.size[i--]) {
        if (t.size[i] > 1 && t.stride[i] != dense) refuse(std::string(name) + " must be contiguous");
    }
}

// First byte past the last element.
static const char* end_of(const TensorView& t) {
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) last += (t.size[i] - 1) * t.stride[i];
    return t.data + (last + 1) * element_size(t.dtype);
}

void refuse_overlap(const TensorView& t, const char* name, std::initializer_list<const TensorView*> others) {
    if (!t || is_empty(t)) return;
    for (int i = 0; i < 4; ++i) {
        if (t.size[i] > 1 && t.stride[i] == 0) refuse(std::string(name) + " is expanded: its elements share memory");
    }
    for (const TensorView* other : others) {
        if (*other && !is_empty(*other) && t.data < end_of(*other) && other->data < end_of(t)) {
            refuse(std::string(name) + " shares memory with another tensor of the call");
        }
    }
}

void ask_for_large_pages(const TensorView& t) {
#ifdef __linux__
    constexpr uintptr_t kPage = uintptr_t{2} << 20, kFewest = 16;
    if (!t || is_empty(t)) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(t.data) + kPage - 1) / kPage * kPage;
    const uintptr_t last = reinterpret_cast<uintptr_t>(end_of(t)) / kPage * kPage;
    if (last < first + kFewest * kPage) return;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)t;
#endif
}

float* floats(const TensorView& t, const char* name, const int64_t (&sizes)[4]) {
    if (!t) return nullptr;
    expect(t, name, sizes);
    if (t.dtype != DType::kFloat32) refuse(std::string(name) + " must be float32");
    refuse_unless_contiguous(t, name);
    return reinterpret_cast<float*>(t.data);
}

}  // namespace fastattn
