// Feature maps on packed fp32 rows, and their gradients.
#pragma once
#include <cmath>

#include "fastattn/linear.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// e^x for x <= 0 (or NaN) as high + low; relative error 1.5e-7 of e^x - 1 near 0 and of e^x elsewhere. x is reduced in
// two parts, since x * log2(e) in one float loses 3e-6 of e^-50.
FASTATTN_INLINE void exp_nonpositive(Vec x, Vec* high, Vec* low) {
    x = vmax(vset(-104.0f), x);
    const Vec n = vround(vmul(x, vset(kLog2e))), one = vset(1.0f);
    Vec r = vfma(n, vset(-0.693359375f), x);
    r = vfma(n, vset(2.12194440e-4f), r);
    // Terms in pairs: half the latency of one after the other.
    const Vec square = vmul(r, r);
    const Vec low_terms = vfma(vset(1.0f / 6), r, vset(0.5f)),
              high_terms = vfma(vset(1.0f / 5040), r, vset(1.0f / 720));
    const Vec terms = vfma(vfma(high_terms, square, vfma(vset(1.0f / 120), r, vset(1.0f / 24))), square, low_terms);
    const Vec grown = vfma(terms, square, r), sum = vadd(one, grown);
    *low = vscale2(vsub(grown, vsub(sum, one)), n);
    *high = vscale2(sum, n);
}

FASTATTN_INLINE Vec exp_nonpositive(Vec x) {
    Vec high, low;
    exp_nonpositive(x, &high, &low);
    return high;
}

// The factor of a token, high + low, such that the product of all so far is right: it takes over what rounding took off
// the one before. Else a slow decay, the same rounded number at every token, would drift by its rounding times the
// tokens. A fast one forgets before it drifts.
FASTATTN_INLINE float next_factor(float high, float low, float* carry) {
    const float rest = low + high * *carry, factor = high + rest;
    *carry = factor > 0.5f ? (rest - (factor - high)) / factor : 0;
    return factor;
}
FASTATTN_INLINE Vec next_factor(Vec high, Vec low, Vec* carry) {
    const Vec rest = vfma(high, *carry, low), factor = vadd(high, rest);
    *carry = vselect(vless(vset(0.5f), factor), vdiv(vsub(rest, vsub(factor, high)), factor), vzero());
    return factor;
}
FASTATTN_INLINE Vec next_factor(Vec g, Vec* carry) {
    Vec high, low;
    exp_nonpositive(g, &high, &low);
    return next_factor(high, low, carry);
}

FASTATTN_INLINE uint32_t lane_bits(int n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); }

// body(c, n): columns [c, c + n) of the vectors of a row.
template <class Body>
FASTATTN_INLINE void each_vector(int64_t cols, Body&& body) {
    for (int64_t c = 0; c < cols; c += W) body(c, static_cast<int>(least<int64_t>(W, cols - c)));
}

// body(c, floats of columns [c, c + W)) of row r of x, zeros past its end.
template <class Body>
FASTATTN_INLINE void with_row(const Source& x, int64_t r, int64_t cols, Body&& body) {
    const char* row = x.at(r);
    int64_t c = 0;
    if (x.col == 1) {
        with_loader(x.dtype, [&](auto load) {
            for (; c + W <= cols; c += W) body(c, load(row, c));
        });
    }
    for (; c < cols; c += W) {
        body(c, load_floats(row, x.dtype, c, x.col, static_cast<int>(least<int64_t>(W, cols - c))));
    }
}

// Row r of x as floats; zeros up to ld.
FASTATTN_INLINE void load_row(const Source& x, int64_t r, int64_t cols, int64_t ld, float* out) {
    with_row(x, r, cols, [&](int64_t c, Vec a) { vstore(out + c, a); });
    for (int64_t c = round_up(cols, W); c < ld; c += W) vstore(out + c, vzero());
}
// The same of rows r, r + step, .., n of them, each to the next `stride` floats of out. Whole vectors of the row
// `ahead` rows of x later are asked for; it may lie outside the tensor, where no pointer may point.
inline void load_rows(const Source& x, int64_t r, int64_t step, int n, int64_t ahead, int64_t cols, int64_t ld,
                      int64_t stride, float* out) {
    const int64_t size = element_size(x.dtype), row_bytes = x.row * size, whole = x.col == 1 ? cols / W * W : 0;
    const char* row = x.at(r);
    with_loader(x.dtype, [&](auto load) {
        for (int j = 0; j < n; ++j, row += step * row_bytes, out += stride) {
            const uintptr_t later = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(ahead * row_bytes);
            for (int64_t c = 0; c < whole; c += W) {
                __builtin_prefetch(reinterpret_cast<const char*>(later + static_cast<uintptr_t>(c * size)), 0, 2);
                vstore(out + c, load(row, c));
            }
            for (int64_t c = whole; c < ld; c += W) {
                const int left = static_cast<int>(least<int64_t>(W, cols - c));
                vstore(out + c, left > 0 ? load_floats(row, x.dtype, c, x.col, left) : vzero());
            }
        }
    });
}

