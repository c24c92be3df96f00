// Scans of the backward delta rule whose lanes are channels of k, all of whose terms are known: four tokens at a time,
// X [rows][kDeltaLanes] scaled within a group as linear_delta.h says, here by lanes.
#pragma once
#include "linear_delta.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// What tokens of a group bring, slot j at j * step: r, dout and du, Dv floats each.
struct DeltaTerms {
    const float *r, *dout, *du;
    int64_t step;
};

// Decay of the lanes of a tile in a group.
struct LaneFade {
    DeltaFade of[kDeltaVecs];
};

// Row by row, over the tokens of a group in the order they are walked:
//   forward in time, x = S^T: one += dout_j . x, two += du_j . x, then x += r_j a_j^T;
//   backward in time, x = dS^T: one += r_j . x, then x += dout_j a_j^T + du_j b_j^T.
template <bool fades, bool backward>
inline void delta_scan(int64_t count, float* x, const DeltaTerms& terms, const LaneFade& fade, const GroupLanes& a,
                       const GroupLanes& b, GroupLanes& one, GroupLanes& two) {
    // Slots 0 to 2 are addressing modes of one pointer.
    const int64_t step = terms.step;
    const float *r = terms.r, *dout = terms.dout, *du = terms.du;
    const float *r3 = r + 3 * step, *dout3 = dout + 3 * step, *du3 = du + 3 * step;
    Vec first[kGroup][kDeltaVecs], second[kGroup][kDeltaVecs], y[kGroup][kDeltaVecs], z[kGroup][kDeltaVecs];
    FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            first[j][v] = a[j][v];
            if (backward) second[j][v] = b[j][v];
            y[j][v] = z[j][v] = vzero();
        }
    }
    for (int64_t row = 0; row < count; ++row, x += kDeltaLanes) {
        Vec state[kDeltaVecs];
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            state[v] = vload(x + v * W);
            if (fades) state[v] = vmul(fade.of[v].factor, state[v]);
        }
        FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
            const Vec rj = vset(j == 3 ? r3[row] : r[j * step + row]);
            const Vec doutj = vset(j == 3 ? dout3[row] : dout[j * step + row]);
            const Vec duj = vset(j == 3 ? du3[row] : du[j * step + row]);
            FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
                y[j][v] = vfma(backward ? rj : doutj, state[v], y[j][v]);
                if (!backward) z[j][v] = vfma(duj, state[v], z[j][v]);
                state[v] = vfma(backward ? doutj : rj, first[j][v], state[v]);
                if (backward) state[v] = vfma(duj, second[j][v], state[v]);
            }
        }
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) vstore(x + v * W, state[v]);
    }
    FASTATTN_UNROLL for (int j = 0; j < kGroup; ++j) {
        FASTATTN_UNROLL for (int v = 0; v < kDeltaVecs; ++v) {
            one[j][v] = fades ? vmul(y[j][v], fade.of[v].past[j]) : y[j][v];
            if (!backward) two[j][v] = fades ? vmul(z[j][v], fade.of[v].past[j]) : z[j][v];
        }
    }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
