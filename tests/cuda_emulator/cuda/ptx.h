// Emulated twin of csrc/cuda/ptx.h, from the PTX ISA's definitions of each instruction.
#pragma once
#include <cmath>
#include <deque>
#include <limits>

#include "cuda_runtime.h"
#include "fastattn/params.h"
#include "machine.h"

namespace fastattn {
namespace cuda {

inline int thread_index() { return emulator::thread_index(); }
inline int volatile_copy(int x) { return x; }
inline int64_t block_index() { return emulator::block_index(); }
inline void sync_threads() { emulator::meet("bar.sync", emulator::block()); }
inline void sync_warp() { emulator::meet("bar.warp.sync", emulator::warp()); }

template <class T>
T shuffled(const char* what, T x, int argument, int (*source)(int lane, int argument)) {
    struct Slot {
        T x;
        int argument;
        T result;
    } mine{x, argument, {}};
    emulator::collective(what, emulator::warp(), mine, [&](Slot** lanes) {
        for (int l = 0; l < 32; ++l) lanes[l]->result = lanes[source(l, lanes[l]->argument)]->x;
    });
    return mine.result;
}

inline float shuffle_xor(float x, int mask) {
    return shuffled("shfl.bfly", x, mask, [](int lane, int m) { return lane ^ m; });
}
inline uint32_t shuffle_xor(uint32_t x, int mask) {
    return shuffled("shfl.bfly", x, mask, [](int lane, int m) { return lane ^ m; });
}
inline int from_lane(int x, int lane) {
    return shuffled("shfl.idx", x, lane, [](int, int from) { return from; });
}
inline bool warp_any(bool x) {
    emulator::collective("vote.any", emulator::warp(), x, [](bool** lanes) {
        bool any = false;
        for (int l = 0; l < 32; ++l) any = any || *lanes[l];
        for (int l = 0; l < 32; ++l) *lanes[l] = any;
    });
    return x;
}

inline uint32_t shared_memory() { return emulator::kSharedBase; }

template <class T>
T load_shared(uint32_t address) {
    return emulator::shared<T>(address, "ld.shared");
}

// Copies of 16 bytes under way to shared memory, by any thread of the block: an ordinary store would race with them.
struct UnderWay {
    std::vector<int> copies;

    int& to(uint32_t address) {
        const size_t at = (address - emulator::kSharedBase) / 16;
        if (copies.size() <= at) copies.resize(at + 1);
        return copies[at];
    }
};

// Units of 16 bytes that a thread has stored to without a fence.proxy.async after it: wgmma and the copy engine may not
// see what is in them.
struct Unfenced {
    std::vector<int> writer;  // thread + 1

