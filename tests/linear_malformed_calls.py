"""Malformed calls of linear attention: name -> (pattern the message must match, call). Run as a script: one JSON line per call."""

import json
import sys
from functools import partial

import torch

from fastattn import LinearState, explain_linear, linear_attention, linear_attention_step
from fastattn.params import LinearParams, LinearTensors

NAN, INF = float("nan"), float("inf")
Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
G, VECTOR, BETA = torch.zeros(2, 2, 5), torch.zeros(2, 2, 5, 8), torch.ones(2, 2, 5)
KV, Z, MASK = torch.zeros(2, 2, 8, 6), torch.zeros(2, 2, 8), torch.ones(2, 5, dtype=torch.bool)
OUT = torch.zeros(2, 4, 5, 6)
ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
ONE = [x[:1] for x in (Q, K, V)]
NESTED = torch.nested.nested_tensor([torch.zeros(4, 5, 8), torch.zeros(4, 6, 8)])
DELTA = {"feature_map": "identity", "beta": BETA}
CALLS = {}


def expect(pattern, **calls):
    for name, call in calls.items():
        assert name not in CALLS, name
        CALLS[name] = (pattern, call)


def attend(*tensors, **options):
    return lambda: linear_attention(*(tensors or (Q, K, V)), **options)


# Each line of the issue.
expect(r"decay.*<= 0.*0\.5.*logsigmoid", public_decay_positive=attend(decay=G + 0.5))
expect(r"beta.*\[0, 2\].*2\.5.*sigmoid", public_beta_high=attend(feature_map="identity", beta=BETA + 1.5))
expect(r"beta.*\[0, 2\].*-1", public_beta_negative=attend(feature_map="identity", beta=-BETA))
expect(r"decay.*causal=True", public_decay_not_causal=attend(causal=False, decay=G))
expect(r"beta.*causal=True", public_beta_not_causal=attend(causal=False, **DELTA))
expect(
    r"kv \[2, 2, 8, 7\].*\[2, 2, 8, 6\]",
    public_state_shape=attend(initial_state=LinearState(torch.zeros(2, 2, 8, 7), Z)),
)
expect(r"kv.*float32.*float16.*\.to", public_state_dtype=attend(initial_state=LinearState(KV.half(), Z)))
expect(r"normalize.*beta.*normalize=False", public_delta_normalised=attend(**DELTA, normalize=True))
expect(r"key_mask.*causal=False", public_key_mask_causal=attend(key_mask=MASK))
expect(r"feature_map.*'taylor2'.*'softmax'", public_feature_map=attend(feature_map="softmax"))

# And more: gates.
expect(r"decay.*finite", public_decay_nan=attend(decay=G + NAN), public_decay_inf=attend(decay=G - INF))
expect(r"decay.*<= 0.*e-07", public_decay_barely_positive=attend(decay=G + 1e-6))
for wanted in (False, True):  # a parameter is checked like any other tensor
    gate, share = (torch.nn.Parameter(t, requires_grad=wanted) for t in (torch.full((2,), 0.5), BETA + 1.5))
    expect(r"decay.*<= 0.*0\.5", **{f"public_decay_parameter_{wanted}": attend(decay=gate)})
    expect(r"beta.*2\.5", **{f"public_beta_parameter_{wanted}": attend(feature_map="identity", beta=share)})
