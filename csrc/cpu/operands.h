// What the products multiply: operands made of 32-bit units, a float, or (Bf16) a pair of bf16 neighbours along the
// summed dimension.
#pragma once
#include "simd/simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct Fp32 {
    static constexpr int kPair = 1;        // elements per unit
    static constexpr int kParts = 1;       // numbers whose sum an element is
    static constexpr bool kTiles = false;  // whether the products are those of gemm_tiles.h
    static constexpr bool kFastExp = false;
    static Vec dot(Vec a, Vec b, Vec c) { return vfma(a, b, c); }
};
#ifdef FASTATTN_HAS_BF16_DOT
struct Bf16 {
    static constexpr int kPair = 2;
    static constexpr int kParts = 1;
    static constexpr bool kTiles = false;
    static constexpr bool kFastExp = true;
    static Vec dot(Vec a, Vec b, Vec c) { return bf16_dot(a, b, c); }
};
#endif

constexpr int kPanel = 2 * W;  // columns of a register tile, and of a packed panel of B

// A[r, s] at a[r * row + s * step]; its parts are `part` units from one another.
struct Rows {
    const float* a;
    int64_t row, step, part = 0;
};

// Steps [a_at, a_at + steps) of A times steps [b_at, b_at + steps) of B.
struct Segment {
    int64_t a_at, b_at, steps;
};

enum class Store { kWrite, kAdd, kRescale };  // C = AB, C += AB, C = decay[r] * C + AB

}  // namespace FASTATTN_ISA
}  // namespace fastattn
