// Numbers as units of pairs of bf16, and as sums of several of them (Parts of gemm_tiles.h).
#pragma once
#include <atomic>

#include "gemm.h"

namespace fastattn {
namespace FASTATTN_ISA {

#ifdef FASTATTN_HAS_BF16_DOT

FASTATTN_INLINE Vec high_half(Vec a) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Units of two vectors whose lanes are bf16 already, or are cut to it.
FASTATTN_INLINE Vec pair_high_halves(Vec even, Vec odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(odd)));
}

// The bf16 nearest to x, a tie away from zero.
FASTATTN_INLINE Vec nearest_bf16(Vec x) {
    return high_half(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000))));
}

// From here on products of parts may overflow where the whole sum does not, or be NaN where it is infinite: 2^60. Sets
// `large` then, and what is made of the parts does not count.
constexpr float kLargestOfParts = 1152921504606846976.0f;

// x = out[0] + ... + out[P - 1], each the bf16 nearest to what is left, so that what products of parts leave out has no
// sign.
template <int P>
FASTATTN_INLINE void split_nearest(Vec x, std::atomic<bool>* large, Vec out[P]) {
    if (__builtin_expect(_mm512_cmp_ps_mask(vabs(x), vset(kLargestOfParts), _CMP_NLT_UQ), 0)) {
        large->store(true, std::memory_order_relaxed);
    }
    FASTATTN_UNROLL for (int part = 0; part < P; ++part) {
        out[part] = nearest_bf16(x);
        x = vsub(x, out[part]);
    }
}

// The same by cutting, in half the instructions: for weights, whose partners in the products are nearest parts. What
// the last part loses is below 2^-16 of a weight with two parts, nothing with three.
template <int P>
FASTATTN_INLINE void split_down(Vec x, Vec out[P]) {
    FASTATTN_UNROLL for (int part = 0; part + 1 < P; ++part) {
        out[part] = high_half(x);
        x = vsub(x, out[part]);
    }
    out[P - 1] = x;
}

// Units (even[c], odd[c]) of weights, part by part `step` apart.
template <class Math>
FASTATTN_INLINE void store_pairs(float* out, int64_t step, Vec even, Vec odd) {
    if constexpr (Math::kParts == 1) {
        vstore(out, interleave_bf16(even, odd));
    } else {
        Vec a[Math::kParts], b[Math::kParts];
        split_down<Math::kParts>(even, a);
        split_down<Math::kParts>(odd, b);
        FASTATTN_UNROLL for (int part = 0; part < Math::kParts; ++part) {
            vstore(out + part * step, pair_high_halves(a[part], b[part]));
        }
    }
}

// 2 W weights along the summed dimension as units. With several parts a unit holds lane c of both vectors, which costs
// no permutation, so the partner of an element is kPartner<Math> after it.
template <class Math>
FASTATTN_INLINE void store_neighbours(float* out, int64_t step, Vec first, Vec second) {
    if constexpr (Math::kParts == 1) {
        vstore(out, narrow_bf16(first, second));
    } else {
        store_pairs<Math>(out, step, first, second);
    }
}
template <class Math>
constexpr int64_t kPartner = Math::kParts == 1 ? 1 : W;

#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
