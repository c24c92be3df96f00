"""Malformed calls: name -> (pattern the message must match, call). Run as a script: one JSON line per call."""

import json
import sys
from functools import partial

import numpy as np
import torch

import fastattn
from fastattn import attention, masks, scaled_dot_product_attention
from fastattn.params import SoftmaxParams, SoftmaxTensors

NAN = float("nan")
Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 8)
MASK, BIAS = torch.ones(2, 4, 5, 7, dtype=torch.bool), torch.zeros(2, 4, 5, 7)
OUT, LSE, PARTS = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5), torch.zeros(2, 4, 5, 2)
RNG = torch.tensor([1, 2])
FREED = torch.zeros(2, 4, 5, 8)
FREED.untyped_storage().resize_(0)
NESTED = torch.nested.nested_tensor([torch.zeros(4, 5, 8), torch.zeros(4, 6, 8)])
CALLS = {}


def expect(pattern, **calls):
    for name, call in calls.items():
        assert name not in CALLS, name
        CALLS[name] = (pattern, call)


# The public function: the message names the argument, and shows what was given.
expect(r"q .*\[4, 5, 8\]", public_q_3d=lambda: attention(Q[0], K, V))
expect(r"k .*\[2, 7, 8\]", public_k_3d=lambda: attention(Q, K[0], V))
expect(r"v .*\[1, 2, 2, 7, 8\]", public_v_5d=lambda: attention(Q, K, V[None]))
expect(r"q .*\[\]", public_q_scalar=lambda: attention(torch.tensor(1.0), K, V))
expect(r"batch.*q \[2, 4, 5, 8\].*k \[1, 2, 7, 8\]", public_batch=lambda: attention(Q, K[:1], V))
expect(r"batch.*v \[1, 2, 7, 8\]", public_batch_of_v=lambda: attention(Q, K, V[:1]))
expect(r"heads.*k \[2, 2, 7, 8\].*v \[2, 1, 7, 8\]", public_heads_of_v=lambda: attention(Q, K, V[:, :1]))
expect(r"4 heads of q.*3 heads", public_group=lambda: attention(Q, torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)))
expect(r"0 heads", public_zero_kv_heads=lambda: attention(Q, K[:, :0], V[:, :0]))
expect(r"4 heads|heads", public_zero_q_heads=lambda: attention(Q[:, :0], K, V))
expect(r"length.*k \[2, 2, 7, 8\].*v \[2, 2, 6, 8\]", public_lengths=lambda: attention(Q, K, V[:, :, :6]))
expect(r"head dimension.*k \[2, 2, 7, 4\]", public_head_dim=lambda: attention(Q, K[..., :4], V))
expect(r"dtype.*float16", public_mixed_dtype=lambda: attention(Q, K.half(), V))
expect(r"dtype.*int64", public_int=lambda: attention(Q.long(), K.long(), V.long()))
expect(r"dtype.*complex64", public_complex=lambda: attention(*(x.to(torch.complex64) for x in (Q, K, V))))
expect(r"dtype.*bool", public_bool=lambda: attention(Q.bool(), K.bool(), V.bool()))
expect(r"dtype.*float8", public_float8=lambda: attention(*(x.to(torch.float8_e4m3fn) for x in (Q, K, V))))
expect(r"device.*meta", public_device=lambda: attention(Q, K.to("meta"), V))
expect(r"q must be.*list", public_list=lambda: attention([1.0], K, V))
expect(r"v must be.*NoneType", public_none=lambda: attention(Q, K, None))
expect(r"q.*(sparse|layout)", public_sparse=lambda: attention(Q.to_sparse(), K, V))
expect(r"q.*nested.*padded", public_nested=lambda: attention(NESTED, NESTED, NESTED))
expect(r"mask.*\[5, 6\].*\[2, 4, 5, 7\]", public_mask_shape=lambda: attention(Q, K, V, mask=MASK[0, 0, :, :6]))
expect(r"mask.*\[3, 1, 1, 7\]", public_mask_batch=lambda: attention(Q, K, V, mask=torch.ones(3, 1, 1, 7).bool()))
expect(r"mask.*\[1, 2, 4, 5, 7\]", public_mask_5d=lambda: attention(Q, K, V, mask=MASK[None]))
expect(r"mask.*float32.*bias", public_mask_float=lambda: attention(Q, K, V, mask=BIAS))
expect(r"mask.*uint8", public_mask_uint8=lambda: attention(Q, K, V, mask=MASK.byte()))
expect(
    r"cu_seqlens_q.*meta.*CPU",
    public_packed_meta=lambda: attention(
        Q[:1], K[:1], V[:1], cu_seqlens_q=torch.zeros(2, dtype=torch.int32).to("meta")
    ),
)
expect(r"mask.*meta", public_mask_device=lambda: attention(Q, K, V, mask=MASK.to("meta")))
expect(r"mask.*str", public_mask_str=lambda: attention(Q, K, V, mask="causal"))
expect(r"mask.*layout", public_mask_sparse=lambda: attention(Q, K, V, mask=MASK.to_sparse()))
expect(r"bias.*bool", public_bias_bool=lambda: attention(Q, K, V, bias=MASK))
expect(r"bias.*float64", public_bias_double=lambda: attention(Q, K, V, bias=BIAS.double()))
expect(r"bias.*float16", public_bias_half=lambda: attention(Q, K, V, bias=BIAS.half()))
expect(r"bias.*\[4, 5, 8\]", public_bias_shape=lambda: attention(Q, K, V, bias=torch.zeros(4, 5, 8)))
expect(r"bias.*float", public_bias_number=lambda: attention(Q, K, V, bias=1.0))
expect(r"causal.*'left'", public_causal_name=lambda: attention(Q, K, V, causal="left"))
expect(r"causal.*3", public_causal_int=lambda: attention(Q, K, V, causal=3))
expect(r"causal", public_causal_tensor=lambda: attention(Q, K, V, causal=MASK))
expect(r"causal must be", public_causal_array=lambda: attention(Q, K, V, causal=np.array(["top_left", "x"])))
expect(r"window.*5", public_window_int=lambda: attention(Q, K, V, window=5))
expect(r"window.*\(1, 2, 3\)", public_window_three=lambda: attention(Q, K, V, window=(1, 2, 3)))
expect(r"window.*-1", public_window_negative=lambda: attention(Q, K, V, window=(-1, 0)))
expect(r"window.*1.5", public_window_float=lambda: attention(Q, K, V, window=(1.5, 0)))
expect(r"dropout_p.*1.5", public_p_high=lambda: attention(Q, K, V, dropout_p=1.5))
expect(r"deterministic.*'yes'", public_deterministic=lambda: attention(Q, K, V, deterministic="yes"))
expect(r"dropout_p.*-0.1", public_p_low=lambda: attention(Q, K, V, dropout_p=-0.1))
expect(r"dropout_p.*nan", public_p_nan=lambda: attention(Q, K, V, dropout_p=NAN))
expect(r"dropout_p.*None", public_p_none=lambda: attention(Q, K, V, dropout_p=None))
expect(r"scale.*nan", public_scale_nan=lambda: attention(Q, K, V, scale=NAN))
expect(r"scale.*inf", public_scale_inf=lambda: attention(Q, K, V, scale=float("inf")))
expect(r"scale must be finite", public_scale_huge=lambda: attention(Q, K, V, scale=10**400))
expect(r"scale.*Tensor", public_scale_tensor=lambda: attention(Q, K, V, scale=torch.tensor(1.0)))
expect(r"scale.*'1'", public_scale_str=lambda: attention(Q, K, V, scale="1"))
expect(r"backend.*'cudnn'", public_backend=lambda: attention(Q, K, V, backend="cudnn"))
expect(r"backend", public_backend_none=lambda: attention(Q, K, V, backend=None))
expect(r"backend must be.*got \[\]", public_backend_list=lambda: attention(Q, K, V, backend=[]))
expect(r"native.*float64", public_native_fp64=lambda: attention(Q.double(), K.double(), V.double(), backend="native"))
expect(r"native.*513", public_native_D=lambda: attention(*(torch.zeros(1, 1, 2, 513),) * 3, backend="native"))
expect(r"unexpected keyword.*softcaps", public_keyword=lambda: attention(Q, K, V, softcaps=1.0))
expect(r"softcap.*-1", public_softcap_negative=lambda: attention(Q, K, V, softcap=-1.0))
expect(r"softcap.*finite", public_softcap_huge=lambda: attention(Q, K, V, softcap=10**400))
expect(r"softcap.*'a'", public_softcap_str=lambda: attention(Q, K, V, softcap="a"))
expect(r"softcap.*nan", public_softcap_nan=lambda: attention(Q, K, V, softcap=NAN))
expect(r"sinks.*\[4\], got int", public_sinks_int=lambda: attention(Q, K, V, sinks=2))
expect(r"sinks \[2\].*\[4\]", public_sinks_shape=lambda: attention(Q, K, V, sinks=torch.zeros(2)))
expect(r"sinks.*int64", public_sinks_dtype=lambda: attention(Q, K, V, sinks=torch.zeros(4).long()))
expect(
    r"alibi_slopes \[3\].*\[4\] or \[2, 4\]",
    public_slopes_shape=lambda: attention(Q, K, V, alibi_slopes=torch.zeros(3)),
)
expect(r"alibi_slopes.*bool", public_slopes_dtype=lambda: attention(Q, K, V, alibi_slopes=torch.ones(4) > 0))
expect(
    r"alibi_slopes.*meta", public_slopes_device=lambda: attention(Q, K, V, alibi_slopes=torch.zeros(4, device="meta"))
)
expect(r"sinks.*layout", public_sinks_sparse=lambda: attention(Q, K, V, sinks=torch.zeros(4).to_sparse()))
expect(r"alibi_slopes.*nested", public_slopes_nested=lambda: attention(Q, K, V, alibi_slopes=NESTED))
expect(r"4 dimensions.*\[5, 8\]", explain_2d=lambda: fastattn.explain(Q[0, 0], K, V))
expect(r"backend must be.*'natvie'", explain_backend=lambda: fastattn.explain(Q, K, V, backend="natvie"))

