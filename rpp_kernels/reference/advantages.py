"""Returns, advantages and their normalisation over the batch."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rpp_kernels.reference.shared import all_shards, inverse_std, padded, result_dtype, select, stacked, unpadded

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class GAE(NamedTuple):
    """Generalised advantage estimates and the critic's targets, `returns = advantages + values`."""

    advantages: Tensor
    returns: Tensor


def returns(
    rewards: Tensor,  # (B, S) or (T,)
    completion_mask: Tensor | None = None,  # same, bool
    *,
    gamma: float = 1.0,
    gap: str = "carry",
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} [R++ eq. 7], t counting valid tokens only: a hole in the mask (tool output) neither
    pays, nor discounts, nor resets ("carry"). In a hole the sum starts anew with "reset", steps as in any token, which
    pays nothing, with "step"."""
    rewards, mask, packed_at = padded(rewards.to(result_dtype(rewards)), completion_mask, cu_seqlens)
    carry = rewards.new_zeros(rewards.shape[0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        in_hole = {"carry": carry, "reset": torch.zeros_like(carry), "step": gamma * carry}[gap]
        carry = torch.where(mask[:, t], rewards[:, t] + gamma * carry, in_hole)
        columns.append(carry)
    return unpadded(select(stacked(columns, rewards), mask), packed_at)


def gae(
    rewards: Tensor,  # (B, S) or (T,)
    values: Tensor,  # same
    completion_mask: Tensor | None = None,  # same, bool
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    gap: str = "carry",
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> GAE:
    """delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lambda A_{t+1}, returns_t = A_t + V_t [GAE eq. 11, 16].

    t counts valid tokens only, as in `returns`; beyond the last one V and A are 0. With `gap="step"` it counts all
    tokens, and where masked r and V are 0.
    """
    dtype = result_dtype(rewards)
    values, *_ = padded(values.to(dtype), completion_mask, cu_seqlens)
    rewards, mask, packed_at = padded(rewards.to(dtype), completion_mask, cu_seqlens)
    rewards, values = select(rewards, mask), select(values, mask)
    counts = torch.ones_like(mask) if gap == "step" else mask
    next_value = advantage = rewards.new_zeros(rewards.shape[0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(counts[:, t], delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(counts[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = select(stacked(columns, rewards), mask)
    targets = select(advantages + values, mask)
    return GAE(unpadded(advantages, packed_at), unpadded(targets, packed_at))


def whiten(
    values: Tensor,  # any shape
    completion_mask: Tensor | None = None,  # same, bool
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    eps_mode: str = "floor",
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """(x - mu) / sigma over all valid elements of the batch [R++ eq. 8; v9 eq. 5]; `shift_mean=False` puts mu back.

    1 / sigma = rsqrt(max(var, eps)) ("floor"), rsqrt(var + eps) ("add_var") or 1 / (sqrt(var) + eps) ("add_std").
    `unbiased` divides the squares by n - 1 (by 1 where n = 1). The batch is that of all ranks of a `process_group`.
    """
    x = select(values.to(result_dtype(values)), completion_mask)
    mask = torch.ones_like(x, dtype=torch.bool) if completion_mask is None else completion_mask
    batch, valid = all_shards(x.flatten(), process_group), all_shards(mask.flatten(), process_group)
    count = valid.sum()
    mean = batch.sum() / count.clamp(min=1)
    variance = select(batch - mean, valid).square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = select((x - mean) * inverse_std(variance, eps, eps_mode), mask)
    return whitened if shift_mean else select(whitened + mean, mask)
