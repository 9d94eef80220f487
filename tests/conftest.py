"""Which backends the tests of the ops run on, and where."""

import itertools
import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # Triton's kernels are then interpreted, which they must know before they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated  # noqa: E402

from rpp_kernels import backends  # noqa: E402
from rpp_kernels.backends import triton  # noqa: E402

if triton.INTERPRETED and not triton.PROBLEM:
    import interpreter

    interpreter.prepare()

backends.BACKENDS["emulated"] = backends.Backend(emulated.kernels, emulated.why_not)

# Another backend, or another device for one that is there, is one more line.
RUNS = (
    ("native", "cpu"),
    ("reference", "cpu"),
    ("triton", "cuda" if ON_GPU else "cpu"),
    ("native", "cuda") if ON_GPU else ("emulated", "cpu"),
)
# Of what stands in for a GPU, and takes its time: one case of a test in so many is among those of `make test`.
ONE_IN = {("triton", "cpu"): 64, ("emulated", "cpu"): 16}


def pytest_generate_tests(metafunc):
    """A test that asks for `backend` or `device` runs on every one; marked `kernels`, on all but the reference."""
    if "run" in metafunc.fixturenames:
        kernels = metafunc.definition.get_closest_marker("kernels")
        left_out = {"reference"} if kernels else set()
        if {"worlds", "ranks"} & set(metafunc.fixturenames):  # whose processes have the backends of the package
            left_out.add("emulated")
        runs = [run for run in RUNS if run[0] not in left_out]
        metafunc.parametrize("run", runs, ids=map("-".join, runs), indirect=True)


def pytest_addoption(parser):
    parser.addoption("--share", type=int, default=1, help="of the cases marked gpu_kernels only one in so many")


def _of_a_world(item) -> bool:
    return bool({"worlds", "ranks"} & set(getattr(item, "fixturenames", ())))


def pytest_collection_modifyitems(items, config):
    """Of the cases of each test on what stands in for a GPU the first and every so-manieth behind it are among the
    others; `make test-gpu-kernels` runs the rest, and all of those that ask for a world, which runs whole. One worker
    has all worlds: each would start its own."""
    for item in items:
        if _of_a_world(item):
            item.add_marker(pytest.mark.xdist_group("worlds"))
    rest = []
    for run, one_in in ONE_IN.items():
        cases = (x for x in items if hasattr(x, "callspec") and x.callspec.params.get("run") == run)
        for _, of_test in itertools.groupby(cases, lambda x: x.function):
            rest += [case for i, case in enumerate(of_test) if i % one_in or _of_a_world(case)]
    for case in rest:
        case.add_marker(pytest.mark.gpu_kernels)
    left_out = {x for i, x in enumerate(rest) if i % config.option.share}
    items[:] = [x for x in items if x not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group: of pytest-xdist, without which the tests run too")
    config.addinivalue_line(
        "markers", "kernels: not for the reference, of which it holds by definition or by test_reference.py"
    )


@pytest.fixture
def run(request):
    """Within the test every op runs on this backend, and its tensors belong on `device`."""
    name, device = request.param
    reason = backends.why_not(name, device)
    if reason:
        pytest.skip(reason)
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