// Columns [first, last) of a row of floats to user memory, times `factor`; past the caches where that is asked for and
// can be.
FASTATTN_INLINE void store_row(char* out, DType dtype, int64_t stride, const float* row, int64_t first, int64_t last,
                               float factor, bool past_caches) {
    const Vec weight = vset(factor);
    int64_t c = first;
    float* floats = reinterpret_cast<float*>(out);
    if (past_caches && stride == 1 && dtype == DType::kFloat32 && reinterpret_cast<uintptr_t>(floats + c) % 64 == 0) {
        for (; c + W <= last; c += W) vstream(floats + c, vmul(vload(row + c), weight));
    }
    if (stride == 1) {
        with_storer(dtype, [&](auto store) {
            for (; c + W <= last; c += W) store(out, c, vmul(vload(row + c), weight));
        });
    }
    for (; c < last; c += W) {
        const int n = static_cast<int>(least<int64_t>(W, last - c));
        store_floats(out, dtype, c, stride, vmul(vload_n(row + c, n), weight), n);
    }
}

// Maps of one element.
struct Identity {
    FASTATTN_INLINE Vec operator()(Vec a) const { return a; }
};
struct Relu {
    FASTATTN_INLINE Vec operator()(Vec a) const { return vmax(vzero(), a); }
};
struct Elu1 {
    FASTATTN_INLINE Vec operator()(Vec a) const {
        const uint32_t positive = vless(vzero(), a);
        return vselect(positive, vadd(a, vset(1.0f)), exp_nonpositive(vselect(positive, vzero(), a)));
    }
};

struct Features {
    FeatureMap map;
    int64_t D, F;
    float linear, square;  // taylor2: factors of x and of x (x) x

    explicit Features(const LinearParams& p) : map(p.map), D(p.D()), F(p.F()) {
        const double width = static_cast<double>(D > 0 ? D : 1);
        linear = static_cast<float>(std::pow(width, -0.25));
        square = static_cast<float>(std::sqrt(0.5 / width));
    }

    // phi of row r of x to out [ld], zero past F; returns 1 / |x| for taylor1, 0 for the zero row.
    float row(const Source& x, int64_t r, int64_t ld, float* out, float* wide) const {
        switch (map) {
            case FeatureMap::kTaylor1:
                return taylor1(x, r, ld, out, wide);
            case FeatureMap::kTaylor2:
                taylor2(x, r, ld, out, wide);
                return 0;
            default:
                break;
        }
        map_rows(x, r, 1, ld, out, [](int64_t) {});
        return 0;
    }

    // Whether a feature is a function of one element.
    bool elementwise() const { return map != FeatureMap::kTaylor1 && map != FeatureMap::kTaylor2; }
    // The same of rows [r0, r0 + n), for such maps. ahead(r) comes before row r.
    template <class Ahead>
    void map_rows(const Source& x, int64_t r0, int64_t n, int64_t ld, float* out, Ahead&& ahead) const {
        if (map == FeatureMap::kRelu) {
            apply(x, r0, n, ld, out, ahead, Relu());
        } else if (map == FeatureMap::kElu1) {
            apply(x, r0, n, ld, out, ahead, Elu1());
        } else {
            apply(x, r0, n, ld, out, ahead, Identity());
        }
    }

