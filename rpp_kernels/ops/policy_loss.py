"""The clipped surrogate of the policy and the clipped loss of the critic."""

from typing import Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import (
    check_choice,
    check_constant,
    check_count,
    check_floats,
    check_like,
    check_mask,
    check_number,
    describe,
    fail,
    flat,
    flat_mask,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.reference import PolicyLoss, PolicyStats, ValueLoss, ValueStats

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none")
INFINITY = float("inf")


def _fake(num_stats: int) -> Any:
    def shapes(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        per_token, stats = arguments[-2], x.new_empty(num_stats, dtype=torch.float64)
        return torch.empty_like(x) if per_token else x.new_empty(()), torch.empty_like(x), stats

    return shapes


# ---------------------------------------------------------------- policy


@kernel_op(_fake(len(PolicyStats._fields)))
def policy_loss_fwd(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    sequence_advantages: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float,
    log_ratio_clamp: float,
    sequence_ratio: bool,
    sequence_mean: bool,
    per_token: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, stats): each token's loss or their weighted sum, d(loss) / d(logps), sums as in PolicyStats."""
    loss, slope, stats = kernels(backend).policy_loss_fwd(
        logps,
        old_logps,
        advantages,
        sequence_advantages,
        mask,
        cu_seqlens,
        epsilon_low,
        epsilon_high,
        dual_clip,
        log_ratio_clamp,
        sequence_ratio,
        sequence_mean,
        per_token,
    )
    return loss, slope, stats


@kernel_op(lambda dloss, slope, *_: torch.empty_like(slope))
def policy_loss_bwd(dloss: Tensor, slope: Tensor, mask: Tensor | None, cu_seqlens: Tensor, backend: str) -> Tensor:
    """Of unreduced losses of a sequence-level ratio: each token moves the losses of its whole sequence."""
    result: Tensor = kernels(backend).policy_loss_bwd(dloss.contiguous(), slope, mask, cu_seqlens)
    return result


@kernel_op(lambda slope, dloss: torch.empty_like(slope))
def slope_bwd(slope: Tensor, dloss: Tensor) -> Tensor:
    """The chain rule, with a slope that the forward kept. An op only so that a second derivative is refused."""
    return slope * dloss


def _policy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mask, cu_seqlens, sequence_ratio, per_token, ctx.backend = inputs[4], inputs[5], inputs[10], inputs[12], inputs[13]
    ctx.across_tokens = sequence_ratio and per_token
    ctx.save_for_backward(output[1], *((mask, cu_seqlens) if ctx.across_tokens else (None, None)))
    ctx.set_materialize_grads(False)


def _policy_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    slope, mask, cu_seqlens = ctx.saved_tensors
    if dloss is None:
        return (None,) * 14
    dlogps = (
        policy_loss_bwd(dloss, slope, mask, cu_seqlens, ctx.backend) if ctx.across_tokens else slope_bwd(slope, dloss)
    )
    return dlogps, *(None,) * 13


register_gradient(policy_loss_fwd, _policy_backward, _policy_setup)


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
    """`-torch.min(r * A, r.clamp(1 - epsilon_low, 1 + epsilon_high) * A)` with r = exp(logps - old_logps), reduced.

    PPO's clipped surrogate (1707.06347 eq. 7), as REINFORCE++ (2501.03262 eq. 6), GRPO, DAPO and others use it; loss,
    gradient and statistics come from one kernel.

    Args:
        logps: of the policy that learns. The loss is differentiable in them and in nothing else.
        old_logps: of the policy that sampled, or `logps.detach()` for an exactly on-policy step.
        advantages: what each token is worth, or each sequence.
        completion_mask: bool; elsewhere nothing counts, and the gradient is exactly 0.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high].
        dual_clip: c > 1 bounds the loss of a token of negative advantage by -c * A (1912.09729 eq. 5); None for none.
        importance_sampling_level: "token", or "sequence": one ratio for each sequence, exp of its mean log-ratio (GSPO,
            2507.18071 eq. 7), through which every token's loss moves every token of the sequence.
        log_ratio_clamp: log-ratios are clamped to +-this before exp; beyond it the gradient is 0.
        reduction: with N = `num_items_in_batch`,

            "token-mean"               sum of all tokens / N
            "seq-mean-token-mean"      sum over sequences of their token mean / N
            "seq-mean-token-sum"       sum over sequences of their token sum / N
            "seq-mean-token-sum-norm"  the same / (max_completion_length * N), as in Dr. GRPO (2503.20783)
            "none"                     each token's loss, in the shape of `logps`

        num_items_in_batch: how many items (valid tokens for "token-mean", sequences for the others) the mean is over; a
            number, or a 0-dim tensor on the device. None counts those of this call, sequences without a valid token
            left out. Pass the count of the whole batch when a batch is split over calls or processes, and add the
            losses: gradients are then those of one call.
        max_completion_length: for "seq-mean-token-sum-norm" only.
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it log-probs are padded (B, S).

    Returns:
        PolicyLoss(loss, stats): a 0-dim loss or each token's, float64 for float64 `logps`, else float32; `PolicyStats`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; `old_logps` or `advantages` that
            require grad.
    """
    starts = check_loss(
        "logps",
        logps,
        {"old_logps": old_logps},
        completion_mask,
        reduction,
        num_items_in_batch,
        max_completion_length,
        cu_seqlens,
    )
    check_advantages(advantages, logps, starts.shape[0] - 1, cu_seqlens)
    clips = check_clips(epsilon_low, epsilon_high, dual_clip, importance_sampling_level, log_ratio_clamp)
    backend = backend_of(logps)
    if backend == "reference":
        return reference.policy_loss(
            logps,
            old_logps,
            advantages,
            completion_mask,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            dual_clip=dual_clip,
            importance_sampling_level=importance_sampling_level,
            log_ratio_clamp=log_ratio_clamp,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            max_completion_length=max_completion_length,
            cu_seqlens=cu_seqlens,
        )
    dtype = result_dtype(logps)
    loss, _, stats = policy_loss_fwd(
        flat(logps, dtype),
        flat(old_logps, dtype),
        flat(advantages, dtype),
        advantages.shape != logps.shape,
        flat_mask(completion_mask),
        starts,
        *clips,
        importance_sampling_level == "sequence",
        reduction == "seq-mean-token-mean",
        reduction == "none",
        backend,
    )
    named = PolicyStats(*stats.detach().unbind())
    mean = divided(loss, named, reduction, num_items_in_batch, max_completion_length)
    return PolicyLoss(mean.view(logps.shape if reduction == "none" else ()), named)


def check_clips(
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float | None,
    importance_sampling_level: str,
    log_ratio_clamp: float,
) -> tuple[float, float, float, float]:
    """The bounds of the ratio as kernels take them."""
    check_number("epsilon_low", epsilon_low, "a number from 0 to 1", 0, 1)
    check_number("epsilon_high", epsilon_high, "a number from 0", 0)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, "a number above 1, or None", 1, open_low=True)
    check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    check_number("log_ratio_clamp", log_ratio_clamp, "a positive number", 0, open_low=True)
    return epsilon_low, epsilon_high, INFINITY if dual_clip is None else dual_clip, log_ratio_clamp


def check_advantages(advantages: Tensor, logps: Tensor, batch: int, cu_seqlens: Tensor | None) -> None:
    check_floats("advantages", advantages, (1, 2), like=logps)
    check_constant("advantages", advantages)
    shapes = [tuple(logps.shape), (batch, 1)] + ([] if cu_seqlens is not None else [(batch,)])
    if tuple(advantages.shape) not in shapes:
        wanted = f"{shapes[0]}, one for each token, or " + " or ".join(map(str, shapes[1:])) + ", one for each sequence"
        fail("advantages", wanted, describe(advantages))


# ---------------------------------------------------------------- critic


@kernel_op(_fake(len(ValueStats._fields)))
def value_loss_fwd(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    epsilon: float,
    sequence_mean: bool,
    per_token: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, stats) as in policy_loss_fwd."""
    loss, slope, stats = kernels(backend).value_loss_fwd(
        values, old_values, returns, mask, cu_seqlens, epsilon, sequence_mean, per_token
    )
    return loss, slope, stats


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _value_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return None if dloss is None else slope_bwd(ctx.saved_tensors[0], dloss), *(None,) * 8


register_gradient(value_loss_fwd, _value_backward, _value_setup)


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
    """`0.5 * torch.max((V - R)**2, (V_clip - R)**2)`, V_clip = V_old + (V - V_old).clamp(-epsilon, epsilon), reduced.

    The clipped critic loss of PPO's reference implementation; `epsilon=None` is the plain squared error over 2.

    Args:
        values: of the critic that learns. The loss is differentiable in them and in nothing else.
        old_values: of the critic when it sampled.
        returns: its targets, `gae(...).returns`.
        completion_mask: bool; elsewhere nothing counts, and the gradient is exactly 0.
        reduction, num_items_in_batch, max_completion_length, cu_seqlens: as in `policy_loss`.

    Returns:
        ValueLoss(loss, stats): a 0-dim loss or each token's, float64 for float64 `values`, else float32; `ValueStats`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; constants that require grad.
    """
    constants = {"old_values": old_values, "returns": returns}
    starts = check_loss(
        "values", values, constants, completion_mask, reduction, num_items_in_batch, max_completion_length, cu_seqlens
    )
    if epsilon is not None:
        check_number("epsilon", epsilon, "a positive number, or None", 0, open_low=True)
    backend = backend_of(values)
    if backend == "reference":
        return reference.value_loss(
            values,
            old_values,
            returns,
            completion_mask,
            epsilon=epsilon,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            max_completion_length=max_completion_length,
            cu_seqlens=cu_seqlens,
        )
    dtype = result_dtype(values)
    loss, _, stats = value_loss_fwd(
        flat(values, dtype),
        flat(old_values, dtype),
        flat(returns, dtype),
        flat_mask(completion_mask),
        starts,
        INFINITY if epsilon is None else epsilon,
        reduction == "seq-mean-token-mean",
        reduction == "none",
        backend,
    )
    named = ValueStats(*stats.detach().unbind())
    mean = divided(loss, named, reduction, num_items_in_batch, max_completion_length)
    return ValueLoss(mean.view(values.shape if reduction == "none" else ()), named)


# ---------------------------------------------------------------- shared


def check_loss(
    name: str,
    learned: Tensor,
    constants: dict[str, Tensor],
    completion_mask: Tensor | None,
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Where sequences start."""
    check_floats(name, learned, (1, 2))
    for other, x in constants.items():
        check_like(other, x, name, learned)
        check_constant(other, x)
    starts = sequence_starts(learned, name, cu_seqlens)
    check_mask(completion_mask, name, learned.shape, learned)
    check_choice("reduction", reduction, REDUCTIONS)
    check_count("num_items_in_batch", num_items_in_batch, reduction, learned)
    if (reduction == "seq-mean-token-sum-norm") != (max_completion_length is not None):
        wanted = "a positive integer" if max_completion_length is None else "None"
        fail("max_completion_length", f"{wanted} with reduction {reduction!r}", max_completion_length)
    if max_completion_length is not None and not isinstance(max_completion_length, int):
        fail("max_completion_length", "a positive integer", max_completion_length)
    if max_completion_length is not None:
        check_number("max_completion_length", max_completion_length, "a positive integer", 1)
    return starts


def divided(
    loss: Tensor,
    stats: PolicyStats | ValueStats,
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
) -> Tensor:
    if reduction == "none":
        return loss
    count = stats.num_tokens if reduction == "token-mean" else stats.num_sequences
    divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, Tensor):  # of any dtype: in few bits the product below overflows
        divisor = divisor.double()
    if max_completion_length is not None:
        divisor = divisor * max_completion_length
    return (loss / divisor).to(loss.dtype)
