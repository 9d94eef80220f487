"""What only a GPU can show of the kernels, beside the tests of the ops, which run on it where there is one: any stream,
any device, a graph that is captured and replayed, the same bits each time. compute-sanitizer: benchmarks/gpu.py."""

import pytest
import torch
from every_kernel import CALLS, Sizes, assert_same_bits, calls_of, copied, written

from rpp_kernels import backends

HERE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="there is no GPU here; tests/test_emulated.py runs the same calls on a CPU"),
]
SIZES = Sizes(T=2048, B=4, V=2050, device="cuda")


@pytest.fixture(params=["native", "triton"])
def kernels(request):
    reason = backends.why_not(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    return backends.kernels(request.param)


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_the_same_bits_each_time(kernels, name, dtype):
    for what, function, arguments in calls_of(kernels, name, dtype, SIZES):
        first = written(function, copied(arguments))
        for _ in range(3):
            assert_same_bits(written(function, copied(arguments)), first, what)


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_in_any_stream(kernels, name, dtype):
    """The inputs become right in that stream alone, and late."""
    stream = torch.cuda.Stream()
    for what, function, arguments in calls_of(kernels, name, dtype, SIZES):
        expected = written(function, copied(arguments))
        late = copied(arguments)
        tensors = [(x, y) for x, y in zip(late, arguments, strict=True) if isinstance(x, torch.Tensor)]
        for x, _ in tensors:
            if x.is_floating_point():
                x.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for x, y in tensors:
                x.copy_(y)
            actual = written(function, late)
        stream.synchronize()
        assert_same_bits(actual, expected, what)


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_captured_in_a_graph(kernels, name, dtype):
    """Captured on other numbers than those that it is replayed on, twice."""
    for what, function, arguments in calls_of(kernels, name, dtype, SIZES):
        expected = written(function, copied(arguments))
        static = copied(arguments)
        written(function, copied(arguments))  # compiled, and attributes set, before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = written(function, static)
        for _ in range(2):
            for x, y in zip(static, arguments, strict=True):
                if isinstance(x, torch.Tensor):
                    x.copy_(y)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(captured, expected, what)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_on_a_device_that_is_not_the_current_one(kernels, name, dtype):
    on_first = calls_of(kernels, name, dtype, SIZES._replace(device="cuda:0"))
    on_second = calls_of(kernels, name, dtype, SIZES._replace(device="cuda:1"))
    with torch.cuda.device(0):
        for (what, function, arguments), (_, _, others) in zip(on_first, on_second, strict=True):
            moved = tuple(
                y.copy_(x) if isinstance(x, torch.Tensor) else x for x, y in zip(arguments, others, strict=True)
            )
            actual = written(function, moved)
            assert all(x.device.index == 1 for x in actual)
            assert torch.cuda.current_device() == 0
            assert_same_bits(actual, written(function, arguments), what)
