"""Weights that correct for sampling with another policy than the one that is said to have sampled."""

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op
from rpp_kernels.ops.checks import (
    check_choice,
    check_constant,
    check_floats,
    check_like,
    check_mask,
    check_number,
    flat,
    flat_mask,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.reference import RolloutStats, RolloutWeights

LEVELS = {"token": 0, "sequence": 1, "geometric": 2}  # csrc/cpu/rollout.h, enum RolloutLevel


def _fake(old_logps: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(old_logps), old_logps.new_empty(len(RolloutStats._fields), dtype=torch.float64)


@kernel_op(_fake)
def rollout_weights_fwd(
    old_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    level: int,
    truncate: bool,
    low: float,
    high: float,
    log_ratio_clamp: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(weights, stats): of constants, so that there is no backward."""
    weights, stats = kernels(backend).rollout_weights_fwd(
        old_logps, sampling_logps, mask, cu_seqlens, level, truncate, low, high, log_ratio_clamp
    )
    return weights, stats


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
    """`torch.exp(old_logps - sampling_logps).clamp(low, high)`: importance weights of what an inference engine sampled.

    An engine samples with probabilities that are not quite those of the trainer, which makes training off-policy. With
    `policy_loss(..., weights=rollout_weights(...).weights)` each token's loss is weighted by

        rho = exp(clamp(L, +-log_ratio_clamp)), d = old_logps - sampling_logps

        level "token"              L = d
        level "sequence"           L = the sum of d over the sequence: its true, and much noisier, weight
        level "geometric"          L = the mean of d over the sequence
        outside "truncate"         clamp(rho, low, high)
        outside "mask"             rho where low <= rho <= high, else 0

    By the names they go by: truncated importance sampling (TIS, Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy training") is the default, and the same at level "sequence"; IcePop (2510.18855) is
    `outside="mask", low=0.5, high=5.0`; sequence and geometric masks (MIS, Liu et al. 2025) are "mask" at those levels.
    Weights of one kind kept by the ratio of another are products:

        each = rollout_weights(old_logps, sampling_logps, mask, high=math.inf).weights
        kept = rollout_weights(old_logps, sampling_logps, mask, level="geometric", outside="mask", low=0.5, high=5.0)
        weights = each * (kept.weights > 0)  # OpenRLHF's sequence mask of token weights

    Args:
        old_logps: of the trainer's policy when the completions were sampled.
        sampling_logps: of the engine for the tokens that it sampled. A NaN, "not known", makes its weight NaN, or those
            of its sequence; `torch.where(sampling_logps.isnan(), old_logps, sampling_logps)` leaves such a token as it
            is.
        completion_mask: bool; elsewhere the weight is exactly 0, and nothing counts.
        low, high: bounds of rho, 0 <= low <= high; `math.inf` for none above.
        log_ratio_clamp: the log-ratio, sum or mean is clamped to +-this before exp.
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it log-probs are padded (B, S).

    Returns:
        RolloutWeights(weights, stats): weights in the shape of `old_logps`, float64 for float64 input, else float32,
        and constant; `RolloutStats`, sums for the share of tokens outside the bounds, the mean weight and the KL.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; log-probs that require grad.
    """
    check_floats("old_logps", old_logps, (1, 2))
    check_like("sampling_logps", sampling_logps, "old_logps", old_logps)
    check_constant("old_logps", old_logps)
    check_constant("sampling_logps", sampling_logps)
    starts = sequence_starts(old_logps, "old_logps", cu_seqlens)
    check_mask(completion_mask, "old_logps", old_logps.shape, old_logps)
    check_choice("level", level, list(LEVELS))
    check_choice("outside", outside, ("truncate", "mask"))
    check_number("low", low, "a number from 0", 0)
    check_number("high", high, f"a number from low, which is {low}", low)
    check_number("log_ratio_clamp", log_ratio_clamp, "a positive number", 0, open_low=True)
    backend = backend_of(old_logps, "rollout_weights")
    if backend == "reference":
        return reference.rollout_weights(
            old_logps,
            sampling_logps,
            completion_mask,
            level=level,
            outside=outside,
            low=low,
            high=high,
            log_ratio_clamp=log_ratio_clamp,
            cu_seqlens=cu_seqlens,
        )
    dtype = result_dtype(old_logps)
    weights, stats = rollout_weights_fwd(
        flat(old_logps, dtype),
        flat(sampling_logps, dtype),
        flat_mask(completion_mask),
        starts,
        LEVELS[level],
        outside == "truncate",
        low,
        high,
        log_ratio_clamp,
        backend,
    )
    return RolloutWeights(weights.view(old_logps.shape), RolloutStats(*stats.unbind()))
