// Sums of the Hopper backward kernels on their way from the accumulators of wgmma to memory.
#pragma once
#include "cuda/warps_sm90.h"

namespace fastattn {
namespace cuda {
namespace sm90 {

// Row of a thread's first sums, of the 64 of its warpgroup; the others are 8 further.
__device__ __forceinline__ int sums_row() { return thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4; }

// Writes a warpgroup's sums [64, N], times `factor`, those of rows below `rows` and columns below `columns`. `row`: of
// the thread's first sums.
template <DType dtype, int N>
__device__ __forceinline__ void write_sums(char* to, int64_t row_stride, int row, int rows, int columns, float factor,
                                           const float (&sums)[N / 2]) {
    const int lane = thread_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int four = 0; four < N / 32; ++four) {
            uint32_t w[4];
#pragma unroll
            for (int g = 0; g < 4; ++g) {
                const int at = 16 * four + 4 * g + 2 * half;
                w[g] = pack<dtype>(sums[at] * factor, sums[at + 1] * factor);
            }
            const Sixteen eight = gather_group(w, lane);
            const int r = row + 8 * half, column = 32 * four + 8 * lane;
            if (r < rows && column < columns) *reinterpret_cast<Sixteen*>(to + 2 * (r * row_stride + column)) = eight;
        }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace fastattn
