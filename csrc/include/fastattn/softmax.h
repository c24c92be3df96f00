// Entry points of softmax attention. The ISA namespaces hold the same source compiled with different flags.
#pragma once
#include "fastattn/isa.h"
#include "fastattn/params.h"

namespace fastattn {

// Rows of one key-value head (queries x group) up to which keys are split instead of queries.
constexpr int64_t kDecodeRows = 64;
FASTATTN_INLINE bool is_decode(int64_t Lq, int64_t group, int64_t Lk) {
    return Lq <= 16 && Lq * group <= kDecodeRows && Lk > 0;
}

// A float32 call that would be mostly padding as matrix tiles. Forward, where a backward pass follows, and backward
// choose alike: both make the same scores.
FASTATTN_INLINE bool is_small(const SoftmaxParams& p) {
    return p.q.dtype == DType::kFloat32 && p.Lq() <= 32 && p.Lk() <= 32;
}

// Threads for a call of `tasks` tasks. Waking a team costs more than it saves where a forward pass has few
// multiply-adds.
FASTATTN_INLINE int team_of(const SoftmaxParams& p, int64_t tasks) {
    constexpr double kSerialWork = 1 << 19;
    const double work = static_cast<double>(p.B() * p.Hq() * p.Lq()) * static_cast<double>(p.Lk() * (p.D() + p.Dv()));
    if (work < kSerialWork || tasks < 2) return 1;
    return tasks < p.threads ? static_cast<int>(tasks) : p.threads;
}

#define FASTATTN_DECLARE_SOFTMAX(isa)                                         \
    namespace isa {                                                           \
    void softmax_forward(const SoftmaxParams& p);                             \
    void softmax_backward(const SoftmaxParams& p, const SoftmaxGradients& g); \
    }
FASTATTN_FOR_EACH_BF16_ISA(FASTATTN_DECLARE_SOFTMAX)
#undef FASTATTN_DECLARE_SOFTMAX

void softmax_forward(const SoftmaxParams& p);
void softmax_backward(const SoftmaxParams& p, const SoftmaxGradients& g);

}  // namespace fastattn