# The drop-in.
expect(r"\[8\]", dropin_1d=lambda: scaled_dot_product_attention(Q[0, 0, 0], K, V))
expect(
    r"last dimension.*\[2, 2, 7, 4\]",
    dropin_head_dim=lambda: scaled_dot_product_attention(Q, K[..., :4], V, enable_gqa=True),
)
expect(
    r"attn_mask.*\[5, 6\]", dropin_mask=lambda: scaled_dot_product_attention(Q, K[:, :1], V[:, :1], MASK[0, 0, :, :6])
)
expect(r"attn_mask.*int64", dropin_mask_int=lambda: scaled_dot_product_attention(Q, K[:, :1], V[:, :1], MASK.long()))
expect(r"attn_mask.*layout", dropin_mask_sparse=lambda: scaled_dot_product_attention(Q, Q, Q, MASK.to_sparse()))
expect(r"attn_mask.*nested", dropin_mask_nested=lambda: scaled_dot_product_attention(Q, Q, Q, NESTED))
expect(r"attn_mask.*meta", dropin_mask_meta=lambda: scaled_dot_product_attention(Q, Q, Q, MASK.to("meta")))
expect(r"query.*layout", dropin_sparse=lambda: scaled_dot_product_attention(Q.to_sparse(), Q, Q))
expect(r"attn_mask must be.*list", dropin_type_mask=lambda: scaled_dot_product_attention(Q, Q, Q, [[True]]))
for value in ("no", None, 1, torch.tensor(True)):
    causal, gqa = {"is_causal": value}, {"enable_gqa": value}
    expect(
        r"is_causal must be a bool",
        **{f"dropin_type_causal_{value}": partial(scaled_dot_product_attention, Q, Q, Q, **causal)},
    )
    expect(
        r"enable_gqa must be a bool",
        **{f"dropin_type_gqa_{value}": partial(scaled_dot_product_attention, Q, Q, Q, **gqa)},
    )
