"""Linear attention in chunks of plain torch, on any device: products inside a chunk, one state between chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..params import LINEAR_EPS, LinearParams, LinearTensors, accumulate_dtype, empty_like_layout

CHUNK = 64
VECTOR_CHUNK = 16  # decays of single channels make a chunk x chunk x D tensor
NOTHING = -1e3  # e^-1000 is 0; a sum of larger ones (finfo.min between documents) would swallow the gates that follow


class Chunk(NamedTuple):
    """Tokens [start, end), and which states are theirs: one packed sequence's, or those of all batches."""

    sequence: slice
    start: int
    end: int


def chunks(x: LinearTensors, params: LinearParams, length: int) -> Iterator[Chunk]:
    size = params.chunk_size or (VECTOR_CHUNK if x.decay is not None and x.decay.dim() == 4 else CHUNK)
    ends = [0, length] if x.cu_seqlens is None else x.cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(ends, ends[1:])):
        sequence = slice(None) if x.cu_seqlens is None else slice(n, n + 1)
        for t in range(start, end, size):
            yield Chunk(sequence, t, min(t + size, end))


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi of the last dimension (see `fastattn.linear_attention`)."""
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "taylor1":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit = x / norm.masked_fill(norm == 0, 1)
        return torch.cat((torch.ones_like(norm), unit.masked_fill(norm == 0, 0)), -1)
    if feature_map == "taylor2":
        y = x * max(x.shape[-1], 1) ** -0.25
        products = (y[..., :, None] * y[..., None, :]).flatten(-2) * 0.5**0.5
        return torch.cat((y.new_ones(*y.shape[:-1], 1), y, products), -1)
    if feature_map != "identity":
        raise ValueError(f"unknown feature_map {feature_map!r}")
    return x


def linear_saved_shape(x: LinearTensors, params: LinearParams) -> tuple[int, ...]:
    return (0,)


def linear_forward(x: LinearTensors, params: LinearParams, with_saved: bool):
    with torch.no_grad():
        out = x.empty_out()
        kv, z = _start(x, params)
        if params.causal:
            for c in chunks(x, params, x.q.shape[2]):
                result, kv[c.sequence], z[c.sequence] = _causal(
                    *(*_cut(x, c), kv[c.sequence], z[c.sequence]), params=params
                )
                out[:, :, c.start : c.end] = result
        else:
            _reduce(x, params, kv, z)
            for c in chunks(x, params, x.q.shape[2]):
                q = x.q[:, :, c.start : c.end]
                out[:, :, c.start : c.end] = _read(q, kv[c.sequence], z[c.sequence], params=params)
        return out, kv, z if params.normalize else None, None


def linear_backward(dout, dkv, dz, x: LinearTensors, out, saved, params: LinearParams, needs):
    """Chunks in reverse, each computed again from the state before it and differentiated by autograd."""
    with torch.no_grad():
        kv, z = _start(x, params)
        grads: list[Any] = [empty_like_layout(t, t.shape[3]).zero_() for t in x[:3]]
        grads += [None if t is None else t.new_zeros(t.shape) for t in x[3:7]]
        # New and dense: what is left of them is returned as the gradients of the state before the first token.
        dkv = torch.zeros_like(kv) if dkv is None else torch.empty_like(kv).copy_(dkv)
        dz = torch.zeros_like(z) if dz is None else torch.empty_like(z).copy_(dz)
        backward = _causal_backward if params.causal else _whole_backward
        backward(dout, dkv, dz, x, kv, z, params, grads)
        # What is left has flowed to the state before the first token.
        for i, left in ((5, dkv), (6, dz)):
            grads[i] = None if grads[i] is None else left
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def linear_step(x: LinearTensors, params: LinearParams):
    with torch.no_grad():
        kv, z = _start(x, params)
        chunk = next(chunks(x._replace(cu_seqlens=None), params, 1))
        result, kv, z = _causal(*(*_cut(x, chunk), kv, z), params=params)
        for state, after in ((x.kv, kv), (x.z, z)):
            if state is not None:
                state.copy_(after)
        out = x.empty_out()
        out.copy_(result)
        return out


def _start(x: LinearTensors, params: LinearParams) -> tuple[Tensor, Tensor]:
    """Fresh tensors with the state before the first token."""
    wide, shape = accumulate_dtype(x.q.dtype), x.state_shape(params.feature_map)
    kv, z = (x.q.new_zeros(shape[:n], dtype=wide) for n in (4, 3))
    if x.kv is not None:
        kv.copy_(x.kv)
    if x.z is not None:
        z.copy_(x.z)
    return kv, z


def _cut(x: LinearTensors, c: Chunk) -> tuple[Any, ...]:
    """q, k, v, decay and beta of a chunk."""
    return tuple(None if t is None else t[:, :, c.start : c.end] for t in x[:5])


def _wide(t: Tensor, heads: int) -> Tensor:
    """[B, heads, ...], each head repeated for those that share it, in the dtype of sums."""
    t = t.to(accumulate_dtype(t.dtype))
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _queries(q: Tensor, heads: int, params: LinearParams) -> Tensor:
    """scale * phi(q) as [B, Hs, G, C, F]: the G heads of a group read one state."""
    q = features(_wide(q, max(q.shape[1], heads)), params.feature_map) * params.scale
    return q.unflatten(1, (heads, q.shape[1] // max(heads, 1)))


def _keys(k: Tensor, heads: int, params: LinearParams) -> Tensor:
    return _wide(features(k.to(accumulate_dtype(k.dtype)), params.feature_map), heads)


class Gates(NamedTuple):
    """Products of decays within a chunk; every exponent is a difference <= 0, taken in float64."""

    start: Any = 1.0  # of token 0 .. i, [B, Hs, C, 1 or D]
    end: Any = 1.0  # of token j + 1 .. C - 1, the same
    whole: Any = 1.0  # [B, Hs, 1 or D]
    pairs: Optional[Tensor] = None  # of token j + 1 .. i, 0 for j > i, [B, Hs, C, C] or [B, Hs, C, C, D]

    @staticmethod
    def of(decay: Optional[Tensor]) -> Gates:
        if decay is None:
            return Gates()
        total = decay.double().clamp(min=NOTHING).cumsum(2)
        vector = decay.dim() == 4
        i = torch.arange(total.shape[2], device=decay.device)
        later = i[:, None] < i
        between = total[:, :, :, None] - total[:, :, None]
        pairs = between.masked_fill(later[..., None] if vector else later, -torch.inf)
        if not vector:
            total = total[..., None]
        exponents = total, total[:, :, -1:] - total, total[:, :, -1], pairs
        return Gates(*(t.to(decay.dtype).exp() for t in exponents))


def _weights(q: Tensor, k: Tensor, gates: Gates) -> Tensor:
    """Lower triangle of sum_d q_id k_jd e^(G_i - G_j), [..., C, C] of [..., C, F]; k and gates broadcast to q."""
    if gates.pairs is None:
        return (q @ k.mT).tril()
    pairs = gates.pairs if q.dim() == 4 else gates.pairs[:, :, None]
    if gates.pairs.dim() == 4:
        return (q @ k.mT) * pairs
    return (q[..., :, None, :] * k[..., None, :, :] * pairs).sum(-1)


def _causal(q, k, v, decay, beta, kv, z, *, params: LinearParams) -> tuple[Tensor, Tensor, Tensor]:
    """(out, kv, z) of one chunk, from the state before it to the one after it. Differentiable."""
    heads = kv.shape[1]
    dtype, queries = q.dtype, _queries(q, heads, params)
    keys, values, gates = _keys(k, heads, params), _wide(v, heads), Gates.of(decay)
    if beta is not None:
        # Each token's value less what the state predicts for it, which holds the chunk's earlier ones: a unit triangle.
        rows = _weights(keys, keys, gates).tril(-1) * beta[..., None]
        right = beta[..., None] * (values - (keys * gates.start) @ kv)
        values = torch.linalg.solve_triangular(rows, right, upper=False, unitriangular=True)
    weights = _weights(queries, keys[:, :, None], gates)
    start = gates.start if decay is None else gates.start[:, :, None]
    out = (queries * start) @ kv[:, :, None] + weights @ values[:, :, None]
    if params.normalize:
        den = (queries * start) @ z[:, :, None, :, None] + weights.sum(-1, keepdim=True)
        out = out / den.clamp(min=LINEAR_EPS)
    added = keys * gates.end
    whole = gates.whole if decay is None else gates.whole[..., None]
    kv = kv * whole + added.mT @ values
    if params.normalize:
        z = z * gates.whole + added.sum(2)
    return out.flatten(1, 2).to(dtype), kv, z


def _added(k, v, mask, heads: int, params: LinearParams) -> tuple[Tensor, Tensor]:
    """What keys add to the state of a call that is not causal. Masked keys may hold NaN."""
    hidden = None if mask is None else ~mask[:, None, :, None]
    if hidden is not None:
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    keys = _keys(k, heads, params)
    if hidden is not None:
        keys = keys.masked_fill(hidden, 0)
    return keys.mT @ _wide(v, heads), keys.sum(2)


def _read(q, kv, z, *, params: LinearParams) -> Tensor:
    queries = _queries(q, kv.shape[1], params)
    out = queries @ kv[:, :, None]
    if params.normalize:
        out = out / (queries @ z[:, :, None, :, None]).clamp(min=LINEAR_EPS)
    return out.flatten(1, 2).to(q.dtype)


def _reduce(x: LinearTensors, params: LinearParams, kv: Tensor, z: Tensor) -> None:
    for c in chunks(x, params, x.k.shape[2]):
        mask = None if x.key_mask is None else x.key_mask[:, c.start : c.end]
        _, k, v, *_ = _cut(x, c)
        added = _added(k, v, mask, kv.shape[1], params)
        kv[c.sequence] += added[0]
        z[c.sequence] += added[1]


def _recorded() -> AbstractContextManager:
    """Autograd on again: a compiled graph may run this op below it, and there is nothing to differentiate there."""
    keys = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys)


def _differentiate(function, leaves, cotangents) -> list[Any]:
    """Gradients of function(*leaves), a tuple of tensors, with respect to every leaf that is not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    with _recorded(), torch.enable_grad():
        results = function(*leaves)
        pairs = [(y, dy) for y, dy in zip(results, cotangents) if y.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [t for t in leaves if t is not None],
                [dy for _, dy in pairs],
                materialize_grads=True,
            )
        )
    return [t if t is None else next(found) for t in leaves]


