"""What the bench would do on a GPU, without one: its grid and goals, and how calls are timed there."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.bench import environment, memory, peaks, runner, session
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


def test_gpu_peaks_are_matmuls_of_each_dtype_and_fp32_is_not_tf32(monkeypatch):
    switch, ran = SimpleNamespace(allow_tf32=True), []
    seconds = {"copy": 1e-3, "float32": 2e-3, "bfloat16": 4e-3, "float16": 5e-3}

    def interleave(calls, device, budget):
        assert device == "cuda"
        for call in calls.values():
            call()
        return {name: timing.Samples((seconds[name],)) for name in calls}

    def randn(*shape, device, dtype):
        assert device == "cuda"
        return [(dtype, shape[1:])] * shape[0]

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8")}
    fake = SimpleNamespace(
        **dtypes,
        randn=randn,
        empty=lambda size, dtype, device: SimpleNamespace(copy_=lambda source: ran.append(size)),
        matmul=lambda a, b: ran.append((a, b, switch.allow_tf32)),
        backends=SimpleNamespace(cuda=SimpleNamespace(matmul=switch)),
        cuda=SimpleNamespace(get_device_name=lambda: "a GPU"),
    )
    monkeypatch.setattr(peaks, "torch", fake)
    monkeypatch.setattr(peaks, "interleave", interleave)
    found = peaks.measure("cuda", 1)
    assert [one[0] for one in ran[1:]] == [
        (torch.float32, (4096, 4096)), (torch.bfloat16, (8192, 8192)), (torch.float16, (8192, 8192)),
    ]  # fmt: skip
    assert [one[2] for one in ran[1:]] == [False] * 3 and switch.allow_tf32 is True
    roofs = {dtype: found.of(dtype, "compute") for dtype in ("fp32", "bf16", "fp16")}
    expected = {"fp32": 2e-9 * 4096**3 / 2e-3, "bf16": 2e-9 * 8192**3 / 4e-3, "fp16": 2e-9 * 8192**3 / 5e-3}
    assert roofs == pytest.approx(expected)
    assert found.of("bf16", "memory") == pytest.approx(2e-9 * ran[0] / 1e-3)
    assert found.best(peaks.Peaks(fp32=1e9)).of("fp32", "compute") == 1e9
    assert peaks.Peaks(fp32=5.0, bf16=9.0).of("fp16", "compute") == 5.0  # as a CPU computes it


def test_the_gpu_is_described_with_named_fields(monkeypatch):
    properties = SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    fake = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True, get_device_properties=lambda i: properties),
        version=SimpleNamespace(cuda="12.9"),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91000)),
    )
    here = environment.describe(1)
    monkeypatch.setattr(environment, "torch", fake)
    answer = "550.1, 1755 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31, Enabled"
    monkeypatch.setattr(environment, "_output", lambda command: f"{answer}\n{answer}")
    gpu = environment._gpu()
    assert (gpu["name"], gpu["capability"], gpu["memory_gb"], gpu["multiprocessors"]) == ("a GPU", "9.0", 80.0, 132)
    (line,) = [line for line in environment.lines(here | {"gpu": gpu}) if line.startswith("GPU")]
    assert line == (
        "GPU a GPU, sm 9.0, 80.0 GB, CUDA 12.9, driver version 550.1, clocks sm 1755 MHz, clocks max sm 1980 MHz, "
        "clocks mem 2619 MHz, power limit 700.00 W, temperature gpu 31, ecc mode current Enabled"
    )
    assert any(
        line.endswith("nvidia-smi does not answer") for line in environment.lines(here | {"gpu": gpu | {"smi": None}})
    )


def test_gpu_memory_is_the_allocators_peak_beyond_what_was_there(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 175)
    assert memory.peak_extra(lambda: log.append("call"), "cuda") == 75
    assert log == ["reset", "call"]

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert memory.peak_extra(too_large, "cuda") is None
