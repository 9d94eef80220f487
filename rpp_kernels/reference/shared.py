"""Pieces that several functions of the spec are made of."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def select(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """x.clamp(low, high) with the gradient of x at the bounds themselves, where that of torch is 0 from 2.15 on."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def all_shards(x: Tensor, process_group: "ProcessGroup | None") -> Tensor:
    """The rows of all ranks in their order; differentiable in this rank's own."""
    if process_group is None:
        return x
    lengths: list[int] = [0] * process_group.size()
    torch.distributed.all_gather_object(lengths, x.shape[0], group=process_group)
    shards = [x.new_zeros(max(lengths), *x.shape[1:]) for _ in lengths]
    own = torch.cat([x.detach(), shards[0][x.shape[0] :]])
    torch.distributed.all_gather(shards, own, group=process_group)
    parts = [shard[:length] for shard, length in zip(shards, lengths, strict=True)]
    parts[process_group.rank()] = x
    return torch.cat(parts)


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt whose gradient at 0 is 0 rather than infinite: a group of equal scores must not poison the others."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def inverse_std(variance: Tensor, eps: float, eps_mode: str) -> Tensor:
    if eps_mode == "floor":
        return variance.clamp(min=eps).rsqrt()
    if eps_mode == "add_var":
        return (variance + eps).rsqrt()
    return 1 / (safe_sqrt(variance) + eps)


def stacked(columns_from_the_end: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(columns_from_the_end[::-1], dim=1) if columns_from_the_end else like


def padded(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Padded view of x, its mask, and where each packed token went (rows, columns), for `unpadded`."""
    if cu_seqlens is None:
        return x, torch.ones_like(x, dtype=torch.bool) if mask is None else mask, None
    lengths = cu_seqlens.diff().long()
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=x.device), lengths)
    columns = torch.arange(x.shape[0], device=x.device) - cu_seqlens[:-1].long()[rows]
    shape = (lengths.numel(), int(lengths.max()) if lengths.numel() else 0)
    padded = x.new_zeros(shape).index_put((rows, columns), x)
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return padded, valid.new_zeros(shape).index_put((rows, columns), valid), (rows, columns)


def unpadded(x: Tensor, packed_at: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if packed_at is None else x[packed_at]


def per_token(advantages: Tensor, logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:  # (T,) beside sequences is never mistaken for (B,): theirs is (B, 1)
        if advantages.dim() == 1:
            return advantages
        lengths = cu_seqlens.diff().long()
        return torch.repeat_interleave(advantages[:, 0], lengths, output_size=logps.shape[0])
    return (advantages[:, None] if advantages.dim() == 1 else advantages).expand_as(logps)


def reduced(
    loss: Tensor,  # (B, S), 0 where masked
    mask: Tensor,  # (B, S) bool
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
    packed_at: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if reduction == "none":
        return unpadded(loss, packed_at)
    local_count = mask.sum() if reduction == "token-mean" else mask.any(1).sum()
    if reduction == "seq-mean-token-mean":
        loss = loss.sum(1) / mask.sum(1).clamp(min=1)
    count = local_count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    divisor = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
    if reduction == "seq-mean-token-sum-norm":
        assert max_completion_length is not None
        divisor = divisor * max_completion_length
    return (loss.sum() / divisor).to(loss.dtype)
