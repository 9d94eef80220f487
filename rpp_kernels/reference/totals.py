"""Totals of a batch that comes in parts, to micro-batches or to ranks: the divisor of its loss, and its statistics."""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rpp_kernels.reference.shared import all_shards, padded

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup

Stats = TypeVar("Stats", bound=tuple[Tensor, ...])


def num_items_in_batch(
    completion_mask: Tensor,  # (B, S) or (T,) bool
    reduction: str = "token-mean",
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """What the losses divide by: valid tokens for "token-mean", sequences with a valid token for the others; on all
    ranks of a `process_group`, and at least 1."""
    mask, *_ = padded(completion_mask, None, cu_seqlens)
    count = mask.sum() if reduction == "token-mean" else mask.any(1).sum()
    return all_shards(count[None].double(), process_group).sum().clamp(min=1)


def sum_over_ranks(stats: Stats, process_group: "ProcessGroup | None") -> Stats:
    """Each tensor of a NamedTuple, summed over the ranks."""
    sums = [all_shards(x[None], process_group).sum(0, dtype=torch.float64).to(x.dtype) for x in stats]
    return type(stats)(*sums)
