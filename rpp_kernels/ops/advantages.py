"""Returns and advantages: scans over sequences, and normalisation over the batch."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.distributed import group_name, merged_moments, named_group
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import (
    check_choice,
    check_floats,
    check_like,
    check_mask,
    check_number,
    check_ranks,
    flat,
    flat_mask,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.reference import GAE

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup

EPS_MODES = {"floor": 0, "add_var": 1, "add_std": 2}  # csrc/statistics.h, enum EpsMode
GAPS = {"carry": 0, "reset": 1, "step": 2}  # csrc/choices.h, enum Gap


# ---------------------------------------------------------------- returns


@kernel_op(lambda rewards, *_: torch.empty_like(rewards))
def returns_fwd(
    rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor, gamma: float, gap: int, backend: str
) -> Tensor:
    result: Tensor = kernels(backend).returns_fwd(rewards, mask, cu_seqlens, gamma, gap)
    return result


@kernel_op(lambda dreturns, *_: torch.empty_like(dreturns))
def returns_bwd(
    dreturns: Tensor, mask: Tensor | None, cu_seqlens: Tensor, gamma: float, gap: int, backend: str
) -> Tensor:
    result: Tensor = kernels(backend).returns_bwd(dreturns.contiguous(), mask, cu_seqlens, gamma, gap)
    return result


def _returns_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(mask, cu_seqlens)


def _returns_backward(ctx: Any, dreturns: Tensor) -> tuple[Tensor | None, ...]:
    return returns_bwd(dreturns, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


register_gradient(returns_fwd, _returns_backward, _returns_setup)


def check_discount(name: str, value: float) -> None:
    check_number(name, value, "a number from 0 to 1", 0, 1)


def returns(
    rewards: Tensor,  # (B, S) or (T,)
    completion_mask: Tensor | None = None,  # same, bool
    *,
    gamma: float = 1.0,
    gap: str = "carry",
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """`rewards.flip(1).cumsum(1).flip(1)` for gamma = 1: the discounted reward to come, at each token.

    G_t = r_t + gamma * G_{t+1} (REINFORCE++ 2501.03262 eq. 7), t counting valid tokens only. What a hole in the mask
    (tool output) does to the sum that passes it is `gap`:

        "carry"   nothing: it neither pays, nor discounts, nor resets
        "reset"   it starts anew: what is earned behind the hole is not owed to the tokens before it (as in verl)
        "step"    it is discounted by gamma for each masked token too, which pays nothing (as in OpenRLHF)

    Args:
        rewards: as `token_rewards` gives them.
        completion_mask: bool; elsewhere the return is exactly 0.
        gamma: discount, from 0 to 1.
        gap: "carry", "reset" or "step".
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it `rewards` is padded (B, S).

    Returns:
        The shape of `rewards`; float64 for float64 input, else float32. Differentiable in `rewards`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above.
    """
    check_floats("rewards", rewards, (1, 2))
    starts = sequence_starts(rewards, "rewards", cu_seqlens)
    check_mask(completion_mask, "rewards", rewards.shape, rewards)
    check_discount("gamma", gamma)
    check_choice("gap", gap, list(GAPS))
    backend = backend_of(rewards, "returns")
    if backend == "reference":
        return reference.returns(rewards, completion_mask, gamma=gamma, gap=gap, cu_seqlens=cu_seqlens)
    result: Tensor = returns_fwd(
        flat(rewards, result_dtype(rewards)), flat_mask(completion_mask), starts, gamma, GAPS[gap], backend
    )
    return result.view(rewards.shape)


# ---------------------------------------------------------------- GAE


@kernel_op(lambda rewards, *_: (torch.empty_like(rewards), torch.empty_like(rewards)))
def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    gae_lambda: float,
    gap: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    advantages, targets = kernels(backend).gae_fwd(rewards, values, mask, cu_seqlens, gamma, gae_lambda, gap)
    return advantages, targets


@kernel_op(lambda dadvantages, *_: (torch.empty_like(dadvantages), torch.empty_like(dadvantages)))
def gae_bwd(
    dadvantages: Tensor,
    dreturns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    gae_lambda: float,
    gap: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    drewards, dvalues = kernels(backend).gae_bwd(
        dadvantages.contiguous(), dreturns.contiguous(), mask, cu_seqlens, gamma, gae_lambda, gap
    )
    return drewards, dvalues


def _gae_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, mask, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(mask, cu_seqlens)


def _gae_backward(ctx: Any, dadvantages: Tensor, dreturns: Tensor) -> tuple[Tensor | None, ...]:
    drewards, dvalues = gae_bwd(dadvantages, dreturns, *ctx.saved_tensors, *ctx.options)
    return drewards, dvalues, None, None, None, None, None, None


register_gradient(gae_fwd, _gae_backward, _gae_setup)


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
    """Generalised advantage estimation: the loop `A_t = delta_t + gamma * gae_lambda * A_{t+1}`, last token first.

    delta_t = r_t + gamma V_{t+1} - V_t and returns_t = A_t + V_t (1506.02438 eq. 11, 16), t counting valid tokens only,
    V and A being 0 beyond the last. The default lambda = 1 is what Back to Basics (2402.14740, fig. 1) found best for
    fine-tuning; PPO for control commonly takes 0.95.

    With `gap="step"` t counts every token: where masked, r and V are 0 (so OpenRLHF), and time goes on.

    Args:
        rewards: as `token_rewards` gives them.
        values: the critic's, for the same tokens.
        completion_mask: bool; elsewhere both results are exactly 0.
        gamma, gae_lambda: from 0 to 1.
        gap: "carry" or "step".
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it `rewards` is padded (B, S).

    Returns:
        GAE(advantages, returns), each of the shape of `rewards`; float64 for float64 input, else float32. Not whitened.
        Differentiable in `rewards` and `values`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above.
    """
    check_floats("rewards", rewards, (1, 2))
    check_like("values", values, "rewards", rewards)
    starts = sequence_starts(rewards, "rewards", cu_seqlens)
    check_mask(completion_mask, "rewards", rewards.shape, rewards)
    check_discount("gamma", gamma)
    check_discount("gae_lambda", gae_lambda)
    check_choice("gap", gap, ("carry", "step"))
    backend = backend_of(rewards, "gae")
    if backend == "reference":
        return reference.gae(
            rewards, values, completion_mask, gamma=gamma, gae_lambda=gae_lambda, gap=gap, cu_seqlens=cu_seqlens
        )
    dtype = result_dtype(rewards)
    advantages, targets = gae_fwd(
        flat(rewards, dtype),
        flat(values, dtype),
        flat_mask(completion_mask),
        starts,
        gamma,
        gae_lambda,
        GAPS[gap],
        backend,
    )
    return GAE(advantages.view(rewards.shape), targets.view(rewards.shape))


# ---------------------------------------------------------------- whitening


def _moments_like(x: Tensor) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def over_ranks(moments: Tensor, group_name: str) -> Tensor:
    """The moments of all ranks' values; those of this rank's where no group is named."""
    return merged_moments(moments, named_group(group_name)) if group_name else moments


@kernel_op(lambda values, *_: (torch.empty_like(values), _moments_like(values)))
def whiten_fwd(
    values: Tensor,
    mask: Tensor | None,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    eps_mode: int,
    group_name: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Also returns the moments: count, mean and sum of squared deviations, in float64."""
    run = kernels(backend)
    moments, out = over_ranks(run.moments(values, mask), group_name), torch.empty_like(values)
    run.whiten_out(out, values, mask, moments, shift_mean, unbiased, eps, eps_mode)
    return out, moments


