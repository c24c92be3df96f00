// Descriptions of tensors for the copy engine, made by the driver without linking to it.
// tests/cuda_emulator/cuda/tensor_map.h is its twin for a host.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastattn/params.h"

namespace fastattn {
namespace cuda {

// Sizes and box innermost first; strides in bytes, of all dimensions but the innermost. Boxes arrive swizzled by 128
// bytes, with zeros for what lies outside.
inline CUtensorMap encode_tensor_map(DType dtype, void* data, const uint64_t (&size)[4], const uint64_t (&stride)[3],
                                     const uint32_t (&box)[4]) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                                             : nullptr;
    }();
    if (!encode) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer is needed)");
    const CUtensorMapDataType type =
        dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const cuuint64_t sizes[4] = {size[0], size[1], size[2], size[3]};
    const cuuint64_t strides[3] = {stride[0], stride[1], stride[2]};
    const cuuint32_t ones[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult error =
        encode(&map, type, 4, data, sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(error));
    return map;
}

}  // namespace cuda
}  // namespace fastattn
