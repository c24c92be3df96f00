// The vector type of the ISA this file is compiled for, and what is built from it.
#pragma once
#include "fastattn/params.h"

#define FASTATTN_PASTE(a, b) a##b
#define FASTATTN_RANK_scalar 0
#define FASTATTN_RANK_avx2 1
#define FASTATTN_RANK_avx512 2
#define FASTATTN_RANK_avx512_bf16 3
#define FASTATTN_RANK_amx 4
#define FASTATTN_RANK_OF(isa) FASTATTN_PASTE(FASTATTN_RANK_, isa)

#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 2
#include "avx512.h"
#elif FASTATTN_RANK_OF(FASTATTN_ISA) == 1
#include "avx2.h"
#else
#include "scalar.h"
#endif
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
#include "amx.h"
#endif

namespace fastattn {
namespace FASTATTN_ISA {

#if FASTATTN_RANK_OF(FASTATTN_ISA) < 4
template <bool>
struct MatrixUnit {
    MatrixUnit() {}  // a thread needs no preparation
    static void stay_awake() {}
};
#endif

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <class T>
inline T least(T a, T b) {
    return a < b ? a : b;
}
template <class T>
inline T most(T a, T b) {
    return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Lane n of the result is the sum, or what else op makes, of the lanes of r[n].
template <class Op>
FASTATTN_INLINE Vec reduce_each(Vec r[W], Op&& op) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 2
    // A tree that halves the vectors at each level: a full transpose would shuffle twice as much.
    const auto pd = [](Vec a) { return _mm512_castps_pd(a); };
    const auto ps = [](__m512d a) { return _mm512_castpd_ps(a); };
    Vec a[8], b[4];
    FASTATTN_UNROLL for (int i = 0; i < 8; ++i) {
        a[i] = op(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    }
    FASTATTN_UNROLL for (int i = 0; i < 4; ++i) {
        b[i] = op(ps(_mm512_unpacklo_pd(pd(a[2 * i]), pd(a[2 * i + 1]))),
                  ps(_mm512_unpackhi_pd(pd(a[2 * i]), pd(a[2 * i + 1]))));
    }
    FASTATTN_UNROLL for (int i = 0; i < 2; ++i) {
        a[i] =
            op(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    }
    return op(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
#else
    transpose(r);
    FASTATTN_UNROLL for (int step = 1; step < W; step *= 2) {
        FASTATTN_UNROLL for (int n = 0; n + step < W; n += 2 * step) r[n] = op(r[n], r[n + step]);
    }
    return r[0];
#endif
}

inline Vec vabs(Vec a) { return vmax(a, vsub(vzero(), a)); }

// 2^x, infinite (of x = inf perhaps NaN) from x = 128 on. What is below 2^-126 is 0, or, on AVX-512 outside
// FlushSubnormals, subnormal and slow. Minimax polynomials of the fraction with value 1 at 0; largest relative error
// 9.4e-8 before rounding and, Fast, 2.9e-6, a thousandth of a bf16 rounding and the error of an lse made of such
// weights.
template <bool Fast>
inline Vec exp2_of(Vec x) {
    if (W < 16) x = vmax(vset(-160.0f), x);  // -inf has no fraction there
    const Vec f = vfraction(x);
    Vec p;
    if (Fast) {
        p = vfma(vset(0.013426684f), f, vset(0.052242473f));
        p = vfma(p, f, vset(0.2412802f));
        p = vfma(p, f, vset(0.69304484f));
    } else {
        p = vfma(vset(0.00186713f), f, vset(0.0090170307f));
        p = vfma(p, f, vset(0.055799913f));
        p = vfma(p, f, vset(0.24016444f));
        p = vfma(p, f, vset(0.6931513f));
    }
    return vscale2_floor(vfma(p, f, vset(1.0f)), x);
}
// The same, 0 below 2^-126 everywhere.
template <bool Fast>
inline Vec exp2_normal(Vec x) {
    return exp2_of<Fast>(W < 16 ? x : vselect(vless(x, vset(-126.0f)), vset(-1000.0f), x));
}

// Element x[i * stride] of any float type as float.
inline float load_one(const char* x, DType dtype, int64_t i) {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(x)[i];
    uint16_t bits[W] = {reinterpret_cast<const uint16_t*>(x)[i]};
    float wide[W];
    vstore(wide, dtype == DType::kBFloat16 ? load_bf16(bits) : load_fp16(bits));
    return wide[0];
}

// n <= W elements from x[at * stride], the lanes beyond n zero.
inline Vec load_floats(const char* x, DType dtype, int64_t at, int64_t stride, int n) {
    if (stride == 1) {
        if (dtype == DType::kFloat32) {
            const float* p = reinterpret_cast<const float*>(x) + at;
            return n == W ? vload(p) : vload_n(p, n);
        }
        const uint16_t* p = reinterpret_cast<const uint16_t*>(x) + at;
        uint16_t tail[W] = {};
        if (n < W) {
            for (int i = 0; i < n; ++i) tail[i] = p[i];
            p = tail;
        }
        return dtype == DType::kBFloat16 ? load_bf16(p) : load_fp16(p);
    }
    float wide[W] = {};
    for (int i = 0; i < n; ++i) wide[i] = load_one(x, dtype, (at + i) * stride);
    return vload(wide);
}

inline void store_floats(char* x, DType dtype, int64_t at, int64_t stride, Vec a, int n) {
    if (stride == 1 && dtype == DType::kFloat32) {
        vstore_n(reinterpret_cast<float*>(x) + at, a, n);
        return;
    }
    float wide[W];
    uint16_t narrow[W];
    if (dtype == DType::kFloat32) {
        vstore(wide, a);
        for (int i = 0; i < n; ++i) reinterpret_cast<float*>(x)[(at + i) * stride] = wide[i];
        return;
    }
    uint16_t* p = reinterpret_cast<uint16_t*>(x) + at * stride;
    uint16_t* q = stride == 1 && n == W ? p : narrow;
    dtype == DType::kBFloat16 ? store_bf16(q, a) : store_fp16(q, a);
    for (int i = 0; q == narrow && i < n; ++i) p[i * stride] = narrow[i];
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
