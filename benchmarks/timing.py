"""Interleaved timing in one process, the parity check that comes before it, and the memory check that comes after.

A shared machine changes its speed by the minute, so a number alone says little here: in every round each contestant
runs once, in an order that rotates, and beside them a floor that moves the same bytes (or multiplies the same matrices)
with plain library calls. What is reported as a ratio is the median of the ratios within rounds.
"""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Work:
    """What is timed: a forward, and where there are gradients a backward of what the forward gave."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    prepare: Callable[[], None] | None = None  # before each forward, not timed


class Sample(NamedTuple):
    """Seconds of one run."""

    forward: float
    backward: float

    def of(self, phase: str) -> float:
        return {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}[phase]


class Spread(NamedTuple):
    median: float
    p20: float
    p80: float


def differentiated(
    function: Callable[..., Outputs], inputs: Mapping[str, Tensor], wrt: Sequence[str], grads: Sequence[Tensor]
) -> Work:
    """The work of calling a function, and of differentiating its first `len(grads)` outputs in the inputs of `wrt`.

    A function with a method `prepare` has that called with the inputs first.
    """
    leaves = {name: x.detach().requires_grad_(name in wrt) for name, x in inputs.items()}

    def forward() -> Outputs:
        return function(**leaves)

    def backward(outputs: Outputs) -> Outputs:
        return torch.autograd.grad(outputs[: len(grads)], [leaves[name] for name in wrt], list(grads))

    prepare = getattr(function, "prepare", None)
    return Work(forward, backward if wrt else None, prepare and (lambda: prepare(**leaves)))


class Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]


def results(work: Work) -> Results:
    """For the parity check."""
    if work.prepare:
        work.prepare()
    outputs = work.forward()
    gradients = work.backward(outputs) if work.backward else ()
    return Results(*([x.detach() for x in some] for some in (outputs, gradients)))


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of all, each relative to the largest value of its own; infinite where one is NaN."""
    worst = 0.0
    for x, want in zip(actual, exact, strict=True):
        if x.shape != want.shape:
            return float("inf")
        error = float((x.double() - want).abs().max() / want.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def run_once(work: Work) -> Sample:
    if work.prepare:
        work.prepare()
    start = time.perf_counter()
    outputs = work.forward()
    middle = time.perf_counter()
    if work.backward is None:
        return Sample(middle - start, 0.0)
    gradients = work.backward(outputs)
    end = time.perf_counter()
    del outputs, gradients  # not timed, for anyone
    return Sample(middle - start, end - middle)


def interleave(
    works: Mapping[str, Work],
    *,
    rounds: int | None = None,
    seconds: float = 6.0,
    at_least: int = 5,
    at_most: int = 100,
    run: Callable[[Work], Sample] = run_once,
) -> dict[str, list[Sample]]:
    """Every work once in each round, in a rotated order; without `rounds` as many as fit into `seconds`."""
    names = list(works)
    for name in names:
        run(works[name])  # warms caches and thread pools
    if rounds is None:
        start = time.perf_counter()
        for name in names:
            run(works[name])
        rounds = min(at_most, max(at_least, int(seconds / (time.perf_counter() - start))))
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(run(works[name]))
    return samples


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[3])


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def peak_extra_mib(work: Work) -> float | None:
    """How far the resident set rises above where it was while the work runs, its results included.

    Linux keeps the high-water mark and resets it on request, after the allocator has given back what earlier calls left
    with it. None where that cannot be had. Good to about a megabyte.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        before = _status("VmRSS")
        run_once(work)
        return max(0.0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(field: str) -> float:  # MiB
    with open("/proc/self/status") as f:
        found = re.search(rf"^{field}:\s+(\d+) kB", f.read(), re.MULTILINE)
    if found is None:
        raise KeyError(field)
    return int(found[1]) / 1024
