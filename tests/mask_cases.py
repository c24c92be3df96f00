"""Masks next to what they mean: each pattern with a dense oracle written from its definition, and random expressions."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn import masks
from fastattn.masks import Mask
from fastattn.philox import philox4x32

LENGTHS = (1, 63, 64, 65, 127, 200)
SQUARE = ("neighborhood_2d", "neighborhood_3d", "neighborhood_dilated", "documents_self")
BATCHES, HEADS = 2, 3

Made = tuple[Mask, Tensor]  # a mask, and bool [B|1, H|1, Lq, Lk]


def grid(Lq: int, Lk: int) -> tuple[Tensor, Tensor, Tensor]:
    """i [Lq, 1], j [Lk], and d = j - (i + Lk - Lq)."""
    i, j = torch.arange(Lq)[:, None], torch.arange(Lk)
    return i, j, j - (i + Lk - Lq)


def every(Lq: int, Lk: int, visible: Callable[[int, int], bool]) -> Tensor:
    """bool [1, 1, Lq, Lk] by asking for one pair after the other."""
    rows = [[visible(i, j) for j in range(Lk)] for i in range(Lq)]
    return torch.tensor(rows, dtype=torch.bool).view(1, 1, Lq, Lk)


def _ints(r: random.Random, low: int, high: int, *shape: int) -> Tensor:
    return torch.tensor([r.randint(low, high) for _ in range(torch.Size(shape).numel())]).view(shape)


def full(r, Lq, Lk) -> Made:
    return masks.full(), torch.ones(1, 1, Lq, Lk, dtype=torch.bool)


def empty(r, Lq, Lk) -> Made:
    return masks.empty(), torch.zeros(1, 1, Lq, Lk, dtype=torch.bool)


def causal(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    return masks.causal(), (d <= 0)[None, None]


def causal_top_left(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    return masks.causal("top_left"), (j <= i)[None, None]


def window(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    left, right = (r.choice([None, 0, r.randint(0, 70)]) for _ in range(2))
    visible = torch.ones(Lq, Lk, dtype=torch.bool)
    if left is not None:
        visible &= d >= -left
    if right is not None:
        visible &= d <= right
    return masks.window(left, right), visible[None, None]


def prefix(r, Lq, Lk) -> Made:
    n = r.randint(0, Lk)
    return masks.prefix(n), (torch.arange(Lk) < n).expand(1, 1, Lq, Lk)


def prefix_batched(r, Lq, Lk) -> Made:
    n = _ints(r, 0, Lk, BATCHES)
    return masks.prefix(n), (torch.arange(Lk) < n[:, None])[:, None, None].expand(-1, 1, Lq, Lk)


def documents_self(r, Lq, Lk) -> Made:
    ids = _ints(r, 0, 3, Lq).sort().values
    return masks.documents(ids), (ids[:, None] == ids)[None, None]


def documents_pieces(r, Lq, Lk) -> Made:
    """Two sides, ids out of order, some on one side only."""
    ids_q = _ints(r, -2, 4, Lq // 9 + 1).repeat_interleave(9)[:Lq]
    ids_k = _ints(r, -2, 4, Lk // 11 + 1).repeat_interleave(11)[:Lk]
    return masks.documents(ids_q, ids_k), (ids_q[:, None] == ids_k)[None, None]


def documents_random(r, Lq, Lk) -> Made:
    """More pieces than intervals hold, different in each batch and head."""
    ids_q, ids_k = _ints(r, 0, 2, BATCHES, HEADS, Lq), _ints(r, 0, 2, 1, 1, Lk)
    return masks.documents(ids_q, ids_k), ids_q[..., None] == ids_k[:, :, None]


def _offsets(r: random.Random, total: int, sequences: int) -> list[int]:
    return [0, *sorted(r.randint(0, total) for _ in range(sequences - 1)), total]


def cu_seqlens(r, Lq, Lk) -> Made:
    cu_q, cu_k = _offsets(r, Lq, 4), _offsets(r, Lk, 4)
    how, sides = r.choice([False, True, "top_left"]), r.choice([None, (r.randint(0, 9), r.choice([None, 5]))])

    def visible(i: int, j: int) -> bool:
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
            if q0 <= i < q1 and k0 <= j < k1:
                i, j, shift = i - q0, j - k0, (k1 - k0) - (q1 - q0)
                left, right = sides or (None, None)
                near = (left is None or j - i - shift >= -left) and (right is None or j - i - shift <= right)
                return near and (not how or j <= i + (0 if how == "top_left" else shift))
        return False

    return masks.from_cu_seqlens(cu_q, cu_k, causal=how, window=sides), every(Lq, Lk, visible)


def global_tokens(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    tokens = _ints(r, 0, Lk - 1, r.choice([1, 3, 60]))
    visible = torch.isin(j, tokens) | torch.isin(i + Lk - Lq, tokens)
    return masks.global_tokens(tokens), visible[None, None]


def dilated(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    step, reach = r.randint(1, 9), r.choice([None, r.randint(0, 60)])
    visible = (d % step == 0) & ((d.abs() <= reach) if reach is not None else True)
    return masks.dilated(step, reach), visible[None, None]


def strided(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    step = r.randint(1, 20)
    return masks.strided(step), ((d.abs() <= step) | (d % step == 0))[None, None]


def blocks(r, Lq, Lk) -> Made:
    bq, bk = r.choice([(16, 16), (64, 64), (7, 30), (128, 32)])
    visible = torch.rand(r.choice([1, BATCHES]), r.choice([1, HEADS]), -(-Lq // bq), -(-Lk // bk)) < 0.4
    rows, columns = torch.arange(Lq) // bq, torch.arange(Lk) // bk
    return masks.blocks(visible, (bq, bk)), visible[:, :, rows][..., columns]


def blocks_many(r, Lq, Lk) -> Made:
    visible = torch.rand(-(-Lq // 2), -(-Lk // 2)) < 0.5
    rows, columns = torch.arange(Lq) // 2, torch.arange(Lk) // 2
    return masks.blocks(visible, 2), visible[rows][:, columns][None, None]


def drawn_blocks(seed: int, head: int, block: int, draws: int, n: int) -> set[int]:
    """bigbird's random blocks, one number after the other."""
    found: set[int] = set()
    for draw, last in enumerate(range(n - draws, n)):
        words = philox4x32(
            tuple(torch.tensor(x) for x in (block & 0xFFFFFFFF, draw, head, 0)),
            (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)),
        )
        candidate = int(words[0]) * (last + 1) // 2**32
        found.add(last if candidate in found else candidate)
    return found


