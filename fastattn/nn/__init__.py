"""Attention layers [B, L, E] -> [B, L, E] on fastattn's ops, with a cached step for decoding."""

from .gated_delta import GatedDeltaNet
from .gated_linear import GatedLinearAttention
from .linear import LinearAttention, TaylorLinearAttention
from .recurrent import Cache
from .retention import Retention

__all__ = [
    "Cache",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "LinearAttention",
    "Retention",
    "TaylorLinearAttention",
]
