// Softmax attention, forward: by blocks of queries, or, for a few queries, by chunks of keys.
#include "softmax_forward_split.h"
#include "softmax_forward_tiled.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// False where numbers are too large for their parts.
template <class Math>
bool forward(const SoftmaxParams& p) {
    return is_decode(p.Lq(), p.group(), p.Lk()) ? Split<Math>(p).run() : Tiled<Math>(p).run();
}

#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
// Rows of a decoding call for which tiles are worth packing keys. They multiply bf16 so much faster than vectors that
// few do; and backward, if it follows, makes the scores again by tiles.
bool tiles_pay(const SoftmaxParams& p) {
    const bool few = is_decode(p.Lq(), p.group(), p.Lk());
    if (p.lse_parts) return !is_small(p);
    return !few || (p.q.dtype == DType::kBFloat16 && p.Lq() * p.group() > kDirectValueRows);
}

bool forward_by_tiles(const SoftmaxParams& p) {
    switch (p.q.dtype) {
        case DType::kBFloat16:
            return forward<Parts<1>>(p);
        case DType::kFloat16:
            return forward<Parts<2>>(p);
        default:
            return forward<Parts<3>>(p);
    }
}
#endif

}  // namespace

void softmax_forward(const SoftmaxParams& p) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
    if (!tiles_pay(p) || !forward_by_tiles(p)) avx512_bf16::softmax_forward(p);
#elif FASTATTN_RANK_OF(FASTATTN_ISA) == 3
    if (p.q.dtype != DType::kBFloat16) return avx512::softmax_forward(p);
    forward<Bf16>(p);
#else
    forward<Fp32>(p);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