expect(r"dropout_p.*None", dropin_type_p=lambda: scaled_dot_product_attention(Q, Q, Q, dropout_p=None))
expect(r"scale.*'1'", dropin_type_scale=lambda: scaled_dot_product_attention(Q, Q, Q, scale="1"))
expect(
    r"\[2, 4, 5, 5\].*query \[2, 4, 5, 8\].*mask=",
    dropin_mask_and_causal=lambda: scaled_dot_product_attention(Q, Q, Q, MASK[..., :5], 0.0, True),
)
expect(r"dropout_p.*2", dropin_p=lambda: scaled_dot_product_attention(Q, Q, Q, None, 2.0))
expect(r"enable_gqa", dropin_gqa=lambda: scaled_dot_product_attention(Q, Q[:, :3], Q[:, :3], enable_gqa=True))

# torch.ops: callable by anyone, past the checks above. Bad arguments must raise on every backend.
PARAMS = dict(SoftmaxParams(0.3)._asdict())


def forward_op(backend, q=Q, k=K, v=V, mask=None, bias=None, rng=None, **params):
    x = SoftmaxTensors(q, k, v, bias, mask=mask, rng=rng, plan=[])
    return torch.ops.fastattn.softmax_forward(*x, *{**PARAMS, **params}.values(), True, backend)


