"""What every softmax test shares: run a case on a backend, and its fp64 golden and low-precision reference."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.params import SoftmaxParams
from fastattn.reference.softmax import softmax
from fastattn.testing import GRAD_FACTOR, OUT_FACTOR, Case, Inputs, assert_close, cast, make, max_error
from fastattn.testing.tolerances import HALF_LSE

BACKENDS = tuple(os.environ.get("FASTATTN_TEST_BACKENDS", "native,eager,reference").split(","))
DEVICE = os.environ.get("FASTATTN_TEST_DEVICE", "cpu")
DIFFERENTIABLE = ("q", "k", "v", "bias", "slopes", "sinks")
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)

all_backends = pytest.mark.parametrize("backend", BACKENDS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dbias: Tensor | None
    dslopes: Tensor | None = None
    dsinks: Tensor | None = None


def why_not(backend: str, inputs: Inputs, **options) -> list[str]:
    rows = fastattn.explain(*inputs[:3], **{**_optional(inputs), **options}, backend=backend).rows
    device = inputs.q.device
    return next((list(row.reasons) for row in rows if row.backend == backend), [f"{backend} does not run on {device}"])


def _optional(inputs: Inputs) -> dict[str, Tensor | None]:
    return {"mask": inputs.mask, "bias": inputs.bias, "alibi_slopes": inputs.slopes, "sinks": inputs.sinks}


def need(backend: str, inputs: Inputs, **options) -> None:
    """Skip with the backend's own words when it does not take the call."""
    reasons = why_not(backend, inputs, **options)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def backward(out: Tensor, lse: Tensor, inputs: Inputs) -> list[Tensor | None]:
    """Gradients of the tensors of `inputs`, which are leaves."""
    leaves = [getattr(inputs, name) for name in DIFFERENTIABLE]
    wanted = [leaf for leaf in leaves if leaf is not None]
    outputs = [(out, inputs.dout), (lse, inputs.dlse)]
    outputs = [(y, dy) for y, dy in outputs if y.requires_grad]
    if not outputs:  # a result that no input influences (Lk == 0) may be detached
        return [None if leaf is None else torch.zeros_like(leaf) for leaf in leaves]
    found = iter(
        torch.autograd.grad([y for y, _ in outputs], wanted, [dy for _, dy in outputs], materialize_grads=True)
    )
    return [None if leaf is None else next(found) for leaf in leaves]


def _leaves(inputs: Inputs, wanted: bool) -> Inputs:
    return inputs._replace(**{
        name: None if getattr(inputs, name) is None else getattr(inputs, name).detach().requires_grad_(wanted)
        for name in DIFFERENTIABLE
    })  # fmt: skip


def attend(inputs: Inputs, backend: str, grad: bool = True, **options) -> Result:
    """Forward and, if asked, backward of the public function, or a skip with its refusal; leaves keep the strides of `inputs`."""
    x = _leaves(inputs, grad)
    try:
        out, lse = fastattn.attention(*x[:3], **_optional(x), return_lse=True, backend=backend, **options)
    except fastattn.UnsupportedError as refusal:
        pytest.skip(str(refusal).splitlines()[0])
    if not grad:
        return Result(out, lse, None, None, None, None)
    return Result(out.detach(), lse.detach(), *backward(out, lse, x))


def _scale_and_band(inputs: Inputs, case: Case) -> tuple[float, tuple[int | None, int | None]]:
    left, right = case.window or (None, None)
    causal = "bottom_right" if case.causal is True else case.causal or "none"
    scale = case.scale if case.scale is not None else inputs.q.shape[-1] ** -0.5 if inputs.q.shape[-1] else 1.0
    return scale, SoftmaxParams(scale, causal, left, right, case.dropout_p).band(inputs.q.shape[2], inputs.k.shape[2])


def reference(inputs: Inputs, case: Case, keep: Tensor | None = None) -> Result:
    """Forward and backward of the dense reference, differentiated by autograd, in the precision of `inputs`."""
    x = _leaves(inputs, True)
    scale, band = _scale_and_band(inputs, case)
    options = {"scale": scale, "band": band, "softcap": case.softcap or 0.0, "dropout_p": case.dropout_p}
    slopes = x.slopes if x.slopes is None or x.slopes.dim() == 2 else x.slopes[None]
    out, lse = softmax(*x[:3], x.bias, slopes, x.sinks, inputs.mask, keep=keep, **options)
    return Result(out.detach(), lse.detach(), *backward(out, lse, x))


class Weights(NamedTuple):
    p: Tensor  # exp(z - lse) [B, Hq, Lq, Lk]
    kept: Tensor  # the factor dropout puts on it
    z: Tensor
    damp: Tensor | float  # derivative of the softcap
    distance: Tensor  # of ALiBi [Lq, Lk]


