#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "dlpack.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// What tensors are read by, made once: reading them is much of the cost of a small call.
struct Names {
    const DLExchange* dlpack;
    PyObject *tensor, *parameter, *empty_like, *requires_grad;
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
        requires_grad = PyUnicode_InternFromString("requires_grad");
        const py::module_ torch = py::module_::import("torch");
        tensor = py::object(torch.attr("Tensor")).release().ptr();
        parameter = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
        empty_like = py::object(torch.attr("empty_like")).release().ptr();
        dlpack = dlpack_of(tensor);
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

bool dtype_of(const DLTensor& t, DType* dtype) {
    constexpr int kinds[] = {kDLFloat << 8 | 32, kDLBFloat << 8 | 16, kDLFloat << 8 | 16,
                             kDLBool << 8 | 8,   kDLInt << 8 | 32,    kDLInt << 8 | 64};  // in the order of DType
    for (int i = 0; i < 6 && t.type_lanes == 1; ++i) {
        if ((t.type_code << 8 | t.type_bits) != kinds[i]) continue;
        *dtype = static_cast<DType>(i);
        return true;
    }
    return false;
}

void refuse_elsewhere(py::handle tensor, const char* name, int device) {
    if (device == kCpu) {
        if (get(tensor, known().is_cpu, name).ptr() != Py_True) refuse(std::string(name) + " must be a CPU tensor");
    } else if (get(tensor, known().is_cuda, name).ptr() != Py_True ||
               checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().get_device)).cast<int>() != device) {
        refuse(std::string(name) + " must be a tensor on cuda:" + std::to_string(device));
    }
}

constexpr TensorView kScalar{nullptr, {1, 1, 1, 1}, {0, 0, 0, 0}, DType::kFloat32};

int64_t item(const py::object& tuple, int i) {
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

}  // namespace

// Sizes, strides, address and dtype in one call; false where it cannot be told so, or is not what the caller wants: the
// tensor's methods then say what is wrong.
static bool read_dlpack(py::handle tensor, int dims, int device, TensorView* view) {
    const DLExchange* dlpack = known().dlpack;
    if (!dlpack || !PyObject_TypeCheck(tensor.ptr(), reinterpret_cast<PyTypeObject*>(known().tensor))) return false;
    DLTensor t;
    if (dlpack->read(tensor.ptr(), &t) != 0) {
        PyErr_Clear();
        return false;
    }
    const bool here = device == kCpu ? t.device_type == kDLCpu : t.device_type == kDLCuda && t.device_id == device;
    if (!here || t.dims != dims || !dtype_of(t, &view->dtype)) return false;
    for (int i = 0; i < dims; ++i) {
        view->size[i + 4 - dims] = t.shape[i];
        view->stride[i + 4 - dims] = t.strides[i];
    }
    view->data = static_cast<char*>(t.data) + t.byte_offset;
    return true;
}

static void read_methods(py::handle tensor, const char* name, int dims, int device, TensorView* view) {
    refuse_elsewhere(tensor, name, device);
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
    for (int i = 0; i < dims; ++i) {
        view->size[i + 4 - dims] = item(shape, i);
        view->stride[i + 4 - dims] = item(strides, i);
    }
    const py::object address = checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().data_ptr));
    view->data = static_cast<char*>(PyLong_AsVoidPtr(address.ptr()));
    if (!view->data && PyErr_Occurred()) throw py::error_already_set();
}

static bool is_empty(const TensorView& t) { return !t.size[0] || !t.size[1] || !t.size[2] || !t.size[3]; }

// The view, of a tensor whose elements are what its memory says and can be addressed.
static TensorView addressable(TensorView view, py::handle tensor, const char* name) {
    if (checked(PyObject_CallMethodNoArgs(tensor.ptr(), known().is_neg)).ptr() == Py_True) {
        refuse(std::string(name) + " has the negative bit set; call resolve_neg() on it");
    }
    int64_t span = 0;
    for (int i = 0; i < 4; ++i) {
        const int64_t size = view.size[i], stride = view.stride[i];
        int64_t reach;
        if (size < 0 || stride < 0) refuse(std::string(name) + " has a negative size or stride");
        if (__builtin_mul_overflow(size > 0 ? size - 1 : 0, stride, &reach) ||
            __builtin_add_overflow(span, reach, &span)) {
            refuse(std::string(name) + " spans more than 2^63 elements");
        }
    }
    if (__builtin_mul_overflow(span + 1, element_size(view.dtype), &span)) {
        refuse(std::string(name) + " spans more than 2^63 bytes");
    }
    if (!view.data) {
        if (!is_empty(view)) refuse(std::string(name) + " has no storage (freed or never allocated)");
        // An empty tensor is present, though it has no memory: the address is never read.
        static char nothing;
        view.data = &nothing;
    }
    return view;
}

TensorView view_of(py::handle tensor, const char* name, int dims, bool optional, int device) {
    if (tensor.is_none()) {
        if (!optional) refuse(std::string(name) + " is required");
        return TensorView();
    }
    TensorView view = kScalar;
    if (!read_dlpack(tensor, dims, device, &view) || view.dtype > DType::kBool) {
        view.dtype = dtype_of(tensor, name);
        read_methods(tensor, name, dims, device, &view);
    }
    return addressable(view, tensor, name);
}

TensorView view_as(py::handle tensor, const char* name, int dims, DType dtype, int device) {
    TensorView view = kScalar;
    if (!read_dlpack(tensor, dims, device, &view) || view.dtype != dtype) {
        const py::object found = get(tensor, known().dtype, name);
        const py::handle wanted = known().dtypes[static_cast<int>(dtype)];
        if (!found.is(wanted)) {
            throw py::type_error(std::string(name) + " has dtype " + std::string(py::str(found)) + ", expected " +
                                 std::string(py::str(wanted)));
        }
        view.dtype = dtype;
        read_methods(tensor, name, dims, device, &view);
    }
    return addressable(view, tensor, name);
}

bool is_plain(py::handle tensor) {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    return type == known().tensor || type == known().parameter;
}

bool is_on_cpu(py::handle tensor) { return get(tensor, known().is_cpu, "tensor").ptr() == Py_True; }

bool requires_grad(py::handle tensor) { return get(tensor, known().requires_grad, "tensor").ptr() == Py_True; }

py::object empty_like(py::handle tensor) { return checked(PyObject_CallOneArg(known().empty_like, tensor.ptr())); }

py::object empty_floats(py::handle tensor, const std::array<int64_t, 4>& sizes) {
    const py::handle dtype = known().dtypes[static_cast<int>(DType::kFloat32)];
    return tensor.attr("new_empty")(py::make_tuple(sizes[0], sizes[1], sizes[2], sizes[3]), py::arg("dtype") = dtype);
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

bool is_expanded(const TensorView& t) {
    for (int i = 0; i < 4; ++i) {
        if (t.size[i] > 1 && t.stride[i] == 0) return true;
    }
    return false;
}

void refuse_overlap(const TensorView& t, const char* name, std::initializer_list<const TensorView*> others) {
    if (!t || is_empty(t)) return;
    if (is_expanded(t)) refuse(std::string(name) + " is expanded: its elements share memory");
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
