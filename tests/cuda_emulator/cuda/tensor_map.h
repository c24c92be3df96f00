// Emulated twin of csrc/cuda/tensor_map.h: keeps what it is given, and the limits that the driver documents.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "fastattn/params.h"

namespace fastattn {
namespace cuda {

// Of 16-bit numbers; innermost dimension first.
struct alignas(64) TensorMap {
    const char* data;
    uint64_t size[4];
    uint64_t stride[4];  // bytes
    uint32_t box[4];
};

inline TensorMap encode_tensor_map(DType dtype, void* data, const uint64_t (&size)[4], const uint64_t (&stride)[3],
                                   const uint32_t (&box)[4]) {
    const auto need = [](bool holds, const char* what) {
        if (!holds) throw std::runtime_error(std::string("tensor map: ") + what);
    };
    need(dtype == DType::kBFloat16 || dtype == DType::kFloat16, "dtype");
    need(data && reinterpret_cast<uintptr_t>(data) % 16 == 0, "address");
    TensorMap map{static_cast<const char*>(data), {}, {2}, {}};
    for (int d = 0; d < 4; ++d) {
        need(size[d] >= 1 && size[d] <= uint64_t{1} << 32, "size");
        need(box[d] >= 1 && box[d] <= 256, "box");
        map.size[d] = size[d];
        map.box[d] = box[d];
        if (d == 0) continue;
        need(stride[d - 1] >= 16 && stride[d - 1] % 16 == 0 && stride[d - 1] < uint64_t{1} << 40, "stride");
        map.stride[d] = stride[d - 1];
    }
    need(box[0] * 2 <= 128 && box[0] * 2 % 16 == 0, "box of a 128-byte swizzle");
    return map;
}

}  // namespace cuda
}  // namespace fastattn
