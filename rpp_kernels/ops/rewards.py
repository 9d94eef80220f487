"""Rewards: a score for each sequence and a KL for each token, made into a reward for each token."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.advantages import whiten
from rpp_kernels.ops.checks import (
    check_floats,
    check_integer,
    check_mask,
    check_number,
    check_ranks,
    check_shape,
    describe,
    fail,
    flat,
    flat_mask,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.reference.shared import clamp

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


@kernel_op(lambda scores, kl, *_: torch.empty_like(kl))
def token_rewards_fwd(
    scores: Tensor, kl: Tensor, mask: Tensor | None, cu_seqlens: Tensor, beta: float, backend: str
) -> Tensor:
    result: Tensor = kernels(backend).token_rewards_fwd(scores, kl, mask, cu_seqlens, beta)
    return result


@kernel_op(lambda d, mask, cu, *_: (d.new_empty(cu.shape[0] - 1), torch.empty_like(d)))
def token_rewards_bwd(
    drewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor, beta: float, backend: str
) -> tuple[Tensor, Tensor]:
    dscores, dkl = kernels(backend).token_rewards_bwd(drewards.contiguous(), mask, cu_seqlens, beta)
    return dscores, dkl


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, mask, cu_seqlens, ctx.beta, ctx.backend = inputs
    ctx.save_for_backward(mask, cu_seqlens)


def _backward(ctx: Any, drewards: Tensor) -> tuple[Tensor | None, ...]:
    dscores, dkl = token_rewards_bwd(drewards, *ctx.saved_tensors, ctx.beta, ctx.backend)
    return dscores, dkl, None, None, None, None


register_gradient(token_rewards_fwd, _backward, _setup_context)


def token_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, S) or (T,)
    completion_mask: Tensor | None = None,  # same, bool
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """`-beta * kl`, and the sequence's score on top at its last valid token.

    r_t = 1[t is the last valid token] * score - beta * kl_t (REINFORCE++ 2501.03262 eq. 4-5, PPO-style RLHF alike).

    Args:
        scores: one for each sequence, from the reward model or verifier.
        kl: `kl_penalty(old_logps, ref_logps)`, in nats.
        completion_mask: bool; elsewhere the reward is exactly 0. A sequence without a valid token gets none: its score
            has no token to stand on.
        beta: what a nat costs; REINFORCE++ uses 0.01 in general and 0.001 for mathematics.
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it `kl` is padded (B, S).

    Returns:
        The shape of `kl`; float64 for float64 `kl`, else float32. Differentiable in `scores` and `kl`.

    Raises:
        ValueError: a shape, dtype, device or range that is not as above.
    """
    check_floats("kl", kl, (1, 2))
    starts = sequence_starts(kl, "kl", cu_seqlens)
    check_floats("scores", scores, (1,), like=kl)
    check_shape("scores", scores, (starts.shape[0] - 1,), "of one for each sequence")
    check_mask(completion_mask, "kl", kl.shape, kl)
    check_number("beta", beta, "a finite number", -1e30, 1e30)
    backend = backend_of(kl, "token_rewards")
    if backend == "reference":
        return reference.token_rewards(scores, kl, completion_mask, beta=beta, cu_seqlens=cu_seqlens)
    dtype = result_dtype(kl)
    rewards: Tensor = token_rewards_fwd(
        flat(scores, dtype), flat(kl, dtype), flat_mask(completion_mask), starts, beta, backend
    )
    return rewards.view(kl.shape)


def normalize_rewards(
    scores: Tensor,  # (B,)
    *,
    zscore: bool = True,
    clip: tuple[float, float] | None = (-10.0, 10.0),
    scale: float = 1.0,
    eps: float = 1e-8,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`scale * ((scores - scores.mean()) / scores.std(correction=0)).clamp(*clip)`, each step optional.

    Reward processing of REINFORCE++ (2501.03262, 3.4): z-score over the batch, clip, scale. The paper prints no
    constants; the bounds are OpenRLHF's default, which clips the raw reward (`zscore=False`).

    Args:
        scores: one for each sequence of the batch.
        zscore: subtract the mean and divide by the population standard deviation, its variance floored at `eps`.
        clip: (low, high), applied after the z-score; None for no clip.
        scale: applied last.
        process_group: as in `whiten`: the z-score is over the scores of all its ranks, each of which must call this.

    Returns:
        (B,), float64 for float64 input, else float32. Differentiable in `scores` without a process_group.

    Raises:
        ValueError: a shape, dtype or range that is not as above; with process_group, `scores` that require grad.
    """
    check_floats("scores", scores, (1,))
    if clip is not None and not (isinstance(clip, (tuple, list)) and len(clip) == 2 and clip[0] < clip[1]):
        fail("clip", "(low, high) with low < high, or None", repr(clip))
    check_number("scale", scale, "a finite number", -1e30, 1e30)
    check_ranks(process_group, scores=scores)
    # One path for every backend: the whitening is the only step with a kernel, the rest is B numbers.
    scores = whiten(scores, eps=eps, process_group=process_group) if zscore else scores.to(result_dtype(scores))
    if clip is not None:
        scores = clamp(scores, *clip)
    return scale * scores


def overlong_penalty(
    lengths: Tensor,  # (B,) int32 or int64
    *,
    max_completion_length: int,
    buffer_length: int,
    scale: float = 1.0,
) -> Tensor:
    """`-scale * ((lengths - (max_completion_length - buffer_length)) / buffer_length).clamp(0, 1)`, to add to scores.

    The soft overlong punishment of DAPO (2503.14476 eq. 13): nothing up to max_completion_length - buffer_length
    tokens, then linearly down to -scale at max_completion_length, and -scale beyond.

    Args:
        lengths: tokens of each completion, `completion_mask.sum(1)`.
        max_completion_length: positive.
        buffer_length: from 1 to max_completion_length; DAPO has 4096 of 20480.
        scale: the whole penalty, in the unit of the scores; not negative.

    Returns:
        (B,) float32, from -scale to 0.

    Raises:
        ValueError: a shape, dtype or range that is not as above.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64) or lengths.dim() != 1:
        fail("lengths", "an int32 or int64 tensor of shape (B,)", describe(lengths))
    check_integer("max_completion_length", max_completion_length, "a positive integer", 1)
    check_integer("buffer_length", buffer_length, "a positive integer", 1)
    if buffer_length > max_completion_length:
        fail("buffer_length", f"at most max_completion_length, which is {max_completion_length}", buffer_length)
    check_number("scale", scale, "a finite number from 0", 0, 1e30)
    return reference.overlong_penalty(
        lengths, max_completion_length=max_completion_length, buffer_length=buffer_length, scale=scale
    )