expect(r"decay \[2, 2, 4\].*\[2\].*\[2, 2, 5\].*\[2, 2, 5, 8\]", public_decay_shape=attend(decay=G[..., :4]))
expect(r"decay \[2, 4, 5\]", public_decay_of_query_heads=attend(decay=torch.zeros(2, 4, 5)))
expect(r"decay \[1, 2, 5\]", public_decay_batch=attend(decay=G[:1]))
expect(r"decay \[\]", public_decay_scalar=attend(decay=torch.tensor(-1.0)))
expect(r"decay.*float", public_decay_number=attend(decay=-1.0))
expect(r"decay.*int64", public_decay_int=attend(decay=G.long()))
expect(r"decay.*meta", public_decay_device=attend(decay=G.to("meta")))
expect(r"decay per channel.*taylor1", public_vector_decay_taylor=attend(feature_map="taylor1", decay=VECTOR))
expect(r"decay per channel.*taylor2", public_vector_decay_taylor2=attend(feature_map="taylor2", decay=VECTOR))
expect(r"beta.*nan|beta.*\[0, 2\]", public_beta_nan=attend(feature_map="identity", beta=BETA * NAN))
expect(r"beta \[2, 2, 5, 1\].*\[2, 2, 5\]", public_beta_shape=attend(feature_map="identity", beta=BETA[..., None]))
expect(r"beta.*float", public_beta_number=attend(feature_map="identity", beta=1.0))
expect(r"beta.*bool", public_beta_bool=attend(feature_map="identity", beta=BETA > 0))
expect(r"beta.*meta", public_beta_device=attend(feature_map="identity", beta=BETA.to("meta")))
expect(r"beta.*identity.*elu1", public_beta_default_map=attend(beta=BETA))
expect(r"beta.*identity.*relu", public_beta_map=attend(feature_map="relu", beta=BETA))

# Tensors.
expect(r"q .*\[4, 5, 8\]", public_q_3d=attend(Q[0], K, V))
expect(r"batch.*k \[1, 2, 5, 8\]", public_batch=attend(Q, K[:1], V))
expect(r"length.*v \[2, 2, 4, 6\]", public_lengths=attend(Q, K, V[:, :, :4]))
expect(r"head dimension.*k \[2, 2, 5, 4\]", public_head_dim=attend(Q, K[..., :4], V))
expect(
    r"queries as keys.*q \[2, 4, 4, 8\].*k \[2, 2, 5, 8\].*causal=False",
    public_causal_lengths=attend(Q[:, :, :4], K, V),
)
expect(r"heads.*k \[2, 3, 5, 8\]", public_group=attend(Q, torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6)))
expect(r"heads.*v \[2, 3, 5, 6\]", public_group_of_v=attend(Q, K, torch.zeros(2, 3, 5, 6)))
expect(r"heads.*q \[2, 3, 5, 8\]", public_group_of_q=attend(Q[:, :3], K, V))
expect(r"heads", public_zero_heads_of_k=attend(Q, K[:, :0], V), public_zero_heads_of_q=attend(Q[:, :0], K, V))
expect(r"dtype.*float16", public_mixed_dtype=attend(Q, K.half(), V))
expect(r"dtype.*int64", public_int=attend(Q.long(), K.long(), V.long()))
expect(r"dtype.*complex64", public_complex=attend(*(x.to(torch.complex64) for x in (Q, K, V))))
expect(r"dtype.*float8", public_float8=attend(*(x.to(torch.float8_e4m3fn) for x in (Q, K, V))))
expect(r"device.*meta", public_device=attend(Q, K.to("meta"), V))
expect(r"k must be.*list", public_list=attend(Q, [1.0], V))
expect(r"v must be.*NoneType", public_none=attend(Q, K, None))
expect(r"q.*sparse.*to_dense", public_sparse=attend(Q.to_sparse(), K, V))
expect(r"q .*got a nested.*to_padded_tensor.*cu_seqlens", public_nested=attend(NESTED, NESTED, NESTED))
JAGGED = torch.nested.nested_tensor([torch.zeros(4, 5), torch.zeros(4, 6)], layout=torch.jagged)
for kind, words, make in (
    ("sparse", "to_dense", lambda t: t.to_sparse()),
    ("nested", "got a nested", lambda t: JAGGED),
    ("float8", "float8", lambda t: t.to(torch.float8_e4m3fn)),
):
    beta = attend(feature_map="identity", beta=make(BETA))
    kv, z = (attend(initial_state=state) for state in (LinearState(make(KV), Z), LinearState(KV, make(Z))))
    for name, call in {"decay": attend(decay=make(G)), "beta": beta, "state.kv": kv, "state.z": z}.items():
        expect(f"{name} .*{words}", **{f"public_{kind}_{name}": call})
expect(r"key_mask.*to_dense", public_sparse_mask=attend(causal=False, key_mask=MASK.to_sparse()))
expect(r"key_mask.*nested", public_nested_mask=attend(causal=False, key_mask=JAGGED > 1))
expect(r"cu_seqlens.*to_dense", public_sparse_ends=attend(*ONE, cu_seqlens=ENDS.to_sparse()))

