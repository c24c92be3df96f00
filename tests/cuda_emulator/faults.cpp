// Faults that the emulator has to name: prints, for each, what its launch threw. Then mma.sync and ldmatrix against
// sums written out, through the layouts of the PTX ISA.
#include <cmath>
#include <cstdio>
#include <exception>

#include "cuda/launch.h"
#include "cuda/ptx.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

constexpr int kThreads = 64;

__global__ void missing_lane(const float*) {
    if (thread_index() != 5) shuffle_xor(1.0f, 1);
}

__global__ void two_instructions(const float*) {
    if (thread_index() % 2)
        shuffle_xor(1.0f, 1);
    else
        warp_any(true);
}

__global__ void missing_warp(const float*) {
    if (thread_index() < 32) sync_threads();
}

__global__ void past_shared_memory(const float*) { load_shared<float>(shared_memory() + 1024 + 4 * thread_index()); }

__global__ void unaligned(const float*) { load_shared<double>(shared_memory() + 4); }

__global__ void never_true(const float*) {
    emulator::wait_until("a flag that nobody sets", [] { return false; });
}

__global__ void read_before_the_wait(const float* from) {
    if (thread_index() == 0) {
        cp_async(shared_memory(), from, true);
        cp_async_commit();
        const float early = load_shared<float>(shared_memory());
        cp_async_wait<0>();
        std::printf("%s before the wait, %g after\n", std::isnan(early) ? "NaN" : "a number",
                    load_shared<float>(shared_memory()));
    }
}

// c [16, 8] = a [16, 16] b [8, 16]^T in one warp.
__global__ void product(const uint16_t* a, const uint16_t* b, float* c) {
    const uint32_t left = shared_memory(), right = left + 512;
    const int lane = thread_index();
    cp_async(left + 16 * lane, a + 8 * lane, true);
    if (lane < 16) cp_async(right + 16 * lane, b + 8 * lane, true);
    cp_async_commit();
    cp_async_wait<0>();
    sync_warp();
    uint32_t x[4], y[4];
    ldmatrix(x, left + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix(y, right + lane % 8 * 32 + lane / 8 % 2 * 16);
    float d[4] = {};
    mma<DType::kFloat16>(d, x, y[0], y[1]);
    for (int r = 0; r < 4; ++r) c[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = d[r];
}

void report(const char* name, void (*kernel)(const float*)) {
    alignas(16) static const float numbers[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    try {
        launch(name, kernel, 1, kThreads, 1024, nullptr, numbers);
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
    }
}

}  // namespace

int main() {
    report("missing_lane", missing_lane);
    report("two_instructions", two_instructions);
    report("missing_warp", missing_warp);
    report("past_shared_memory", past_shared_memory);
    report("unaligned", unaligned);
    report("never_true", never_true);
    report("read_before_the_wait", read_before_the_wait);

    alignas(16) static uint16_t a[256], b[128];
    static float c[128];
    for (int n = 0; n < 256; ++n) a[n] = narrow<DType::kFloat16>(static_cast<float>(n * 7 % 31 - 15));
    for (int n = 0; n < 128; ++n) b[n] = narrow<DType::kFloat16>(static_cast<float>(n * 5 % 23 - 11));
    launch("product", product, 1, 32, 768, nullptr, a, b, c);
    float worst = 0;
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            float sum = 0;
            for (int k = 0; k < 16; ++k)
                sum += static_cast<float>((i * 16 + k) * 7 % 31 - 15) * ((j * 16 + k) * 5 % 23 - 11);
            worst = std::fmax(worst, std::fabs(sum - c[i * 8 + j]));
        }
    std::printf("product is off by %g\n", worst);
}
