// Tensors [B, H, L, D] as the copy engine reads them: tiles of 64 columns, swizzled by 128 bytes.
#pragma once
#include "cuda/ptx_sm90.h"
#include "cuda/tensor_map.h"

namespace fastattn {
namespace cuda {

constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128;

struct TensorTiles {
    TensorMap map;
    int head_step, batch_step;  // 0 where all heads (batches) are one
};

// Tiles of `rows` rows of `heads` heads of a tensor of 16-bit numbers; sizes above 0, no row expanded.
inline TensorTiles tensor_tiles(const TensorView& x, int rows, int heads) {
    const auto moves = [&](int d) { return x.size[d] > 1 && x.stride[d] != 0; };
    const auto size = [&](int d) { return static_cast<uint64_t>(moves(d) ? x.size[d] : 1); };
    // The stride of a dimension of size 1 means nothing, but the driver checks it.
    const auto stride = [&](int d) { return static_cast<uint64_t>(moves(d) ? x.stride[d] * 2 : 16); };
    TensorTiles tiles;
    tiles.map = encode_tensor_map(
        x.dtype, x.data, {static_cast<uint64_t>(x.size[3]), static_cast<uint64_t>(x.size[2]), size(1), size(0)},
        {x.size[2] > 1 ? static_cast<uint64_t>(x.stride[2] * 2) : 16, stride(1), stride(0)},
        {kTileColumns, static_cast<uint32_t>(rows), static_cast<uint32_t>(moves(1) ? heads : 1), 1});
    tiles.head_step = moves(1);
    tiles.batch_step = moves(0);
    return tiles;
}

// Loads the tile whose first element is x[b, h, row, column].
__device__ __forceinline__ void load_tile(uint32_t to, const TensorTiles& x, uint32_t barrier, int column, int row,
                                          int h, int b) {
    tma_load(to, x.map, barrier, column, row, h * x.head_step, b * x.batch_step);
}

}  // namespace cuda
}  // namespace fastattn
