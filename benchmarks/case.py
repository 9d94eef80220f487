"""What a case is: an op, its inputs, its floor, and who competes. cases.py and linear_cases.py have the cases.

A competitor is a loader: called when its turn comes, it imports what it needs and returns a function of the case's
inputs that gives the case's outputs. A loader that raises ImportError is listed as not installed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from timing import Outputs, Work, differentiated
from torch import Tensor

Function = Callable[..., Outputs]
Loader = Callable[[], Function]
Tensors = dict[str, Tensor]

OURS = "rpp-kernels"


@dataclass(frozen=True)
class Data:
    inputs: Tensors
    wrt: tuple[str, ...] = ()  # the inputs that are differentiated
    grads: Outputs = ()  # of the first outputs

    def work(self, function: Function) -> Work:
        return differentiated(function, self.inputs, self.wrt, self.grads)

    def sample(self, every: int) -> "Data":
        """Every so-manieth row of every tensor, in float64: what the specification is asked about."""
        wide = {k: rows(x.double() if x.is_floating_point() else x, every) for k, x in self.inputs.items()}
        return Data(wide, self.wrt, tuple(rows(x.double(), every) for x in self.grads))


def rows(x: Tensor, every: int) -> Tensor:
    return x[::every] if x.dim() else x


@dataclass(frozen=True)
class Floor:
    """The least that must be done: `work` does it with plain library calls, `amount` says how much for each phase."""

    what: str
    unit: str  # "GB" or "GFlop"
    amount: dict[str, float]  # phase -> bytes or flops
    work: Callable[[], Work]


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    shape: str
    why: str
    data: Callable[[], Data]
    spec: Function
    competitors: Mapping[str, Loader]
    floor: Floor
    tolerance: float  # of the parity check, relative to the largest value
    check_every: int = 1  # row: where rows do not touch each other, a sample of them will do
    left_out: Mapping[str, str] = field(default_factory=dict)  # competitor -> why it does not run

    @property
    def phases(self) -> list[str]:
        return list(self.floor.amount)


def compiled(function: Function) -> Loader:
    return lambda: torch.compile(function, dynamic=False)


def plain(function: Function) -> Loader:
    return lambda: function


# ---------------------------------------------------------------- floors


def memory_floor(what: str, **phases: tuple[int, int]) -> Floor:
    """So many bytes read and written in each phase: a copy of what is written, a dot product of what is only read."""

    def pass_over(read: int, written: int) -> Callable[..., None]:
        source, out = torch.ones(max(read, written) // 4), torch.empty(written // 4)
        rest = source[out.numel() :]

        def run(_: object = None) -> None:
            if out.numel():
                out.copy_(source[: out.numel()])
            if rest.numel():
                torch.dot(rest, rest)

        return run

    amount = {phase: float(read + written) for phase, (read, written) in phases.items()}
    if "backward" in amount:
        amount["both"] = amount["forward"] + amount["backward"]
    return Floor(what, "GB", amount, lambda: Work(*(pass_over(*phases[phase]) for phase in phases)))


def matmul_floor(
    tokens: int, vocab: int, hidden: int, *phases: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Floor:
    """The three matrix products of a linear head, into memory that is there already; by default in all phases."""

    def work() -> Work:
        x, weight = (torch.randn(n, hidden, dtype=dtype, device=device) for n in (tokens, vocab))
        logits = x.new_empty(tokens, vocab)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)

        def forward() -> None:
            torch.mm(x, weight.T, out=logits)

        def backward(_: None) -> None:
            torch.mm(logits, weight, out=dx)
            torch.mm(logits.T, x, out=dweight)

        return Work(forward, backward)

    product = 2.0 * tokens * vocab * hidden
    amount = {"forward": product, "backward": 2 * product, "both": 3 * product}
    what = "the three bare matrix products, of 2 T V H flops each"
    return Floor(what, "GFlop", {phase: amount[phase] for phase in phases or amount}, work)
