"""The papers' formulas of the layers of fastattn.nn, token by token in float64, with a layer's own parameters."""

from __future__ import annotations

import math

import torch

FP64 = torch.float64


def heads(x, n):
    """[B, L, n * D] -> [B, L, n, D]"""
    return x.reshape(*x.shape[:2], n, -1)


def grouped(norm, o, eps):
    """Each head's row of o [B, L, H, Dv] normalised by itself, with one weight for all heads."""
    return (o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight).flatten(2)


def phi(x, name):
    if name == "elu1":
        return torch.where(x > 0, x + 1, x.exp())
    if name == "relu":
        return x.clamp(min=0)
    if name == "taylor1":
        length = x.square().sum(-1, keepdim=True).sqrt()
        return torch.cat((torch.ones_like(length), x / length), -1)
    s = x / x.shape[-1] ** 0.25
    return torch.cat((torch.ones_like(x[..., :1]), s, (s[..., None] * s[..., None, :]).flatten(-2) / math.sqrt(2)), -1)


def weighted(q, k, v, name, causal=True, visible=None):
    """sum_s w_ts v_s / sum_s w_ts with w_ts = phi(q_t) . phi(k_s), q [B, L, H, D]; keys of `visible` [B, Lk] only."""
    weights = torch.einsum("bthf,bshf->bhts", phi(q, name), phi(k, name))
    if causal:
        weights = weights.tril()
    if visible is not None:
        weights = weights * visible[:, None, None]
    return torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), v)


def katharopoulos(m, x, causal=True, context=None, visible=None):
    seen = x if context is None else context
    q, k, v = (heads(t, m.num_heads) for t in (m.q_proj(x), m.k_proj(seen), m.v_proj(seen)))
    return m.out_proj(weighted(q, k, v, m.feature_map, causal, visible).flatten(2))


def taylor(m, x, causal=True, visible=None):
    q, k, v = (heads(t, m.num_heads) for t in (m.q_proj(x), m.k_proj(x), m.v_proj(x)))
    return x + m.gamma * weighted(q, k, v, "taylor1", causal, visible).flatten(2)


def channels(m, x, visible=None):
    """The same with channels as tokens: [B, L, C] -> tokens C of dimension L."""
    q = x if visible is None else x * visible[..., None]
    tokens, values = q.mT[:, :, None], x.mT[:, :, None]
    return x + m.gamma * weighted(tokens, tokens, values, "taylor1", False)[:, :, 0].mT


def retention(m, x):
    q, k, v = (heads(t, m.num_heads) for t in (m.q_proj(x), m.k_proj(x), m.v_proj(x)))
    D, H = q.shape[-1], m.num_heads
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=FP64))
    if m.counts_tokens:
        angle = torch.outer(torch.arange(x.shape[1]).double(), 10000.0 ** (-torch.arange(0, D, 2).double() / D))
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # e^(i t theta)
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn for t in (q, k))
    S, outs = torch.zeros(len(x), H, q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(x.shape[1]):
        S = gamma[:, None, None] * S + torch.einsum("bhd,bhv->bhdv", k[:, t].conj(), v[:, t].to(q.dtype))
        outs.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S).real / math.sqrt(D))
    o = torch.stack(outs, 1)
    mean, variance = o.mean(-1, keepdim=True), o.var(-1, keepdim=True, correction=0)
    o = ((o - mean) / (variance + m.norm.eps).sqrt()).flatten(2) * m.norm.weight + m.norm.bias
    gate = m.gate_proj(x)
    return m.out_proj(gate * gate.sigmoid() * o)


def gated_linear(m, x):
    H = m.num_heads
    q, k, v = (heads(t, H) for t in (m.q_proj(x), m.k_proj(x), m.v_proj(x)))
    a = heads(m.decay_proj(x).sigmoid() ** (1 / m.temperature), H)
    S, outs = torch.zeros(len(x), H, q.shape[-1], v.shape[-1], dtype=FP64), []
    for t in range(x.shape[1]):
        S = a[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S) / math.sqrt(q.shape[-1]))
    gate = m.gate_proj(x)
    return m.out_proj(gate * gate.sigmoid() * grouped(m.norm, torch.stack(outs, 1), m.norm.eps))


def gated_delta(m, x):
    H, Hv, width = m.num_heads, m.value_heads, m.conv_width
    inputs, taps = m.qkv_proj(x), m.conv.weight[:, 0]
    qkv = torch.zeros_like(inputs)
    for t in range(x.shape[1]):
        for back in range(min(width, t + 1)):
            qkv[:, t] += taps[:, width - 1 - back] * inputs[:, t - back]
    qkv = qkv * qkv.sigmoid()
    q, k, v = qkv[..., : m.key_dim], qkv[..., m.key_dim : 2 * m.key_dim], heads(qkv[..., 2 * m.key_dim :], Hv)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (heads(q, H), heads(k, H)))
    D = q.shape[-1]
    q, k = q.repeat_interleave(Hv // H, 2), k.repeat_interleave(Hv // H, 2)
    alpha = (-m.A_log.exp() * (1 + (m.decay_proj(x) + m.dt_bias).exp()).log()).exp()
    beta = m.beta_proj(x).sigmoid() * (2 if m.negative_eigenvalues else 1)
    S, outs = torch.zeros(len(x), Hv, D, v.shape[-1], dtype=FP64), []
    for t in range(x.shape[1]):
        key, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        erase = torch.eye(D, dtype=FP64) - b * key * key.mT
        S = erase @ (alpha[:, t, :, None, None] * S) + b * key * v[:, t, :, None]
        outs.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S) / math.sqrt(D))
    gate = m.gate_proj(x)
    return m.out_proj(gate * gate.sigmoid() * grouped(m.norm, torch.stack(outs, 1), m.norm.eps))
