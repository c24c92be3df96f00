"""What the passes of linear attention share: chunks of a call, and the launches of the scan and of the read-out."""

from typing import NamedTuple, Optional

import torch
import triton.language as tl

from ..common.launch import INTERPRETED, arch_of, launch
from ..common.sizes import block_dim, ceil_div, wide
from . import config
from .channels import near_kernel, pairs_kernel
from .delta import delta_kernel, inverse_kernel
from .gates import sum_gates_kernel
from .read import read_kernel
from .states import states_kernel
from .tiles import BLOCK, Packing, Rows, rows_of

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class Chunks(NamedTuple):
    """How L tokens of N sequences fall into chunks."""

    packing: Optional[Packing]
    L: int
    N: int
    per_sequence: int  # chunks of each sequence; packed, of the longest there could be
    n_chunks: int  # packed, as many as there could be: the host does not know the lengths


class States(NamedTuple):
    """What a scan leaves. before: [n_chunks, Hs, F, V] and fp32 [n_chunks, Hs, F]; final: fp32 [N, Hs, F, V], [N, Hs, F]."""

    before: Optional[torch.Tensor]
    before_z: Optional[torch.Tensor]
    final: torch.Tensor
    final_z: Optional[torch.Tensor]
    passed: Optional[torch.Tensor] = None


