"""One row of a parity table says the same thing twice: as the host says it, and with our public functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from batches import Batch
from torch import Tensor

from rpp_kernels.testing import evaluate

Call = Callable[[Batch], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    host: Call
    ours: Call
    wrt: tuple[str, ...] = ()  # what the result is differentiated by
    exact: float | None = 1e-12  # rtol in float64: 1e-7 where the host has a 1e-8 in a divisor; None: float32 only
    holes: bool = True  # whether the mask has any
    options: dict[str, Any] | None = None  # of our call, where bugs can be planted in it


def row(name: str, host: Call, ours: Call, **fields: Any) -> Any:
    return pytest.param(Row(host, ours, **fields), id=name)


def cases(rows: list[Any]) -> Any:
    """Each row in each dtype that its host computes in, with three batches."""

    def decorated(test: Any) -> Any:
        parameters = [
            pytest.param(*row.values, dtype, id=f"{row.id}-{str(dtype)[6:]}")
            for row in rows
            for dtype in (torch.float32, torch.float64)
            if dtype == torch.float32 or row.values[0].exact is not None
        ]
        return pytest.mark.parametrize("seed", [0, 1, 2])(pytest.mark.parametrize(("row", "dtype"), parameters)(test))

    return decorated


def results(call: Call, batch: Batch, wrt: tuple[str, ...]) -> dict[str, Tensor]:
    """Values and gradients of a call, values for each token where they are defined only: under the mask."""

    def valid(x: Tensor) -> Tensor:
        return x[batch.completion_mask] if x.shape == batch.completion_mask.shape else x

    def named(tensors: dict[str, Tensor]) -> Any:
        result = call(Batch(tensors))
        return valid(result) if isinstance(result, Tensor) else Values(*(valid(x) for x in result))

    return evaluate(named, batch, wrt)


class Values(tuple[Tensor, ...]):
    """Several results, as `evaluate` takes them apart."""

    def __new__(cls, *values: Tensor) -> "Values":
        return super().__new__(cls, values)

    @property
    def _fields(self) -> list[str]:
        return [f"result{i}" for i in range(len(self))]


def distance(row: Row, batch: Batch) -> float:
    """The largest difference between the two sayings, relative to the tolerance: they agree up to 1.

    The tolerance is rtol of the number itself and a tenth of that of the largest number: losses are sums that cancel.
    """
    host, ours = (results(call, batch, row.wrt) for call in (row.host, row.ours))
    assert host.keys() == ours.keys()
    rtol = row.exact if batch.logps.dtype == torch.float64 else 2e-5
    largest = max(float(x.abs().max()) for x in host.values())
    assert largest > 0, "all zero: nothing is compared"
    distances = [0.0]
    for name, expected in host.items():
        actual = ours[name]
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, the host has {tuple(expected.shape)}"
        assert expected.isfinite().all(), f"{name}: the host's own is not finite"
        tolerance = rtol * expected.double().abs() + 0.1 * rtol * largest
        distances.append(float(((actual.double() - expected.double()).abs() / tolerance).nan_to_num(1e9).max()))
    return max(distances)
