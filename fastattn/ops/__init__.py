"""Public ops: signature, meaning, checks, and their autograd functions."""

from .linear import explain_linear, linear_attention, linear_attention_step
from .softmax import attention, explain

__all__ = ["attention", "explain", "explain_linear", "linear_attention", "linear_attention_step"]