def chunks_of(x, L: int, BT: int) -> Chunks:
    cu, N = x.cu_seqlens, x.sequences
    if cu is None:
        count = ceil_div(L, BT)
        return Chunks(None, L, N, count, N * count)
    first = torch.zeros_like(cu)
    torch.cumsum((cu.diff() + BT - 1) // BT, 0, dtype=torch.int32, out=first[1:])
    n_chunks = L // BT + N
    each = torch.arange(n_chunks, dtype=torch.int32, device=cu.device)
    sequence = torch.searchsorted(first, each, right=True, out_int32=True) - 1
    return Chunks(Packing(cu, first, sequence), L, N, ceil_div(L, BT), n_chunks)


class Run(NamedTuple):
    """One call: its tensors, options, tiles and chunks."""

    x: tuple
    params: tuple
    tiles: config.Tiles
    queries: Chunks
    keys: Chunks
    gates: Optional[torch.Tensor]  # fp32 [2, B, Hs, L, 1 or F]

    @property
    def F(self) -> int:
        return self.x.state_shape(self.params.feature_map)[2]

    @property
    def decay(self) -> str:
        decay = self.x.decay
        return "none" if decay is None else "scalar" if decay.dim() == 3 else "vector"

    @property
    def plane(self) -> int:
        return 0 if self.gates is None else self.gates[0].numel()

    def options(self, *tensors) -> dict:
        dtype = self.x.q.dtype
        return {
            "D": self.x.q.shape[3],
            "MAP": self.params.feature_map,
            "DECAY": self.decay,
            "BT": self.tiles.BT,
            "BD": block_dim(self.x.q.shape[3]),
            "WIDE": wide(*tensors),
            "DTYPE": TYPES[config.product_type(dtype, INTERPRETED)],
            "PRECISION": config.product_precision(dtype),
        }

    def mask(self) -> tuple:
        mask = self.x.key_mask
        return (None, None) if mask is None else (mask, mask.stride())

    def scan(
        self, chunks, x, y, group, V, *, z, weights=None, start=None, start_z=None, reverse=False, other=None
    ) -> States:  # fmt: skip
        """States of x^T y; see `states_kernel`."""
        tile, heads, causal = self.tiles.states, self.x.state_heads, self.params.causal
        F, N, q = self.F, chunks.N, self.x.q
        n_parts = 1
        if not causal and chunks.packing is None:
            n_parts = max(1, ceil_div(chunks.per_sequence, self.tiles.part))
        n_f, n_v = ceil_div(F, tile.rows), ceil_div(V, tile.columns)
        before = before_z = passed = None
        if causal:
            before = q.new_empty(chunks.n_chunks, heads, F, V, dtype=config.state_type(q.dtype, z, INTERPRETED))
            before_z = q.new_empty(chunks.n_chunks, heads, F, dtype=torch.float32) if z else None
        final = q.new_empty(n_parts, N, heads, F, V, dtype=torch.float32)
        final_z = q.new_empty(n_parts, N, heads, F, dtype=torch.float32) if z else None
        if other is not None and self.decay != "none":
            shape = (n_v, chunks.n_chunks, heads, F) if self.decay == "vector" else (n_f * n_v, chunks.n_chunks, heads)
            passed = q.new_empty(shape, dtype=torch.float32)
        launch(
            states_kernel, n_f * n_v * heads * N * n_parts, x, y, weights, self.gates, self.plane,
            *((None, None) if reverse else self.mask()), chunks.packing, start, start_z, before, before_z, final, final_z,
            *((None, None) if passed is None else (other.before, other.before_z)), passed,
            chunks.L, N, heads, group, chunks.per_sequence,
            ceil_div(chunks.per_sequence, n_parts) if chunks.packing is None else chunks.n_chunks, chunks.n_chunks,
            F=F, V=V, REVERSE=reverse, BF=tile.rows, BV=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages,
            **self.options(x.x, y.x),
        )  # fmt: skip
        final, final_z = (None if t is None else t[0] if n_parts == 1 else t.sum(0) for t in (final, final_z))
        return States(before, before_z, final, final_z, passed)

    def read(
        self, chunks, c, a, b, maps, heads, group, inner, lanes, out, *, state=None, state_z=None, added=None, pairs=None, near=None,
        scale=1.0, eps=0.0, den=None, x=None, touched=None, reverse=False, strict=False, transposed=False, masked=False,
    ) -> None:  # fmt: skip
        """Fill `out` [B, heads, L, lanes] with what its rows read; see `read_kernel`. maps: of c, a and b."""
        tile = self.tiles.read
        launch(
            read_kernel, chunks.n_chunks * heads * ceil_div(lanes, tile.columns), c, a, b, added, state, state_z,
            self.gates, self.plane, pairs, near, Rows(out, *out.stride()), den, touched, x,
            *(self.mask() if masked else (None, None)), chunks.packing, chunks.L, chunks.N, heads, heads // self.x.state_heads,
            group, chunks.per_sequence, 0 if touched is None else touched[0].numel(), self.x.heads, float(scale), eps,
            INNER=inner, LANES=lanes, C_MAP=maps[0], A_MAP=maps[1], B_MAP=maps[2], CAUSAL=self.params.causal, REVERSE=reverse,
            STRICT=strict, TRANSPOSED=transposed, GRADIENT=x is not None,
            STATE_PRECISION=config.state_precision(self.x.q.dtype), BK=tile.rows, BL=tile.columns, num_warps=tile.num_warps,
            num_stages=tile.num_stages, **self.options(c.x, a.x, b.x, out),
        )  # fmt: skip

    def pairs(self) -> Optional[torch.Tensor]:
        """fp32 [B, H, L, BT] for `read` where channels decay each on its own; see `pairs_kernel`."""
        x, chunks, tiles, heads = self.x, self.keys, self.tiles, self.x.heads
        if self.decay != "vector":
            return None
        pairs = x.q.new_empty(x.q.shape[0], heads, chunks.L, tiles.BT, dtype=torch.float32)
        launch(
            pairs_kernel, chunks.n_chunks * heads * (tiles.BT // BLOCK.value), rows_of(x.q, heads), rows_of(x.k, x.state_heads),
            self.gates, self.plane, pairs, chunks.packing, chunks.L, chunks.N, heads, heads // x.state_heads,
            chunks.per_sequence, F=self.F, BK=tiles.channels.rows, num_warps=tiles.channels.num_warps,
            num_stages=tiles.channels.num_stages, **self.options(x.q, x.k),
        )  # fmt: skip
        return pairs

    def near(self, c, a, v, added, heads, group, reverse=False) -> Optional[torch.Tensor]:
        """fp32 [B, heads, L, F] for `read`, likewise; see `near_kernel`."""
        x, chunks, tile = self.x, self.keys, self.tiles.channels
        if self.decay != "vector":
            return None
        near = x.q.new_empty(x.q.shape[0], heads, chunks.L, self.F, dtype=torch.float32)
        launch(
            near_kernel, chunks.n_chunks * heads * (self.tiles.BT // BLOCK.value) * ceil_div(self.F, tile.columns), c, a, v, added,
            self.gates, self.plane, near, chunks.packing, chunks.L, chunks.N, heads, heads // x.state_heads, group,
            chunks.per_sequence, INNER=x.v.shape[3], LANES=self.F, REVERSE=reverse, BK=tile.rows, BL=tile.columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **self.options(c.x, a.x, v.x),
        )  # fmt: skip
        return near

    def betas(self) -> Rows:
        return rows_of(self.x.v, self.x.state_heads, self.x.beta)

    def inverse(self) -> torch.Tensor:
        """[B, Hs, L, BT]; see `inverse_kernel`."""
        x, chunks, heads = self.x, self.keys, self.x.state_heads
        dtype = config.product_type(x.q.dtype, INTERPRETED)
        inverse = x.q.new_empty(x.q.shape[0], heads, chunks.L, self.tiles.BT, dtype=dtype)
        launch(
            inverse_kernel, chunks.n_chunks * heads, rows_of(x.k, heads), self.betas(), self.gates, self.plane, inverse,
            chunks.packing, chunks.L, chunks.N, heads, chunks.per_sequence, BK=self.tiles.read.rows, num_warps=4, num_stages=1,
            MERGE=config.merge_precision(x.q.dtype), **self.options(x.k),
        )  # fmt: skip
        return inverse

    def scan_delta(self, inverse, values, start, reverse=False, inner=None, other=None) -> tuple[torch.Tensor, States]:
        """(u, or backward the gradient of beta r; states); see `delta_kernel`."""
        x, chunks, heads = self.x, self.keys, self.x.state_heads
        B, D, V, tile = x.q.shape[0], x.q.shape[3], x.v.shape[3], self.tiles.delta
        dtype = config.product_type(x.q.dtype, INTERPRETED)
        n_v = ceil_div(V, tile.columns)
        u = x.q.new_empty(B, heads, chunks.L, V, dtype=torch.float32 if reverse else dtype)
        states = x.q.new_empty(chunks.n_chunks, heads, D, V, dtype=dtype)
        final = x.q.new_empty(chunks.N, heads, D, V, dtype=torch.float32)
        passed = None
        if other is not None and self.decay != "none":
            passed = x.q.new_empty(n_v, chunks.n_chunks, heads, dtype=torch.float32)
        launch(
            delta_kernel, n_v * heads * chunks.N, rows_of(x.q, x.heads), rows_of(x.k, heads), values, self.betas(), self.gates,
            self.plane, inverse, u, inner, chunks.packing, start, states, final,
            None if passed is None else other.before, passed, chunks.L, chunks.N, heads,
            x.heads // heads, chunks.per_sequence, chunks.n_chunks, V=V, REVERSE=reverse, BV=tile.columns,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **self.options(x.q, x.k, values.x),
        )  # fmt: skip
        return u, States(states, None, final, None, passed)


def gates_of(x, chunks: Chunks, BT: int) -> Optional[torch.Tensor]:
    """Sums of the decay inside chunks."""
    if x.decay is None:
        return None
    decay = x.decay if x.decay.dim() == 4 else x.decay[..., None]
    B, heads, L, F = decay.shape
    gates = decay.new_empty(2, B, heads, L, F)
    BF = min(32, block_dim(F)) if F > 1 else 1
    launch(
        sum_gates_kernel, chunks.n_chunks * heads * ceil_div(F, BF), decay, decay.stride(), gates, B * heads * L * F,
        chunks.packing, L, chunks.N, heads, chunks.per_sequence, F=F, BT=BT, BF=BF, num_warps=4,
    )  # fmt: skip
    return gates


def begin(x, params) -> Run:
    tiles = config.pick(x.q.dtype, arch_of(x.q), x.q.shape[3], x.beta is not None, params.chunk_size)
    queries = chunks_of(x, x.q.shape[2], tiles.BT)
    keys = queries if x.k.shape[2] == x.q.shape[2] else chunks_of(x, x.k.shape[2], tiles.BT)
    return Run(x, params, tiles, queries, keys, gates_of(x, keys, tiles.BT))
