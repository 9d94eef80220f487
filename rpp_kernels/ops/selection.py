"""Which tokens count: chosen by their place in the order of the whole batch.

Plain PyTorch on every backend: an order of the whole batch is a library's sort, and what surrounds it is little.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.ops.checks import (
    check_floats,
    check_like,
    check_mask,
    check_number,
    check_process_group,
    fail,
    sequence_starts,
)
from rpp_kernels.ops.policy_loss import check_advantages

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def top_entropy_mask(
    entropy: Tensor,  # any shape
    completion_mask: Tensor | None = None,  # same, bool
    *,
    fraction: float = 0.2,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`entropy >= torch.quantile(entropy[completion_mask], 1 - fraction)`: the tokens at which the policy hesitates.

    Training on the fifth of greatest entropy alone is as good or better (2506.01939; TRL's
    `top_entropy_quantile`): `policy_loss(..., weights=top_entropy_mask(out.entropy, mask).float())`, in whose mean the
    others still count. As its `completion_mask` it would leave them out of the mean too.

    Args:
        entropy: any one shape of at least one dimension and, unlike torch.quantile's, any size; a constant here.
        completion_mask: bool; elsewhere the result is False, and nothing counts.
        fraction: of the valid tokens that are chosen, 0 < fraction <= 1. The quantile is linear between neighbours;
            tokens that equal it are all chosen, and a NaN always.
        process_group: the quantile is then of the tokens of all its ranks. Every rank must call, one without tokens
            too. Reads lengths back: on an accelerator this waits for it, which nothing else here does.

    Returns:
        bool, the shape of `entropy`.

    Raises:
        ValueError: a shape, dtype, device or range that is not as above.
    """
    check_floats("entropy", entropy, range(1, 9))
    check_mask(completion_mask, "entropy", entropy.shape, entropy)
    _check_fraction(fraction)
    if process_group is not None:
        check_process_group(process_group)
    return reference.top_entropy_mask(entropy, completion_mask, fraction=fraction, process_group=process_group)


def clip_cov_weights(
    logps: Tensor,  # (B, S) or (T,)
    old_logps: Tensor,  # same
    advantages: Tensor,  # same, or one for each sequence as in policy_loss
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    generator: torch.Generator | None = None,
) -> Tensor:
    """`torch.where(chosen, 0.0, 1.0)`: a few random tokens of high covariance get no gradient, so that entropy stays.

    Clip-Cov (2505.22617): tokens whose log-prob and advantage go together are those that cost the policy its
    entropy. With means over the N valid tokens, a token may be chosen where

        low < (A - mean A) * (logps - mean logps) < high

    and it is not clipped already: not ratio > 1 + epsilon_high with A > 0, nor ratio < 1 - epsilon_low with A < 0. Of
    these `max(int(fraction * N), 1)` are drawn, or all where there are fewer.

        weights = clip_cov_weights(logps, old_logps, advantages, mask)
        loss = policy_loss(logps, old_logps, advantages, mask, weights=weights).loss

    Args:
        logps, old_logps, advantages, completion_mask, cu_seqlens: those of `policy_loss`, with the same `epsilon_low`
            and `epsilon_high`. Constants here: a choice has no gradient. Packed tokens need `cu_seqlens` for an
            advantage of each sequence only.
        fraction: 0 < fraction <= 1.
        generator: what the draw is made from, with `torch.randperm` over the candidates in their order; None is the
            CPU's default generator, whatever the device: a seed chooses the same tokens everywhere.

    Returns:
        The shape of `logps`, 1, at chosen and at masked tokens 0; float64 for float64 `logps`, else float32.

    The number of candidates is read back: on an accelerator this waits for it, and torch.compile breaks the graph.

    Raises:
        ValueError: a shape, dtype, device or range that is not as above.
    """
    _check_policy(logps, advantages, completion_mask, fraction, cu_seqlens)
    check_like("old_logps", old_logps, "logps", logps)
    check_number("low", low, "a number")
    check_number("high", high, f"a number from low, which is {low}", low)
    check_number("epsilon_low", epsilon_low, "a number from 0 to 1", 0, 1)
    check_number("epsilon_high", epsilon_high, "a number from 0", 0)
    if generator is not None and not isinstance(generator, torch.Generator):
        fail("generator", "a torch.Generator or None", repr(generator))
    return reference.clip_cov_weights(
        logps,
        old_logps,
        advantages,
        completion_mask,
        fraction=fraction,
        low=low,
        high=high,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        cu_seqlens=cu_seqlens,
        generator=generator,
    )


def kl_cov_mask(
    logps: Tensor,  # (B, S) or (T,)
    advantages: Tensor,  # same, or one for each sequence as in policy_loss
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    fraction: float = 2e-4,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """`cov >= cov.topk(max(1, int(fraction * N))).values[-1]`: the tokens of greatest covariance, to be held by a KL.

    KL-Cov (2505.22617): with cov = (A - mean A) * (logps - mean logps) over the N valid tokens, the greatest
    pay for leaving the policy that sampled, and nothing is clipped:

        mask = kl_cov_mask(logps, advantages, completion_mask)
        loss = policy_loss(logps, old_logps, advantages, completion_mask, epsilon_low=1, epsilon_high=math.inf,
                           ref_logps=torch.where(mask, old_logps, logps.detach()), beta=1.0, kl_estimator="abs").loss

    (a reference that is the policy itself costs nothing).

    Args:
        logps, advantages, completion_mask, cu_seqlens: those of `policy_loss`. Constants here: a choice has no
            gradient. Packed tokens need `cu_seqlens` for an advantage of each sequence only.
        fraction: 0 < fraction <= 1.

    Returns:
        bool, the shape of `logps`. Exactly `max(1, int(fraction * N))` valid tokens, of equal ones the first, and none
        where there is none. Nothing is read back.

    Raises:
        ValueError: a shape, dtype, device or range that is not as above.
    """
    _check_policy(logps, advantages, completion_mask, fraction, cu_seqlens)
    return reference.kl_cov_mask(logps, advantages, completion_mask, fraction=fraction, cu_seqlens=cu_seqlens)


def _check_policy(
    logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None,
    fraction: float,
    cu_seqlens: Tensor | None,
) -> None:
    check_floats("logps", logps, (1, 2))
    if logps.dim() == 1 and cu_seqlens is None:
        check_like("advantages", advantages, "logps", logps)
    else:
        check_advantages(advantages, logps, sequence_starts(logps, "logps", cu_seqlens).shape[0] - 1, cu_seqlens)
    check_mask(completion_mask, "logps", logps.shape, logps)
    _check_fraction(fraction)


def _check_fraction(fraction: float) -> None:
    check_number("fraction", fraction, "a number above 0, up to 1", 0, 1, open_low=True)
