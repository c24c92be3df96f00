#include "fastattn/peak.h"

#include <omp.h>

#include <atomic>
#include <cstdint>

#include "fastattn/parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include "simd/amx.h"
#endif

namespace fastattn::FASTATTN_ISA {
namespace {

// Independent accumulators: enough to cover latency x issue width (4 x 2), few enough to stay in registers.
constexpr int chains = 12;

#if defined(__AVX512F__)
using Vec = __m512;
Vec splat(float x) { return _mm512_set1_ps(x); }
Vec load(const float* p) { return _mm512_loadu_ps(p); }
Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
float first(Vec a) { return _mm512_cvtss_f32(a); }
#elif defined(__AVX2__)
using Vec = __m256;
Vec splat(float x) { return _mm256_set1_ps(x); }
Vec load(const float* p) { return _mm256_loadu_ps(p); }
Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
float first(Vec a) { return _mm256_cvtss_f32(a); }
#else
using Vec = float __attribute__((vector_size(16)));
Vec splat(float x) { return Vec{x, x, x, x}; }
Vec load(const float* p) {
    Vec a;
    __builtin_memcpy(&a, p, sizeof(a));
    return a;
}
Vec add(Vec a, Vec b) { return a + b; }
Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
float first(Vec a) { return a[0]; }
#endif

constexpr int lanes = sizeof(Vec) / sizeof(float);

// Operands come from here and results go here, so that no loop is folded or dropped as unused.
volatile float half = 0.5f, tiny = 1e-6f, sink;

void fma_burst(int64_t steps) {
    Vec acc[chains];
    for (int i = 0; i < chains; ++i) acc[i] = splat(1e-3f * static_cast<float>(i));
    const Vec a = splat(half), b = splat(tiny);
    for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
        for (int i = 0; i < chains; ++i) acc[i] = fma(acc[i], a, b);
    for (int i = 1; i < chains; ++i) acc[0] = add(acc[0], acc[i]);
    sink = first(acc[0]);
}

#if defined(__AMX_BF16__)
constexpr int64_t kTileSteps = 8;  // a step of matrix tiles takes that much longer than one of vectors

void bf16_dot_burst(int64_t steps) {
    const MatrixUnit<true> unit;
    FASTATTN_TILE_ZERO(0);
    FASTATTN_TILE_ZERO(1);
    FASTATTN_TILE_ZERO(2);
    FASTATTN_TILE_ZERO(3);
    FASTATTN_TILE_ZERO(4);
    FASTATTN_TILE_ZERO(5);
    for (int64_t s = 0; s < steps / kTileSteps; ++s) {
        FASTATTN_TILE_DOT(0, 4, 5);
        FASTATTN_TILE_DOT(1, 4, 5);
        FASTATTN_TILE_DOT(2, 4, 5);
        FASTATTN_TILE_DOT(3, 4, 5);
    }
}
#elif defined(__AVX512BF16__)
void bf16_dot_burst(int64_t steps) {
    Vec acc[chains];
    for (int i = 0; i < chains; ++i) acc[i] = splat(1e-3f * static_cast<float>(i));
    const __m512bh a = _mm512_cvtne2ps_pbh(splat(half), splat(half));
    const __m512bh b = _mm512_cvtne2ps_pbh(splat(tiny), splat(tiny));
    for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
        for (int i = 0; i < chains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
    for (int i = 1; i < chains; ++i) acc[0] = add(acc[0], acc[i]);
    sink = first(acc[0]);
}
#endif

void read_pass(const float* begin, int64_t count) {
    constexpr int streams = 8;
    Vec acc[streams];
    for (int i = 0; i < streams; ++i) acc[i] = splat(0.f);
    for (int64_t o = 0; o + streams * lanes <= count; o += streams * lanes)
#pragma GCC unroll 8
        for (int i = 0; i < streams; ++i) acc[i] = add(acc[i], load(begin + o + i * lanes));
    for (int i = 1; i < streams; ++i) acc[0] = add(acc[0], acc[i]);
    sink = first(acc[0]);
}

// Best rate of a team whose members start together; the slowest one ends a window.
template <class Burst>
double best_gflops(int threads, double seconds, double flops_per_step, Burst burst) {
    constexpr int64_t steps = 1 << 20;
    double best = 0;
    const double end = omp_get_wtime() + seconds;
    do {
        std::atomic<int> team{0};
        const double start = omp_get_wtime();
        run_team(threads, [&] {
            team.fetch_add(1, std::memory_order_relaxed);
            burst(steps);
        });
        const double rate = flops_per_step * steps * team.load() / (omp_get_wtime() - start) * 1e-9;
        if (rate > best) best = rate;
    } while (omp_get_wtime() < end);
    return best;
}

}  // namespace

double fma_peak(int threads, double seconds) { return best_gflops(threads, seconds, 2.0 * lanes * chains, fma_burst); }

double bf16_dot_peak(int threads, double seconds) {
#if defined(__AMX_BF16__)
    return best_gflops(threads, seconds, 4.0 * 16 * 16 * 32 * 2 / kTileSteps, bf16_dot_burst);
#elif defined(__AVX512BF16__)
    return best_gflops(threads, seconds, 4.0 * lanes * chains, bf16_dot_burst);
#else
    (void)threads, (void)seconds;
    return 0;
#endif
}

double read_bandwidth(int threads, size_t bytes) {
    constexpr int passes = 6;
    if (threads < 1) return 0;
    const int64_t slice = static_cast<int64_t>(bytes) / threads / 4096 * 4096;
    const int64_t count = slice / static_cast<int64_t>(sizeof(float));
    if (slice == 0) return 0;
    const Scratch buffer(slice * threads);
    double best = 0;
    for (int pass = -1; pass < passes; ++pass) {
        const double start = omp_get_wtime();
        parallel_for(threads, threads, [&](int64_t i) {
            float* begin = buffer.as<float>() + i * count;
            // The pass before the first touches the pages: untouched ones would all read the same zero page.
            if (pass < 0)
                for (int64_t j = 0; j < count; ++j) begin[j] = 1.f;
            else
                read_pass(begin, count);
        });
        const double rate = static_cast<double>(slice * threads) / (omp_get_wtime() - start) * 1e-9;
        if (pass >= 0 && rate > best) best = rate;
    }
    return best;
}

}  // namespace fastattn::FASTATTN_ISA
