"""The few collectives: sums, concatenations and moments over the processes of a group.

Every process of the group must take part, one with an empty batch too. Parts are combined in the order of ranks, so
that all processes have the same result to the last bit.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def group_name(process_group: "ProcessGroup | None") -> str:
    """What an op takes in place of a process group; "" for none."""
    return "" if process_group is None else process_group.group_name


def named_group(name: str) -> Any:
    if not name:
        return None
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def gathered(x: Tensor, process_group: "ProcessGroup") -> Tensor:
    """(ranks, *shape): the `x` of every rank, all of one shape."""
    parts = [torch.empty_like(x) for _ in range(process_group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=process_group)
    return torch.stack(parts)


def concatenated(x: Tensor, process_group: "ProcessGroup") -> tuple[Tensor, int]:
    """The (n,) tensors of all ranks, which may differ in n, side by side, and where this rank's begins.

    Reads the lengths back: on an accelerator this waits for it.
    """
    lengths: list[int] = gathered(torch.tensor(x.shape[0], device=x.device), process_group).tolist()
    longest = max(lengths)
    rows = gathered(torch.nn.functional.pad(x, (0, longest - x.shape[0])), process_group)
    whole = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
    return whole, sum(lengths[: process_group.rank()])


def merged_moments(moments: Tensor, process_group: "ProcessGroup") -> Tensor:
    """Count, mean and sum of squared deviations (3,) of all ranks' values, from each rank's (Chan et al. 1979)."""
    counts, means, squares = gathered(moments, process_group).unbind(1)
    count = counts.sum()
    mean = torch.where(counts > 0, counts * means, 0.0).sum() / count.clamp(min=1)
    between = torch.where(counts > 0, counts * (means - mean).square(), 0.0)
    return torch.stack([count, mean, (squares + between).sum()])
