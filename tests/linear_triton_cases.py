"""Linear attention on the Triton backend against the recurrence in fp64. Run by test_linear_triton.py in a process of its
own: in Triton's interpreter, and on a GPU.

By hand: TRITON_INTERPRET=1 pytest tests/linear_triton_cases.py, or FASTATTN_TEST_DEVICE=cuda pytest tests/linear_triton_cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from harness import BF16, DEVICE, FP16, FP32

import fastattn
from fastattn import LinearState
from fastattn.params import feature_rows
from fastattn.testing import randn, relayout, rms_ratio

FP64 = torch.float64
RMS = {FP32: 2e-6, FP16: 5e-3, BF16: 5e-3}
# The interpreter's bf16 rounds toward zero.
DTYPES = (FP16,) if DEVICE == "cpu" else (FP32, BF16, FP16)


@dataclass(frozen=True)
class Case:
    """One call. decay: "", "head", "scalar" or "vector", drawn from [-gate, 0], or, with gate 0, -50 and -1e-4 mixed."""

    B: int = 1
    Hq: int = 1
    Hk: int = 1
    Hv: int = 1
    L: int = 40
    Lk: int = 0  # 0: L
    D: int = 20
    Dv: int = 18
    phi: str = "identity"
    causal: bool = True
    decay: str = ""
    gate: float = 1.0
    beta: bool = False
    state: bool = False
    mask: bool = False
    packed: tuple[int, ...] = ()
    chunk: int | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        default = Case()
        names = [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(default, name)]
        return "-".join(f"{name}={getattr(self, name)}" for name in names).replace(" ", "") or "default"


def inputs_of(case: Case, dtype: torch.dtype) -> dict:
    """Tensors by name; keys that are masked out hold NaN."""
    B, L, Lk, D, Dv, Hs = case.B, case.L, case.Lk or case.L, case.D, case.Dv, max(case.Hk, case.Hv)
    x = {
        "q": relayout(randn((B, case.Hq, L, D), dtype, 1), case.layout),
        "k": relayout(randn((B, case.Hk, Lk, D), dtype, 2), case.layout),
        "v": relayout(randn((B, case.Hv, Lk, Dv), dtype, 3), case.layout),
    }
    uniform = torch.Generator().manual_seed(4)
    if case.beta:
        x["k"] = torch.nn.functional.normalize(x["k"].float(), dim=-1).to(dtype)
        x["beta"] = torch.rand(B, Hs, L, generator=uniform) * 2
    if case.decay:
        shape = {"head": (Hs,), "scalar": (B, Hs, L), "vector": (B, Hs, L, D)}[case.decay]
        draw = torch.rand(shape, generator=uniform)
        x["decay"] = -case.gate * draw if case.gate else torch.where(draw < 0.3, -50.0, -1e-4)
    if case.state:
        shape = (len(case.packed) - 1 if case.packed else B, Hs, feature_rows(case.phi, D))
        x["kv"] = randn((*shape, Dv), FP32, 5)
        if case.phi != "identity":
            x["z"] = torch.rand(shape, generator=uniform) * 3
    if case.mask:
        x["key_mask"] = torch.rand(B, Lk, generator=uniform) < 0.6
        for name in "kv":
            x[name] = x[name].masked_fill(~x["key_mask"][:, None, :, None], float("nan"))
    return {name: t.to(DEVICE) for name, t in x.items()}


def run(case: Case, x: dict, backend: str) -> dict:
    """out, the final state and the gradients of everything, of a loss that reads both."""
    leaves = {name: t.detach().clone().requires_grad_() if t.is_floating_point() else t for name, t in x.items()}
    # clone keeps dense strides only; the layouts under test are those of x.
    leaves |= {name: x[name].detach().requires_grad_() for name in "qkv"}
    options = {name: leaves[name] for name in ("decay", "beta", "key_mask") if name in leaves}
    if "kv" in leaves:
        options["initial_state"] = LinearState(leaves["kv"], leaves.get("z"))
    if case.packed:
        options["cu_seqlens"] = torch.tensor(case.packed, dtype=torch.int32, device=x["q"].device)
    out, state = fastattn.linear_attention(
        leaves["q"], leaves["k"], leaves["v"], feature_map=case.phi, causal=case.causal, chunk_size=case.chunk,
        return_state=True, backend=backend, **options,
    )  # fmt: skip
    results = {"out": out, "kv": state.kv} | ({} if state.z is None else {"z": state.z})
    loss = sum((t.to(FP64) * randn(t.shape, FP32, 6 + n).to(t.device)).sum() for n, t in enumerate(results.values()))
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    return {name: t.detach() for name, t in results.items()} | {f"d{n}": g for n, g in zip(wanted, gradients)}


def check(case: Case, dtype: torch.dtype = FP32) -> None:
    x = inputs_of(case, dtype)
    found = run(case, x, "triton")
    golden = run(
        case, {name: t.cpu().to(FP64) if t.is_floating_point() else t.cpu() for name, t in x.items()}, "reference"
    )
    for name, expected in golden.items():
        error = rms(found[name].cpu().double() - expected)
        # What cancels, as the gradient of the weight of an only key, is known to a rounding of what it is made of.
        assert error <= RMS[dtype] * max(rms(expected), 0.1), f"{name}: {error:.2e} of {rms(expected):.2e}"


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


BASE = Case()
CASES = [
    replace(BASE, Hq=2, L=70),
    replace(BASE, phi="elu1", decay="scalar", state=True, B=2, Hq=2, Hv=2),
    replace(BASE, phi="relu", decay="vector", state=True, Hq=2, L=36),
    replace(BASE, decay="vector", gate=0.0),
    replace(BASE, decay="scalar", gate=0.0, L=70),
    replace(BASE, phi="elu1", decay="head", gate=1e-4, packed=(0, 3, 3, 36, 40), state=True),
    replace(BASE, phi="elu1", causal=False, mask=True, L=20, Lk=80, Hq=2, state=True),
    replace(BASE, causal=False, packed=(0, 0, 33, 40), state=True),
    replace(BASE, phi="taylor1", decay="scalar", Hv=2, L=20, D=7),
    replace(BASE, phi="taylor2", causal=False, mask=True, D=5),
    replace(BASE, phi="taylor2", L=35, D=3, state=True),
    replace(BASE, beta=True, decay="scalar", packed=(0, 5, 5, 40), state=True, Hq=2),
    replace(BASE, beta=True, L=70, chunk=64, Hk=2, Hv=1),
    replace(BASE, beta=True, decay="scalar", gate=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [replace(CASES[1], B=1), CASES[6], CASES[13]], ids=str)
def test_other_dtypes(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("decay", ["", "scalar", "vector"])
@pytest.mark.parametrize("phi", ["relu", "elu1"])
def test_the_gradient_of_a_denominator_reads_no_rounded_row(phi, decay):
    """fp16 in and out: dq, dk and dv are off by their own rounding, the gradient of the decay as in fp32."""
    if DEVICE != "cpu":
        pytest.skip("products are rounded to 16 bits there")
    x = inputs_of(replace(BASE, phi=phi, decay=decay, L=65), FP16)
    dout = randn((1, 1, 65, BASE.Dv), FP16, 6)

    def gradients(x, backend):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        out = fastattn.linear_attention(**leaves, feature_map=phi, backend=backend)
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))))

    golden = gradients({name: t.to(FP64) for name, t in x.items()}, "reference")
    for name, found in gradients(x, "triton").items():
        error = rms(found.double() - golden[name]) / rms(golden[name])
        assert error <= (RMS[FP32] if name == "decay" else 2.0**-11 / 3**0.5), f"{name}: {error:.2e}"


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("value", [0.0, -5.0, -50.0])
def test_gates_of_one_size(decay, value):
    """At -50, the gradient of decay is what is left of sums of numbers 1e20 times as large."""
    shape = (1, 1, 40) if decay == "scalar" else (1, 1, 40, 4)
    case = replace(BASE, D=4, Dv=4)
    x = inputs_of(case, FP32) | {"decay": torch.full(shape, value, device=DEVICE)}
    found, golden = run(case, x, "triton"), run(case, {n: t.cpu().to(FP64) for n, t in x.items()}, "reference")
    for name, expected in golden.items():
        assert rms_ratio(found[name], expected) <= RMS[FP32], name


@pytest.mark.parametrize("L", [1, 15, 17, 32, 33])
def test_lengths(L):
    check(replace(BASE, L=L, decay="scalar", phi="elu1", D=4, Dv=4))
    check(replace(BASE, L=L, beta=True, D=4, Dv=4))


def test_no_tokens():
    x = inputs_of(replace(BASE, L=0, state=True), FP32)
    out, state = fastattn.linear_attention(
        x["q"], x["k"], x["v"], feature_map="identity", initial_state=x["kv"], return_state=True, backend="triton"
    )
    assert out.shape[2] == 0 and torch.equal(state.kv, x["kv"])


@pytest.mark.parametrize("layout", ["blhd", "last_strided", "expanded"])
def test_layouts(layout):
    check(replace(BASE, L=20, phi="elu1", layout=layout))


def test_largest_head_dimension():
    check(replace(BASE, L=3, D=256, Dv=3))
    check(replace(BASE, L=3, D=3, Dv=255))


def test_features_of_zero_and_denominators_under_the_limit():
    """Queries whose features vanish have out 0 and finite gradients, in fp16 too, where 1e6 is out of range."""
    for dtype in (FP32, FP16):
        case = replace(BASE, phi="relu", L=20)
        x = inputs_of(case, dtype)
        x["q"][:, :, 5:9] = -1.0
        found = run(case, x, "triton")
        assert (found["out"][:, :, 5:9] == 0).all()
        assert all(t.isfinite().all() for t in found.values())


def test_results_do_not_depend_on_the_run_or_the_batch():
    case = replace(BASE, phi="elu1", decay="scalar", D=4, Dv=4)
    x = inputs_of(case, FP32)
    once, again = run(case, x, "triton"), run(case, x, "triton")
    assert all(torch.equal(once[name], again[name]) for name in once)
    with torch.no_grad():
        one = fastattn.linear_attention(x["q"], x["k"], x["v"], decay=x["decay"], backend="triton")
        many = [x[name].repeat(3, *[1] * (x[name].dim() - 1)) for name in ("q", "k", "v", "decay")]
        out = fastattn.linear_attention(*many[:3], decay=many[3], backend="triton")
    assert torch.equal(out, one.expand_as(out))


STEPS = [
    replace(BASE, phi="elu1", decay="scalar", B=2, Hq=4, Hv=2),
    replace(BASE, phi="relu", decay="vector"),
    replace(BASE, phi="taylor1"),
    replace(BASE, phi="taylor2", D=5, decay="head"),
    replace(BASE, beta=True, decay="scalar"),
    replace(BASE, beta=True, decay="vector"),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_steps(case):
    """Three tokens one by one, the state in place, against the recurrence over all of them."""
    case = replace(case, L=3, state=True)
    x = inputs_of(case, FP32)
    state = LinearState(x["kv"].clone(), x["z"].clone() if "z" in x else None)
    outs = []
    for t in range(3):
        now = {n: x[n][:, :, t : t + 1] if x[n].dim() > 1 else x[n] for n in ("q", "k", "v", "decay", "beta") if n in x}
        outs.append(fastattn.linear_attention_step(
            now.pop("q"), now.pop("k"), now.pop("v"), state, feature_map=case.phi, backend="triton", **now
        ))  # fmt: skip
    golden = run(case, {name: t.cpu().to(FP64) for name, t in x.items()}, "reference")
    found = {"out": torch.cat(outs, 2), "kv": state.kv} | ({} if state.z is None else {"z": state.z})
    for name, actual in found.items():
        assert rms_ratio(actual, golden[name]) <= RMS[FP32], name


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: about graphs")
def test_steps_in_a_graph():
    x = inputs_of(replace(BASE, L=1, phi="elu1", decay="scalar", state=True), FP32)
    state, eager = (LinearState(x["kv"].clone(), x["z"].clone()) for _ in range(2))
    call = lambda s: fastattn.linear_attention_step(x["q"], x["k"], x["v"], s, decay=x["decay"], backend="triton")
    call(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(state)
    graph.replay()
    expected = LinearState(x["kv"].clone(), x["z"].clone())
    assert torch.equal(out, call(expected)) and torch.equal(state.kv, expected.kv) and torch.equal(state.z, expected.z)
