// Matrix tiles of AMX: registers of 16 rows of 64 bytes. Sums [16][16] += A [16 rows][16 units] B [16 steps][16 units],
// where a unit is a pair of bf16 and sums are floats. Written as instructions: GCC's intrinsics do not say that they
// read memory.
#pragma once
#include <cstdint>

#define FASTATTN_TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t::: "memory")
#define FASTATTN_TILE_LOAD(t, from, bytes) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(from), "r"(bytes) : "memory")
#define FASTATTN_TILE_STORE(t, to, bytes) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(bytes) : "memory")
#define FASTATTN_TILE_DOT(sums, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums::: "memory")

namespace fastattn {
namespace FASTATTN_ISA {

// While one lives, its thread has tile registers, if it uses them; afterwards a context switch need not save them.
template <bool kUsed>
class MatrixUnit {
   public:
    MatrixUnit() {
        if (!kUsed) return;
        struct alignas(64) Configuration {
            uint8_t palette, start_row, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        };
        static const Configuration whole = {
            1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        __asm__ volatile("ldtilecfg %0" ::"m"(whole));
    }
    ~MatrixUnit() {
        if (kUsed) __asm__ volatile("tilerelease");
    }
    // Some hundred nanoseconds after a product the unit falls asleep, and the next one waits for it to wake. What is
    // multiplied here nobody reads: products begin by setting their sums.
    static void stay_awake() {
        if (kUsed) FASTATTN_TILE_DOT(0, 4, 6);
    }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
