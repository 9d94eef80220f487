"""The CUDA kernels on the machine that stands in for a GPU, and that machine itself (tests/cuda/emulator.h)."""

import os
import subprocess
from pathlib import Path

import emulated
import pytest
from every_kernel import CALLS, Sizes, assert_same_bits, calls_of, copied, written

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(emulated.PROBLEM is not None, reason=str(emulated.PROBLEM))


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_the_same_bits_whoever_comes_first(name, dtype, monkeypatch):
    """Threads and blocks in their order and in the reverse one: where one had to wait for another and did not, what it
    reads is not there yet in one of the two."""
    calls = 0
    for what, function, arguments in calls_of(emulated.kernels(), name, dtype, Sizes(T=24, B=4, V=2050)):
        monkeypatch.delenv("RPP_EMULATED_ORDER", raising=False)
        forward = written(function, copied(arguments))
        monkeypatch.setenv("RPP_EMULATED_ORDER", "reverse")
        assert_same_bits(written(function, copied(arguments)), forward, what)
        calls += 1
    assert calls


# ---------------------------------------------------------------- the machine

FAULTS = {
    "none": "",
    "a barrier that half of the threads come to": "threads wait for others that never come",
    "a shuffle that one lane misses": "threads wait for others that never come",
    "a write behind the shared memory": "a write behind the end of the shared memory",
    "a copy that nobody waits for": "wrong result",
    "a missing barrier": "wrong result",
    "too much shared memory": "more shared memory than a block has",
    "half a warp": "threads that are no whole warps",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = tmp_path_factory.mktemp("faults") / "faults"
    source = ROOT / "tests" / "cuda" / "faults.cpp"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", "-O1", "-w", str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("order", ["", "reverse"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds(fault, order, faults):
    env = {**os.environ, "RPP_EMULATED_ORDER": order}
    done = subprocess.run([faults, fault], capture_output=True, text=True, env=env, timeout=60)
    if fault == "a missing barrier" and not order:  # in the order of threads the one before has always written
        assert done.returncode == 0
        return
    assert FAULTS[fault] in done.stderr, done.stderr
    assert (done.returncode != 0) == (fault != "none")