def _weights(inputs: Inputs, case: Case, keep: Tensor | None, lse: Tensor) -> Weights:
    q, k, _, mask, bias = inputs[:5]
    scale, (lo, hi) = _scale_and_band(inputs, case)
    offset = torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]
    visible = (offset >= (-torch.inf if lo is None else lo)) & (offset <= (torch.inf if hi is None else hi))
    visible = visible if mask is None else visible & mask
    z = (q @ k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1).mT * scale).to(lse.dtype)
    damp: Tensor | float = 1.0
    if case.softcap:
        t = torch.tanh(z / case.softcap)
        z, damp = case.softcap * t, 1 - t * t
    if bias is not None:
        visible, z = visible & (bias != -torch.inf), z + bias
    distance = (offset - (k.shape[2] - q.shape[2])).abs().to(lse.dtype)
    if inputs.slopes is not None:
        z = z - inputs.slopes[..., None, None] * distance
    p = torch.exp(z - lse[..., None]).masked_fill(~visible, 0)
    kept = torch.ones_like(p) if keep is None else keep * (1 / (1 - case.dropout_p) if case.dropout_p < 1 else 0.0)
    return Weights(p, kept, z, damp, distance)


def textbook(
    inputs: Inputs, case: Case, keep: Tensor | None, out: Tensor, lse: Tensor, magnitude: bool = False
) -> Result:
    """Gradients by the formulas every fused kernel uses, densely: dS = P (dP - rowsum(dout out) + dlse).

    With `magnitude` every term enters by its absolute value, and weights by how well an exponent of their size is known.
    """
    p, kept, z, damp, distance = _weights(inputs, case, keep, lse)
    sink = None if inputs.sinks is None else torch.exp(inputs.sinks[:, None] - lse)
    scale, sign = _scale_and_band(inputs, case)[0], -1.0
    weights = torch.where(p > 0, p * z.abs().clamp(min=1), 0) if magnitude else p
    if magnitude:
        sink = None if sink is None else sink * inputs.sinks[:, None].abs().clamp(min=1)
        inputs = inputs._replace(**{name: getattr(inputs, name).abs() for name in ("q", "k", "v", "dout", "dlse")})
        out, lse, scale, sign = (p * kept).to(out.dtype) @ _repeated(inputs.v, out), lse.abs(), abs(scale), 1.0
    q, k, v, _, bias, dout, dlse = inputs[:7]
    narrow, wide, groups = q.dtype, lse.dtype, (q.shape[0], k.shape[1], q.shape[1] // max(k.shape[1], 1))
    delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    ds = weights * (kept * (dout @ _repeated(v, q).mT).to(wide) + sign * delta + dlse[..., None])
    dbias = (
        None if bias is None else ds.sum_to_size((1,) * (4 - bias.dim()) + bias.shape).view(bias.shape).to(bias.dtype)
    )
    dslopes = None if inputs.slopes is None else sign * (ds * distance).sum((2, 3)).sum_to_size(inputs.slopes.shape)
    dsinks = None if sink is None else (sink * (sign * delta.squeeze(-1) + dlse)).sum((0, 2))
    ds = (ds * damp * scale).to(narrow)
    dk = (ds.mT @ q).view(*groups, *k.shape[2:]).sum(2)
    dv = ((weights * kept).to(narrow).mT @ dout).view(*groups, *v.shape[2:]).sum(2)
    if magnitude:
        out = (weights * kept).to(narrow) @ _repeated(v, q)
    return Result(out, lse, ds @ _repeated(k, q), dk, dv, dbias, dslopes, dsinks)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1)


class Expected(NamedTuple):
    """What a result is held against: fp64, the worse of two orders of operations in its own precision, magnitudes."""

    golden: Result
    low: Result
    magnitude: Result


def expect(inputs: Inputs, case: Case, keep: Tensor | None = None) -> Expected:
    """The yardstick is the precision of `inputs`; lse is float32 whatever they are."""
    exact = cast(inputs, FP64)
    golden, low = reference(exact, case, keep), reference(inputs, case, keep)
    magnitude = textbook(exact, case, keep, golden.out, golden.lse, magnitude=True)
    if inputs.q.dtype == FP64:
        return Expected(golden, low, magnitude)
    other = textbook(inputs, case, keep, low.out, low.lse)
    worse = [None if g is None else max(a, b, key=lambda x: max_error(x, g)) for g, a, b in zip(golden, low, other)]
    if inputs.q.dtype != FP32:
        worse[1] = golden.lse + HALF_LSE / 2  # doubled by the rule for outputs
    return Expected(golden, Result(*worse), magnitude)


@lru_cache(maxsize=64)
def problem(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Inputs, Expected]:
    """Inputs and what to expect: cached, so that backends of one case share the dense work."""
    inputs = make(case, dtype, seed, DEVICE)
    return inputs, expect(inputs, case)


