"""Softmax attention by definition: dense, differentiable, in the dtype it is given."""

import torch


def softmax(
    q, k, v, bias=None, slopes=None, sinks=None, mask=None, diagonal=None, keep=None,
    *, scale, band=(None, None), softcap=0.0, dropout_p=0.0,
):  # fmt: skip
    """(out, lse) of q [B,Hq,Lq,D], k [B,Hk,Lk,D], v [B,Hk,Lk,Dv]; mask, bias, keep broadcast to [B,Hq,Lq,Lk].

    z = softcap(scale * q k^T) + bias - slopes * |i + diagonal[i] - j|, slopes [B|1,Hq], diagonal [Lq] or Lk - Lq;
    P = softmax of z over the keys with mask True and lo <= j - i <= hi, with exp(sinks), [Hq], in the denominator;
    out = (P * keep / (1 - dropout_p)) v; lse = log of the denominator. A row that sees nothing: out 0, lse -inf or sink.
    """
    Hk = k.shape[1]
    group = q.shape[1] // max(Hk, 1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)

    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    lo, hi = band
    visible = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if lo is not None:
        visible = visible & (j - i >= lo)
    if hi is not None:
        visible = visible & (j - i <= hi)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias != -torch.inf)

    # Keys nobody sees may hold NaN: take them out before any product.
    seen = visible.expand(q.shape[0], q.shape[1], -1, -1).any(2)
    seen = seen.reshape(q.shape[0], Hk, group, k.shape[2]).any(2).repeat_interleave(group, dim=1)
    k, v = (x.masked_fill(~seen[..., None], 0) for x in (k, v))

    z = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        cap = min(max(softcap, torch.finfo(z.dtype).tiny), torch.finfo(z.dtype).max)
        z = cap * torch.tanh(z / cap)
    if bias is not None:
        z = z + bias.masked_fill(bias == -torch.inf, 0)
    if slopes is not None:
        zero = i + (k.shape[2] - q.shape[2] if diagonal is None else diagonal[:, None])
        z = z - slopes[:, :, None, None] * (zero - j).abs()
    z = z.to(wide).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        z = torch.cat((z, sinks.to(wide)[:, None, None].expand(*z.shape[:3], 1)), -1)
    if z.shape[-1] == 0:
        lse = z.new_full(z.shape[:-1], -torch.inf) + 0 * q.to(wide).sum(-1)
        return q @ k.transpose(-1, -2) @ v, lse
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    p = torch.exp(z - top)
    total = p.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    lse = (top + total.log()).masked_fill(nothing, -torch.inf).squeeze(-1)
    p = p[..., : k.shape[2]] / total
    if keep is not None:
        p = p * keep * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))
    return p.to(v.dtype) @ v, lse
