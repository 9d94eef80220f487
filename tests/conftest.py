"""Which backends the tests of the ops run on, and where."""

import itertools
import os
from pathlib import Path

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file whose tests ask for worlds stays with one worker: each would start its own. Others go test by test."""
    from xdist.scheduler import LoadScopeScheduling

    root, tests = config.rootpath, Path(__file__).parent
    of_worlds = {str(p.relative_to(root)) for p in tests.rglob("test_*.py") if "from worlds import" in p.read_text()}

    class WorldsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file in of_worlds else nodeid

    return WorldsTogether(config, log)


def pytest_collection_modifyitems(items, config):
    """Of the cases of each test on what stands in for a GPU the first and every so-manieth behind it are among the
    others; `make test-gpu-kernels` runs the rest, and all of those that ask for a world, which runs whole."""
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
