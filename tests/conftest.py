"""Which backends the tests of the ops run on, and where."""

import functools
import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # Triton's kernels are then interpreted, which they must know before they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rpp_kernels import backends  # noqa: E402

# Another backend, or another device for one that is there, is one more line.
RUNS = (
    ("native", "cpu"),
    ("reference", "cpu"),
    ("triton", "cuda" if ON_GPU else "cpu"),
)


def pytest_generate_tests(metafunc):
    """A test that asks for `backend` or `device` runs on every one; marked `kernels`, on all but the reference."""
    if "run" in metafunc.fixturenames:
        kernels = metafunc.definition.get_closest_marker("kernels")
        runs = [run for run in RUNS if not kernels or run[0] != "reference"]
        metafunc.parametrize("run", runs, ids=map("-".join, runs), indirect=True)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "kernels: not for the reference, of which it holds by definition or by test_reference.py"
    )


@functools.cache
def patch_once():
    """Triton's interpreter replaces the functions of triton.language anew at each call of a helper, which takes two
    thirds of the time of these tests; once for each file of helpers is enough."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture
def run(request):
    """Within the test every op runs on this backend, and its tensors belong on `device`."""
    name, device = request.param
    reason = backends.why_not(name, device)
    if reason:
        pytest.skip(reason)
    if name == "triton" and device == "cpu":
        patch_once()
    with backends.use_backend(name):
        yield request.param


@pytest.fixture
def backend(run) -> str:
    return run[0]


@pytest.fixture
def device(run) -> str:
    return run[1]


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)