# Options.
expect(r"causal.*'top_left'", public_causal_name=attend(causal="top_left"))
expect(r"causal.*None", public_causal_none=attend(causal=None))
expect(r"causal.*1", public_causal_int=attend(causal=1))
expect(r"normalize.*'yes'", public_normalize=attend(normalize="yes"))
expect(r"feature_map.*None", public_map_none=attend(feature_map=None))
expect(r"feature_map.*method relu", public_map_callable=attend(feature_map=torch.relu))
expect(r"feature_map.*\[\]", public_map_list=attend(feature_map=[]))
expect(r"scale.*> 0.*-1.*normalize=False", public_scale_negative=attend(scale=-1.0))
expect(r"scale.*> 0.*0", public_scale_zero=attend(scale=0.0))
expect(r"scale.*nan", public_scale_nan=attend(feature_map="identity", scale=NAN))
expect(r"scale.*inf", public_scale_inf=attend(scale=INF))
expect(r"scale.*Tensor", public_scale_tensor=attend(scale=torch.tensor(1.0)))
expect(r"scale.*'1'", public_scale_str=attend(scale="1"))
expect(r"chunk_size.*100", public_chunk_odd=attend(chunk_size=100))
expect(r"chunk_size.*got (0|-64)", public_chunk_zero=attend(chunk_size=0), public_chunk_negative=attend(chunk_size=-64))
expect(r"chunk_size.*64\.0", public_chunk_float=attend(chunk_size=64.0))
expect(r"chunk_size.*True", public_chunk_bool=attend(chunk_size=True))
expect(r"backend.*'cuda'", public_backend=attend(backend="cuda"))
expect(r"backend.*None", public_backend_none=attend(backend=None))
expect(r"native.*float64", public_native_fp64=attend(*(x.double() for x in (Q, K, V)), backend="native"))
expect(r"unexpected keyword.*window", public_keyword=attend(window=(1, 1)))
expect(r"positional", public_positional=lambda: linear_attention(Q, K, V, "elu1"))

# Masks, sequences and states.
expect(r"key_mask.*float32", public_mask_float=attend(causal=False, key_mask=MASK.float()))
expect(r"key_mask \[5\].*\[2, 5\]", public_mask_shape=attend(causal=False, key_mask=MASK[0]))
expect(r"key_mask \[2, 4\]", public_mask_length=attend(causal=False, key_mask=MASK[:, :4]))
expect(r"key_mask.*list", public_mask_list=attend(causal=False, key_mask=[True]))
expect(r"key_mask.*meta", public_mask_device=attend(causal=False, key_mask=MASK.to("meta")))
expect(r"cu_seqlens.*\[2, 4, 5, 8\].*B must be 1", public_packed_batch=attend(cu_seqlens=ENDS))
expect(r"cu_seqlens.*0 to.*5.*4", public_packed_short=attend(*ONE, cu_seqlens=torch.tensor([0, 2, 4]).int()))
expect(r"cu_seqlens.*1 to 5", public_packed_start=attend(*ONE, cu_seqlens=torch.tensor([1, 5]).int()))
expect(r"cu_seqlens.*falling", public_packed_falling=attend(*ONE, cu_seqlens=torch.tensor([0, 4, 2, 5]).int()))
expect(r"cu_seqlens.*float32", public_packed_float=attend(*ONE, cu_seqlens=ENDS.float()))
expect(r"cu_seqlens.*list", public_packed_list=attend(*ONE, cu_seqlens=[0, 5]))
expect(r"cu_seqlens.*\[1, 3\]", public_packed_2d=attend(*ONE, cu_seqlens=ENDS[None]))
expect(r"cu_seqlens.*\[0\]", public_packed_empty=attend(*ONE, cu_seqlens=ENDS[:0]))
expect(r"cu_seqlens.*meta", public_packed_device=attend(*ONE, cu_seqlens=ENDS.to("meta")))
expect(
    r"length|lengths equal|queries as keys",
    public_packed_cross=attend(ONE[0][:, :, :4], *ONE[1:], causal=False, cu_seqlens=ENDS),
)
expect(
    r"kv \[1, 2, 8, 6\].*\[2, 2, 8, 6\]",
    public_packed_state=attend(*ONE, cu_seqlens=ENDS, initial_state=LinearState(KV[:1], Z[:1])),
)
expect(
    r"z.*NoneType",
    public_state_without_z=attend(initial_state=LinearState(KV)),
    public_state_bare=attend(initial_state=KV),
)
expect(
    r"z.*LinearState\(kv, None\)", public_state_with_z=attend(feature_map="identity", initial_state=LinearState(KV, Z))
)
expect(r"z \[2, 2, 7\].*\[2, 2, 8\]", public_state_z_shape=attend(initial_state=LinearState(KV, Z[..., :7])))
expect(r"z.*float64", public_state_z_dtype=attend(initial_state=LinearState(KV, Z.double())))
expect(
    r"kv.*\[2, 2, 9, 6\].*taylor1",
    public_state_features=attend(feature_map="taylor1", initial_state=LinearState(KV, Z)),
)
expect(r"kv \[2, 4, 8, 6\]", public_state_heads=attend(initial_state=LinearState(torch.zeros(2, 4, 8, 6), Z)))
expect(
    r"kv.*float64.*float32",
    public_state_of_double=attend(*(x.double() for x in (Q, K, V)), initial_state=LinearState(KV, Z)),
)
expect(r"kv.*meta", public_state_device=attend(initial_state=LinearState(KV.to("meta"), Z)))
expect(r"kv.*int", public_state_int=attend(feature_map="identity", initial_state=3))
expect(
    r"state",
    public_state_dict=attend(initial_state={"kv": KV, "z": Z}),
    public_state_triple=attend(initial_state=(KV, Z, Z)),
)
expect(
    r"feature_map.*'taylor1'.*'tailor1'", public_zeros_map=lambda: LinearState.zeros(1, 2, 8, 6, feature_map="tailor1")
)
expect(r"decay", explain_decay=lambda: explain_linear(Q, K, V, decay=G + 1))
expect(r"feature_map", explain_map=lambda: explain_linear(Q, K, V, feature_map="exp"))

