// The C interface of DLPack 1 as torch offers it (2.10 and later): a tensor's memory in one call, where its Python
// methods take six. The layout is DLPack's stable ABI.
#pragma once
#include <Python.h>

#include <cstdint>

namespace fastattn {

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DLExchange {
    uint32_t major_version, minor_version;
    const DLExchange* older;
    void* managed[3];  // functions for tensors whose lifetime the reader shares
    // Fills `out`, whose shape and strides belong to the tensor; else sets a Python error and returns non-zero.
    int (*read)(void* tensor, DLTensor* out);
    void* current_stream;
};

enum DLDevice : int32_t { kDLCpu = 1, kDLCuda = 2 };
enum DLTypeCode : uint8_t { kDLInt = 0, kDLFloat = 2, kDLBFloat = 4, kDLBool = 6 };

// Of torch.Tensor; null where this torch has none.
inline const DLExchange* dlpack_of(PyObject* tensor_type) {
    PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
    const auto* api =
        capsule ? static_cast<DLExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
    PyErr_Clear();
    Py_XDECREF(capsule);
    while (api && api->major_version > 1) api = api->older;
    return api && api->major_version == 1 && api->read ? api : nullptr;
}

}  // namespace fastattn
