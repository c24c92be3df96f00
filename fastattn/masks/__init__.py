"""Sparse masks as data: exact at token level, combined with `&`, `|`, `~`, planned in O(L), serialisable, never Lq x Lk."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .algebra import Mask
from .plan import TilePlan, plan_from_dense

if TYPE_CHECKING:
    from .convert import from_causal_bias, from_dense, from_flash, from_padding_mask
    from .flex import from_flex
    from .grids import bigbird, blocks, dilated, global_tokens, longformer, neighborhood, strided
    from .patterns import causal, dense, empty, full, intervals, key_padding, prefix, window
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

# Imported when first asked for: `import fastattn` is quick, and most programs use few of them.
_HOMES = {
    "convert": ("from_causal_bias", "from_dense", "from_flash", "from_padding_mask"),
    "flex": ("from_flex",),
    "grids": ("bigbird", "blocks", "dilated", "global_tokens", "longformer", "neighborhood", "strided"),
    "patterns": ("causal", "dense", "empty", "full", "intervals", "key_padding", "prefix", "window"),
    "sequences": ("documents", "from_cu_seqlens", "tree"),
    "structure": ("Report",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
