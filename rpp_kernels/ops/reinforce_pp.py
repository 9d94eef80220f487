"""The advantages of REINFORCE++, fused: KL, terminal reward, return and moments in one pass, then one scale."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.distributed import group_name
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.advantages import (
    EPS_MODES,
    GAPS,
    check_discount,
    check_eps,
    over_ranks,
    returns_bwd,
    returns_fwd,
    whiten_bwd,
)
from rpp_kernels.ops.checks import (
    check_choice,
    check_floats,
    check_like,
    check_mask,
    check_number,
    check_ranks,
    check_shape,
    fail,
    flat,
    flat_mask,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.ops.kl import ESTIMATORS, INFINITY, check_clamps, kl_bwd, kl_fwd
from rpp_kernels.ops.rewards import token_rewards_bwd, token_rewards_fwd

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup

LOG_RATIO_CLAMP = 20.0  # the default of kl_penalty, which this pipeline is defined by
FLOOR, CARRY = EPS_MODES["floor"], GAPS["carry"]


@kernel_op(lambda scores, old_logps, *_: (torch.empty_like(old_logps), old_logps.new_empty(3, dtype=torch.float64)))
def reinforce_pp_fwd(
    scores: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    beta: float,
    gamma: float,
    estimator: int,
    kl_clamp: float,
    eps: float,
    group_name: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Also returns the moments that whitened: count, mean and sum of squared deviations, in float64."""
    run = kernels(backend)
    returns, moments = run.reinforce_pp_fwd(
        scores, old_logps, ref_logps, mask, cu_seqlens, beta, gamma, estimator, LOG_RATIO_CLAMP, kl_clamp
    )
    moments = over_ranks(moments, group_name)
    run.whiten_out(returns, returns, mask, moments, True, False, eps, FLOOR)  # in place: they are ours
    return returns, moments


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, old_logps, ref_logps, mask, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(scores, old_logps, ref_logps, mask, cu_seqlens, output[1])


def _backward(ctx: Any, dadvantages: Tensor, dmoments: Tensor) -> tuple[Tensor | None, ...]:
    """Step by step, through the gradients of the four ops that the pipeline fuses: no training loop comes here."""
    scores, old_logps, ref_logps, mask, cu_seqlens, moments = ctx.saved_tensors
    beta, gamma, estimator, kl_clamp, eps, _, backend = ctx.options  # a group has no gradient
    clamps = LOG_RATIO_CLAMP, kl_clamp
    if ref_logps is None:
        kl = torch.zeros_like(old_logps)
    else:
        kl = kl_fwd(old_logps, ref_logps, mask, estimator, estimator, *clamps, backend)
    rewards = token_rewards_fwd(scores, kl, mask, cu_seqlens, beta, backend)
    returns = returns_fwd(rewards, mask, cu_seqlens, gamma, CARRY, backend)
    dreturns = whiten_bwd(dadvantages, returns, mask, moments, True, False, eps, FLOOR, backend)
    drewards = returns_bwd(dreturns, mask, cu_seqlens, gamma, CARRY, backend)
    dscores, dkl = token_rewards_bwd(drewards, mask, cu_seqlens, beta, backend)
    none = (None,) * 9
    if ref_logps is None:
        return dscores, torch.zeros_like(old_logps), None, *none
    dold_logps = kl_bwd(dkl, old_logps, ref_logps, mask, estimator, *clamps, backend)
    return dscores, dold_logps, -dold_logps, *none


register_gradient(reinforce_pp_fwd, _backward, _setup_context)


def reinforce_pp_advantages(
    scores: Tensor,  # (B,)
    old_logps: Tensor,  # (B, S) or (T,)
    ref_logps: Tensor | None,  # same; None where beta is 0
    completion_mask: Tensor | None = None,  # same, bool
    *,
    beta: float = 0.01,
    gamma: float = 1.0,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`whiten(returns(token_rewards(scores, kl_penalty(old_logps, ref_logps, mask), mask)))`, in one pass and a scale.

    With gamma = 1 and k1 (REINFORCE++ 2501.03262 eq. 4-8), normalised over all valid tokens of the batch:

        A_t = score - beta * sum over i >= t of (old_logps_i - ref_logps_i)
        advantages = (A - mean A) * rsqrt(max(var A, eps)), population variance

    Args:
        scores: one for each sequence; the paper normalises and clips them first (`normalize_rewards`), and REINFORCE++
            without baseline wants them symmetric, such as -1 and +1 (v9, 5.1).
        old_logps: log-probs of the policy that sampled.
        ref_logps: those of the reference policy; None only together with beta = 0.
        completion_mask: bool; elsewhere the advantage is exactly 0. Holes are carried through (see `returns`).
        beta: price of a nat of KL; the paper's 0.01 in general, 0.001 for mathematics.
        gamma: discount, from 0 to 1.
        kl_estimator, kl_clamp: as in `kl_penalty`; OpenRLHF clamps at 10.
        eps: floor of the variance.
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it log-probs are padded (B, S).
        process_group: as in `whiten`: normalised over the valid tokens of all its ranks, each of which must call this.

    Returns:
        The shape of `old_logps`; float64 for float64 input, else float32. Differentiable in `scores`, `old_logps` and
        `ref_logps` without a process_group, though a training loop passes constants.

    Raises:
        ValueError: a shape, dtype, device, estimator or range that is not as above; with process_group, a tensor that
            requires grad.
    """
    check_floats("old_logps", old_logps, (1, 2))
    starts = sequence_starts(old_logps, "old_logps", cu_seqlens)
    check_floats("scores", scores, (1,), like=old_logps)
    check_shape("scores", scores, (starts.shape[0] - 1,), "of one for each sequence")
    check_mask(completion_mask, "old_logps", old_logps.shape, old_logps)
    check_number("beta", beta, "a finite number", -1e30, 1e30)
    if ref_logps is not None:
        check_like("ref_logps", ref_logps, "old_logps", old_logps)
    elif beta != 0:
        fail("ref_logps", f"a tensor, for beta = {beta}", "None")
    check_discount("gamma", gamma)
    check_choice("kl_estimator", kl_estimator, [name for name in ESTIMATORS if name != "none"])
    check_clamps(LOG_RATIO_CLAMP, kl_clamp)
    check_eps(eps)
    check_ranks(process_group, scores=scores, old_logps=old_logps, ref_logps=ref_logps)
    backend = backend_of(old_logps, "reinforce_pp_advantages")
    if backend == "reference":
        return reference.reinforce_pp_advantages(
            scores,
            old_logps,
            ref_logps,
            completion_mask,
            beta=beta,
            gamma=gamma,
            kl_estimator=kl_estimator,
            kl_clamp=kl_clamp,
            eps=eps,
            cu_seqlens=cu_seqlens,
            process_group=process_group,
        )
    dtype = result_dtype(old_logps)
    advantages, _ = reinforce_pp_fwd(
        flat(scores, dtype),
        flat(old_logps, dtype),
        None if ref_logps is None or beta == 0 else flat(ref_logps, dtype),
        flat_mask(completion_mask),
        starts,
        beta,
        gamma,
        ESTIMATORS[kl_estimator],
        INFINITY if kl_clamp is None else kl_clamp,
        eps,
        group_name(process_group),
        backend,
    )
    result: Tensor = advantages.view(old_logps.shape)
    return result
