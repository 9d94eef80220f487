"""token_rewards, returns and gae: a program for each sequence, block after block with a carry in float64."""

import torch
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import kernel, launch
from rpp_kernels.backends.triton.math import number
from rpp_kernels.backends.triton.sequences import GAP_RESET, discount_of, inside_and_valid, scanned, sequence_of, tokens

__all__ = ["gae_bwd", "gae_fwd", "returns_bwd", "returns_fwd", "token_rewards_bwd", "token_rewards_fwd"]


# ---------------------------------------------------------------- token_rewards


@kernel
def token_rewards_kernel(
    out,  # (T,): rewards, or dkl of the backward
    dscores,  # (B,), of the backward
    x,  # (T,): kl, or drewards
    scores,  # (B,), of the forward
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    beta: tl.float64,
    BLOCK: tl.constexpr,
):
    F = out.dtype.element_ty
    i, begin, end = sequence_of(cu_seqlens)
    price = -number(beta, F)
    last, dscore = tl.full([], -1, tl.int64), tl.full([], 0.0, F)
    for k in range(0, end - begin, BLOCK):
        at = tokens(k, begin, end, False, BLOCK)
        inside, valid = inside_and_valid(mask, at, begin, end)
        value = tl.load(x + at, mask=valid, other=0.0)
        last = tl.where(last < 0, tl.max(tl.where(valid, at, -1)), last)
        result = price * value
        if scores is not None:
            result = tl.where(at == last, result + tl.load(scores + i), result)
        else:
            dscore += tl.sum(tl.where(at == last, value, 0.0))
        tl.store(out + at, tl.where(valid, result, 0.0), mask=inside)
    if scores is None:
        tl.store(dscores + i, dscore)


def token_rewards_fwd(scores: Tensor, kl: Tensor, mask: Tensor | None, cu_seqlens: Tensor, beta: float) -> Tensor:
    rewards = torch.empty_like(kl)
    launch(token_rewards_kernel, scores.numel(), rewards, None, kl, scores, mask, cu_seqlens, beta, like=kl)
    return rewards