def bigbird(r, Lq, Lk) -> Made:
    size, near, fixed, draws, seed = (
        r.choice([8, 16]),
        r.randint(0, 2),
        r.randint(0, 2),
        r.randint(0, 3),
        r.randint(0, 2**40),
    )
    n, heads, layers = -(-Lk // size), r.choice([1, HEADS]), []
    for head in range(heads):
        random_blocks = {
            I: drawn_blocks(seed, head, I, min(draws, n), n) for I in {(i + Lk - Lq) // size for i in range(Lq)}
        }

        def visible(i: int, j: int) -> bool:
            I, J = (i + Lk - Lq) // size, j // size
            return abs(I - J) <= near or 0 <= I < fixed or J < fixed or J in random_blocks[I]  # noqa: B023

        layers.append(every(Lq, Lk, visible))
    return masks.bigbird(size, near, fixed, draws, seed, heads), torch.cat(layers, 1)


def longformer(r, Lq, Lk) -> Made:
    i, j, d = grid(Lq, Lk)
    tokens, step, reach = _ints(r, 0, Lk - 1, 3), r.randint(1, 3), r.randint(0, 30)
    visible = (d.abs() <= reach) & (d % step == 0) | torch.isin(j, tokens) | torch.isin(i + Lk - Lq, tokens)
    return masks.longformer(reach, tokens, step), visible[None, None]


def _neighborhood(shape, kernel, dilation) -> Made:
    """Per dimension: the points of the same residue, nearest by index, as many as the kernel says."""
    n = torch.Size(shape).numel()
    points = torch.cartesian_prod(*(torch.arange(s) for s in shape)).view(n, len(shape)).tolist()
    kernels = kernel if isinstance(kernel, tuple) else (kernel,) * len(shape)
    dilations = dilation if isinstance(dilation, tuple) else (dilation,) * len(shape)
    seen = []
    for size, k, step in zip(shape, kernels, dilations):
        per_point = []
        for x in range(size):
            same = [y for y in range(size) if y % step == x % step]
            first = min(max(same.index(x) - k // 2, 0), len(same) - k)
            per_point.append(set(same[first : first + k]))
        seen.append(per_point)
    visible = every(n, n, lambda i, j: all(y in s[x] for x, y, s in zip(points[i], points[j], seen)))
    return masks.neighborhood(shape, kernel, dilation), visible


def neighborhood_2d(r, Lq, Lk) -> Made:
    shape = {1: (1, 1), 63: (7, 9), 64: (8, 8), 65: (5, 13), 127: (1, 127), 200: (10, 20)}[Lk]
    return _neighborhood(shape, tuple(r.randint(1, s) for s in shape), 1)


def neighborhood_3d(r, Lq, Lk) -> Made:
    shape = {1: (1, 1, 1), 63: (3, 3, 7), 64: (4, 4, 4), 65: (1, 5, 13), 127: (1, 1, 127), 200: (5, 5, 8)}[Lk]
    return _neighborhood(shape, tuple(r.randint(1, min(s, 5)) for s in shape), 1)


def neighborhood_dilated(r, Lq, Lk) -> Made:
    shape = {1: (1,), 63: (63,), 64: (8, 8), 65: (5, 13), 127: (127,), 200: (10, 20)}[Lk]
    dilation = tuple(r.randint(1, min(s, 3)) for s in shape)
    return _neighborhood(shape, tuple(r.randint(1, s // d) for s, d in zip(shape, dilation)), dilation)


def key_padding_lengths(r, Lq, Lk) -> Made:
    n = _ints(r, 0, Lk, BATCHES)
    return masks.key_padding(n), (torch.arange(Lk) < n[:, None])[:, None, None].expand(-1, 1, Lq, Lk)


def key_padding_bool(r, Lq, Lk) -> Made:
    keys = torch.rand(BATCHES, Lk) < r.random()
    return masks.key_padding(keys), keys[:, None, None].expand(-1, 1, Lq, Lk)


def tree(r, Lq, Lk) -> Made:
    """Lq nodes under the keys before them; where Lq > Lk the context is cut, so the test takes Lq <= Lk."""
    parents = [r.randint(-1, i - 1) if r.random() < 0.3 else i - 1 for i in range(Lq)]
    ancestors: list[set[int]] = []
    for i, parent in enumerate(parents):
        ancestors.append({i} | (ancestors[parent] if parent >= 0 else set()))
    context = Lk - Lq
    visible = every(Lq, Lk, lambda i, j: j < context or j - context in ancestors[i])
    return masks.tree(parents, context), visible


def intervals(r, Lq, Lk) -> Made:
    ends = _ints(r, 0, Lk, Lq, 3, 2).sort(-1).values
    i, j, d = grid(Lq, Lk)
    visible = ((ends[:, None, :, 0] <= j[:, None]) & (j[:, None] < ends[:, None, :, 1])).any(-1)
    return masks.intervals(ends[..., 0], ends[..., 1]), visible[None, None]


def dense(r, Lq, Lk) -> Made:
    visible = torch.rand(r.choice([1, BATCHES]), r.choice([1, HEADS]), Lq, Lk) < r.random()
    return masks.dense(visible), visible


def dense_row(r, Lq, Lk) -> Made:
    visible = torch.rand(1, HEADS, 1, Lk) < 0.5
    return masks.dense(visible), visible.expand(-1, -1, Lq, -1)


PATTERNS: dict[str, Callable[[random.Random, int, int], Made]] = {
    f.__name__: f
    for f in (
        full, empty, causal, causal_top_left, window, prefix, prefix_batched, documents_self, documents_pieces,
        documents_random, cu_seqlens, global_tokens, dilated, strided, blocks, blocks_many, bigbird, longformer,
        neighborhood_2d, neighborhood_3d, neighborhood_dilated, key_padding_lengths, key_padding_bool, tree, intervals,
        dense, dense_row,
    )
}  # fmt: skip
CHEAP = [name for name in PATTERNS if name not in ("cu_seqlens", "bigbird", *SQUARE[:3])]


def possible(name: str, Lq: int, Lk: int) -> bool:
    return Lq <= Lk if name == "tree" else Lq == Lk if name in SQUARE else True


def expression(r: random.Random, Lq: int, Lk: int, depth: int = 3) -> Made:
    """A random tree of &, | and ~ over random patterns."""
    if depth == 0 or r.random() < 0.15:
        name = r.choice([n for n in PATTERNS if possible(n, Lq, Lk) and (n in CHEAP or max(Lq, Lk) < 66)])
        return PATTERNS[name](r, Lq, Lk)
    a, dense_a = expression(r, Lq, Lk, depth - 1)
    how = r.choice("&|&|~")
    if how == "~":
        return ~a, ~dense_a
    b, dense_b = expression(r, Lq, Lk, depth - 1)
    return (a & b, dense_a & dense_b) if how == "&" else (a | b, dense_a | dense_b)


def expressions(count: int, seed: int = 0) -> list[tuple[Mask, Tensor, int, int]]:
    r = random.Random(seed)
    torch.manual_seed(seed)
    made = []
    for _ in range(count):
        Lq, Lk = r.choice(LENGTHS), r.choice(LENGTHS)
        Lk = Lq if r.random() < 0.4 else Lk
        made.append((*expression(r, Lq, Lk), Lq, Lk))
    return made
