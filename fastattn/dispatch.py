"""Chooses the backend of a call, and says why. The only place where an order of backends exists."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from .backends import cuda, eager, native, reference, triton
from .params import Call

BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "cuda": cuda,
    "triton": triton,
    "eager": eager,
    "reference": reference,
}
ORDER = {
    "cpu": ("native", "eager", "reference", "cuda", "triton"),
    "cuda": ("cuda", "triton", "eager", "reference", "native"),
}
OPT_IN = tuple(name for name, module in BACKENDS.items() if hasattr(module, "why_not_by_default"))
OTHER_DEVICES = ("eager", "reference", "native", "cuda", "triton")


class UnsupportedError(RuntimeError):
    """No backend takes the call; the message lists every backend's reasons."""


def check_name(backend: str) -> None:
    if not isinstance(backend, str) or backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {", ".join(map(repr, BACKENDS))}, got {backend!r}')


def _order(call: Call) -> tuple[str, ...]:
    return ORDER.get(call.x.q.device.type, OTHER_DEVICES)


def _by_default(name: str, call: Call) -> list[str]:
    """Reasons not to pick a backend unless it is asked for by name (kernels never run on hardware)."""
    return BACKENDS[name].why_not_by_default(call) if name in OPT_IN else []


def select(call: Call, backend: str = "auto") -> str:
    """Name of the backend that runs the call. An explicit backend never falls back."""
    if backend == "auto":
        for name in _order(call):
            if not BACKENDS[name].why_not(call) and (name not in OPT_IN or not _by_default(name, call)):
                return name
        raise UnsupportedError(f"no backend takes this call\n{explain(call)}")
    check_name(backend)
    reasons = BACKENDS[backend].why_not(call)
    if reasons:
        raise UnsupportedError(
            f"backend={backend!r} does not take this call: {'; '.join(reasons)}\n"
            f'Use backend="auto", or see all reasons:\n{explain(call)}'
        )
    return backend


@dataclass(frozen=True)
class Row:
    """One backend's answer."""

    backend: str
    chosen: bool
    reasons: tuple[str, ...]
    kernel: str


@dataclass(frozen=True)
class Explanation:
    """Which backend a call runs on, and why the others do not. Prints as a table."""

    op: str
    call: str
    rows: tuple[Row, ...]

    @property
    def chosen(self) -> str | None:
        return next((row.backend for row in self.rows if row.chosen), None)

    @property
    def kernel(self) -> str | None:
        return next((row.kernel for row in self.rows if row.chosen), None)

    def __str__(self) -> str:
        lines = [f"{self.op} attention: {self.call}"]
        for row in self.rows:
            mark, note = (
                ("->", row.kernel) if row.chosen else ("  ", "; ".join(row.reasons) or f"could run: {row.kernel}")
            )
            lines.append(f"{mark} {row.backend:<10} {note}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(call: Call, backend: str = "auto") -> Explanation:
    """The table behind `select`: every backend with its reasons, in order."""
    check_name(backend)
    rows = []
    chosen = None
    for name in _order(call):
        reasons = tuple(BACKENDS[name].why_not(call))
        if backend == "auto" and not reasons:
            reasons = tuple(_by_default(name, call))
        takes = not reasons and chosen is None and backend in ("auto", name)
        chosen = name if takes else chosen
        kernel = BACKENDS[name].describe(call) if not BACKENDS[name].why_not(call) else ""
        rows.append(Row(name, takes, reasons, kernel))
    return Explanation(call.op, str(call), tuple(rows))