def compare(result: Result, expected: Expected, dtype: torch.dtype) -> None:
    for name, actual, golden, low, magnitude in zip(Result._fields, result, *expected):
        if actual is not None:
            factor = OUT_FACTOR if name in ("out", "lse") else GRAD_FACTOR
            assert_close(name, actual, golden, low, magnitude, dtype if name == "out" else actual.dtype, factor)


def check(case: Case, dtype: torch.dtype, backend: str, seed: int = 0) -> Result:
    """The standard test: forward, lse and every gradient of a case against fp64, within the data's own tolerance."""
    inputs, expected = problem(case, dtype, seed)
    result = attend(inputs, backend, **case.options())
    assert result.out.dtype == dtype and result.lse.dtype == (FP64 if dtype == FP64 else FP32)
    compare(result, expected, dtype)
    return result


def check_inputs(inputs: Inputs, case: Case, backend: str, keep: Tensor | None = None) -> Result:
    """`check` for inputs made by hand (adversarial values, odd strides)."""
    result = attend(inputs, backend, **case.options())
    compare(result, expect(inputs, case, keep), inputs.q.dtype)
    return result


def check_seeds(case: Case, dtype: torch.dtype, backend: str, seeds: int = 8) -> Result:
    """`check` over several inputs at once: gradients of a few numbers need more than one draw of the yardstick."""
    rows = []
    for seed in range(seeds):
        inputs, expected = problem(case, dtype, seed)
        rows.append((attend(inputs, backend, **case.options()), *expected))
    stacked = [Result(*(x[0] if x[0] is None else torch.stack(x) for x in zip(*results))) for results in zip(*rows)]
    compare(stacked[0], Expected(*stacked[1:]), dtype)
    return rows[0][0]


# Error of a gradient in eps of its dtype, relative to the sum of its terms' absolute values. fp32: the log2 of the sum of
# a thousand weights, 10, and the exponent made of it are rounded; the halves round P, dS, out and the result, by eps / 2.
EXACT_ERROR = {FP32: 8.0, FP16: 2.0, BF16: 2.0}


def check_exact(inputs: Inputs, case: Case, backend: str) -> Result:
    """Every gradient against fp64 where scores are exact, however large: no allowance for the size of a logit."""
    exact = cast(inputs, FP64)
    result, golden = (attend(x, name, **case.options()) for x, name in ((inputs, backend), (exact, "reference")))
    identity = torch.eye(inputs.k.shape[2], dtype=FP64, device=DEVICE).expand(*inputs.k.shape[:3], -1)
    p = attend(exact._replace(v=identity), "reference", grad=False, **case.options()).out  # [B, Hq, Lq, Lk]
    q, k, v, bias, dout, dlse = (None if x is None else x.abs() for x in (*exact[:3], *exact[4:7]))
    dp = dout @ _repeated(v, q).mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True) + dlse[..., None])
    scale, groups = abs(_scale_and_band(inputs, case)[0]), (q.shape[0], k.shape[1], -1)
    sizes = {
        "dq": scale * ds @ _repeated(k, q),
        "dk": (scale * ds.mT @ q).view(*groups, *k.shape[2:]).sum(2),
        "dv": (p.mT @ dout).view(*groups, *v.shape[2:]).sum(2),
        "dbias": None if bias is None else ds.sum_to_size((1,) * (4 - bias.dim()) + bias.shape).view(bias.shape),
    }
    for name, size in sizes.items():
        if size is not None:
            error = (getattr(result, name).double() - getattr(golden, name)).abs()
            limit = EXACT_ERROR[inputs.q.dtype] * torch.finfo(inputs.q.dtype).eps * size.amax(-1, keepdim=True)
            assert (error <= limit).all(), (name, float((error / limit).max()))
    torch.testing.assert_close(result.lse.double(), golden.lse, rtol=4 * torch.finfo(FP32).eps, atol=HALF_LSE)
    return result


def tied_scores(case: Case, dtype: torch.dtype, root: float) -> Inputs:
    """q . k is exactly +-root^2 + 0, 1, 2 or 3 (root a power of two), or, for every third key and 512 in a row, far below.

    The logits of the others tie, or differ by small multiples of the scale that the size of q . k must not swallow.
    """
    inputs = make(case, dtype, device=DEVICE)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    j, sign = torch.arange(case.Lk, device=DEVICE), math.copysign(1, case.scale or 1)
    far = (j % 3 == 1) | ((j >= 512) & (j < 1024))
    q[..., 0], q[..., 1] = abs(root), 1
    k[..., 0] = (root - abs(root) * far).to(dtype) * sign
    k[..., 1] = j % 4
    return inputs._replace(q=q, k=k)


def assert_equal(a: Result, b: Result, what: str) -> None:
    """Bitwise: the message names the tensor and the first differing place."""
    for name, x, y in zip(Result._fields, a, b):
        if x is None and y is None:
            continue
        if not torch.equal(x, y):
            at = (x != y).nonzero()[0].tolist()
            raise AssertionError(f"{what}: {name} differs first at {at}: {x[tuple(at)]} and {y[tuple(at)]}")
