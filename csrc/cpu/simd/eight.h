// 8 lanes of 32-bit units on every ISA: for products whose rows, at most 8, are the lanes.
#pragma once
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 1
using Eight = __m256;
inline Eight eight_zero() { return _mm256_setzero_ps(); }
inline Eight eight_load(const float* p) { return _mm256_loadu_ps(p); }
// c + a * unit in each lane; a unit is a float, or a pair of bf16.
template <int pair>
inline Eight eight_dot(Eight a, const void* unit, Eight c) {
    const Eight b = _mm256_broadcast_ss(static_cast<const float*>(unit));
#ifdef FASTATTN_HAS_BF16_DOT
    if constexpr (pair == 2) {
        return _mm256_dpbf16_ps(c, (__m256bh)_mm256_castps_si256(a), (__m256bh)_mm256_castps_si256(b));
    }
#endif
    return _mm256_fmadd_ps(a, b, c);
}
#else
struct Eight {
    float lane[8];
};
inline Eight eight_zero() { return {}; }
inline Eight eight_load(const float* p) {
    Eight a;
    for (int r = 0; r < 8; ++r) a.lane[r] = p[r];
    return a;
}
template <int>
inline Eight eight_dot(Eight a, const void* unit, Eight c) {
    for (int r = 0; r < 8; ++r) c.lane[r] += a.lane[r] * *static_cast<const float*>(unit);
    return c;
}
#endif

// Lane r of columns[n], n < W, to out[r * ld + n], for r < rows.
FASTATTN_INLINE void store_transposed(const Eight columns[W], int rows, float* out, int64_t ld) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 1
    Vec block[W];
    FASTATTN_UNROLL for (int n = 0; n < W; ++n) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 2
        block[n] = _mm512_castps256_ps512(columns[n]);
#else
        block[n] = columns[n];
#endif
    }
    transpose(block);
    FASTATTN_UNROLL for (int r = 0; r < 8; ++r) {
        if (r < rows) vstore(out + r * ld, block[r]);
    }
#else
    for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < W; ++n) out[r * ld + n] = columns[n].lane[r];
    }
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