@kernel_op(lambda dout, *_: torch.empty_like(dout))
def whiten_bwd(
    dout: Tensor,
    values: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    eps_mode: int,
    backend: str,
) -> Tensor:
    result: Tensor = kernels(backend).whiten_bwd(
        dout.contiguous(), values, mask, moments, shift_mean, unbiased, eps, eps_mode
    )
    return result


def _whiten_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, mask, *options, _, backend = inputs  # a group has no gradient
    ctx.options = *options, backend
    ctx.save_for_backward(values, mask, output[1])


def _whiten_backward(ctx: Any, dout: Tensor, dmoments: Tensor) -> tuple[Tensor | None, ...]:
    return whiten_bwd(dout, *ctx.saved_tensors, *ctx.options), *(None,) * 7


register_gradient(whiten_fwd, _whiten_backward, _whiten_setup)


def check_eps(eps: float) -> None:
    check_number("eps", eps, "a positive number", 0, 1e30, open_low=True)


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
    """`(values - mean) * rsqrt(var.clamp(min=eps))`, mean and variance over all valid elements of the batch.

    The batch normalisation of REINFORCE++ (2501.03262 eq. 8; v9 eq. 5). The batch is what this call is given or, with
    `process_group`, what all its ranks are. The moments are summed in float64.

    Args:
        values: any shape.
        completion_mask: bool; elsewhere the result is exactly 0.
        shift_mean: False puts the mean back, so that only the scale changes.
        unbiased: variance over n - 1 (over 1 where n = 1) instead of n.
        eps, eps_mode: 1 / sigma is rsqrt(max(var, eps)) for "floor", rsqrt(var + eps) for "add_var", and
            1 / (sqrt(var) + eps) for "add_std".
        process_group: the ranks whose valid elements are whitened together. Each must call this, one without a valid
            element or with an empty batch too; `values` must then be a constant. One collective of three numbers.

    Returns:
        The shape of `values`; float64 for float64 input, else float32. Differentiable in `values` without a
        process_group: the gradient through the statistics of other ranks is not offered.

    Raises:
        ValueError: a shape, dtype, device, mode or range that is not as above; with process_group, `values` that
            require grad.
    """
    check_floats("values", values, range(1, 9))
    check_mask(completion_mask, "values", values.shape, values)
    check_eps(eps)
    check_choice("eps_mode", eps_mode, list(EPS_MODES))
    check_ranks(process_group, values=values)
    backend = backend_of(values, "whiten")
    if backend == "reference":
        return reference.whiten(
            values,
            completion_mask,
            shift_mean=shift_mean,
            unbiased=unbiased,
            eps=eps,
            eps_mode=eps_mode,
            process_group=process_group,
        )
    out, _ = whiten_fwd(
        flat(values, result_dtype(values)),
        flat_mask(completion_mask),
        shift_mean,
        unbiased,
        eps,
        EPS_MODES[eps_mode],
        group_name(process_group),
        backend,
    )
    result: Tensor = out.view(values.shape)
    return result