def _causal_backward(dout, dkv, dz, x: LinearTensors, kv, z, params: LinearParams, grads) -> None:
    states = []
    plan = list(chunks(x, params, x.q.shape[2]))
    for c in plan:
        states.append((kv[c.sequence].clone(), z[c.sequence].clone()))
        _, kv[c.sequence], z[c.sequence] = _causal(*(*_cut(x, c), *states[-1]), params=params)
    for c, state in zip(reversed(plan), reversed(states)):
        cotangents = dout[:, :, c.start : c.end], dkv[c.sequence], dz[c.sequence]
        found = _differentiate(lambda *t: _causal(*t, params=params), [*_cut(x, c), *state], cotangents)
        *along, dkv[c.sequence], dz[c.sequence] = found
        for grad, part in zip(grads, along):
            if part is not None:
                grad[:, :, c.start : c.end] = part


def _whole_backward(dout, dkv, dz, x: LinearTensors, kv, z, params: LinearParams, grads) -> None:
    _reduce(x, params, kv, z)
    for c in chunks(x, params, x.q.shape[2]):
        leaves = [x.q[:, :, c.start : c.end], kv[c.sequence], z[c.sequence]]
        cotangents = (dout[:, :, c.start : c.end],)
        grads[0][:, :, c.start : c.end], a, b = _differentiate(
            lambda *t: (_read(*t, params=params),), leaves, cotangents
        )
        dkv[c.sequence] += a
        dz[c.sequence] += b
    for c in chunks(x, params, x.k.shape[2]):
        mask = None if x.key_mask is None else x.key_mask[:, c.start : c.end]
        leaves = [t[:, :, c.start : c.end] for t in (x.k, x.v)]
        found = _differentiate(
            lambda k, v, mask=mask: _added(k, v, mask, kv.shape[1], params), leaves, (dkv[c.sequence], dz[c.sequence])
        )
        grads[1][:, :, c.start : c.end], grads[2][:, :, c.start : c.end] = found
