"""Weights that correct for sampling with another policy than the one that is said to have sampled."""

from typing import NamedTuple

import torch
from torch import Tensor

from rpp_kernels.reference.shared import padded, result_dtype, select, unpadded


class RolloutStats(NamedTuple):
    """Sums over the valid tokens of one call, which add as `PolicyStats` do.

    `outside_low`: tokens whose ratio is below `low`; `outside_high`: above `high`; `weights`: the weights themselves;
    `kl`: sampling_logps - old_logps, whose mean estimates KL(sampler || old policy).
    """

    num_tokens: Tensor
    outside_low: Tensor
    outside_high: Tensor
    weights: Tensor
    kl: Tensor

    def __add__(self, other: "RolloutStats") -> "RolloutStats":  # type: ignore[override]
        return RolloutStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "RolloutStats":  # sum() starts from 0
        return self


class RolloutWeights(NamedTuple):
    weights: Tensor
    stats: RolloutStats


def rollout_weights(
    old_logps: Tensor,  # (B, S) or (T,), constant
    sampling_logps: Tensor,  # same, constant
    completion_mask: Tensor | None = None,  # same, bool
    *,
    level: str = "token",
    outside: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
    log_ratio_clamp: float = 20.0,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> RolloutWeights:
    """rho = exp(clamp(L, +-log_ratio_clamp)), with d_t = old_logps_t - sampling_logps_t and

    level "token"      L_t = d_t
    level "sequence"   L_t = the sum of d over the sequence of t
    level "geometric"  L_t = the mean of d over the sequence of t

    outside "truncate"  w = clamp(rho, low, high)               [TIS]
    outside "mask"      w = rho where low <= rho <= high, else 0  [IcePop 2510.18855, at level "token"]
    """
    dtype = result_dtype(old_logps)
    d = old_logps.detach().to(dtype) - sampling_logps.detach().to(dtype)
    d, mask, packed_at = padded(d, completion_mask, cu_seqlens)
    d = select(d, mask)
    log_ratio = d if level == "token" else d.sum(1, keepdim=True)
    if level == "geometric":
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp().expand_as(d)
    below, above = ratio < low, ratio > high
    weights = ratio.clamp(low, high) if outside == "truncate" else torch.where(below | above, 0.0, ratio)
    weights = select(weights, mask)
    stats = RolloutStats(
        num_tokens=mask.sum().double(),
        outside_low=(mask & below).sum().double(),
        outside_high=(mask & above).sum().double(),
        weights=weights.double().sum(),
        kl=-d.double().sum(),
    )
    return RolloutWeights(unpadded(weights, packed_at), stats)
