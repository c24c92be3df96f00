// 4 lanes in portable C++ (the compiler's vector extension): runs on any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastattn {
namespace FASTATTN_ISA {

typedef float Vec __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kTileRows = 4;

inline Vec vset(float x) { return Vec{x, x, x, x}; }
inline Vec vzero() { return vset(0.0f); }
inline Vec vload(const void* p) {
    Vec a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void vstore(void* p, Vec a) { std::memcpy(p, &a, sizeof a); }
// Past the caches, to an aligned address. The thread's vstream_end comes before what tells others that it is done.
inline void vstream(void* p, Vec a) { vstore(p, a); }
inline void vstream_end() {}
inline Vec vload_n(const void* p, int n) {
    Vec a = vzero();
    std::memcpy(&a, p, static_cast<size_t>(n) * 4);
    return a;
}
inline void vstore_n(void* p, Vec a, int n) { std::memcpy(p, &a, static_cast<size_t>(n) * 4); }

inline Vec vadd(Vec a, Vec b) { return a + b; }
inline Vec vsub(Vec a, Vec b) { return a - b; }
inline Vec vmul(Vec a, Vec b) { return a * b; }
inline Vec vdiv(Vec a, Vec b) { return a / b; }
inline Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec vmax(Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < W; ++i) r[i] = a[i] > b[i] ? a[i] : b[i];
    return r;
}
inline float vsum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float vmaximum(Vec a) {
    float m = a[0];
    for (int i = 1; i < W; ++i) m = a[i] > m ? a[i] : m;
    return m;
}
inline Vec vselect(uint32_t bits, Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < W; ++i) r[i] = bits >> i & 1 ? a[i] : b[i];
    return r;
}
inline uint32_t vnot_equal(Vec a, Vec b) {
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a[i] != b[i]) << i;
    return bits;
}
inline uint32_t vless(Vec a, Vec b) {
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a[i] < b[i]) << i;
    return bits;
}
inline Vec vround(Vec a) {
    Vec r;
    for (int i = 0; i < W; ++i) r[i] = std::nearbyintf(a[i]);
    return r;
}
inline Vec vscale2(Vec a, Vec exponent) {
    Vec r;
    for (int i = 0; i < W; ++i) {
        const int32_t e = exponent[i] < -126.0f ? 0 : static_cast<int32_t>(exponent[i]) + 127;
        const uint32_t bits = static_cast<uint32_t>(e) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        r[i] = a[i] * power;
    }
    return r;
}
inline Vec vfraction(Vec a) {
    Vec r;
    for (int i = 0; i < W; ++i) r[i] = a[i] - std::floor(a[i]);
    return r;
}
// a * 2^floor(x), infinite from x = 128 on
inline Vec vscale2_floor(Vec a, Vec x) {
    Vec n;
    for (int i = 0; i < W; ++i) n[i] = x[i] < 128.0f ? std::floor(x[i]) : 128.0f;
    return vscale2(a, n);
}
struct FlushSubnormals {
    FlushSubnormals() {}  // powers of 2 have none here
};

inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float fp16_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    if (exponent == 0) x = (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
    return x;
}
inline uint16_t float_to_fp16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {  // subnormal result: let the float adder round at 2^-24
        float small;
        std::memcpy(&small, &magnitude, 4);
        const float shifted = small + 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &shifted, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
inline Vec load_bf16(const uint16_t* p) {
    Vec r;
    for (int i = 0; i < W; ++i) r[i] = bf16_to_float(p[i]);
    return r;
}
inline Vec load_fp16(const uint16_t* p) {
    Vec r;
    for (int i = 0; i < W; ++i) r[i] = fp16_to_float(p[i]);
    return r;
}
inline void store_bf16(uint16_t* p, Vec a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(a[i]);
}
inline void store_fp16(uint16_t* p, Vec a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_fp16(a[i]);
}

inline void transpose(Vec r[4]) {
    for (int i = 0; i < W; ++i) {
        for (int j = i + 1; j < W; ++j) {
            const float swap = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = swap;
        }
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
