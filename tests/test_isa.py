"""Every instruction set's build of the kernels, each in its own process: FASTATTN_ISA forces a lower one than the CPU has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.info import ISA_FLAGS

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
COMPACT = (
    "test_options_combined or test_every_option or test_head_dims or test_few_queries or test_bits_are or test_rows_that "
    "or test_first_tiles or test_native_takes or test_equal_logits or test_ties or test_backward_has "
    "or test_extra_with or test_softcap or test_huge_sinks "
    "or test_odd_widths or test_values_ or test_scores_of_minus or test_every_lane or test_every_feature_map or test_gradients_under_a_fast"
)
FILES = (
    "test_softmax.py",
    "test_softmax_masks.py",
    "test_softmax_numerics.py",
    "test_softmax_dropout.py",
    "test_softmax_extras.py",
    "test_linear_native.py",
    "test_parts.py",
)


def _missing(isa):
    """What this machine lacks for `isa`, or the build."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    missing = [flag for flag in ISA_FLAGS.get(isa, ()) if flag not in flags]
    usable = ISAS.index(isa) <= ISAS.index(fastattn._C.best_isa())
    return missing or ([] if usable else [f"a build or kernel with {isa}"])


def run(isa, *arguments):
    environment = {**os.environ, "FASTATTN_ISA": isa, "FASTATTN_TEST_BACKENDS": "native", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=Path(__file__).parent,
    )


@pytest.fixture(autouse=True)
def native():
    if fastattn.backends.native.status() is not None:
        pytest.skip(f"native: {fastattn.backends.native.status()}")


def test_the_best_isa_may_be_asked_for():
    """The others' processes, of the suite below, ask for theirs."""
    best = fastattn._C.best_isa()
    done = run(best, "-c", "import torch, fastattn; from fastattn import _C; print(_C.isa())")
    assert done.stdout.strip() == best, done.stderr


def test_explain_names_the_isa_that_runs():
    """Kernels that do not multiply bf16 are compiled for avx512 at most."""
    q = torch.randn(1, 1, 20, 16)
    isa = fastattn._C.isa()
    assert f" {isa} " in str(fastattn.explain(q, q, q))
    assert f" {isa if ISAS.index(isa) < ISAS.index('avx512') else 'avx512'} " in str(fastattn.explain_linear(q, q, q))


def test_unknown_isa_is_refused():
    done = run("avx1024", "-c", "import torch; from fastattn import _C; print(_C.isa())")
    assert done.returncode != 0 and "FASTATTN_ISA" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_native_suite(isa):
    """The native half of the tests; the ISA this CPU picks by itself has had all of it already."""
    missing = _missing(isa)
    if missing:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    if isa == fastattn._C.best_isa():
        pytest.skip(f"{isa} is the default here: the whole test session runs on it")
    # avx512_bf16 and amx hand all but bf16 down to avx512: where they run, only bf16 is left to test there.
    handed_down = isa == "avx512" and fastattn._C.best_isa() in ("avx512_bf16", "amx")
    # fp16 is fp32 but for how it is loaded and stored.
    dtypes = "bfloat16" if handed_down else "(not float16 or bfloat16 or test_options_combined or test_every_option)"
    which = f"test_forced_isa or ({COMPACT}) and {dtypes}"
    done = run(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", *FILES, "-k", which)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= (50 if handed_down else 150), done.stdout[-500:]
