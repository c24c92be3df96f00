// Softmax attention, forward: by blocks of queries, or, for a few queries, by chunks of keys.
#include "softmax_forward_split.h"
#include "softmax_forward_tiled.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class Math>
void forward(const SoftmaxParams& p) {
    if (is_decode(p.Lq(), p.group(), p.Lk())) {
        Split<Math>(p).run();
    } else {
        Tiled<Math>(p).run();
    }
}

}  // namespace

void softmax_forward(const SoftmaxParams& p) {
#ifdef FASTATTN_HAS_BF16_DOT
    if (p.q.dtype == DType::kBFloat16) return forward<Bf16>(p);
#endif
    forward<Fp32>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