    int& of(uint32_t address) {
        if (writer.size() <= address / 16) writer.resize(address / 16 + 1);
        return writer[address / 16];
    }
};

inline void note_store(uint32_t address, size_t bytes) {
    auto& mine = emulator::thread_state<std::vector<uint32_t>>();
    for (uint32_t at = address / 16 * 16; at < address + bytes; at += 16) {
        int& writer = emulator::block_state<Unfenced>().of(at);
        if (writer == emulator::thread_index() + 1) continue;
        writer = emulator::thread_index() + 1;
        mine.push_back(at);
    }
}

inline void fence_stores() {
    auto& mine = emulator::thread_state<std::vector<uint32_t>>();
    for (const uint32_t at : mine) {
        int& writer = emulator::block_state<Unfenced>().of(at);
        if (writer == emulator::thread_index() + 1) writer = 0;
    }
    mine.clear();
}

inline void need_fenced(uint32_t address, size_t bytes, const char* what) {
    for (uint32_t at = address / 16 * 16; at < address + bytes; at += 16)
        if (const int writer = emulator::block_state<Unfenced>().of(at))
            emulator::fail(std::string(what) + ": thread " + std::to_string(writer - 1) + " stored to shared address " +
                           std::to_string(at) + " without a fence.proxy.async");
}

template <class T>
void store_shared(uint32_t address, T x) {
    note_store(address, sizeof(T));
    T& to = emulator::shared<T>(address, "st.shared");
    if (emulator::block_state<UnderWay>().to(address))
        emulator::fail("st.shared: a cp.async is under way to the address");
    to = x;
}

// Lands at the wait that asks for it, and reads its source no earlier.
struct AsyncCopies {
    struct Copy {
        uint32_t to;
        const void* from;
        bool wanted;
    };
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

inline void cp_async(uint32_t to, const void* from, bool wanted) {
    if (wanted && reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async: source is not 16-byte aligned");
    emulator::poison(emulator::shared_bytes(to, 16, 16, "cp.async"), 16);
    if (emulator::block_state<UnderWay>().to(to)++) emulator::fail("cp.async: another is under way to the address");
    emulator::thread_state<AsyncCopies>().open.push_back({to, from, wanted});
}

inline void cp_async_commit() {
    auto& copies = emulator::thread_state<AsyncCopies>();
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
}

template <int pending>
void cp_async_wait() {
    auto& groups = emulator::thread_state<AsyncCopies>().groups;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
        for (const auto& copy : groups.front()) {
            char* to = emulator::shared_bytes(copy.to, 16, 16, "cp.async");
            --emulator::block_state<UnderWay>().to(copy.to);
            if (copy.wanted)
                std::memcpy(to, copy.from, 16);
            else
                std::memset(to, 0, 16);
        }
}

// Lane l holds row l / 4, columns 2 (l % 4) and the next, of each matrix; transposed: columns and rows swap.
inline void ldmatrix_any(const char* what, uint32_t (&r)[4], uint32_t address, bool trans) {
    struct Slot {
        uint32_t address;
        uint32_t* r;
    } mine{address, r};
    emulator::collective(what, emulator::warp(), mine, [&](Slot** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t x[8][8];
            bool taken[8] = {};
            for (int row = 0; row < 8; ++row) {
                const uint32_t at = lanes[8 * matrix + row]->address;
                std::memcpy(x[row], emulator::shared_bytes(at, 16, 16, what), 16);
                if (taken[at / 16 % 8]) emulator::count_bank_conflict();
                taken[at / 16 % 8] = true;
            }
            for (int l = 0; l < 32; ++l) {
                const int row = l / 4, column = l % 4 * 2;
                const uint32_t low = trans ? x[column][row] : x[row][column];
                const uint32_t high = trans ? x[column + 1][row] : x[row][column + 1];
                lanes[l]->r[matrix] = low | high << 16;
            }
        }
    });
}

inline void ldmatrix(uint32_t (&r)[4], uint32_t address) { ldmatrix_any("ldmatrix", r, address, false); }
inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) { ldmatrix_any("ldmatrix.trans", r, address, true); }

inline float bits_to_float(uint32_t x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}

inline uint32_t float_to_bits(float f) {
    uint32_t x;
    std::memcpy(&x, &f, 4);
    return x;
}

template <DType dtype>
float widen(uint16_t x) {
    if constexpr (dtype == DType::kBFloat16) return bits_to_float(uint32_t{x} << 16);
    const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7FFF;
    if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400) return (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
    return bits_to_float(sign | ((rest << 13) + (112u << 23)));
}

// Rounds to nearest even.
template <DType dtype>
uint16_t narrow(float f) {
    const uint32_t x = float_to_bits(f), sign = x >> 16 & 0x8000, rest = x & 0x7FFFFFFF;
    if (rest > 0x7F800000) return 0x7FFF;
    if constexpr (dtype == DType::kBFloat16) return static_cast<uint16_t>((x + 0x7FFF + (x >> 16 & 1)) >> 16);
    if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
    if (rest < 0x38800000)  // subnormal: a multiple of 2^-24, rounded by adding 1.5 * 2^23 of them
        return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.75f) - float_to_bits(0.75f)));
    return static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13);
}

// Fragments of m16n8k16, with g = lane / 4 and t = lane % 4. A: rows g, g + 8 of columns 2t, 2t + 1 in a[0], a[1], of
// columns 8 further in a[2], a[3]. B: rows 2t, 2t + 1 of column g in b[0], rows 8 further in b[1]. D: row g, columns
// 2t, 2t + 1 in d[0], d[1]; row g + 8 in d[2], d[3].
template <DType dtype>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Slot {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } mine{d, a, {b0, b1}};
    emulator::collective("mma.sync", emulator::warp(), mine, [](Slot** lanes) {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; ++l)
            for (int r = 0; r < 4; ++r)
                for (int half = 0; half < 2; ++half) {
                    const int row = l / 4 + r % 2 * 8, k = l % 4 * 2 + r / 2 * 8 + half;
                    A[row][k] = widen<dtype>(static_cast<uint16_t>(lanes[l]->a[r] >> 16 * half));
                    if (r < 2) B[l / 4][l % 4 * 2 + r * 8 + half] = widen<dtype>(lanes[l]->b[r] >> 16 * half);
                }
        for (int l = 0; l < 32; ++l)
            for (int r = 0; r < 4; ++r) {
                const float *x = A[l / 4 + r / 2 * 8], *y = B[l % 4 * 2 + r % 2];
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
                lanes[l]->d[r] += sum;
            }
    });
}

template <DType dtype>
uint32_t pack(float low, float high) {
    return narrow<dtype>(low) | uint32_t{narrow<dtype>(high)} << 16;
}

template <DType dtype>
float unpack_low(uint32_t x) {
    return widen<dtype>(static_cast<uint16_t>(x));
}

template <DType dtype>
float unpack_high(uint32_t x) {
    return widen<dtype>(static_cast<uint16_t>(x >> 16));
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float reciprocal_approx(float x) { return flushed(1.0f / flushed(x)); }
inline float log2_approx(float x) { return std::log2(flushed(x)); }

inline float multiply(float a, float b) { return a * b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

}  // namespace cuda
}  // namespace fastattn
