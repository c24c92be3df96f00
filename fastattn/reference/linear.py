"""Linear attention by definition: the recurrence, token by token, differentiable, in the dtype it is given."""

import torch


def features(x, feature_map):
    """phi of the last dimension: D numbers to F."""
    D = x.shape[-1]
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "taylor1":
        square = x.square().sum(-1, keepdim=True)
        nothing = square == 0
        unit = (x * square.masked_fill(nothing, 1).rsqrt()).masked_fill(nothing, 0)
        return torch.cat((torch.ones_like(square), unit), -1)
    if feature_map == "taylor2":
        y = x * max(D, 1) ** -0.25
        products = (y[..., :, None] * y[..., None, :]).flatten(-2) * 0.5**0.5
        return torch.cat((torch.ones_like(x[..., :1].sum(-1, keepdim=True)), y, products), -1)
    return x


def _repeated(x, heads):
    return x if x is None else x.repeat_interleave(heads // max(x.shape[1], 1), 1)


def linear(
    q, k, v, decay=None, beta=None, kv=None, z=None, key_mask=None, cu_seqlens=None,
    *, feature_map, causal, normalize, scale, eps,
):  # fmt: skip
    """(out, kv, z) of q [B,Hq,Lq,D], k [B,Hk,Lk,D], v [B,Hv,Lk,Dv]; state head s of Hs = max(Hk, Hv) serves H / Hs heads.

    S_t = e^decay_t S_{t-1} + phi(k_t) v_t^T, z_t = e^decay_t z_{t-1} + phi(k_t), from kv and z or 0 on; with beta,
    v_t becomes beta_t (v_t - (e^decay_t S_{t-1})^T k_t). out_t = scale phi(q_t)^T S_t [/ max(scale phi(q_t).z_t, eps)].
    """
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize, "scale": scale, "eps": eps}
    if cu_seqlens is not None:
        ends = [0, *cu_seqlens.tolist()]  # the first part has no token: there may be no other
        parts = [
            linear(
                *(t if t is None else t[:, :, i:j] for t in (q, k, v, decay, beta)),
                *(None if t is None or n == 0 else t[n - 1, None] for t in (kv, z)),
                key_mask if key_mask is None else key_mask[:, i:j],
                **options,
            )
            for n, (i, j) in enumerate(zip(ends, ends[1:]))
        ]
        outs, kvs, zs = zip(*parts)
        return torch.cat(outs, 2), torch.cat(kvs)[1:], torch.cat(zs)[1:]
    if key_mask is not None:  # masked keys may hold NaN: take them out before any product
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
    q, k = features(q, feature_map) * scale, features(k, feature_map)
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], 0)
    Hs = max(k.shape[1], v.shape[1])
    q, k, v = _repeated(q, max(q.shape[1], Hs)), _repeated(k, Hs), _repeated(v, Hs)
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if kv is None else kv.clone()
    z = k.new_zeros(*k.shape[:2], k.shape[3]) if z is None else z.clone()
    if not causal:
        S, z = S + k.mT @ v, z + k.sum(2)
        out, den = q @ _repeated(S, q.shape[1]), (q * _repeated(z, q.shape[1])[:, :, None]).sum(-1)
    else:
        outs, dens = [], []
        for t in range(k.shape[2]):
            if decay is not None:
                gate = decay[:, :, t].exp().reshape(*decay.shape[:2], -1)  # [B, Hs, 1 or D]
                S, z = gate[..., None] * S, gate * z
            value = v[:, :, t]
            if beta is not None:
                value = beta[:, :, t, None] * (value - (k[:, :, t, :, None] * S).sum(-2))
            S, z = S + k[:, :, t, :, None] * value[..., None, :], z + k[:, :, t]
            outs.append((q[:, :, t, :, None] * _repeated(S, q.shape[1])).sum(-2))
            dens.append((q[:, :, t] * _repeated(z, q.shape[1])).sum(-1))
        out = torch.stack(outs, 2) if outs else q.new_zeros(*q.shape[:2], 0, v.shape[3])
        den = torch.stack(dens, 2) if dens else q.new_zeros(*q.shape[:2], 0)
    return out / den.clamp(min=eps)[..., None] if normalize else out, S, z


def quadratic(q, k, v, decay=None, *, feature_map, normalize, scale, eps):
    """out of a causal call without beta, state and groups, from its weights [L, L]: a second oracle."""
    q, k = features(q, feature_map) * scale, features(k, feature_map)
    pairs = q[..., :, None, :] * k[..., None, :, :]
    if decay is not None:
        gates = (decay if decay.dim() == 4 else decay[..., None]).cumsum(2)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)[..., None]
        pairs = pairs * (gates[..., :, None, :] - gates[..., None, :, :]).masked_fill(later, 0).exp()
    weights = pairs.sum(-1).tril()
    out = weights @ v
    return out / weights.sum(-1, keepdim=True).clamp(min=eps) if normalize else out
