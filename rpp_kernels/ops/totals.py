"""Totals of a batch that comes in parts, to micro-batches or to ranks: the divisor of its loss, and its statistics.

One path for every backend: sums over a mask, and one collective, which is an op for the sake of torch.compile.
"""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rpp_kernels.distributed import gathered, group_name, named_group
from rpp_kernels.ops import kernel_op
from rpp_kernels.ops.checks import (
    FLOATS,
    check_choice,
    check_constant,
    check_process_group,
    describe,
    fail,
    sequence_starts,
)
from rpp_kernels.ops.policy_loss import REDUCTIONS

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup

Stats = TypeVar("Stats", bound=tuple[Tensor, ...])


@kernel_op(lambda x, group_name: torch.empty_like(x))
def rank_sums(x: Tensor, group_name: str) -> Tensor:
    return gathered(x, named_group(group_name)).sum(0) if group_name else x.clone()


def num_items_in_batch(
    completion_mask: Tensor,  # (B, S) or (T,) bool
    reduction: str = "token-mean",
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`completion_mask.sum()` or `completion_mask.any(1).sum()`, by the reduction: what the loss of a batch divides by.

    Counted once over the whole batch and passed to every call of a loss as its `num_items_in_batch`, it makes the
    losses and gradients of micro-batches, and of ranks, add up to those of one call over all of it, however unequal the
    parts. Count before you cut, and do not divide by the number of micro-batches:

        items = num_items_in_batch(mask, process_group=group)  # of all that one optimizer step sees
        for rows in range(0, len(mask), 4):
            part = slice(rows, rows + 4)
            loss, stats = policy_loss(..., mask[part], num_items_in_batch=items)
            (loss * group.size()).backward()  # DDP and FSDP average over ranks; without them, no factor

    DDP and FSDP divide the sum of the ranks' gradients by their number: multiply the loss by `process_group.size()`.
    For the loss to log, add those of the parts (and of the ranks, `sum_over_ranks`), unmultiplied.

    Args:
        completion_mask: of this rank's whole share of the batch.
        reduction: that of the loss: "token-mean" counts valid tokens, the others ("seq-mean-token-mean",
            "seq-mean-token-sum", "seq-mean-token-sum-norm") sequences with a valid token.
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it the mask is padded (B, S).
        process_group: the ranks that share the batch. Each must call this, one with an empty batch too. Under tensor,
            sequence or pipeline parallelism it is the data-parallel group: ranks with the same tokens count them once.

    Returns:
        0-dim float64 on the device of the mask, at least 1; nothing is read back.

    Raises:
        ValueError: a shape, dtype, device or option that is not as above; the reduction "none", which does not divide.
    """
    if not isinstance(completion_mask, Tensor) or completion_mask.dtype != torch.bool:
        fail("completion_mask", "a bool tensor (completion_mask != 0)", describe(completion_mask))
    starts = sequence_starts(completion_mask, "completion_mask", cu_seqlens)
    check_choice("reduction", reduction, [name for name in REDUCTIONS if name != "none"])
    if process_group is not None:
        check_process_group(process_group)
    if reduction == "token-mean":
        count = completion_mask.sum()
    elif cu_seqlens is None:
        count = completion_mask.any(1).sum()
    else:
        before = torch.nn.functional.pad(completion_mask.cumsum(0), (1, 0))
        count = (before[starts].diff() > 0).sum()
    items = count.double()
    if process_group is not None:
        items = rank_sums(items, group_name(process_group))
    return items.clamp(min=1)


def sum_over_ranks(stats: Stats, process_group: "ProcessGroup | None") -> Stats:
    """`type(stats)(*(all_reduce(x) for x in stats))`: the sums of a batch from those of its ranks, in one collective.

    Of `PolicyStats` and `ValueStats`, or any NamedTuple of tensors. Micro-batches first: `sum(all_stats)`; then this,
    once a step; then divide.

    Args:
        stats: floats or integers, of the same shapes on all ranks. Sums are taken in float64, in the order of ranks, so
            that all have the same to the last bit.
        process_group: its ranks, each of which must call this; None for this process alone.

    Returns:
        The same NamedTuple, each tensor in its own dtype and shape.

    Raises:
        ValueError: not a NamedTuple of such tensors on one device, or one that requires grad.
    """
    if not hasattr(stats, "_fields"):
        fail("stats", "a NamedTuple of tensors", type(stats).__name__)
    for name, x in zip(stats._fields, stats, strict=True):
        if not isinstance(x, Tensor) or x.dtype not in (*FLOATS, torch.int64, torch.int32):
            fail(f"stats.{name}", "a tensor of floats, int64 or int32", describe(x))
        check_constant(f"stats.{name}", x)
        if x.device != stats[0].device:
            fail(f"stats.{name}", f"a tensor on {stats[0].device}", describe(x))
    if process_group is None or not stats:
        return stats
    check_process_group(process_group)
    flat = torch.cat([x.double().reshape(-1) for x in stats])
    sums = rank_sums(flat, group_name(process_group)).split([x.numel() for x in stats])
    return type(stats)(*(total.view(x.shape).to(x.dtype) for total, x in zip(sums, stats, strict=True)))
