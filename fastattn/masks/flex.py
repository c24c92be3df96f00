"""To and from torch's FlexAttention: block lists and a mask_mod that reads data, imported when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from . import data
from .algebra import Mask
from .plan import TilePlan
from .rows import TILE, Rows, table_of
from .structure import recognise

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_PAIRS = 2**20  # that a mask_mod is asked for at once


def to_flex(mask: Mask, Lq: int, Lk: int, block_size: int, device: Union[str, torch.device]) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    if data.whole("block_size", block_size, TILE) % TILE:
        raise ValueError(f"block_size must be a multiple of {TILE}, got {block_size}")
    plan = mask.plan(Lq, Lk, device=device)
    if 0 in (Lq, Lk, plan.batches, plan.heads):
        raise ValueError(f"a BlockMask needs pairs: {plan.batches} x {plan.heads} slices of {Lq} x {Lk} have none")
    partial, whole = _blocks(plan, block_size // TILE)
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=block_size, mask_mod=_mask_mod(plan), seq_lengths=(Lq, Lk)
    )


def _blocks(plan: TilePlan, n: int) -> tuple[Tensor, Tensor]:
    """bool [B, H, q blocks, k blocks] of partial and of full blocks of n x n tiles. Blocks cut by an end are not full."""
    kinds = plan.tiles()
    q_tiles, k_tiles = kinds.shape[2:]
    cut = torch.zeros_like(kinds, dtype=torch.bool)
    cut[:, :, plan.Lq // TILE :] = True
    cut[:, :, :, plan.Lk // TILE :] = True
    pad = (0, -k_tiles % n, 0, -q_tiles % n)

    def by_block(tiles: Tensor) -> Tensor:
        tiles = torch.nn.functional.pad(tiles, pad)
        return tiles.unflatten(3, (-1, n)).unflatten(2, (-1, n)).transpose(3, 4).flatten(4)

    seen, whole = by_block(kinds != -2).any(-1), by_block((kinds == -1) & ~cut).all(-1)
    return seen & ~whole, whole


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, int32 [B, H, q blocks], and which, theirs first: int32 [B, H, q blocks, k blocks]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(plan: TilePlan):
    B, H = plan.batches, plan.heads
    kinds = plan.tiles() + 2
    ends = torch.tensor([[0], [-1]], device=plan.words.device).expand(2, TILE)
    words = torch.cat((ends, plan.words))  # of an empty, a full, and the partial tiles

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kind = kinds[b % B, h % H, q_idx // TILE, kv_idx // TILE]
        return (words[kind, q_idx % TILE] >> (kv_idx % TILE)) & 1 == 1

    return mask_mod


def from_flex(block_mask: BlockMask) -> Mask:
    """The mask of a torch.nn.attention.flex_attention.BlockMask, under the name of the first pattern that fits.

    As in the compiled kernel, blocks that are listed as full are visible whole, blocks in no list are hidden, and
    mask_mod decides inside the others; it is asked for those alone. Errors: TypeError for anything else.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"expected a torch.nn.attention.flex_attention.BlockMask, got {type(block_mask).__name__}")
    Lq, Lk = block_mask.seq_lengths
    if Lq == 0 or Lk == 0:
        raise ValueError(f"a BlockMask of lengths {Lq} x {Lk} has no pairs to convert")
    return recognise(list(_rows_of_blocks(block_mask, Lq, Lk)), Lq, Lk)[0]


def _rows_of_blocks(block_mask: BlockMask, Lq: int, Lk: int) -> Iterator[Rows]:
    """One block of queries after the other."""
    bq, bk = block_mask.BLOCK_SIZE
    partial = _unlisted("kv_indices", block_mask.kv_num_blocks, block_mask.kv_indices)
    whole = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        whole = _unlisted("full_kv_indices", block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    for q in range(-(-Lq // bq)):
        visible = whole[:, :, q, :, None, None].repeat(1, 1, 1, bq, bk)
        ask = partial[:, :, q] & ~whole[:, :, q]
        visible[ask] = _asked(block_mask, ask.nonzero(), q, Lq, Lk)
        B, H, nk = visible.shape[:3]
        dense = visible.transpose(2, 3).reshape(B, H, bq, nk * bk)[:, :, : Lq - q * bq, :Lk]
        with data.plainly():
            rows = table_of(dense.cpu())
        yield rows


def _unlisted(name: str, count: Tensor, indices: Tensor) -> Tensor:
    """bool [B, H, q blocks, k blocks] of a list of blocks."""
    n = indices.shape[-1]
    listed = torch.arange(n, device=indices.device) < count[..., None]
    outside = indices[listed & ((indices < 0) | (indices >= n))]
    if len(outside):
        raise ValueError(f"{name} of the BlockMask lists block {int(outside[0])}, there are {n}")
    # What comes after the listed ones may be anything: it goes to a block that is cut off.
    blocks = torch.zeros(*indices.shape[:-1], n + 1, dtype=torch.bool, device=indices.device)
    blocks.scatter_(-1, indices.long().masked_fill(~listed, n), True)
    return blocks[(None,) * (4 - indices.dim())][..., :n]


def _asked(block_mask: BlockMask, at: Tensor, q: int, Lq: int, Lk: int) -> Tensor:
    """bool [blocks, bq, bk]: mask_mod inside the blocks at [n, (b, h, k)] of block row q, vmapped as in FlexAttention."""
    from torch.nn.attention.flex_attention import create_mask

    bq, bk = block_mask.BLOCK_SIZE
    answers = [torch.zeros(0, bq, bk, dtype=torch.bool, device=at.device)]
    for part in at.split(max(1, _PAIRS // (bq * bk))) if len(at) else ():
        b, h, k = part.unbind(1)

        def inside(n: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # Blocks that an end cuts ask for the last pair again; the caller drops the answers.
            key = (k[n] * bk + j).clamp(max=Lk - 1)  # noqa: B023 used inside this iteration only
            return block_mask.mask_mod(b[n], h[n], (q * bq + i).clamp(max=Lq - 1), key)  # noqa: B023

        answers.append(create_mask(inside, len(part), 1, bq, bk, device=at.device)[:, 0])
    return torch.cat(answers)
