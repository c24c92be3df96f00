"""Sparse masks as data: exact at token level, combined with `&`, `|`, `~`, planned in O(L), serialisable, never Lq x Lk."""

from .algebra import Mask
from .convert import from_causal_bias, from_dense, from_flash, from_padding_mask
from .flex import from_flex
from .grids import bigbird, blocks, dilated, global_tokens, longformer, neighborhood, strided
from .patterns import causal, dense, empty, full, intervals, key_padding, prefix, window
from .plan import TilePlan, plan_from_dense
from .sequences import documents, from_cu_seqlens, tree
from .structure import Report

from_dict = Mask.from_dict

__all__ = [
    "Mask",
    "Report",
    "TilePlan",
    "bigbird",
    "blocks",
    "causal",
    "dense",
    "dilated",
    "documents",
    "empty",
    "from_causal_bias",
    "from_cu_seqlens",
    "from_dense",
    "from_dict",
    "from_flash",
    "from_flex",
    "from_padding_mask",
    "full",
    "global_tokens",
    "intervals",
    "key_padding",
    "longformer",
    "neighborhood",
    "plan_from_dense",
    "prefix",
    "strided",
    "tree",
    "window",
]
