// Denominators of the bench: the best this machine can do, measured with the instructions the kernels use.
#pragma once
#include <cstddef>

#include "fastattn/isa.h"

namespace fastattn {

// fma_peak, bf16_dot_peak: best GFLOP/s over windows that fill `seconds`; bf16_dot_peak is 0 where the ISA has no such
// instruction. read_bandwidth: best GB/s over passes through a buffer of `bytes` (choose it larger than the last
// cache).
#define FASTATTN_DECLARE_PEAK(isa)                     \
    namespace isa {                                    \
    double fma_peak(int threads, double seconds);      \
    double bf16_dot_peak(int threads, double seconds); \
    double read_bandwidth(int threads, size_t bytes);  \
    }
FASTATTN_FOR_EACH_BF16_ISA(FASTATTN_DECLARE_PEAK)
#undef FASTATTN_DECLARE_PEAK

}  // namespace fastattn
