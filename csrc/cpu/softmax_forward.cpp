// Softmax attention, forward: by blocks of queries, or, for a few queries, by chunks of keys.
#include "softmax_forward_split.h"
#include "softmax_forward_tiled.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class Long, class Few>
bool attend(const SoftmaxParams& p) {
    if (!is_decode(p.Lq(), p.group(), p.Lk())) return Tiled<Long>(p).run();
    // Backward makes the scores of these rows again, by the products of `Long`. Tiles are also worth packing bf16 for:
    // vectors multiply it no faster than fp32.
    const bool packs = Long::kTiles && Long::kParts == 1 && p.Lq() * p.group() > kDirectValueRows;
    if (p.lse_parts || packs) return Split<Long>(p).run();
    return Split<Few>(p).run();
}

template <class Long, class Few>
void forward(const SoftmaxParams& p) {
    if (attend<Long, Few>(p)) return;
    if constexpr (Long::kParts > 1) attend<Fp32, Fp32>(p);
}

}  // namespace

void softmax_forward(const SoftmaxParams& p) {
#if FASTATTN_RANK_OF(FASTATTN_ISA) >= 4
    if (p.q.dtype == DType::kBFloat16) return forward<Parts<1>, Bf16>(p);
    if (p.q.dtype == DType::kFloat16) return forward<Parts<2>, Fp32>(p);
    return forward<Parts<3>, Fp32>(p);
#else
#ifdef FASTATTN_HAS_BF16_DOT
    if (p.q.dtype == DType::kBFloat16) return forward<Bf16, Bf16>(p);
#endif
    forward<Fp32, Fp32>(p);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
