"""Every kernel in every variant, as benchmarks/kernel_calls.py lists them, for tests that treat all of them alike."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kernel_calls import Sizes, workload


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Each kernel and the dtype it works in.
CALLS = sorted({(name, _named(dtype)) for name, dtype, _ in workload(Sizes(T=8), cuda=True)})


def calls_of(kernels, name, dtype, sizes):
    """(what is different, the function, its arguments) of each variant."""
    if not hasattr(kernels, name):
        pytest.skip("only the CUDA backend has this kernel")
    torch.manual_seed(0)
    for found, work, variants in workload(sizes, cuda=True):
        if (found, _named(work)) == (name, dtype):
            for what, arguments in variants.items():
                yield what, getattr(kernels, name), arguments


def copied(arguments):
    """With tensors of their own, of which two that are one stay one."""
    copies = {id(x): x.clone() for x in arguments if isinstance(x, torch.Tensor)}
    return tuple(copies.get(id(x), x) for x in arguments)


def written(function, arguments):
    """What a call returns, and what it writes to its first argument."""
    results = function(*arguments)
    results = () if results is None else (results,) if isinstance(results, torch.Tensor) else results
    return [x.clone() for x in (*results, arguments[0]) if isinstance(x, torch.Tensor)]


def assert_same_bits(actual, expected, what):
    for a, b in itertools.zip_longest(actual, expected):
        assert torch.equal(a.cpu().nan_to_num(7.0), b.cpu().nan_to_num(7.0)), what
