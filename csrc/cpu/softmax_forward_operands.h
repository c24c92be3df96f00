// Packed keys and values of the forward kernels: sizes, and the packing of one key tile.
#pragma once
#include "fastattn/parallel.h"
#include "fastattn/softmax.h"
#include "softmax_panel.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Sizes of packed operands, in units.
template <class Math>
struct Layout {
    int64_t d_units, ldq, dv_vecs, ldo, tiles, k_tile, k_size, v_steps, v_size;
    explicit Layout(const SoftmaxParams& p)
        : d_units(units<Math>(p.D())),
          ldq(round_up(most<int64_t>(d_units, 1), W)),
          dv_vecs(ceil_div(p.Dv(), W)),
          ldo(dv_vecs * W),
          tiles(ceil_div(p.Lk(), 64)),
          k_tile(kPanelsPerTile * kPanel * d_units),
          k_size(tiles * k_tile),
          v_steps(tiles * 64 / Math::kPair * Math::kParts),
          v_size(v_steps * ldo) {}
    int64_t head_size() const { return round_up(k_size + v_size, 16); }
};

// Rows of k or v of one head; keys nobody sees are read as zeros.
Source key_source(const SoftmaxParams& p, const Sight& sight, const TensorView& t, int64_t b, int64_t hk,
                  std::atomic<bool>* large) {
    Source s = source_of(t, b, hk, large);
    s.first = sight.first;
    s.last = sight.last;
    if (sight.seen) s.seen = sight.seen + (b * p.Hk() + hk) * sight.words;
    return s;
}

template <class Math>
void pack_key_tile(const SoftmaxParams& p, const Source& keys, int64_t tile, float* out) {
    const int64_t width = kPanel * units<Math>(p.D());
    const int64_t end = least(p.Lk(), (tile + 1) * 64);
    for (int64_t j = tile * 64; j < end; j += kPanel, out += width) {
        pack_transposed<Math>(keys, j, least<int64_t>(kPanel, end - j), p.D(), out);
    }
}

// Steps of values [at, at + 64 / pair) of each part from key tile `tile`, as many as are used; keys past Lk are zeros.
template <class Math>
void pack_value_tile(const SoftmaxParams& p, Source values, int64_t tile, float* out, int64_t steps, int64_t at) {
    values.last = least(values.last, p.Lk());
    pack_summed<Math>(values, tile * 64, trimmed(p.Lk() - tile * 64), p.Dv(), out, steps, at);
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
