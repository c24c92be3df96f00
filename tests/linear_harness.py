"""What every test of linear attention shares: cases, a run of one on a backend, and what to expect of it.

Expected are the fp64 golden, the worse of two orders of operations in the precision under test, and magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from harness import BACKENDS, DEVICE, FP32, FP64
from torch import Tensor

import fastattn
from fastattn.params import LinearState
from fastattn.reference.linear import features, linear
from fastattn.testing import GRAD_FACTOR, OUT_FACTOR, assert_close, max_error, randn, random_mask, relayout

# The reference needs no comparison with itself where it is the yardstick.
fast_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
EPS = 1e-6
DELTA = {"feature_map": "identity", "beta": True}


@dataclass(frozen=True)
class LinearCase:
    """One problem. `decay` is a shape in letters: "h", "bhl" or "bhld"; `lengths` are those of packed sequences (B = 1)."""

    B: int = 2
    Hq: int = 2
    Hk: int = 2
    Hv: int = 2
    L: int = 37
    Lk: int | None = None
    D: int = 16
    Dv: int = 8
    feature_map: str = "elu1"
    causal: bool = True
    decay: str | None = None
    beta: bool = False
    normalize: bool | None = None
    scale: float | None = None
    state: bool = False
    key_mask: bool = False
    lengths: tuple[int, ...] | None = None
    chunk_size: int | None = None
    layout: str = "contiguous"
    gate: float = 1.0  # decay is -gate * softplus(noise)

    def __str__(self) -> str:
        """Non-default fields only: readable test ids."""
        default = LinearCase()
        fields = [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(default, name)]
        text = "-".join(f"{name}={getattr(self, name)}" for name in fields) or "default"
        return text.replace(" ", "")

    @property
    def normalized(self) -> bool:
        return self.feature_map != "identity" if self.normalize is None else self.normalize

    @property
    def features(self) -> int:
        return {"taylor1": 1 + self.D, "taylor2": 1 + self.D + self.D**2}.get(self.feature_map, self.D)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public function that are neither tensors nor None."""
        values = {"feature_map": self.feature_map, "causal": self.causal, "normalize": self.normalize}
        values |= {"scale": self.scale, "chunk_size": self.chunk_size}
        return {name: value for name, value in values.items() if value is not None}


class LinearInputs(NamedTuple):
    """Tensors of one call; the last three are cotangents of out and of the final state."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    kv: Tensor | None
    z: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    dout: Tensor
    dkv: Tensor
    dz: Tensor | None


LEAVES = LinearInputs._fields[:7]


class Result(NamedTuple):
    out: Tensor
    kv: Tensor
    z: Tensor | None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    ddecay: Tensor | None = None
    dbeta: Tensor | None = None
    dkv: Tensor | None = None
    dz: Tensor | None = None


def make(case: LinearCase, dtype: torch.dtype, seed: int = 0, device: str = DEVICE) -> LinearInputs:
    """Random tensors; with beta, keys of length 1. dout is strided like a transposed projection's gradient."""
    B, L, D, Dv = case.B, case.L if case.lengths is None else sum(case.lengths), case.D, case.Dv
    Lk = L if case.Lk is None else case.Lk
    Hs, H = max(case.Hk, case.Hv), max(case.Hq, case.Hk, case.Hv)
    N = B if case.lengths is None else len(case.lengths)
    wide = FP64 if dtype == FP64 else FP32

    def laid_out(x, layout=case.layout):
        return relayout(x[..., None], layout)[..., 0] if x.dim() == 3 else relayout(x, layout) if x.dim() == 4 else x

    def noise(number, *shape):
        return randn(shape, wide, seed + number, device)

    k = randn((B, case.Hk, Lk, D), FP64, seed + 2, device)
    if case.beta:
        k = torch.nn.functional.normalize(k, dim=-1)
    gates = {"h": (Hs,), "bhl": (B, Hs, L), "bhld": (B, Hs, L, D)}.get(case.decay)
    softplus = torch.nn.functional.softplus
    return LinearInputs(
        q=relayout(randn((B, case.Hq, L, D), dtype, seed + 1, device), case.layout),
        k=relayout(k.to(dtype), case.layout),
        v=relayout(randn((B, case.Hv, Lk, Dv), dtype, seed + 3, device), case.layout),
        decay=None if gates is None else laid_out(-case.gate * softplus(noise(4, *gates))),
        beta=laid_out(2 * noise(5, B, Hs, L).sigmoid()) if case.beta else None,
        kv=laid_out(noise(6, N, Hs, case.features, Dv)) if case.state else None,
        z=laid_out(features(noise(7, N, Hs, 5, D), case.feature_map).sum(2))
        if case.state and case.normalized
        else None,
        key_mask=random_mask((B, Lk), seed + 8, device=device) if case.key_mask else None,
        cu_seqlens=None if case.lengths is None else ends(case.lengths, device),
        dout=relayout(randn((B, H, L, Dv), dtype, seed + 9, device), "blhd"),
        dkv=noise(10, N, Hs, case.features, Dv),
        dz=noise(11, N, Hs, case.features) if case.normalized else None,
    )


