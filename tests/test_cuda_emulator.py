"""The emulator itself: it names what a device would not, and computes what the PTX ISA says."""

import os
import subprocess

import cuda_build
import pytest

EXPECTED = """\
missing_lane, block 0, thread 62: no thread can go on: threads 0-4 wait at shfl.bfly for threads 0-31; \
threads 5-5 have ended; threads 6-31 wait at shfl.bfly for threads 0-31; threads 32-63 have ended;
two_instructions, block 0, thread 1: at shfl.bfly while others of its group are at vote.any
missing_warp, block 0, thread 63: no thread can go on: threads 0-31 wait at bar.sync for threads 0-63; \
threads 32-63 have ended;
past_shared_memory, block 0, thread 0: ld.shared: 4 bytes at shared address 2048 of 1024 bytes from 1024
unaligned, block 0, thread 0: ld.shared: shared address 1028 is not a multiple of 8
never_true, block 0, thread 63: no thread can go on: threads 0-63 wait at a flag that nobody sets;
NaN before the wait, 1 after
product is off by 0
"""
EXPECTED_SM90 = """\
no_fence, block 0, thread 0: wgmma: no wgmma.fence after the last wait
stored_without_a_fence, block 0, thread 31: wgmma: thread 3 stored to shared address 1024 without a fence.proxy.async
more_registers_than_there_are, block 0, thread 382: no thread can go on: threads 0-255 have ended; \
threads 256-383 wait at setmaxnreg.inc;
one_arrival_too_many, block 0, thread 0: mbarrier.arrive: more arrivals than the phase counts
before their waits: tile NaN, product NaN
products are off by 0 and 0
"""


@pytest.mark.parametrize(
    ("name", "expected"), [("faults", EXPECTED), ("faults_sm90", EXPECTED_SM90)], ids=("sm80", "sm90")
)
def test_faults_are_named(name, expected, cuda_emulator, tmp_path):
    """cuda_emulator: skips where there is no compiler."""
    program = tmp_path / name
    sources = [str(cuda_build.EMULATOR / f) for f in (f"{name}.cpp", "machine.cpp")]
    subprocess.run([os.environ.get("CXX", "c++"), *cuda_build.FLAGS, *sources, "-o", str(program)], check=True)
    assert subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout == expected
