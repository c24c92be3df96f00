"""What the numbers were measured on, and what may have disturbed them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastattn

from .peaks import native_library

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")

SMI_FIELDS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,ecc.mode.current"
PEERS = ("flash-attn", "flash-linear-attention", "xformers", "entmax", "natten")
VARIABLES = ("FASTATTN_", "OMP_", "GOMP_", "KMP_", "MKL_", "TORCH", "NVIDIA_TF32")
PINNED_BY = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
NOT_THROTTLED = ("Not Active", "[N/A]", "")


def describe(threads: int) -> dict[str, Any]:
    """Plain data: it goes into the JSON as it is."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "fastattn": fastattn.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            **{name: version for name in PEERS if (version := _version(name))},
        },
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        "cpu": _cpu(),
        "threads": threads,
        "pinned": any(name in os.environ for name in PINNED_BY),
        "variables": {n: v for n, v in sorted(os.environ.items()) if n.startswith(VARIABLES)},
        "gpu": _gpu(),
        "git": _git(),
        "warnings": _warnings(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    native = native_library()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": usable,
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "isa": native.isa() if native else "n/a: native library not built",
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip() or None,
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "smi": _output(["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]),
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git() -> dict[str, Any] | None:
    """Of the checkout this file, or the working directory, belongs to; None for an installed copy elsewhere."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        git = ["git", "-C", str(folder)]
        if _output([*git, "ls-files", "--error-unmatch", "bench/environment.py"]):
            commit, changes = _output([*git, "rev-parse", "HEAD"]), _output([*git, "status", "--porcelain"])
            return {"commit": commit, "dirty": bool(changes)}
    return None


def _warnings() -> list[str]:
    found = []
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        found.append(f"load average {os.getloadavg()[0]:.1f}: other work is running")
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    if governor not in ("", "performance"):
        found.append(f"CPU governor is {governor}: clocks may ramp during a run")
    if torch.version.debug:
        found.append("torch is a debug build")
    if _sanitized():
        found.append("the native library is a sanitizer build")
    if sys.gettrace() is not None:
        found.append("a Python tracer is active")
    if torch.cuda.is_available():
        found += _gpu_warnings()
    return found


def _sanitized() -> bool:
    try:
        return json.loads(_read(str(Path(fastattn.__file__).with_name("_build_info.json")))).get("sanitize") == "ON"
    except json.JSONDecodeError:
        return False


def _gpu_warnings() -> list[str]:
    found = [f"GPU throttled: {reason}" for reason in throttling()]
    processes = _output(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]) or ""
    others = [pid for pid in processes.split() if pid != str(os.getpid())]
    if others:
        found.append(f"{len(others)} other processes use the GPU")
    if torch.backends.cuda.matmul.allow_tf32:
        found.append("torch is allowed to multiply fp32 as tf32")
    return found


def throttling() -> list[str]:
    """What holds the GPU's clocks down now, in the words of nvidia-smi."""
    kinds = ("hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown", "sw_power_cap")
    fields = ",".join(f"clocks_event_reasons.{kind}" for kind in kinds)
    answer = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]) or ""
    states = [state.strip() for state in answer.partition("\n")[0].split(",")]
    return [kind.replace("_", " ") for kind, state in zip(kinds, states) if state not in NOT_THROTTLED]


@dataclass(frozen=True)
class Usage:
    """CPU seconds of the machine and of this process, to tell afterwards who else was there."""

    busy: float
    stolen: float
    own: float
    wall: float


def usage() -> Usage:
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    fields = [int(x) for x in _read("/proc/stat").partition("\n")[0].split()[1:9]]
    if len(fields) < 8:
        return Usage(own, 0.0, own, time.time())
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = fields
    return Usage((user + nice + system + irq + softirq) / tick, steal / tick, own, time.time())


def disturbances(before: Usage, after: Usage) -> list[str]:
    """Warnings about the time between two snapshots."""
    capacity = max(after.wall - before.wall, 1e-9) * (os.cpu_count() or 1)
    others = ((after.busy - before.busy) - (after.own - before.own)) / capacity
    stolen = (after.stolen - before.stolen) / capacity
    found = []
    if others > 0.03:
        found.append(f"other processes used {others:.0%} of the CPUs during the run")
    if stolen > 0.01:
        found.append(f"the hypervisor took {stolen:.0%} of the CPUs during the run")
    if torch.cuda.is_available():
        found += [f"GPU throttled at the end of the run: {reason}" for reason in throttling()]
    return found


def _named(smi: str | None) -> str:
    """The answer of nvidia-smi with the name of each field; several GPUs answer one line each, the first is ours."""
    if smi is None:
        return "nvidia-smi does not answer"
    names = (name.replace(".", " ").replace("_", " ") for name in SMI_FIELDS.split(","))
    return ", ".join(f"{name} {value.strip()}" for name, value in zip(names, smi.partition("\n")[0].split(",")))


def lines(environment: dict[str, Any]) -> list[str]:
    """The block printed above every run."""
    versions = "  ".join(f"{name} {value}" for name, value in environment["versions"].items() if value)
    cpu, git, gpu = environment["cpu"], environment["git"], environment["gpu"]
    commit = "not a checkout"
    if git and git["commit"]:
        commit = git["commit"][:12] + (" + local changes" if git["dirty"] else "")
    pinned = {True: ", pinned", False: ", not pinned", None: ""}[environment.get("pinned")]
    text = [
        versions,
        f"commit {commit}   {environment['os']}   {environment['time']}",
        f"CPU {cpu['model']}, {cpu['cores']} cores, L3 {cpu['l3']}, ISA {cpu['isa']} ({' '.join(cpu['flags'])})",
        f"threads {environment['threads']}{pinned}",
    ]
    if environment["variables"]:
        text.append("set: " + " ".join(f"{n}={v}" for n, v in environment["variables"].items()))
    if gpu:
        text.append(
            f"GPU {gpu['name']}, sm {gpu['capability']}, {gpu['memory_gb']} GB, CUDA {gpu['cuda']}, {_named(gpu['smi'])}"
        )
    return text + [f"warning: {warning}" for warning in environment["warnings"]]
