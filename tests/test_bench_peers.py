"""Other people's packages get the same problem, in their own layout, outside the clock. Stand-ins compute what they would."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import masks as all_masks
from fastattn.bench import runner
from fastattn.bench.cases import free, linear, masks, softmax
from fastattn.testing.inputs import Case as Problem

SMALL = Problem(B=2, Hq=2, Hk=2, Lq=24, Lk=24, D=16)


def attend(q, k, v, **options):
    """Softmax attention of a package whose tensors are [B, L, H, D], as they lie in memory."""
    assert all(t.is_contiguous() for t in (q, k, v))
    return fastattn.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0):
    window = tuple(None if side < 0 else side for side in window_size)
    return attend(q, k, v, causal="bottom_right" if causal else False, window=window, softcap=softcap or None)


def memory_efficient_attention(q, k, v, attn_bias):
    return attend(q, k, v, **(attn_bias or {}))


BIASES = SimpleNamespace(
    LowerTriangularMask=lambda: {"causal": "top_left"},
    LowerTriangularFromBottomRightMask=lambda: {"causal": "bottom_right"},
    LocalAttentionFromBottomRightMask=lambda window_left, window_right: {"window": (window_left, window_right)},
)


def scan(q, k, v, g=None, beta=None):
    assert all(t.is_contiguous() for t in (q, k, v, g, beta) if t is not None)
    q, k, v, g, beta = (t if t is None else t.transpose(1, 2) for t in (q, k, v, g, beta))
    return fastattn.linear_attention(q, k, v, decay=g, beta=beta, feature_map="identity").transpose(1, 2), None


def na1d(q, k, v, kernel_size, dilation):
    return attend(q, k, v, mask=all_masks.neighborhood((q.shape[1],), kernel_size, dilation))


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    def install(name, **functions):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    install("flash_attn", flash_attn_func=flash_attn_func)
    fmha = SimpleNamespace(attn_bias=BIASES)
    install("xformers.ops", memory_efficient_attention=memory_efficient_attention, fmha=fmha)
    install("fla.ops.gla", chunk_gla=scan)
    install("fla.ops.simple_gla", chunk_simple_gla=scan)
    install("fla.ops.gated_delta_rule", chunk_gated_delta_rule=scan)
    install("natten", na1d=na1d)


def outcomes_of(module, case, *names):
    every = module.implementations(case, "auto", names)
    result = runner.Result(case, runner.check(case, every))
    runner.measure(result, every, rounds=1)
    return {name: (o.status, o.reason) for name, o in result.outcomes.items() if name in names}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("options, refused", [
    ({}, ""), ({"causal": "top_left"}, ""), ({"causal": "bottom_right", "Lk": 30}, ""), ({"causal": "top_left", "Lq": 30}, ""),
    ({"causal": "top_left", "Lk": 30}, "flash_attn"), ({"window": (5, 0), "causal": "top_left"}, ""), ({"window": (5, 3), "Lk": 30}, ""),
    ({"window": (None, 2)}, ""), ({"mask": "qk"}, "flash_attn xformers"), ({"softcap": 2.0}, "xformers"), ({"Hq": 4}, "xformers"),
], ids=str)  # fmt: skip
def test_bands_are_given_to_the_packages_that_take_them(options, refused, backward):
    case = softmax.case("small", replace(SMALL, **options), "fp32", backward=backward)
    found = outcomes_of(softmax, case, "flash_attn", "xformers")
    assert {name for name, (status, _) in found.items() if status != "ok"} == set(refused.split()), found


@pytest.mark.parametrize("text, band", [
    ("causal() & window(9)", True), ("window(9, 4)", True), ("full()", True), ("causal()", True), ("window(9) & window(4, 2)", True),
    ("causal() | prefix(9)", False), ("~causal()", False), ("documents([0, 0, 0, 0, 1, 1, 1, 1])", False),
])  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_masks_have_torchs_backends_and_those_that_take_a_band(text, band, backward):
    L = 8 if "documents" in text else 24
    (case,) = free.cases([(1, 2, 2, L, L, 16)], ["fp32"], None, text, backward, "cpu")
    found = outcomes_of(masks, case, "math", "efficient", "flash_attn", "xformers", "entmax")
    assert found["math"] == ("ok", "") and found["entmax"] == ("n/a", "not wired in this bench")
    for name in ("flash_attn", "xformers"):
        assert found[name] == (("ok", "") if band else ("n/a", "it takes no such mask"))


def test_bands_of_other_lengths_keep_their_alignment():
    for text in ("causal() & window(9)", 'causal("top_left")', "window(9, 2)"):
        (case,) = free.cases([(1, 2, 2, 24, 20, 16)], ["fp32"], None, text, False, "cpu")
        assert outcomes_of(masks, case, "flash_attn", "xformers") == dict.fromkeys(
            ("flash_attn", "xformers"), ("ok", "")
        )


def test_neighborhoods_go_to_natten():
    (case,) = free.cases([(1, 2, 2, 32, 32, 16)], ["fp32"], None, "neighborhood((32,), 5)", True, "cpu")
    assert outcomes_of(masks, case, "natten") == {"natten": ("ok", "")}


@pytest.mark.parametrize("variant", ["scalar decay", "vector decay", "gated delta"])
@pytest.mark.parametrize("backward", [False, True])
def test_fla_is_given_its_own_layout_outside_the_clock(variant, backward):
    problem = linear.Problem(1, 2, 64, 16, variant)
    case = linear.case("small", problem, "fp32", "eager", backward=backward, with_forward=backward)
    assert outcomes_of(linear, case, "fla", "natten") == {
        "fla": ("ok", ""),
        "natten": ("n/a", "it has no such operation"),
    }


@pytest.mark.parametrize(
    "options", [{}, {"causal": "top_left"}, {"window": (5, 0)}, {"Dv": 8}, {"Hq": 4}, {"Lq": 1}], ids=str
)
@pytest.mark.parametrize("backward", [False, True])
def test_torchs_own_row_names_the_backend_that_ran(options, backward):
    case = softmax.case("small", replace(SMALL, **options), "fp32", backward=backward)
    inputs, torch_row = softmax.make(case)[0], softmax.peers(case)["torch"]()
    with torch.profiler.profile() as profile:
        torch_row.call(inputs)
    ran = {event.name for event in profile.events()}
    backend = "flash" if "aten::_scaled_dot_product_flash_attention_for_cpu" in ran else "math"
    assert backend == "flash" or "aten::_scaled_dot_product_attention_math" in ran
    assert torch_row.kernel(inputs) == f"torch's choice, {backend}"