def ends(lengths, device: str = DEVICE) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def cast(inputs: LinearInputs, dtype: torch.dtype) -> LinearInputs:
    return LinearInputs(*(x if x is None or not x.is_floating_point() else x.to(dtype) for x in inputs))


def arguments(x: LinearInputs) -> dict[str, Any]:
    """The optional tensors of the public function."""
    state = None if x.kv is None else LinearState(x.kv, x.z)
    values = {"decay": x.decay, "beta": x.beta, "initial_state": state}
    values |= {"key_mask": x.key_mask, "cu_seqlens": x.cu_seqlens}
    return {name: value for name, value in values.items() if value is not None}


def why_not(backend: str, inputs: LinearInputs, **options) -> list[str]:
    rows = fastattn.explain_linear(*inputs[:3], **arguments(inputs), **options, backend=backend).rows
    return next((list(row.reasons) for row in rows if row.backend == backend), [f"{backend} does not run here"])


def need(backend: str, inputs: LinearInputs, **options) -> None:
    """Skip with the backend's own words when it does not take the call."""
    reasons = why_not(backend, leaves(inputs), **options)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def leaves(inputs: LinearInputs, wanted: bool = True) -> LinearInputs:
    return inputs._replace(**{
        name: x.detach().requires_grad_(wanted) for name, x in zip(LEAVES, inputs) if x is not None
    })  # fmt: skip


def call(x: LinearInputs, backend: str, **options) -> tuple[Tensor, LinearState]:
    """The public function with its final state, or a skip with the backend's refusal."""
    try:
        return fastattn.linear_attention(*x[:3], **arguments(x), return_state=True, backend=backend, **options)
    except fastattn.UnsupportedError as refusal:
        pytest.skip(str(refusal).splitlines()[0])


def attend(inputs: LinearInputs, backend: str, grad: bool = True, **options) -> Result:
    """Forward and, if asked, all gradients."""
    x = leaves(inputs, grad)
    out, (kv, z) = call(x, backend, **options)
    return differentiate(out, kv, z, x) if grad else Result(out, kv, z)


def differentiate(out: Tensor, kv: Tensor, z: Tensor | None, x: LinearInputs) -> Result:
    pairs = [(y, dy) for y, dy in ((out, x.dout), (kv, x.dkv), (z, x.dz)) if y is not None and y.requires_grad]
    wanted = [leaf for leaf in x[:7] if leaf is not None]
    if pairs:
        found = torch.autograd.grad(
            [y for y, _ in pairs], wanted, [dy for _, dy in pairs], materialize_grads=True, allow_unused=True
        )
    else:  # no input influences the result
        found = [torch.zeros_like(leaf) for leaf in wanted]
    found = iter(found)
    grads = [None if leaf is None else next(found) for leaf in x[:7]]
    return Result(out.detach(), kv.detach(), None if z is None else z.detach(), *grads)


def constants_of(case: LinearCase) -> dict[str, Any]:
    scale = case.scale if case.scale is not None else case.D**-0.5 if case.D else 1.0
    return {"feature_map": case.feature_map, "causal": case.causal, "scale": scale, "eps": EPS}


def _per_token(decay: Tensor | None, x: LinearInputs) -> Tensor | None:
    if decay is None or decay.dim() > 1:
        return decay
    return decay[None, :, None].expand(x.q.shape[0], decay.shape[0], x.k.shape[2])


def reference_arguments(x: LinearInputs) -> dict[str, Any]:
    """Arguments of the reference function, in the dtype of sums."""
    wide = FP64 if x.q.dtype == FP64 else FP32
    values = {name: None if t is None else t.to(wide) for name, t in zip(LEAVES, x)}
    return values | {"decay": _per_token(values["decay"], x), "key_mask": x.key_mask, "cu_seqlens": x.cu_seqlens}


def reference(inputs: LinearInputs, case: LinearCase) -> Result:
    """The recurrence in the dtype of sums, differentiated by autograd."""
    x = leaves(inputs)
    out, kv, z = linear(**reference_arguments(x), normalize=case.normalized, **constants_of(case))
    return differentiate(out.to(inputs.q.dtype), kv, z if case.normalized else None, x)


