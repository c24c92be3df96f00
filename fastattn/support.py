"""Which backend takes what, asked of the backends themselves: `python -m fastattn.support` prints the tables of the README."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from . import masks
from .backends import cuda
from .dispatch import BACKENDS
from .params import Call, LinearCall, LinearParams, LinearTensors, SoftmaxCall, SoftmaxParams, SoftmaxTensors

# The families of kernels of the backend "cuda" are asked one by one, with bfloat16 where a row names no dtype.
COLUMNS: dict[str, Callable[[Call], list[str]]] = {
    "native": BACKENDS["native"].why_not,
    "cuda, sm_90a": cuda.hopper_refuses,
    "cuda, sm_80 on": cuda.portable_refuses,
    "triton": BACKENDS["triton"].why_not,
    "eager": BACKENDS["eager"].why_not,
    "reference": BACKENDS["reference"].why_not,
}


def _softmax_calls(default: torch.dtype) -> list[tuple[str, Call]]:
    def call(dtype=default, D=64, Dv=64, Hq=2, Hk=2, Lq=8, Lk=8, grad=False, tensors=None, **options):
        q, k, v = torch.empty(1, Hq, Lq, D), torch.empty(1, Hk, Lk, D), torch.empty(1, Hk, Lk, Dv)
        params = SoftmaxParams(D**-0.5, **options)
        x = SoftmaxTensors(q.to(dtype), k.to(dtype), v.to(dtype), **(tensors or {}))
        return SoftmaxCall(x, params, grad)

    return [
        ("float32", call(torch.float32)),
        ("bfloat16", call(torch.bfloat16)),
        ("float16", call(torch.float16)),
        ("float64", call(torch.float64)),
        ("gradients of q, k, v and lse", call(grad=True)),
        ("causal, top-left and bottom-right", call(causal="bottom_right", Lq=4)),
        ("window", call(window_left=4, window_right=0)),
        ("bool mask, any broadcast shape", call(tensors={"mask": torch.ones(1, 1, 1, 8, dtype=torch.bool)})),
        ("bias with gradient, any broadcast shape", call(tensors={"bias": torch.zeros(1, 2, 8, 1)}, grad=True)),
        ("mask objects (tile plans), packed sequences", call(tensors={"plan": masks.causal().plan(8, 8)})),
        ("softcap", call(softcap=30.0, grad=True)),
        ("ALiBi with gradient", call(tensors={"slopes": torch.ones(1, 2)}, grad=True)),
        ("attention sinks with gradient", call(tensors={"sinks": torch.ones(2)}, grad=True)),
        ("dropout, the same bits everywhere", call(dropout_p=0.1)),
        ("grouped queries (GQA, MQA)", call(Hq=8, Hk=2)),
        ("value dimension other than D", call(D=64, Dv=32)),
        ("head dimension 256", call(D=256, Dv=256)),
        ("head dimension 512", call(D=512, Dv=512)),
        ("head dimension 1024", call(D=1024, Dv=1024)),
    ]


def _linear_calls(default: torch.dtype) -> list[tuple[str, Call]]:
    def call(dtype=default, B=1, heads=(2, 2, 2), L=8, Lk=None, D=16, fm="elu1", causal=True, grad=False, **more):
        step, tensors = more.pop("step", False), dict(more)
        lengths = (L, Lk or L, Lk or L)
        q, k, v = (torch.empty(B, h, n, D, dtype=dtype) for h, n in zip(heads, lengths))
        x = LinearTensors(q, k, v, **tensors)
        return LinearCall(x, LinearParams(fm, causal, fm != "identity", 1.0), grad, step)

    token, channel = -torch.ones(1, 2, 8), -torch.ones(1, 2, 8, 16)
    state = {"kv": torch.zeros(1, 2, 16, 16), "z": torch.zeros(1, 2, 16)}
    one = {"decay": token[:, :, :1], "beta": -token[:, :, :1], "kv": state["kv"]}
    sequences = torch.tensor([0, 3, 8], dtype=torch.int32)
    return [
        ("float32", call(torch.float32, grad=True)),
        ("bfloat16", call(torch.bfloat16, grad=True)),
        ("float16", call(torch.float16, grad=True)),
        ("float64", call(torch.float64, grad=True)),
        ("causal: identity, relu, elu1, normalised or not", call(fm="relu", grad=True)),
        ("taylor1", call(fm="taylor1", grad=True)),
        ("taylor2, head dimension 16", call(fm="taylor2", grad=True)),
        ("taylor2, head dimension 64", call(fm="taylor2", D=64, grad=True)),
        ("taylor2, head dimension 128", call(fm="taylor2", D=128, grad=True)),
        ("decay per head or token, with gradient", call(fm="identity", decay=token, grad=True)),
        ("decay per channel, with gradient", call(fm="identity", decay=channel, grad=True)),
        ("delta rule", call(fm="identity", beta=-token, grad=True)),
        ("delta rule with decay per head or token", call(fm="identity", beta=-token, decay=token, grad=True)),
        ("delta rule with decay per channel", call(fm="identity", beta=-token, decay=channel, grad=True)),
        ("initial and final state, with gradients", call(**state, grad=True)),
        (
            "not causal, key_mask, Lq other than Lk",
            call(causal=False, Lk=9, key_mask=torch.ones(1, 9, dtype=torch.bool)),
        ),
        ("packed sequences", call(cu_seqlens=sequences, grad=True)),
        ("shared heads of q, k or v", call(heads=(4, 1, 2), grad=True)),
        ("head dimension 256", call(D=256, grad=True)),
        ("one step in place", call(L=1, step=True, **state)),
        ("one step of the gated delta rule", call(L=1, fm="identity", step=True, **one)),
    ]


CALLS = {"softmax": _softmax_calls, "linear": _linear_calls}


def matrix(op: str) -> str:
    """Markdown table of `why_not` answers; Triton is asked in its interpreter, so that no GPU is needed."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        names = [name for name in COLUMNS if op == "softmax" or not name.startswith("cuda")]
        calls = {name: CALLS[op](torch.bfloat16 if name.startswith("cuda") else torch.float32) for name in names}
        lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for i, (row, _) in enumerate(calls["native"]):
            answers = ["no" if COLUMNS[name](calls[name][i][1]) else "yes" for name in names]
            lines.append(f"| {row} | " + " | ".join(answers) + " |")
        return "\n".join(lines)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if __name__ == "__main__":
    for op in CALLS:
        print(f"{op} attention\n\n{matrix(op)}\n")
