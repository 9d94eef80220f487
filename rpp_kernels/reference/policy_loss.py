"""The clipped surrogate of the policy and the clipped loss of the critic."""

from typing import NamedTuple

import torch
from torch import Tensor

from rpp_kernels.reference.shared import padded, per_token, reduced, result_dtype, select


class PolicyStats(NamedTuple):
    """Sums over the valid tokens of one call, as 0-dim float64 tensors on the device of the loss.

    They add: `a + b`, or `sum(list)`, is what one call over all the batches had given, so micro-batches and ranks sum
    theirs before anyone divides. `clipped_low`: advantage < 0 and ratio < 1 - epsilon_low; `clipped_high`:
    advantage > 0 and ratio > 1 + epsilon_high; `dual_clipped`: advantage < 0 and ratio > dual_clip; `approx_kl`:
    old_logps - logps.
    """

    num_tokens: Tensor
    num_sequences: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor
    ratio: Tensor
    approx_kl: Tensor

    def __add__(self, other: "PolicyStats") -> "PolicyStats":  # type: ignore[override]
        return PolicyStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "PolicyStats":  # sum() starts from 0
        return self


class PolicyLoss(NamedTuple):
    loss: Tensor
    stats: PolicyStats


class ValueStats(NamedTuple):
    """Sums over the valid tokens of one call, which add as `PolicyStats` do; `squared_error` is that of `values`."""

    num_tokens: Tensor
    num_sequences: Tensor
    clipped: Tensor
    squared_error: Tensor

    def __add__(self, other: "ValueStats") -> "ValueStats":  # type: ignore[override]
        return ValueStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "ValueStats":
        return self


class ValueLoss(NamedTuple):
    loss: Tensor
    stats: ValueStats


def policy_loss(
    logps: Tensor,  # (B, S) or (T,)
    old_logps: Tensor,  # same, constant
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    importance_sampling_level: str = "token",
    log_ratio_clamp: float = 20.0,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> PolicyLoss:
    """Clipped surrogate: minimise l_t = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) [PPO eq. 7; R++ eq. 6].

        r_t = exp(D_t), D = clamp(logps - old_logps, +-log_ratio_clamp)      importance_sampling_level "token"
        r_i = exp(mean of the sequence's unclamped D, then clamped)          "sequence" [GSPO eq. 7]
        where A < 0 and dual_clip is given: l_t = min(l_t, -dual_clip * A)   [dual eq. 5]

    N = num_items_in_batch, or the count of this call: valid tokens for "token-mean", else sequences with a valid token.

        "token-mean"             sum_t l_t / N                        "seq-mean-token-mean"  sum_i mean_t l_t / N
        "seq-mean-token-sum"     sum_i sum_t l_t / N                  "none"                 l_t
        "seq-mean-token-sum-norm"  sum_i sum_t l_t / (max_completion_length * N)  [Dr. GRPO 2503.20783]
    """
    dtype = result_dtype(logps)
    advantages, *_ = padded(per_token(advantages.to(dtype), logps, cu_seqlens), completion_mask, cu_seqlens)
    d, mask, packed_at = padded(logps.to(dtype) - old_logps.detach().to(dtype), completion_mask, cu_seqlens)
    d, advantages = select(d, mask), select(advantages.detach(), mask)
    log_ratio = d
    if importance_sampling_level == "sequence":
        log_ratio = (d.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(d)
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    low, high = 1 - epsilon_low, 1 + epsilon_high
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        dual_clipped = mask & (advantages < 0) & (ratio > dual_clip)
        loss = torch.where(dual_clipped, -dual_clip * advantages, loss)
    loss = select(loss, mask)
    stats = PolicyStats(
        num_tokens=mask.sum().double(),
        num_sequences=mask.any(1).sum().double(),
        clipped_low=(mask & (advantages < 0) & (ratio < low)).sum().double(),
        clipped_high=(mask & (advantages > 0) & (ratio > high)).sum().double(),
        dual_clipped=dual_clipped.sum().double(),
        ratio=select(ratio, mask).detach().double().sum(),
        approx_kl=-d.detach().double().sum(),
    )
    return PolicyLoss(reduced(loss, mask, reduction, num_items_in_batch, max_completion_length, packed_at), stats)


def value_loss(
    values: Tensor,  # (B, S) or (T,)
    old_values: Tensor,  # same, constant
    returns: Tensor,  # same, constant
    completion_mask: Tensor | None = None,  # same, bool
    *,
    epsilon: float | None = 0.2,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> ValueLoss:
    """l_t = max((V - R)^2, (V_clip - R)^2) / 2, V_clip = old + clamp(V - old, +-epsilon); `None`: (V - R)^2 / 2.

    The clipped critic loss of [PPO]'s reference implementation. Reductions as in `policy_loss`.
    """
    dtype = result_dtype(values)
    old_values, *_ = padded(old_values.detach().to(dtype), completion_mask, cu_seqlens)
    returns, *_ = padded(returns.detach().to(dtype), completion_mask, cu_seqlens)
    values, mask, packed_at = padded(values.to(dtype), completion_mask, cu_seqlens)
    values, old_values, returns = (select(x, mask) for x in (values, old_values, returns))
    error = (values - returns).square()
    squares, clipped = error, torch.zeros_like(mask)
    if epsilon is not None:
        clipped_values = old_values + (values - old_values).clamp(-epsilon, epsilon)
        clipped_error = (clipped_values - returns).square()
        clipped = mask & ((values - old_values).abs() > epsilon) & (clipped_error > error)
        squares = torch.maximum(error, clipped_error)
    stats = ValueStats(
        num_tokens=mask.sum().double(),
        num_sequences=mask.any(1).sum().double(),
        clipped=clipped.sum().double(),
        squared_error=error.detach().double().sum(),
    )
    loss = reduced(0.5 * squares, mask, reduction, num_items_in_batch, max_completion_length, packed_at)
    return ValueLoss(loss, stats)