    // Gradient of x from d, that of phi(x), in place of d's first D columns; phi and inverse as row() gave them.
    void gradient(const float* phi, float inverse, float* d) const {
        switch (map) {
            case FeatureMap::kRelu:
                each_vector(D, [&](int64_t c, int) {
                    vstore(d + c, vselect(vless(vzero(), vload(phi + c)), vload(d + c), vzero()));
                });
                break;
            case FeatureMap::kElu1:
                each_vector(D, [&](int64_t c, int) {
                    const Vec a = vload(phi + c);
                    const Vec slope = vselect(vless(vset(1.0f), a), vset(1.0f), a);
                    vstore(d + c, vmul(slope, vload(d + c)));
                });
                break;
            case FeatureMap::kTaylor1: {
                Vec sum = vzero();
                each_vector(D,
                            [&](int64_t c, int n) { sum = vfma(vload_n(phi + 1 + c, n), vload_n(d + 1 + c, n), sum); });
                const Vec along = vset(-vsum(sum)), length = vset(inverse);
                each_vector(D, [&](int64_t c, int n) {
                    const Vec across = vfma(along, vload_n(phi + 1 + c, n), vload_n(d + 1 + c, n));
                    vstore_n(d + c, vmul(across, length), n);
                });
                break;
            }
            case FeatureMap::kTaylor2: {
                // x_i x_j has the gradient d_ij; x is what the linear features hold, up to their factor.
                float* products = d + 1 + D;
                float dx[kLinearLargestSquare];
                for (int64_t i = 0; i < D; ++i) dx[i] = 0;
                for (int64_t i = 0; i < D; ++i) {
                    const Vec xi = vset(phi[1 + i]);
                    Vec sum = vzero();
                    each_vector(D, [&](int64_t c, int n) {
                        const Vec a = vload_n(products + i * D + c, n);
                        sum = vfma(a, vload_n(phi + 1 + c, n), sum);
                        vstore_n(dx + c, vfma(a, xi, vload_n(dx + c, n)), n);
                    });
                    dx[i] += vsum(sum);
                }
                const float back = square / linear;
                for (int64_t i = 0; i < D; ++i) d[i] = linear * d[1 + i] + back * dx[i];
                break;
            }
            default:
                break;
        }
    }

   private:
    template <class Ahead, class Map>
    FASTATTN_INLINE void apply(const Source& x, int64_t r0, int64_t n, int64_t ld, float* out, Ahead&& ahead,
                               Map&& f) const {
        const int64_t whole = x.col == 1 ? D / W * W : 0;
        with_loader(x.dtype, [&](auto load) {
            for (int64_t r = 0; r < n; ++r) {
                ahead(r0 + r);
                const char* row = x.at(r0 + r);
                for (int64_t c = 0; c < whole; c += W) vstore(out + r * ld + c, f(load(row, c)));
            }
        });
        for (int64_t r = 0; r < n && whole < D; ++r) {
            for (int64_t c = whole; c < D; c += W) {
                const int count = static_cast<int>(least<int64_t>(W, D - c));
                const Vec a = load_floats(x.at(r0 + r), x.dtype, c, x.col, count);
                vstore(out + r * ld + c, vselect(lane_bits(count), f(a), vzero()));
            }
        }
    }

    float taylor1(const Source& x, int64_t r, int64_t ld, float* out, float* wide) const {
        load_row(x, r, D, round_up(D, W), wide);
        Vec top = vzero(), all = vzero();
        each_vector(D, [&](int64_t c, int) {
            top = vmax(top, vabs(vload(wide + c)));
            all = vadd(all, vabs(vload(wide + c)));
        });
        const float largest = vmaximum(top);
        for (int64_t c = 0; c < ld; c += W) vstore(out + c, vzero());
        out[0] = 1;
        // The largest of numbers may pass over a NaN, their sum does not.
        if (largest == 0 && vsum(all) == 0) return 0;
        // Scaled by the largest, no square overflows or vanishes.
        Vec sum = vzero();
        each_vector(D, [&](int64_t c, int) {
            const Vec a = vdiv(vload(wide + c), vset(largest));
            vstore(wide + c, a);
            sum = vfma(a, a, sum);
        });
        const float length = std::sqrt(vsum(sum));
        each_vector(D, [&](int64_t c, int n) { vstore_n(out + 1 + c, vdiv(vload(wide + c), vset(length)), n); });
        return 1 / length / largest;
    }

    void taylor2(const Source& x, int64_t r, int64_t ld, float* out, float* wide) const {
        load_row(x, r, D, round_up(D, W), wide);
        out[0] = 1;
        each_vector(D, [&](int64_t c, int n) { vstore_n(out + 1 + c, vmul(vload(wide + c), vset(linear)), n); });
        for (int64_t i = 0; i < D; ++i) {
            const Vec xi = vset(wide[i] * square);
            float* products = out + 1 + D + i * D;
            each_vector(D, [&](int64_t c, int n) { vstore_n(products + c, vmul(vload(wide + c), xi), n); });
        }
        for (int64_t c = F; c < ld; ++c) out[c] = 0;
    }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
