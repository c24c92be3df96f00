"""Softmax attention by definition: dense, differentiable, in the dtype it is given."""

import torch


def softmax(q, k, v, mask=None, bias=None, keep=None, *, scale, band=(None, None), dropout_p=0.0):
    """(out, lse) of q [B,Hq,Lq,D], k [B,Hk,Lk,D], v [B,Hk,Lk,Dv]; mask, bias, keep broadcast to [B,Hq,Lq,Lk].

    z = scale * q k^T + bias; P = softmax of z over the keys with mask True and lo <= j - i <= hi;
    out = (P * keep / (1 - dropout_p)) v; lse = log of the sum of exp(z). A row that sees nothing: out 0, lse -inf.
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
    if bias is not None:
        z = z + bias.masked_fill(bias == -torch.inf, 0)
    z = z.to(wide).masked_fill(~visible, -torch.inf)
    if k.shape[2] == 0:
        lse = z.new_full(z.shape[:-1], -torch.inf) + 0 * q.to(wide).sum(-1)
        return q @ k.transpose(-1, -2) @ v, lse
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    p = torch.exp(z - top)
    total = p.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    lse = (top + total.log()).masked_fill(nothing, -torch.inf).squeeze(-1)
    p = p / total
    if keep is not None:
        p = p * keep * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))
    return p.to(v.dtype) @ v, lse
