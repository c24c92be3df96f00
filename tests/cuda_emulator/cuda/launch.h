// Emulated twin of csrc/cuda/launch.h: runs the kernel before it returns.
#pragma once
#include "cuda_runtime.h"
#include "machine.h"

namespace fastattn {
namespace cuda {

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void*,
            const A&... arguments) {
    emulator::run(name, blocks, threads, static_cast<size_t>(shared_bytes), [&] { kernel(P(arguments)...); });
}

inline void clear(void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }
inline int shared_memory_of_processor(int) { return emulator::shared_memory_of_processor(); }

}  // namespace cuda
}  // namespace fastattn