# One step.
TOKEN = [x[:, :, :1] for x in (Q, K, V)]


def step(*tensors, state=None, **options):
    state = LinearState(KV.clone(), Z.clone()) if state is None else state
    return lambda: linear_attention_step(*(tensors or TOKEN), state, **options)


expect(r"one token.*\[2, 4, 5, 8\]", public_step_length=step(Q, K, V))
expect(r"one token.*\[2, 4, 0, 8\]", public_step_no_token=step(*(x[:, :, :0] for x in (Q, K, V))))
expect(r"kv.*contiguous", public_step_strided=step(state=LinearState(KV.mT.contiguous().mT, Z)))
expect(r"z.*contiguous", public_step_strided_z=step(state=LinearState(KV, Z.mT.contiguous().mT)))
expect(r"kv.*contiguous", public_step_expanded=step(state=LinearState(KV[:1].expand(2, 2, 8, 6), Z)))
expect(r"state.*LinearState\.zeros", public_step_none=lambda: linear_attention_step(*TOKEN, None))
expect(r"kv.*\[2, 2, 8, 6\]", public_step_shape=step(state=LinearState(KV[:1], Z)))
expect(r"decay.*<= 0", public_step_decay=step(decay=G[..., :1] + 1))
expect(r"decay \[2, 2, 5\].*\[2, 2, 1\]", public_step_decay_shape=step(decay=G))
expect(r"beta.*identity", public_step_beta=step(beta=BETA[..., :1]))
expect(r"unexpected keyword.*causal", public_step_causal=step(causal=False))

# torch.ops: callable by anyone, past the checks above. Bad arguments must raise on every backend.
X, PARAMS = LinearTensors(Q, K, V, G, None, KV, Z), LinearParams("elu1", True, True, 0.3)
GATED = {"feature_map": "identity", "normalize": False, "z": None}


def _split(changed):
    tensors = X._replace(**{n: t for n, t in changed.items() if n in X._fields})
    return tensors, PARAMS._replace(**{n: t for n, t in changed.items() if n in PARAMS._fields})


def forward_op(backend, **changed):
    x, params = _split(changed)
    return torch.ops.fastattn.linear_forward(*x, *params, True, backend)


