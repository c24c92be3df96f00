"""Masks as typed on a command line: `causal() & window(1024)`. Nothing of it is executed as Python."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from fastattn import masks

LONGEST = 10_000  # characters
NOT_CONSTRUCTORS = ("Mask", "Report", "TilePlan", "dense", "empty")
CONSTRUCTORS = {
    name
    for name in masks.__all__
    if name not in NOT_CONSTRUCTORS and not name.startswith(("from_", "plan_")) or name == "from_cu_seqlens"
}


def parse(text: str) -> masks.Mask:
    """The mask that `text` spells in the constructors of `fastattn.masks`, `&`, `|`, `~`, numbers, strings and lists.

    Errors: ValueError that quotes what is not understood, or says what the constructor refused.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a mask expression has at most {LONGEST} characters, got {len(text)}")
    try:
        return _mask(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a mask expression: {text[:100]!r} ({error})") from error


def _mask(node: ast.expr) -> masks.Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _mask(node.left), _mask(node.right)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONSTRUCTORS:
        arguments = [_value(part) for part in node.args]
        keywords = {part.arg: _value(part.value) for part in node.keywords if part.arg is not None}
        if len(keywords) == len(node.keywords):
            return _made(node.func.id, arguments, keywords)
    known = ", ".join(sorted(CONSTRUCTORS))
    raise ValueError(f"not a mask: {ast.unparse(node)!r}; masks are &, |, ~ of {known}")


def _made(name: str, arguments: list[Any], keywords: dict[str, Any]) -> masks.Mask:
    constructor = getattr(masks, name)
    try:
        return constructor(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        parameters = ", ".join(inspect.signature(constructor).parameters)
        raise ValueError(f"{name}({parameters}): {error}") from error


def _value(node: ast.expr) -> Any:
    """A number, string, bool or None, or a list or tuple of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        if type(node.operand.value) in (int, float):
            return -node.operand.value  # type: ignore[operator]
    if isinstance(node, (ast.List, ast.Tuple)):
        parts = [_value(part) for part in node.elts]
        return tuple(parts) if isinstance(node, ast.Tuple) else parts
    raise ValueError(f"not a plain value: {ast.unparse(node)!r}")