def textbook(inputs: LinearInputs, case: LinearCase, out: Tensor, magnitude: bool = False) -> Result:
    """Gradients as fused kernels take them: numerator and denominator are one sum, whose cotangents come from `out`.

    v gets a column of ones, and with it the denominator: dN = dout / den, dden = -(dout . out) / den where den > eps.
    With `magnitude` every term enters by its absolute value, amplified by how well a denominator is known.
    """
    x, constants = leaves(inputs), constants_of(case) | {"normalize": False}
    values, wide = reference_arguments(x), FP64 if inputs.q.dtype == FP64 else FP32
    dout, dkv, dz = (None if t is None else t.to(wide) for t in inputs[9:])
    out = out.to(wide)
    if magnitude:
        values, constants = _absolute(values, case, constants)
        dout, dkv, out, dz = dout.abs(), dkv.abs(), out.abs(), None if dz is None else dz.abs()
    if not case.normalized:
        y, kv, _ = linear(**values, **constants)
        return _with_gates(differentiate(y, kv, None, x._replace(dout=dout, dkv=dkv)), x, magnitude)
    values["v"] = torch.cat((values["v"], torch.ones_like(values["v"][..., :1])), -1)
    if values["kv"] is not None:
        values["kv"] = torch.cat((values["kv"], values["z"][..., None]), -1)
    values["z"] = None
    y, kv, _ = linear(**values, **constants)
    with torch.no_grad():
        known = true_denominator(inputs, case).to(wide) if magnitude else y[..., -1]
        den = known.clamp(min=EPS)[..., None]
        spread = 1 + y[..., -1:] / den if magnitude else torch.ones_like(den)
        dden = (dout * out).sum(-1, keepdim=True) / den * (known > EPS)[..., None]
        cotangent = torch.cat((dout / den * spread, dden * spread if magnitude else -dden), -1)
    dkv = torch.cat((dkv, dz[..., None]), -1)
    found = differentiate(y, kv, None, x._replace(dout=cotangent, dkv=dkv))
    outs = (y[..., :-1] + out * y[..., -1:]) / den if magnitude else y[..., :-1] / den
    found = found._replace(out=outs.detach(), kv=found.kv[..., :-1], z=found.kv[..., -1])
    return _with_gates(found, x, magnitude)


