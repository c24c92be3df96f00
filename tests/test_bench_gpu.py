"""What the bench would do on a GPU, without one: its grid and goals, and how calls are timed there."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.bench import environment, runner, session
from fastattn.bench.cases import all_cases, softmax
from fastattn.testing import timing


def test_the_gpu_preset_is_the_grid_with_its_goals_in_eight_minutes():
    cases = [case for case in all_cases() if "gpu" in case.presets]
    grid = [case for case in cases if case.bound == "compute" and not case.extra]
    assert len(grid) == 3 * 2 * 2 * 6
    assert {c.problem.B * c.problem.Lq for c in grid} == {16384}
    assert {c.problem.Hq * c.problem.D for c in grid} == {2048}
    by_name = {case.name: case for case in cases}
    causal = by_name["bf16 forward causal D128 L4096"]
    assert (causal.goal.of_peak, causal.goal.ratio, causal.must.of_peak, causal.must.ratio) == (0.85, 1.2, 0.70, 1.05)
    assert causal.goal.against == "cudnn" and {"cudnn", "flash", "triton", "flex"} <= set(causal.peers)
    assert by_name["bf16 forward full D128 L512"].must.ratio == 0.9
    assert by_name["bf16 backward full D128 L16384"].must.of_peak == 0.58
    portable = by_name["bf16 forward by portable CUDA"]
    assert (portable.goal.ratio, portable.goal.against, portable.peers) == (0.9, "flash", ("flash",))
    decode = [case for case in cases if case.bound == "memory"]
    assert decode and all(2 * c.problem.B * 8 * c.problem.Lk * 128 * 2 >= 64 << 20 for c in decode)
    assert all((c.must.of_peak, c.goal.of_peak) == (0.85, 0.92) for c in decode)
    # Of each implementation two calls to check, three to warm up, five rounds and one for memory, at a modest 100 TFLOP/s;
    # ten seconds to compile FlexAttention; a second for inputs and fp64; and as long as the preset times anything.
    calls = sum(11 * (len(case.peers) + 2) * case.flops for case in cases) / 100e12
    compiling = 10 * sum("flex" in case.peers for case in cases)
    assert calls + compiling + len(cases) * (1 + session.SECONDS_PER_CASE["gpu"]) < 8 * 60


def test_portable_kernels_are_asked_for_during_the_call_alone(monkeypatch):
    monkeypatch.delenv("FASTATTN_CUDA_KERNELS", raising=False)
    chosen = lambda *tensors, backend, **options: (backend, os.environ.get("FASTATTN_CUDA_KERNELS"))
    monkeypatch.setattr(fastattn, "attention", chosen)
    case = next(case for case in softmax.CASES if case.extra == "portable")
    ours = list(softmax.implementations(case).values())[-1]
    inputs = SimpleNamespace(q=None, k=None, v=None, mask=None)
    assert ours.call(inputs) == ("cuda", "portable") and "FASTATTN_CUDA_KERNELS" not in os.environ


class FakeCuda:
    """What torch.cuda is asked for while timing, written down in order."""

    def __init__(self):
        self.log = []

    def Event(self, enable_timing):
        log = self.log

        class Event:
            def record(self):
                log.append("record")

            def synchronize(self):
                log.append("synchronize")

            def elapsed_time(self, end):
                return 2.0

        return Event()

    def empty(self, size, dtype, device):
        assert size >= 64 << 20  # more than any L2 cache
        return SimpleNamespace(zero_=lambda: self.log.append("flush"))

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("side waits"))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("waits"))

    @contextmanager
    def stream(self, stream):
        self.log.append("side {")
        yield
        self.log.append("}")

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def graph(self, graph):
        self.log.append("capture {")
        yield
        self.log.append("}")


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake, empty=fake.empty, int8=torch.int8))
    return fake


def test_gpu_times_lie_between_events_after_a_flush(fake_cuda):
    samples = timing.interleave({"a": lambda: fake_cuda.log.append("call")}, device="cuda", rounds=3)
    assert samples["a"].seconds == (2e-3,) * 3
    assert fake_cuda.log[-15:] == ["flush", "record", "call", "record", "synchronize"] * 3


def test_graph_replay_launches_nothing_but_the_graph(fake_cuda):
    replay = timing.captured(lambda: fake_cuda.log.append("call"))
    timing.interleave({"a": replay}, device="cuda", rounds=1)
    warm_up = ["side waits", "side {", *["call"] * timing.WARM_UP_BEFORE_CAPTURE, "}", "waits"]
    assert fake_cuda.log[: len(warm_up) + 3] == [*warm_up, "capture {", "call", "}"]
    assert fake_cuda.log.count("call") == timing.WARM_UP_BEFORE_CAPTURE + 1 and "replay" in fake_cuda.log


def test_throttling_and_other_processes_are_warned_of(monkeypatch):
    answers = {"clocks_event": "Active, Not Active, [N/A], Active\n", "compute-apps": "1\n2\n"}
    monkeypatch.setattr(environment, "_output", lambda command: next(a for k, a in answers.items() if k in command[1]))
    assert environment.throttling() == ["hw thermal slowdown", "sw power cap"]
    assert "2 other processes use the GPU" in environment._gpu_warnings()
    monkeypatch.setattr(environment, "_output", lambda command: None)
    assert environment._gpu_warnings() == []


def test_what_cannot_be_captured_is_not_available(fake_cuda):
    def synchronises(x):
        raise RuntimeError("operation not permitted when stream is capturing")

    case = softmax.case("small", softmax.square(16, H=2, D=8), "fp32")
    every = softmax.implementations(case)
    result = runner.Result(case, runner.check(case, every))
    every["torch"] = softmax.Implementation(synchronises)
    with runner.calls_of(result, every, graph=True) as calls:
        assert list(calls) == ["fastattn"]
    assert result.outcomes["torch"].status == "n/a" and "capturing" in result.outcomes["torch"].reason
