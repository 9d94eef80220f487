"""Which backends the tests of the ops run on, and where."""

import pytest
import torch

from rpp_kernels import backends

# Another backend, or another device for one that is there, is one more line.
RUNS = (
    ("native", "cpu"),
    ("reference", "cpu"),
)


@pytest.fixture(params=RUNS, ids="-".join)
def run(request):
    """Within the test every op runs on this backend and, by `device`, on this device."""
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
