"""Which backend takes what, asked of the backends themselves: `python -m fastattn.support` prints the table of the README."""

from __future__ import annotations

import os

import torch

from . import masks
from .dispatch import BACKENDS
from .params import SoftmaxCall, SoftmaxParams, SoftmaxTensors

COLUMNS = ("native", "triton", "eager", "reference")


def _calls() -> list[tuple[str, SoftmaxCall]]:
    def call(dtype=torch.float32, D=64, Dv=64, Hq=2, Hk=2, Lq=8, Lk=8, grad=False, tensors=None, **options):
        q, k, v = torch.empty(1, Hq, Lq, D), torch.empty(1, Hk, Lk, D), torch.empty(1, Hk, Lk, Dv)
        params = SoftmaxParams(D**-0.5, **options)
        x = SoftmaxTensors(q.to(dtype), k.to(dtype), v.to(dtype), **(tensors or {}))
        return SoftmaxCall(x, params, grad)

    return [
        ("float32", call()),
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


def matrix() -> str:
    """Markdown table of `why_not` answers; Triton is asked in its interpreter, so that no GPU is needed."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
        for name, call in _calls():
            answers = ["no" if BACKENDS[backend].why_not(call) else "yes" for backend in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(answers) + " |")
        return "\n".join(lines)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if __name__ == "__main__":
    print(matrix())
