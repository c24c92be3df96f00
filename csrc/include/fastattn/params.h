// What a kernel is asked to do: plain structs, no torch and no Python.
#pragma once
#include <cstdint>

// Shared inline functions are compiled once per ISA; inlined always, no copy for one ISA can serve another.
#ifdef __CUDACC__
#define FASTATTN_INLINE __host__ __device__ __forceinline__
#else
#define FASTATTN_INLINE inline __attribute__((always_inline))
#endif
// Unrolled early, arrays of vectors are registers from the start; else GCC gives them a home on the stack as well.
#define FASTATTN_UNROLL _Pragma("GCC unroll 16")

namespace fastattn {

// The last two are for plans of masks; no kernel computes in them.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3, kInt32 = 4, kInt64 = 5 };

FASTATTN_INLINE int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::kFloat32:
        case DType::kInt32:
            return 4;
        case DType::kInt64:
            return 8;
        case DType::kBool:
            return 1;
        default:
            return 2;
    }
}

// Four dimensions; strides in elements. A broadcast dimension has size 1 or stride 0.
struct TensorView {
    char* data = nullptr;
    int64_t size[4] = {0, 0, 0, 0};
    int64_t stride[4] = {0, 0, 0, 0};
    DType dtype = DType::kFloat32;

    FASTATTN_INLINE explicit operator bool() const { return data != nullptr; }
    // Address of [b, h, i, 0], where dimensions of size 1 are read at 0.
    FASTATTN_INLINE char* row(int64_t b, int64_t h, int64_t i) const {
        const int64_t at = (size[0] == 1 ? 0 : b * stride[0]) + (size[1] == 1 ? 0 : h * stride[1]) +
                           (size[2] == 1 ? 0 : i * stride[2]);
        return data + at * element_size(dtype);
    }
    FASTATTN_INLINE int64_t last_stride() const { return size[3] == 1 ? 0 : stride[3]; }
};

constexpr int64_t kUnbounded = int64_t{1} << 62;

struct TilePlanView;

struct SoftmaxParams {
    TensorView q;     // [B, Hq, Lq, D]
    TensorView k;     // [B, Hk, Lk, D]
    TensorView v;     // [B, Hk, Lk, Dv]
    TensorView mask;  // bool [B|1, Hq|1, Lq|1, Lk|1], optional
    TensorView bias;  // float [B|1, Hq|1, Lq|1, Lk|1], optional
    TensorView out;   // [B, Hq, Lq, Dv]
    // ALiBi, optional: slope(b, h) * |i + zero(i) - j| is taken off a logit.
    const float* slopes;       // [B|1, Hq]
    int64_t slopes_batch;      // elements between batches, or 0
    const int32_t* diagonal;   // [Lq], optional: zero(i) is Lk - Lq without it
    const float* sinks;        // [Hq], optional: exp(sink) enters the denominator
    const TilePlanView* plan;  // optional, not together with mask
    float* lse;                // [B, Hq, Lq], of the forward pass, optional
    // [B, Hq, Lq, 2]: lse in two parts, since one float cannot hold both: the largest score of the row as it comes out
    // of the product (with bias, slopes, sinks or softcap: the largest logit or sink), and the log of the sum of
    // weights relative to it; (0, -inf) where there is neither key nor sink. Forward: written where a backward pass
    // will follow.
    float* lse_parts;

    double scale;
    double softcap;  // 0: none
    int64_t lo, hi;  // key j is visible to query i only if lo <= j - i <= hi; +-kUnbounded
    double dropout_p;
    uint64_t seed, offset;
    const uint64_t* rng;  // [2]: the two above where kernels on a device read them
    int threads;          // CPU only

    FASTATTN_INLINE int64_t B() const { return q.size[0]; }
    FASTATTN_INLINE int64_t Hq() const { return q.size[1]; }
    FASTATTN_INLINE int64_t Lq() const { return q.size[2]; }
    FASTATTN_INLINE int64_t D() const { return q.size[3]; }
    FASTATTN_INLINE int64_t Hk() const { return k.size[1]; }
    FASTATTN_INLINE int64_t Lk() const { return k.size[2]; }
    FASTATTN_INLINE int64_t Dv() const { return v.size[3]; }
    FASTATTN_INLINE int64_t group() const { return Hk() ? Hq() / Hk() : 1; }
};

struct SoftmaxGradients {
    TensorView dout;    // [B, Hq, Lq, Dv]
    const float* dlse;  // [B, Hq, Lq], optional
    TensorView dq;      // [B, Hq, Lq, D], optional
    TensorView dk;      // [B, Hk, Lk, D], optional
    TensorView dv;      // [B, Hk, Lk, Dv], optional
    TensorView dbias;   // float32, contiguous, the shape of bias, optional
    float* dslopes;     // the shape of slopes, optional
};

}  // namespace fastattn