def backward_op(backend, **changed):
    x, params = _split(changed)
    needs = changed.get("needs", [t is not None for t in x[:7]])
    good = torch.ops.fastattn.linear_forward(*X, *PARAMS, True, backend)
    out, saved = changed.get("out", good[0]), changed.get("saved", good[3])
    cotangents = (changed.get("dout", OUT), changed.get("dkv"), changed.get("dz"))
    return torch.ops.fastattn.linear_backward(*cotangents, *x, out, saved, *params, needs, backend)


SHAPES = {
    "q_3d": {"q": Q[0]}, "head_dim": {"k": K[..., :4]}, "lengths": {"v": V[:, :, :4]}, "feature_map": {"feature_map": "exp"},
    "kv_shape": {"kv": KV[..., :5]}, "kv_features": {"kv": KV[:, :, :7], "z": Z}, "mask_length": {"causal": False, "decay": None, "key_mask": MASK[:, :4]},
}  # fmt: skip
# Batch, groups and dtypes: torch ops broadcast and promote them safely, raw pointers do not.
RAW = {
    "batch": {"k": K[:1]}, "dtype": {"k": K.half()}, "int": {"q": Q.long(), "k": K.long(), "v": V.long()}, "kv_dtype": {"kv": KV.double()},
    "decay_dtype": {"decay": G.half()}, "decay_shape": {"decay": G[:, :, :3]}, "decay_heads": {"decay": torch.zeros(2, 3, 5)}, "z_shape": {"z": Z[..., :5]},
    "group": {"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 6)}, "cu_seqlens_end": {"q": Q[:1], "k": K[:1], "v": V[:1], "decay": G[:1], "cu_seqlens": ENDS + 9},
    "beta_shape": {**GATED, "beta": BETA[:, :, :3]}, "beta_dtype": {**GATED, "beta": BETA.double()}, "beta_batch": {**GATED, "beta": BETA[:1]},
    "cu_seqlens_falling": {"q": Q[:1], "k": K[:1], "v": V[:1], "decay": G[:1], "cu_seqlens": ENDS.flip(0)},
    "z_missing": {"z": None}, "kv_missing": {"kv": None}, "beta_normalised": {"feature_map": "identity", "beta": BETA}, "taylor_vector": {"feature_map": "taylor1", "decay": VECTOR, "kv": None, "z": None},
}  # fmt: skip
BACKWARD = {
    "dout_shape": {"dout": OUT[:, :, :4]}, "dkv_shape": {"dkv": KV[..., :4]}, "head_dim": {"k": K[..., :4]}, "needs_short": {"needs": [True]},
}  # fmt: skip
RAW_BACKWARD = {
    "out_shape": {"out": OUT[:, :2]}, "dz_shape": {"dz": Z[:1]}, "saved_shape": {"saved": torch.zeros(3)}, "dout_dtype": {"dout": OUT.double()},
    "dout_batch": {"dout": OUT[:1]}, "dkv_dtype": {"dkv": KV.double()}, "saved_dtype": {"saved": torch.zeros(2, 4, 5).half()},
}  # fmt: skip
for b, forward, backward in (("eager", SHAPES, BACKWARD), ("native", SHAPES | RAW, BACKWARD | RAW_BACKWARD)):
    for name, changed in forward.items():
        expect("", **{f"op_{b}_{name}": partial(forward_op, b, **changed)})
    for name, changed in backward.items():
        expect("", **{f"op_{b}_backward_{name}": partial(backward_op, b, **changed)})
expect("", op_unknown_backend=lambda: forward_op("cudnn"))
expect("", op_missing_arguments=lambda: torch.ops.fastattn.linear_forward(Q, K, V))
expect("", op_wrong_types=lambda: torch.ops.fastattn.linear_forward(1, 2, 3, *X[3:], *PARAMS, True, "eager"))


if __name__ == "__main__":
    for name in sys.argv[1:] or CALLS:
        print(json.dumps({"start": name}), flush=True)
        try:
            CALLS[name][1]()
            outcome = {"name": name, "error": None, "message": "no exception"}
        except Exception as error:
            outcome = {"name": name, "error": type(error).__name__, "message": str(error)}
        print(json.dumps(outcome), flush=True)
    print(json.dumps({"alive": True}), flush=True)
