// Faults of wgmma, TMA, mbarriers and setmaxnreg that the emulator has to name. Then two products against sums written
// out: K-major tiles with rows past the end of their tensors, and registers times an MN-major tile.
#include <cmath>
#include <cstdio>
#include <exception>

#include "cuda/launch.h"
#include "cuda/tensor_tiles.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

constexpr DType kHalf = DType::kBFloat16;
constexpr int kRowsA = 50, kRowsB = 100, kTile = 64 * kTileRowBytes;

struct Operands {
    TensorTiles a, b, v;  // [50, 64], [100, 64], [64, 128]
};

__global__ void no_fence(const Operands) {
    float d[32];
    wgmma<kHalf, 64, false, false>(d, wgmma_operand(shared_memory()), wgmma_operand(shared_memory()), false);
}

__global__ void stored_without_a_fence(const Operands) {
    store_shared(shared_memory() + 4 * thread_index(), 1.0f);
    sync_threads();
    float d[32];
    wgmma_fence();
    wgmma<kHalf, 64, false, false>(d, wgmma_operand(shared_memory()), wgmma_operand(shared_memory()), false);
    wgmma_commit();
    wgmma_wait<0>(d);
}

__global__ void more_registers_than_there_are(const Operands) {
    if (thread_index() < 128)
        lower_registers<64>();
    else
        raise_registers<224>();
}

__global__ void one_arrival_too_many(const Operands) {
    if (thread_index()) return;
    barrier_init(shared_memory(), 1);
    barrier_expect(shared_memory(), 16);
    barrier_arrive(shared_memory());
}

// The element of a thread's accumulators as row and column.
int row_of(int i) { return thread_index() / 32 * 16 + thread_index() % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int i) { return i / 4 * 8 + thread_index() % 4 * 2 + i % 2; }

// first [64, 128] = a b^T, second [64, 128] = first[:, :64] v.
__global__ void products(const Operands x, float* first, float* second) {
    const uint32_t a = shared_memory(), b = a + kTile, v = b + 2 * kTile, barrier = v + 2 * kTile;
    if (thread_index() == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_expect(barrier, 5 * kTile);
        load_tile(a, x.a, barrier, 0, 0, 0, 0);
        load_tile(b, x.b, barrier, 0, 0, 0, 0);
        load_tile(v, x.v, barrier, 0, 0, 0, 0);
        load_tile(v + kTile, x.v, barrier, 64, 0, 0, 0);
    }
    sync_threads();
    const float early = load_shared<float>(a);
    barrier_wait(barrier, 0);
    float d[64], o[64];
    wgmma_fence();
    for (int k = 0; k < 4; ++k)
        wgmma<kHalf, 128, false, false>(d, wgmma_advance(wgmma_operand(a), 32 * k),
                                        wgmma_advance(wgmma_operand(b), 32 * k), k > 0);
    wgmma_commit();
    if (thread_index() == 0)
        std::printf("before their waits: tile %s, product %s\n", std::isnan(early) ? "NaN" : "there",
                    std::isnan(d[0]) ? "NaN" : "there");
    wgmma_wait<0>(d);
    uint32_t p[4][4];
    for (int k = 0; k < 4; ++k)
        for (int r = 0; r < 4; ++r) p[k][r] = pack<kHalf>(d[8 * k + 2 * r], d[8 * k + 2 * r + 1]);
    wgmma_fence();
    for (int k = 0; k < 4; ++k)
        wgmma<kHalf, 128, true>(o, p[k], wgmma_advance(wgmma_operand(v, kTile), 16 * kTileRowBytes * k), k > 0);
    wgmma_commit();
    wgmma_wait<0>(o);
    for (int i = 0; i < 64; ++i) {
        first[row_of(i) * 128 + column_of(i)] = d[i];
        second[row_of(i) * 128 + column_of(i)] = o[i];
    }
}

void report(const char* name, void (*kernel)(Operands), int threads, const Operands& x) {
    try {
        launch(name, kernel, 1, threads, kTile, nullptr, x);
        std::printf("%s: nothing\n", name);
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
    }
}

TensorView matrix(uint16_t* data, int rows, int columns) {
    for (int n = 0; n < rows * columns; ++n) data[n] = narrow<kHalf>(static_cast<float>(n * 7 % 31 - 15) / 8.0f);
    TensorView x;
    x.data = reinterpret_cast<char*>(data);
    x.dtype = kHalf;
    x.size[0] = x.size[1] = 1;
    x.size[2] = rows;
    x.size[3] = columns;
    x.stride[2] = columns;
    x.stride[3] = 1;
    return x;
}

}  // namespace

int main() {
    alignas(16) static uint16_t a[kRowsA * 64], b[kRowsB * 64], v[64 * 128];
    static float first[64 * 128], second[64 * 128];
    const Operands x{tensor_tiles(matrix(a, kRowsA, 64), 64, 1), tensor_tiles(matrix(b, kRowsB, 64), 128, 1),
                     tensor_tiles(matrix(v, 64, 128), 64, 1)};
    report("no_fence", no_fence, 128, x);
    report("stored_without_a_fence", stored_without_a_fence, 128, x);
    report("more_registers_than_there_are", more_registers_than_there_are, 384, x);
    report("one_arrival_too_many", one_arrival_too_many, 128, x);

    launch("products", products, 1, 128, 5 * kTile + 8, nullptr, x, first, second);
    float worst[2] = {};
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 128; ++j) {
            float sums[2] = {};
            for (int k = 0; k < 64; ++k) {
                if (i < kRowsA && j < kRowsB) sums[0] += widen<kHalf>(a[i * 64 + k]) * widen<kHalf>(b[j * 64 + k]);
                sums[1] += widen<kHalf>(narrow<kHalf>(first[i * 128 + k])) * widen<kHalf>(v[k * 128 + j]);
            }
            worst[0] = std::fmax(worst[0], std::fabs(sums[0] - first[i * 128 + j]));
            worst[1] = std::fmax(worst[1], std::fabs(sums[1] - second[i * 128 + j]));
        }
    std::printf("products are off by %g and %g\n", worst[0], worst[1]);
}