def token_rewards_bwd(drewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    count = cu_seqlens.numel() - 1
    dscores, dkl = drewards.new_empty(count), torch.empty_like(drewards)
    launch(token_rewards_kernel, count, dkl, dscores, drewards, None, mask, cu_seqlens, beta, like=dkl)
    return dscores, dkl


# ---------------------------------------------------------------- returns


@kernel
def returns_kernel(
    out,  # (T,)
    x,  # (T,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    gamma: tl.float64,
    gap: tl.constexpr,
    forward: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Between two valid tokens lie as many factors from either side, so that the gradient of the returns is the same
    sum from the other end, `forward`."""
    F = out.dtype.element_ty
    _, begin, end = sequence_of(cu_seqlens)
    discount, carry = number(gamma, tl.float64), tl.full([], 0.0, tl.float64)
    for k in range(0, end - begin, BLOCK):
        at = tokens(k, begin, end, forward, BLOCK)
        inside, valid = inside_and_valid(mask, at, begin, end)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float64)
        factor = discount_of(valid, inside, discount, gap)
        sums, carry = scanned(value, factor, carry, gap == GAP_RESET, forward, BLOCK)
        tl.store(out + at, tl.where(valid, sums, 0.0).to(F), mask=inside)


def _returns(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor, gamma: float, gap: int, forward: bool) -> Tensor:
    out, count = torch.empty_like(x), cu_seqlens.numel() - 1
    launch(returns_kernel, count, out, x, mask, cu_seqlens, gamma, like=x, gap=gap, forward=forward)
    return out


def returns_fwd(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor, gamma: float, gap: int) -> Tensor:
    return _returns(rewards, mask, cu_seqlens, gamma, gap, False)


def returns_bwd(dreturns: Tensor, mask: Tensor | None, cu_seqlens: Tensor, gamma: float, gap: int) -> Tensor:
    return _returns(dreturns, mask, cu_seqlens, gamma, gap, True)


# ---------------------------------------------------------------- gae
#
# With E_t = V_t + lambda A_t both are one scan: E_t = lambda r_t + (1 - lambda) V_t + gamma lambda E_{t+1}, and then
# A_t = r_t - V_t + gamma E_{t+1}. Each place scans its neighbour, so that it has what comes before its own step.


@kernel
def gae_fwd_kernel(
    advantages,  # (T,)
    returns,  # (T,)
    rewards,  # (T,)
    values,  # (T,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    gamma: tl.float64,
    gae_lambda: tl.float64,
    gap: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = advantages.dtype.element_ty
    _, begin, end = sequence_of(cu_seqlens)
    discount, weight = number(gamma, tl.float64), number(gae_lambda, tl.float64)
    carry = tl.full([], 0.0, tl.float64)
    for k in range(0, end - begin, BLOCK):
        at = tokens(k, begin, end, False, BLOCK)
        inside, valid = inside_and_valid(mask, at + 1, begin, end)
        reward = tl.load(rewards + at + 1, mask=valid, other=0.0).to(tl.float64)
        value = tl.load(values + at + 1, mask=valid, other=0.0).to(tl.float64)
        factor = discount_of(valid, inside, discount * weight, gap)
        following, carry = scanned(weight * reward + (1.0 - weight) * value, factor, carry, False, False, BLOCK)
        inside, valid = inside_and_valid(mask, at, begin, end)
        reward = tl.load(rewards + at, mask=valid, other=0.0).to(tl.float64)
        value = tl.load(values + at, mask=valid, other=0.0).to(tl.float64)
        advantage = reward - value + discount * following
        tl.store(advantages + at, tl.where(valid, advantage, 0.0).to(F), mask=inside)
        tl.store(returns + at, tl.where(valid, advantage + value, 0.0).to(F), mask=inside)


@kernel
def gae_bwd_kernel(
    drewards,  # (T,)
    dvalues,  # (T,)
    dadvantages,  # (T,)
    dreturns,  # (T,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    gamma: tl.float64,
    gae_lambda: tl.float64,
    gap: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The transposed scan: c_t = dadvantages_t + dreturns_t + gamma lambda c_{t-1} is d(loss) / d(delta_t)."""
    F = drewards.dtype.element_ty
    _, begin, end = sequence_of(cu_seqlens)
    discount, step = number(gamma, tl.float64), number(gamma, tl.float64) * number(gae_lambda, tl.float64)
    carry = tl.full([], 0.0, tl.float64)
    for k in range(0, end - begin, BLOCK):
        at = tokens(k, begin, end, True, BLOCK)
        inside, valid = inside_and_valid(mask, at - 1, begin, end)
        both = tl.load(dadvantages + at - 1, mask=valid, other=0.0).to(tl.float64)
        both += tl.load(dreturns + at - 1, mask=valid, other=0.0).to(tl.float64)
        before, carry = scanned(both, discount_of(valid, inside, step, gap), carry, False, True, BLOCK)
        inside, valid = inside_and_valid(mask, at, begin, end)
        dreturn = tl.load(dreturns + at, mask=valid, other=0.0).to(tl.float64)
        ddelta = tl.load(dadvantages + at, mask=valid, other=0.0).to(tl.float64) + dreturn + step * before
        tl.store(drewards + at, tl.where(valid, ddelta, 0.0).to(F), mask=inside)
        dvalue = dreturn - ddelta + discount * before
        tl.store(dvalues + at, tl.where(valid, dvalue, 0.0).to(F), mask=inside)


def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    gae_lambda: float,
    gap: int,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    tensors = advantages, returns, rewards, values, mask, cu_seqlens
    launch(gae_fwd_kernel, cu_seqlens.numel() - 1, *tensors, gamma, gae_lambda, like=rewards, gap=gap)
    return advantages, returns


def gae_bwd(
    dadvantages: Tensor,
    dreturns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    gae_lambda: float,
    gap: int,
) -> tuple[Tensor, Tensor]:
    drewards, dvalues = torch.empty_like(dadvantages), torch.empty_like(dadvantages)
    tensors = drewards, dvalues, dadvantages, dreturns, mask, cu_seqlens
    launch(gae_bwd_kernel, cu_seqlens.numel() - 1, *tensors, gamma, gae_lambda, like=drewards, gap=gap)
    return drewards, dvalues
