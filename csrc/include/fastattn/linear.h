// Linear attention: what a call asks for, and its entry points.
#pragma once
#include "fastattn/isa.h"
#include "fastattn/params.h"

namespace fastattn {

enum class FeatureMap : int { kIdentity = 0, kRelu = 1, kElu1 = 2, kTaylor1 = 3, kTaylor2 = 4 };

constexpr float kLinearEps = 1e-6f;           // smallest denominator of the normaliser
constexpr int64_t kLinearLargestHead = 256;   // D and Dv
constexpr int64_t kLinearLargestSquare = 64;  // D of taylor2, whose features are its square
constexpr int64_t kLinearMark = 1024;         // tokens after which the delta rule keeps its state

// H = max(Hq, Hk, Hv) heads of out, Hs = max(Hk, Hv) heads of state; F features. float tensors without strides are
// contiguous.
struct LinearParams {
    TensorView q;               // [B, Hq, Lq, D]
    TensorView k;               // [B, Hk, Lk, D]
    TensorView v;               // [B, Hv, Lk, Dv]
    TensorView decay;           // float32 [B, Hs, L, 1 | D], optional: log of the factor of a token, <= 0
    TensorView beta;            // float32 [B, Hs, L, 1], optional: the delta rule
    TensorView key_mask;        // bool [1, 1, B, Lk], optional: keys that take part
    const int32_t* cu_seqlens;  // [N + 1], optional
    const float* kv;            // [N, Hs, F, Dv], optional: state before the first token
    const float* z;             // [N, Hs, F], with kv where normalize
    TensorView out;             // [B, H, Lq, Dv]
    float* kv_out;              // [N, Hs, F, Dv]
    float* z_out;               // [N, Hs, F], where normalize
    // Normaliser: the denominator [B, H, Lq], negative where it is clamped. Delta rule [B, H, saved_rows(), Dv]: v_t -
    // k_t^T e^g S_{t-1} for each token, then the state [D, Dv] near every multiple of kLinearMark. Forward: written
    // where a backward pass will follow.
    float* saved;

    FeatureMap map;
    bool causal, normalize;
    double scale;
    int64_t sequences;  // N: B, or the number of packed sequences
    int threads;

    FASTATTN_INLINE int64_t B() const { return q.size[0]; }
    FASTATTN_INLINE int64_t Lq() const { return q.size[2]; }
    FASTATTN_INLINE int64_t Lk() const { return k.size[2]; }
    FASTATTN_INLINE int64_t D() const { return q.size[3]; }
    FASTATTN_INLINE int64_t Dv() const { return v.size[3]; }
    FASTATTN_INLINE int64_t Hs() const { return k.size[1] > v.size[1] ? k.size[1] : v.size[1]; }
    FASTATTN_INLINE int64_t H() const { return q.size[1] > Hs() ? q.size[1] : Hs(); }
    FASTATTN_INLINE int64_t F() const {
        switch (map) {
            case FeatureMap::kTaylor1:
                return 1 + D();
            case FeatureMap::kTaylor2:
                return 1 + D() + D() * D();
            default:
                return D();
        }
    }
    FASTATTN_INLINE bool saves() const { return normalize || beta; }
    FASTATTN_INLINE int64_t saved_rows() const { return Lk() + Lk() / kLinearMark * D(); }
    FASTATTN_INLINE bool vector_decay() const { return decay && decay.size[3] > 1; }
};

// What comes in and what is asked for; float32 tensors are contiguous, null where not needed.
struct LinearGradients {
    TensorView dout;        // [B, H, Lq, Dv]
    const float* dkv;       // [N, Hs, F, Dv], optional: gradient of the state after the last token
    const float* dz;        // [N, Hs, F], optional
    TensorView dq, dk, dv;  // as q, k, v
    TensorView ddecay;      // float32 [B, Hs, L, 1 | D]
    TensorView dbeta;       // float32 [B, Hs, L, 1]
    TensorView dkv_in;      // float32 [N, Hs, F, Dv]: of the state before the first token
    TensorView dz_in;       // float32 [N, Hs, F, 1]
};

// linear_step: one token for each batch; kv_out and z_out are advanced in place, kv and z are not read.
#define FASTATTN_DECLARE_LINEAR(isa)                                       \
    namespace isa {                                                        \
    void linear_forward(const LinearParams& p);                            \
    void linear_backward(const LinearParams& p, const LinearGradients& g); \
    void linear_step(const LinearParams& p);                               \
    }
FASTATTN_FOR_EACH_ISA(FASTATTN_DECLARE_LINEAR)
#undef FASTATTN_DECLARE_LINEAR

void linear_forward(const LinearParams& p);
void linear_backward(const LinearParams& p, const LinearGradients& g);
void linear_step(const LinearParams& p);

}  // namespace fastattn