def _absolute(values: dict[str, Any], case: LinearCase, constants: dict[str, Any]) -> tuple[dict, dict]:
    signed = ("v", "kv", "z") if case.feature_map in ("relu", "elu1") else ("q", "k", "v", "kv", "z")
    values |= {name: values[name].abs() for name in signed if values[name] is not None}
    if case.feature_map == "taylor1":  # the gradient of a direction is a difference
        for name in ("q", "k"):
            norm = values[name].detach().norm(dim=-1, keepdim=True)
            values[name] = torch.cat((torch.ones_like(norm), values[name] / norm.masked_fill(norm == 0, 1)), -1)
        constants = constants | {"feature_map": "identity"}
    if values["beta"] is not None:  # by absolute values the erased part would grow without bound; |S| is at most this
        v = values["v"].repeat_interleave(max(case.Hk, case.Hv) // max(case.Hv, 1), 1)
        values |= {"v": v * values["beta"][..., None], "beta": None}
    return values, constants | {"scale": abs(constants["scale"])}


def _with_gates(found: Result, x: LinearInputs, magnitude: bool) -> Result:
    """The decay's gradient may be taken as the difference of q dq and k dk, which are this large."""
    if not magnitude or found.ddecay is None or found.ddecay.numel() == 0:
        return found
    parts = [((t.detach().abs() + 1) * dt).sum(-1) for t, dt in ((x.q, found.dq), (x.k, found.dk))]
    total = sum(float(p.sum(-1).max() if x.decay.dim() == 1 else p.max()) for p in parts)
    return found._replace(ddecay=found.ddecay + total)


def triangular(x: LinearInputs, case: LinearCase) -> tuple[Tensor, Tensor]:
    """(out, kv) of the delta rule from one triangular system, u_t = beta_t (v_t - sum_{j<t} (k_t . D_tj k_j) u_j - state)."""
    values = reference_arguments(x)
    Hs, H = max(case.Hk, case.Hv), max(case.Hq, case.Hk, case.Hv)
    k, v = (values[n].repeat_interleave(Hs // values[n].shape[1], 1) for n in ("k", "v"))
    beta, kv, g = values["beta"], values["kv"], values["decay"]
    kv = k.new_zeros(*k.shape[:2], case.D, case.Dv) if kv is None else kv
    g = torch.zeros_like(beta) if g is None else g
    G = (g if g.dim() == 4 else g[..., None]).double().clamp(min=-1e3).cumsum(2)  # [B, Hs, L, 1 or D]
    start, rest = G.exp().to(k.dtype), (G[:, :, -1:] - G).exp().to(k.dtype)
    gate = (G[:, :, :, None] - G[:, :, None]).clamp(max=0).exp().to(k.dtype)  # [B, Hs, L, L, .] of t and j <= t
    keys = (k[:, :, :, None] * gate * k[:, :, None]).sum(-1).tril(-1)
    right = beta[..., None] * (v - (k * start) @ kv)
    u = torch.linalg.solve_triangular(beta[..., None] * keys, right, upper=False, unitriangular=True)
    q = values["q"].repeat_interleave(H // case.Hq, 1).unflatten(1, (Hs, H // Hs))
    seen = (q[:, :, :, :, None] * (gate * k[:, :, None])[:, :, None]).sum(-1).tril()
    out = constants_of(case)["scale"] * (seen @ u[:, :, None] + (q * start[:, :, None]) @ kv[:, :, None])
    return out.flatten(1, 2).to(x.q.dtype), start[:, :, -1, :, None] * kv + (rest * k).mT @ u


def true_denominator(inputs: LinearInputs, case: LinearCase) -> Tensor:
    """scale * phi(q_t) . z_t [B, H, Lq]: the output of values that are 1."""
    values = reference_arguments(inputs)
    v = torch.ones_like(values["v"][..., :1])
    kv = None if values["z"] is None else values["z"][..., None]
    return linear(**values | {"v": v, "kv": kv, "z": None}, normalize=False, **constants_of(case))[0][..., 0]


class Expected(NamedTuple):
    golden: Result
    low: Result
    magnitude: Result


def expect(inputs: LinearInputs, case: LinearCase) -> Expected:
    exact = cast(inputs, FP64)
    golden = reference(exact, case)
    magnitude = textbook(exact, case, golden.out, magnitude=True)
    if inputs.q.dtype == FP64:
        return Expected(golden, golden, magnitude)
    low = reference(inputs, case)
    if case.beta and case.lengths is None:
        x = leaves(inputs)
        other = differentiate(*triangular(x, case), None, x)
    else:
        other = textbook(inputs, case, low.out)
    worse = [None if g is None else max(a, b, key=lambda x: max_error(x, g)) for g, a, b in zip(golden, low, other)]
    return Expected(golden, Result(*worse), magnitude)


@lru_cache(maxsize=256)
def problem(case: LinearCase, dtype: torch.dtype, seed: int = 0) -> tuple[LinearInputs, Expected]:
    """Inputs and what to expect: cached, so that backends of one case share the work."""
    inputs = make(case, dtype, seed)
    return inputs, expect(inputs, case)


def compare(result: Result, expected: Expected, dtype: torch.dtype) -> None:
    for name, actual, golden, low, magnitude in zip(Result._fields, result, *expected):
        assert (actual is None) == (golden is None), name
        if actual is not None:
            factor = OUT_FACTOR if name in ("out", "kv", "z") else GRAD_FACTOR
            assert_close(name, actual, golden, low, magnitude, dtype if name == "out" else actual.dtype, factor)


def check(case: LinearCase, dtype: torch.dtype, backend: str, seed: int = 0) -> Result:
    """The standard test: out, final state and every gradient against fp64, within the data's own tolerance."""
    inputs, expected = problem(case, dtype, seed)
    result = attend(inputs, backend, **case.options())
    check_types(result, inputs)
    compare(result, expected, dtype)
    return result


def check_types(result: Result, inputs: LinearInputs) -> None:
    wide = FP64 if inputs.q.dtype == FP64 else FP32
    assert result.out.dtype == inputs.q.dtype and result.kv.dtype == wide
    assert result.z is None or result.z.dtype == wide
    for name, leaf, grad in zip(LEAVES, inputs, result[3:]):
        assert leaf is None or (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), name


def check_inputs(inputs: LinearInputs, case: LinearCase, backend: str) -> Result:
    """`check` for inputs made by hand."""
    result = attend(inputs, backend, **case.options())
    compare(result, expect(inputs, case), inputs.q.dtype)
    return result


def assert_equal(found: Result, expected: Result, what: str = "") -> None:
    for name, a, b in zip(Result._fields, found, expected):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), f"{what} {name}"
