// 16 lanes of AVX-512.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "fastattn/params.h"

namespace fastattn {
namespace FASTATTN_ISA {

using Vec = __m512;
constexpr int W = 16;         // lanes of a Vec
constexpr int kTileRows = 8;  // rows of a register tile; two Vec wide

inline Vec vzero() { return _mm512_setzero_ps(); }
inline Vec vset(float x) { return _mm512_set1_ps(x); }
inline Vec vload(const void* p) { return _mm512_loadu_ps(p); }
inline void vstore(void* p, Vec a) { _mm512_storeu_ps(p, a); }
// Past the caches, to an aligned address. The thread's vstream_end comes before what tells others that it is done.
inline void vstream(void* p, Vec a) { _mm512_stream_ps(static_cast<float*>(p), a); }
inline void vstream_end() { _mm_sfence(); }
inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec vload_n(const void* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
inline void vstore_n(void* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a); }

inline Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline float vsum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float vmaximum(Vec a) { return _mm512_reduce_max_ps(a); }
// a where the bit of the lane is set, else b
inline Vec vselect(uint32_t bits, Vec a, Vec b) { return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a); }
inline uint32_t vnot_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
inline uint32_t vless(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Vec vround(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec vscale2(Vec a, Vec exponent) { return _mm512_scalef_ps(a, exponent); }  // a * 2^exponent
inline Vec vscale2_floor(Vec a, Vec x) { return _mm512_scalef_ps(a, x); }          // a * 2^floor(x)
inline Vec vfraction(Vec a) { return _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }  // a - floor(a)

// While one lives, this thread's subnormal results are 0: made as such, one takes Intel's processors a hundred cycles.
class FlushSubnormals {
   public:
    FlushSubnormals() : before_(_mm_getcsr()) { set(before_ | _MM_FLUSH_ZERO_ON); }
    ~FlushSubnormals() { set(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

   private:
    // What comes from memory and goes to memory stays on its side.
    static void set(unsigned mode) {
        __asm__ volatile("" ::: "memory");
        _mm_setcsr(mode);
        __asm__ volatile("" ::: "memory");
    }
    const unsigned before_;
};

inline Vec load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i bf16_bits(Vec a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline void store_bf16(uint16_t* p, Vec a) {
#ifdef __AVX512BF16__
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(a);  // makes subnormal numbers 0
#else
    const __m256i bits = bf16_bits(a);
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
inline void store_fp16(uint16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

// W x W transpose of 32-bit units: rows r[0..15] become columns.
FASTATTN_INLINE void transpose(Vec r[16]) {
    __m512i a[16], b[16];
    FASTATTN_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(r[i]);
    FASTATTN_UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    FASTATTN_UNROLL for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    FASTATTN_UNROLL for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    FASTATTN_UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        r[i + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        r[i + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        r[i + 12] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

// (even, odd) bf16 bit patterns side by side: unit c = even[c] | odd[c] << 16.
inline Vec pair_bits(__m256i even, __m256i odd) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
}
inline Vec pair_bf16(Vec even, Vec odd) { return pair_bits(bf16_bits(even), bf16_bits(odd)); }

#ifdef __AVX512BF16__
#define FASTATTN_HAS_BF16_DOT 1
inline Vec bf16_dot(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
// 2 W consecutive floats as W units of neighbouring bf16 pairs
inline Vec narrow_bf16(Vec first, Vec second) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first));
}
// 2 W columns of two rows of bf16 as units (even[c], odd[c]).
inline void interleave_rows(const char* even, const char* odd, Vec units[2]) {
    const __m512i low = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                                         0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                                         0x00230003, 0x00220002, 0x00210001, 0x00200000);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    units[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
    units[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
}
// units (even[c], odd[c]) of bf16
inline Vec interleave_bf16(Vec even, Vec odd) {
    const __m512i lane = _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a,
                                          0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                                          0x00130003, 0x00120002, 0x00110001, 0x00100000);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(lane, _mm512_castps_si512(narrow_bf16(even, odd))));
}
#endif

}  // namespace FASTATTN_ISA
}  // namespace fastattn
