// wgmma of the emulator. Results land in the wait that asks for them, and operands are read no earlier: a register that
// is used or an operand that is overwritten too soon shows in the numbers.
#pragma once
#include <deque>
#include <limits>
#include <memory>

#include "cuda/ptx.h"

namespace fastattn {
namespace cuda {

struct Wgmma {
    static constexpr int kThreads = 128;
    int n = 0;
    bool accumulate = false, a_in_registers = false, a_mn_major = false, b_mn_major = false;
    float (*widen)(uint16_t) = nullptr;
    uint64_t a = 0, b = 0;
    const uint32_t* a_registers[kThreads] = {};
    float* d[kThreads] = {};
    std::shared_ptr<Wgmma> before;  // the one under way that these accumulators come from
    std::vector<float> sums[kThreads];
    bool done = false;

    void run();

   private:
    // x [rows][16] of an operand in shared memory.
    void read(float (*x)[16], int rows, uint64_t descriptor, bool mn_major) const;
};

inline void Wgmma::read(float (*x)[16], int rows, uint64_t descriptor, bool mn_major) const {
    const auto field = [=](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1) emulator::fail("wgmma: only the 128-byte swizzle is emulated");
    if (descriptor >> 49 & 7) emulator::fail("wgmma: operands with a base offset are not emulated");
    // Units of 8 numbers, 16 bytes, along the major dimension; swizzled by the address.
    const auto unit = [&](uint32_t at) {
        at = start + at;
        at ^= (at >> 7 & 7) << 4;
        need_fenced(at, 16, "wgmma");
        return emulator::shared_bytes(at, 16, 16, "wgmma");
    };
    const auto number = [&](const char* from, int i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        return widen(bits);
    };
    if (mn_major) {
        for (int k = 0; k < 16; ++k)
            for (int r = 0; r < rows; r += 8) {
                const char* from = unit(r % 64 * 2 + r / 64 * leading + k % 8 * 128 + k / 8 * stride);
                for (int i = 0; i < 8; ++i) x[r + i][k] = number(from, i);
            }
    } else {
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < 16; k += 8) {
                const char* from = unit(r % 8 * 128 + r / 8 * stride + k * 2);
                for (int i = 0; i < 8; ++i) x[r][k + i] = number(from, i);
            }
    }
}

inline void Wgmma::run() {
    if (done) return;
    done = true;
    if (before) {
        before->run();
        for (int t = 0; t < kThreads; ++t) sums[t] = before->sums[t];
        before = nullptr;
    }
    float A[64][16], B[256][16];
    if (a_in_registers) {
        for (int t = 0; t < kThreads; ++t)
            for (int r = 0; r < 4; ++r)
                for (int half = 0; half < 2; ++half)
                    A[t / 32 * 16 + t % 32 / 4 + r % 2 * 8][t % 4 * 2 + r / 2 * 8 + half] =
                        widen(static_cast<uint16_t>(a_registers[t][r] >> 16 * half));
    } else {
        read(A, 64, a, a_mn_major);
    }
    read(B, n, b, b_mn_major);
    for (int t = 0; t < kThreads; ++t)
        for (int i = 0; i < n / 2; ++i) {
            const float *x = A[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8], *y = B[i / 4 * 8 + t % 4 * 2 + i % 2];
            float parts[4] = {};
            for (int k = 0; k < 16; ++k) parts[k % 4] += x[k] * y[k];
            const float sum = parts[0] + parts[1] + (parts[2] + parts[3]);
            sums[t][i] = accumulate ? sums[t][i] + sum : sum;
        }
}

// What a thread has issued and not waited for, oldest group first; the last one is not committed.
struct WgmmaQueue {
    std::deque<std::vector<std::shared_ptr<Wgmma>>> groups = decltype(groups)(1);
    bool fenced = false;
};

struct WgmmaSlot {
    float* d;
    const uint32_t* a_registers;
    uint64_t a, b;
    bool accumulate;
    WgmmaQueue* queue;
};

inline void issue(Wgmma& made, WgmmaSlot& mine) {
    mine.queue = &emulator::thread_state<WgmmaQueue>();
    if (!mine.queue->fenced) emulator::fail("wgmma: no wgmma.fence after the last wait");
    emulator::collective("wgmma.mma_async", emulator::warpgroup(), mine, [&](WgmmaSlot** threads) {
        auto op = std::make_shared<Wgmma>(made);
        for (const auto& group : threads[0]->queue->groups)
            for (const auto& other : group)
                if (other->d[0] == threads[0]->d) op->before = other;
        for (int t = 0; t < Wgmma::kThreads; ++t) {
            const WgmmaSlot& x = *threads[t];
            if (x.a != mine.a || x.b != mine.b || x.accumulate != mine.accumulate)
                emulator::fail("wgmma: operands differ between threads");
            op->d[t] = x.d;
            op->a_registers[t] = x.a_registers;
            op->sums[t].assign(x.d, x.d + op->n / 2);
            emulator::poison(x.d, op->n / 2 * sizeof(float));
            x.queue->groups.back().push_back(op);
        }
    });
}

template <DType dtype, int n, bool a_mn_major, bool b_mn_major>
void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
    Wgmma made;
    made.n = n;
    made.accumulate = accumulate;
    made.a_mn_major = a_mn_major;
    made.b_mn_major = b_mn_major;
    made.widen = widen<dtype>;
    made.a = a;
    made.b = b;
    WgmmaSlot mine{d, nullptr, a, b, accumulate, nullptr};
    issue(made, mine);
}

template <DType dtype, int n, bool b_mn_major>
void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    Wgmma made;
    made.n = n;
    made.accumulate = accumulate;
    made.a_in_registers = true;
    made.b_mn_major = b_mn_major;
    made.widen = widen<dtype>;
    made.b = b;
    WgmmaSlot mine{d, a, 0, b, accumulate, nullptr};
    issue(made, mine);
}

inline uint64_t wgmma_operand(uint32_t address, int leading = 16) {
    return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t(leading / 16) << 16 | address / 16;
}
inline uint64_t wgmma_advance(uint64_t operand, int bytes) { return operand + bytes / 16; }

inline void wgmma_fence() { emulator::thread_state<WgmmaQueue>().fenced = true; }
inline void wgmma_commit() { emulator::thread_state<WgmmaQueue>().groups.emplace_back(); }

template <int pending, class... Registers>
void wgmma_wait(Registers&...) {
    emulator::meet("wgmma.wait_group", emulator::warp());
    WgmmaQueue& queue = emulator::thread_state<WgmmaQueue>();
    const int t = emulator::thread_index() % Wgmma::kThreads;
    while (static_cast<int>(queue.groups.size()) > pending + 1) {
        const auto landed = queue.groups.front();
        queue.groups.pop_front();
        for (const auto& op : landed) {
            op->run();
            bool goes_on = false;
            for (const auto& group : queue.groups)
                for (const auto& other : group) goes_on = goes_on || other->d[t] == op->d[t];
            if (!goes_on) std::copy(op->sums[t].begin(), op->sums[t].end(), op->d[t]);
        }
        queue.fenced = false;
    }
}

}  // namespace cuda
}  // namespace fastattn
