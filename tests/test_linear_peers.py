"""flash-linear-attention's own naive functions as an outside oracle: they run on CPU where fla-core and einops are installed."""

import warnings

import pytest
import torch
from harness import FP32, FP64, all_backends
from linear_harness import DELTA, LinearCase, call, cast, leaves, make, need

from fastattn.testing import max_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    pytest.importorskip("einops", reason="einops, which fla needs, is not installed")
    from fla.ops.based.naive import naive_parallel_based
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_recurrent_simple_gla


def swapped(*tensors):
    """[B, H, L, ...] as fla has it, [B, L, H, ...], and back."""
    return [t.transpose(1, 2) for t in tensors]


def simple_gla(x, function=naive_recurrent_simple_gla):
    out, kv = function(*swapped(*x[:4]), initial_state=x.kv, output_final_state=True)
    return out.transpose(1, 2), kv


def gla(x):
    out, kv = naive_recurrent_gla(*swapped(*x[:4]), initial_state=x.kv, output_final_state=True)
    return out.transpose(1, 2), kv


def plain(x):
    out, kv = naive_recurrent_linear_attn(*swapped(*x[:3]), initial_state=x.kv, output_final_state=True)
    return out.transpose(1, 2), kv


def divided(x):
    """The identity map of positive q and k, divided by their sums."""
    out, (kv, z) = naive_recurrent_linear_attn(
        *swapped(*x[:3]), initial_state=(x.kv, x.z[:, None]), output_final_state=True, normalize=True
    )
    return out.transpose(1, 2), kv, z[:, 0]


def based(x):
    return (naive_parallel_based(*x[:3]),)


def retention(x):
    return (naive_retention(*x[:3]),)


def delta(x):
    return delta_rule_recurrence(*x[:3], x.beta, initial_state=x.kv)


def gated_delta(x, function=naive_recurrent_gated_delta_rule):
    q, k, v, decay, beta = swapped(*x[:5])
    out, kv = function(q, k, v, beta=beta, g=decay, initial_state=x.kv, output_final_state=True)
    return out.transpose(1, 2), kv


def kda(x):
    out, kv = naive_recurrent_kda(*swapped(*x[:5]), initial_state=x.kv, output_final_state=True)
    return out.transpose(1, 2), kv


IDENTITY = {"feature_map": "identity", "state": True}
PEERS = {
    "simple_gla": (simple_gla, LinearCase(**IDENTITY, decay="bhl")),
    "simple_gla_chunks": (lambda x: simple_gla(x, naive_chunk_simple_gla), LinearCase(**IDENTITY, decay="bhl", L=70)),
    "gla": (gla, LinearCase(**IDENTITY, decay="bhld", Dv=16)),
    "linear_attn": (plain, LinearCase(**IDENTITY)),
    "linear_attn_normalised": (divided, LinearCase(**IDENTITY, normalize=True)),
    "based": (based, LinearCase(feature_map="taylor2")),
    "based_unnormalised": (lambda x: (naive_parallel_based(*x[:3], use_norm=False),), LinearCase(feature_map="taylor2", normalize=False, scale=1.0)),
    "retention": (retention, LinearCase(feature_map="identity", decay="h")),
    "delta_rule": (delta, LinearCase(**DELTA, state=True)),
    "gated_delta_rule": (gated_delta, LinearCase(**DELTA, state=True, decay="bhl")),
    "gated_delta_rule_chunks": (lambda x: gated_delta(x, naive_chunk_gated_delta_rule), LinearCase(**DELTA, state=True, decay="bhl", L=70)),
    "kda": (kda, LinearCase(**DELTA, state=True, decay="bhld")),
}  # fmt: skip


@all_backends
@pytest.mark.parametrize("name", PEERS)
def test_values_and_gradients(name, backend):
    """Theirs in fp32: out, state and every gradient that autograd finds through their loops."""
    peer, case = PEERS[name]
    inputs = make(case, FP32)
    if name == "linear_attn_normalised":
        inputs = inputs._replace(q=inputs.q.abs() + 0.1, k=inputs.k.abs() + 0.1, z=inputs.z.abs())
    if name == "retention":  # its decays are log(1 - 2^(-5 - head))
        inputs = inputs._replace(decay=(1 - 2.0 ** (-5 - torch.arange(2, device=inputs.q.device))).log())
    need(backend, inputs, **case.options())

    def gradients(run, x):
        results = run(x)
        pairs = list(zip(results, (x.dout, x.dkv, x.dz)))
        wanted = [t for t in x[:7] if t is not None]
        if name == "retention":
            wanted = wanted[:3]  # its decays are constants
        grads = torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs])
        return [t.detach() for t in (*results, *grads)]

    count = len(peer(leaves(inputs)))

    def ours(x):
        out, (kv, z) = call(x, backend, **case.options())
        return (out, kv, z)[:count]

    theirs = gradients(peer, leaves(inputs))
    for a, b in zip(gradients(ours, leaves(inputs)), theirs, strict=True):
        assert max_error(a, b) <= 3e-5 * max(1.0, float(b.abs().max()))


def test_reference_in_fp64_is_as_close_to_theirs():
    """Their loops keep fp32 whatever comes in, so fp64 of ours must agree to fp32."""
    for peer, case in PEERS.values():
        inputs = make(case, FP32)
        if case.normalized and case.feature_map == "identity" or case.decay == "h":
            continue
        found = call(cast(inputs, FP64), "reference", **case.options())[0]
        assert max_error(found, peer(inputs)[0].double()) <= 3e-5 * max(1.0, float(found.abs().max()))
