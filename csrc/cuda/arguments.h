// A call as the portable kernels read it: SoftmaxParams and SoftmaxGradients with 32-bit sizes, and what follows from
// them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/walk.h"
#include "fastattn/cuda.h"
#include "fastattn/params.h"
#include "fastattn/tile_plan.h"

namespace fastattn::cuda {

// Rows of a [B, H, L, ..] tensor of 16-bit numbers; strides in elements.
struct Rows {
    uint16_t* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;

    Rows() = default;
    explicit Rows(const TensorView& x)
        : data(reinterpret_cast<uint16_t*>(x.data)),
          batch(x.size[0] == 1 ? 0 : x.stride[0]),
          head(x.size[1] == 1 ? 0 : x.stride[1]),
          row(x.size[2] == 1 ? 0 : x.stride[2]) {}
    __device__ uint16_t* at(int b, int h, int i) const { return data + b * batch + h * head + i * row; }
};

// Of one query, as the backward kernels use them: weight = 2^(x + minus_top + minus_tail).
struct alignas(16) RowStats {
    float minus_top, minus_tail, delta, unused;
};

struct Arguments {
    Rows q, k, v, out, dout, dq, dk, dv;
    float *lse, *parts;
    const float* dlse;
    RowStats* stats;  // [B * Hq, padded_queries()]
    int B, Hq, Hk, group, Lq, Lk, D, Dv;
    int lo, hi;   // clamped to what can matter, so that sums stay inside 32 bits
    bool negate;  // the scale is negative: kernels flip the signs of one operand and go on with |scale|
    float scale;  // as given
    float size;   // |scale|
    float slope;  // |scale| * log2(e), never 0: hidden scores are -inf and must stay so
    int tiles, section;
    bool last_first;
    PlanSide plan;
    const uint64_t* words;
    int plan_batches, plan_heads;
    const float* sinks;

    // The options below only reach kernels compiled with EXTRAS.
    float softcap;       // 0: none
    float scale_by_cap;  // |scale| / softcap
    const char* bias;    // null: none
    bool bias_fp32;
    int64_t bias_stride[4];
    const float* slopes;  // of ALiBi
    int64_t slopes_batch;
    const int32_t* diagonal;
    float* dbias;  // contiguous [dbias_size]
    int dbias_size[4];
    bool drops;
    uint32_t threshold;  // keep iff u32 >= threshold
    float keep_factor;   // 1 / (1 - p); 0 where nothing is kept; 1 without dropout
    const uint64_t* rng;
    uint64_t seed, offset;

    FASTATTN_INLINE int padded_queries() const { return (Lq + 63) / 64 * 64; }
    __device__ int64_t slice(int b, int h) const {
        return (plan_batches == 1 ? 0 : b) * plan_heads + (plan_heads == 1 ? 0 : h);
    }
};

constexpr double kLog2e = 1.4426950408889634;

inline bool has_extras(const SoftmaxParams& p) { return p.softcap > 0 || p.bias || p.slopes || p.dropout_p > 0; }

// Everything but tiles, section, last_first and plan, which differ by kernel.
inline Arguments arguments(const SoftmaxParams& p, const SoftmaxGradients* g, const CudaCall& call) {
    Arguments a{};
    a.q = Rows(p.q);
    a.k = Rows(p.k);
    a.v = Rows(p.v);
    a.out = Rows(p.out);
    a.lse = p.lse;
    a.parts = p.lse_parts;
    if (g) {
        a.dout = Rows(g->dout);
        a.dq = Rows(g->dq);
        a.dk = Rows(g->dk);
        a.dv = Rows(g->dv);
        a.dlse = g->dlse;
        a.stats = reinterpret_cast<RowStats*>(call.workspace);
        a.dbias = reinterpret_cast<float*>(g->dbias.data);
        for (int n = 0; n < 4; ++n) a.dbias_size[n] = static_cast<int>(g->dbias.size[n]);
    }
    a.B = static_cast<int>(p.B());
    a.Hq = static_cast<int>(p.Hq());
    a.Hk = static_cast<int>(p.Hk());
    a.group = static_cast<int>(p.group());
    a.Lq = static_cast<int>(p.Lq());
    a.Lk = static_cast<int>(p.Lk());
    a.D = static_cast<int>(p.D());
    a.Dv = static_cast<int>(p.Dv());
    a.lo = static_cast<int>(std::clamp(p.lo, -p.Lq(), p.Lk()));
    a.hi = static_cast<int>(std::clamp(p.hi, -p.Lq(), p.Lk()));
    a.negate = p.scale < 0;
    a.scale = static_cast<float>(p.scale);
    a.size = std::fabs(a.scale);
    a.slope = static_cast<float>(std::clamp(std::fabs(p.scale) * kLog2e, 1.2e-38, 3.4e38));
    if (p.plan) {
        a.words = p.plan->words;
        a.plan_batches = static_cast<int>(p.plan->batches);
        a.plan_heads = static_cast<int>(p.plan->heads);
    }
    a.sinks = p.sinks;
    if (p.softcap > 0) {
        const double cap = std::clamp(p.softcap, 1.2e-38, 3.4e38);
        a.softcap = static_cast<float>(cap);
        a.scale_by_cap = static_cast<float>(std::clamp(std::fabs(p.scale) / cap, 0.0, 3.4e38));
    }
    if (p.bias) {
        a.bias = p.bias.data;
        a.bias_fp32 = p.bias.dtype == DType::kFloat32;
        for (int n = 0; n < 4; ++n) a.bias_stride[n] = p.bias.size[n] == 1 ? 0 : p.bias.stride[n];
    }
    a.slopes = p.slopes;
    a.slopes_batch = p.slopes_batch;
    a.diagonal = p.diagonal;
    a.drops = p.dropout_p > 0;
    a.threshold = static_cast<uint32_t>(std::min(std::ceil(p.dropout_p * 4294967296.0), 4294967295.0));
    a.keep_factor = p.dropout_p >= 1 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
    a.rng = p.rng;
    a.seed = p.seed;
    a.offset = p.offset;
    return a;
}

inline PlanSide plan_rows(const SoftmaxParams& p) {
    if (!p.plan) return {};
    return {p.plan->row_start, p.plan->row_order, p.plan->rows, static_cast<int>(p.plan->q_tiles)};
}

inline PlanSide plan_columns(const SoftmaxParams& p) {
    if (!p.plan) return {};
    return {p.plan->column_start, p.plan->column_order, p.plan->columns, static_cast<int>(p.plan->k_tiles)};
}

// Heads whose rows, `bytes_per_head` each, fit half of a usual L2 together; a multiple of `group`.
inline int heads_per_section(int64_t heads, int64_t group, int64_t bytes_per_head) {
    constexpr int64_t kBytes = 32 << 20;
    const int64_t fit = std::max<int64_t>(1, kBytes / std::max<int64_t>(1, bytes_per_head)) * group;
    return static_cast<int>(std::min(heads, fit));
}

}  // namespace fastattn::cuda
