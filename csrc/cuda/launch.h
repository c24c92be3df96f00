// Launching a kernel; errors become exceptions that name it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastattn {
namespace cuda {

inline void check(const char* what, cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that the blocks on one multiprocessor have between them.
inline int shared_memory_of_processor(int device) {
    int bytes = 0;
    check("shared memory", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    return bytes;
}

// `blocks` blocks of `threads` threads, each with `shared_bytes` of dynamic shared memory, on `stream`.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void* stream,
            const A&... arguments) {
    if (blocks < 1 || blocks > INT32_MAX)
        throw std::runtime_error(std::string(name) + ": " + std::to_string(blocks) + " blocks");
    if (shared_bytes > 48 << 10)
        check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    check(name, cudaLaunchKernelEx(&config, kernel, P(arguments)...));
}

// Zeros `bytes` of device memory, in the order of the stream.
inline void clear(void* data, size_t bytes, void* stream) {
    const cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) throw std::runtime_error(std::string("cudaMemsetAsync: ") + cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace fastattn
