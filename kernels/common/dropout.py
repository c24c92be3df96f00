"""Dropout bits of one tile: Philox4x32-10, the same for every tiling and every backend."""

import triton
import triton.language as tl


@triton.jit
def keep_tile(rng, threshold, head, i_first, j_first, BM: tl.constexpr, BN: tl.constexpr):
    """int1 [BM, BN]: queries i_first.., keys j_first.. (a multiple of 4); rng points to (seed, offset)."""
    seed = tl.load(rng)
    offset = tl.load(rng + 1).to(tl.int32)
    zeros = tl.zeros([BM, BN // 4], tl.int32)
    group = zeros + (j_first // 4 + tl.arange(0, BN // 4))[None, :]
    row = zeros + (i_first + tl.arange(0, BM))[:, None]
    w0, w1, w2, w3 = tl.philox(seed, group, row, zeros + head, zeros + offset)
    limit = threshold.to(tl.uint32)
    # One draw serves four neighbouring keys: lane j % 4 runs fastest.
    even = tl.join(w0 >= limit, w2 >= limit)
    odd = tl.join(w1 >= limit, w3 >= limit)
    return tl.reshape(tl.join(even, odd), [BM, BN])