def backward_op(
    backend, dout=OUT, dlse=None, q=Q, k=K, v=V, mask=None, bias=None, rng=None, out=OUT, parts=PARTS, **params
):
    needs = params.pop("needs", [True, True, True, bias is not None, False, False])
    x, values = SoftmaxTensors(q, k, v, bias, mask=mask, rng=rng, plan=[]), {**PARAMS, **params}.values()
    return torch.ops.fastattn.softmax_backward(dout, dlse, *x, out, parts, *values, needs, backend)


SHAPES = {
    "q_3d": {"q": Q[0]}, "head_dim": {"k": K[..., :4]}, "lengths": {"v": V[:, :, :6]}, "kv_heads_zero": {"k": K[:, :0], "v": V[:, :0]},
    "group": {"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 8)}, "p_without_rng": {"dropout_p": 0.5},
    "mask_shape": {"mask": MASK[..., :6]}, "mask_batch": {"mask": torch.ones(3, 1, 1, 7, dtype=torch.bool)}, "bias_shape": {"bias": BIAS[..., :6]},
    "causal": {"causal": "diagonal"},
}  # fmt: skip
BACKWARD_SHAPES = {
    "dout_shape": {"dout": OUT[:, :, :4]}, "dout_head_dim": {"dout": OUT[..., :4]}, "parts_shape": {"parts": PARTS[:, :, :4]},
    "dlse_shape": {"dlse": LSE[:1, :, :3]}, "out_shape": {"out": OUT[:, :2]}, "head_dim": {"k": K[..., :4]}, "causal": {"causal": "diagonal"},
    "needs_short": {"needs": [True]}, "needs_bias_without_bias": {"needs": [True, True, True, True, False, False]},
}  # fmt: skip
# Batch and dtype: torch ops broadcast and promote them safely, raw pointers do not.
RAW = {"batch": {"k": K[:1]}, "dtype": {"k": K.half()}, "int": {"q": Q.long(), "k": K.long(), "v": V.long()}}
for b, table in (("eager", SHAPES), ("native", SHAPES | RAW)):
    for name, arguments in table.items():
        expect("", **{f"op_{b}_{name}": partial(forward_op, b, **arguments)})
    for name, arguments in BACKWARD_SHAPES.items():
        expect("", **{f"op_{b}_backward_{name}": partial(backward_op, b, **arguments)})
expect("", op_unknown_backend=lambda: forward_op("cudnn"))
expect("", op_missing_arguments=lambda: torch.ops.fastattn.softmax_forward(Q, K, V))
expect(
    "",
    op_wrong_types=lambda: torch.ops.fastattn.softmax_forward(
        1, 2, 3, *(None,) * 6, [], *PARAMS.values(), True, "eager"
    ),
)

# fastattn._C: reads raw pointers, so it checks everything itself and names what is wrong.
TENSORS = dict(SoftmaxTensors(Q, K, V)._asdict())
OPTIONS = {"scale": 0.3, "lo": None, "hi": None, "softcap": 0.0, "dropout_p": 0.0, "threads": 1}
FORWARD = {"out": OUT, "lse": LSE, "parts": PARTS}
BACKWARD = {"out": OUT, "parts": PARTS, "dq": torch.zeros(2, 4, 5, 8), "dk": torch.zeros(2, 2, 7, 8),
            "dv": torch.zeros(2, 2, 7, 8), "dbias": None, "dslopes": None}  # fmt: skip


def _values(changed, *tables):
    return [[changed.get(name, value) for name, value in table.items()] for table in tables]


def c_forward(**changed):
    from fastattn import _C

    tensors, rest, options = _values(changed, TENSORS, FORWARD, OPTIONS)
    return _C.softmax_forward(changed.get("tensors", tuple(tensors)), *rest, *options)


def c_backward(**changed):
    from fastattn import _C

    tensors, rest, options = _values(changed, TENSORS, BACKWARD, OPTIONS)
    return _C.softmax_backward(changed.get("dout", OUT), changed.get("dlse"), tuple(tensors), *rest, *options)


def c_calls(prefix, function, table):
    expect("", **{f"{prefix}_{name}": partial(function, **arguments) for name, arguments in table.items()})


c_calls("c", c_forward, {
    "none": {"q": None}, "number": {"q": 1}, "numpy": {"q": Q.numpy()}, "q_3d": {"q": Q[0]}, "head_dim": {"k": K[..., :4]},
    "lengths": {"v": V[:, :, :6]}, "batch": {"v": V[:1]}, "group": {"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 8)},
    "zero_kv_heads": {"k": K[:, :0], "v": V[:, :0]}, "dtype_k": {"k": K.half()}, "dtype_all": {"q": Q.double(), "k": K.double(), "v": V.double()},
    "int": {"q": Q.int()}, "meta": {"q": Q.to("meta")}, "sparse": {"q": Q.to_sparse()}, "mask_shape": {"mask": MASK[..., :6]},
    "mask_3d": {"mask": MASK[0]}, "mask_dtype": {"mask": MASK.byte()}, "mask_meta": {"mask": MASK.to("meta")}, "bias_shape": {"bias": BIAS[:, :3]},
    "bias_dtype": {"bias": BIAS.double()}, "rng_missing": {"dropout_p": 0.5}, "rng_dtype": {"dropout_p": 0.5, "rng": RNG.float()},
    "rng_short": {"dropout_p": 0.5, "rng": RNG[:1]}, "rng_meta": {"dropout_p": 0.5, "rng": RNG.to("meta")},
    "out_shape": {"out": OUT[:, :, :4]}, "out_dtype": {"out": OUT.half()}, "out_none": {"out": None}, "out_expanded": {"out": OUT[:1, :1, :1].expand(2, 4, 5, 8)},
    "out_is_q": {"out": Q}, "lse_shape": {"lse": LSE[:, :, :4]}, "lse_dtype": {"lse": LSE.double()}, "lse_none": {"lse": None}, "parts_shape": {"parts": PARTS[..., :1]},
    "parts_dtype": {"parts": PARTS.double()}, "parts_strided": {"parts": PARTS.mT.contiguous().mT},
    "p_high": {"dropout_p": 1.5, "rng": RNG}, "p_nan": {"dropout_p": NAN, "rng": RNG}, "p_negative": {"dropout_p": -0.5, "rng": RNG},
    "scale_nan": {"scale": NAN}, "scale_str": {"scale": "1"}, "lo_str": {"lo": "1"}, "lo_huge": {"lo": 2**70}, "threads_zero": {"threads": 0},
    "threads_negative": {"threads": -3}, "threads_none": {"threads": None}, "conjugate": {"q": torch.zeros(2, 4, 5, 8, dtype=torch.complex64).conj()},
    "tensors_none": {"tensors": None}, "tensors_short": {"tensors": (Q, K, V)}, "slopes_shape": {"slopes": torch.zeros(1, 3)},
    "slopes_batch": {"slopes": torch.zeros(3, 4)}, "slopes_dtype": {"slopes": torch.zeros(1, 4).half()}, "slopes_1d": {"slopes": torch.zeros(4)},
    "sinks_shape": {"sinks": torch.zeros(3)}, "sinks_dtype": {"sinks": torch.zeros(4).double()}, "sinks_strided": {"sinks": torch.zeros(8)[::2]},
    "diagonal_shape": {"diagonal": torch.zeros(4).int()}, "diagonal_dtype": {"diagonal": torch.zeros(5).long()}, "softcap_nan": {"softcap": NAN},
    "softcap_negative": {"softcap": -1.0}, "plan_type": {"plan": (1, 2)}, "plan_lengths": {"plan": masks.causal().plan(7, 5)},
    "plan_heads": {"plan": masks.key_padding(torch.ones(2, 3, 7) > 0).plan(5, 7)}, "plan_and_mask": {"plan": masks.causal().plan(5, 7), "mask": MASK},
    "plan_starts": {"plan": masks.causal().plan(5, 7)._replace(row_start=torch.tensor([0, 9]).int())},
    "negative_bit": {"q": torch._neg_view(Q)}, "float8": {"q": Q.to(torch.float8_e4m3fn)}, "int32": {"q": Q.int()}, "freed": {"q": FREED}, "nested": {"q": NESTED}, "head_dim_513": {"q": torch.zeros(2, 4, 5, 513), "k": torch.zeros(2, 2, 7, 513)},
})  # fmt: skip
c_calls("c_backward", c_backward, {
    "dout_none": {"dout": None}, "dout_shape": {"dout": OUT[..., :4]}, "dout_dtype": {"dout": OUT.double()}, "dlse_shape": {"dlse": LSE[:1]},
    "dlse_dtype": {"dlse": LSE.half()}, "parts_short": {"parts": PARTS[:, :, :4]}, "parts_none": {"parts": None}, "out_shape": {"out": OUT[:1]}, "dq_shape": {"dq": OUT[:, :2]},
    "dk_shape": {"dk": torch.zeros(2, 4, 7, 8)}, "dv_dtype": {"dv": V.half()}, "dbias_without_bias": {"dbias": BIAS},
    "dbias_shape": {"bias": BIAS, "dbias": BIAS[:1]}, "dbias_dtype": {"bias": BIAS, "dbias": BIAS.half()}, "dq_is_q": {"dq": Q},
    "dk_is_dv": {"dk": K.clone(), "dv": None} | {"dk": (shared := torch.zeros(2, 2, 7, 8)), "dv": shared},
    "dq_expanded": {"dq": OUT[:, :1].expand(2, 4, 5, 8)}, "head_dim": {"k": K[..., :4]}, "rng_missing": {"dropout_p": 0.5}, "threads": {"threads": 0},
    "dslopes_without_slopes": {"dslopes": torch.zeros(1, 4)}, "dslopes_shape": {"slopes": torch.zeros(1, 4), "dslopes": torch.zeros(2, 4)},
    "dslopes_batch": {"slopes": torch.zeros(2, 4), "dslopes": torch.zeros(1, 4)}, "dslopes_strided": {"slopes": torch.zeros(1, 4), "dslopes": torch.zeros(1, 8)[:, ::2]},
})  # fmt: skip


if __name__ == "__main__":
    if "--without-dlpack" in sys.argv:  # as in an older torch: tensors are read through their methods
        del torch.Tensor.__dlpack_c_exchange_api__
    for name in [name for name in sys.argv[1:] if name in CALLS] or CALLS:
        print(json.dumps({"start": name}), flush=True)
        try:
            CALLS[name][1]()
            outcome = {"name": name, "error": None, "message": "no exception"}
        except Exception as error:
            outcome = {"name": name, "error": type(error).__name__, "message": str(error)}
        print(json.dumps(outcome), flush=True)
    print(json.dumps({"alive": True}), flush=True)
