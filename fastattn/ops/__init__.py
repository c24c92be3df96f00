"""Public ops: signature, meaning, checks, and their autograd functions."""

from .softmax import attention, explain

__all__ = ["attention", "explain"]
