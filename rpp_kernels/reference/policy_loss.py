"""The surrogates of the policy and the clipped loss of the critic."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rpp_kernels.reference.kl import kl_penalty
from rpp_kernels.reference.shared import clamp, padded, per_token, reduced, result_dtype, select


class PolicyStats(NamedTuple):
    """Sums over the valid tokens of one call, as 0-dim float64 tensors on the device of the loss.

    They add: `a + b`, or `sum(list)`, is what one call over all the batches had given, so micro-batches and ranks sum
    theirs before anyone divides. `clipped_low`: advantage < 0 and ratio < 1 - epsilon_low; `clipped_high`:
    advantage > 0 and ratio > 1 + epsilon_high; `dual_clipped`: advantage < 0 and ratio > dual_clip. Of "gmpo" the first
    two compare the token's log-ratio with -epsilon_low and epsilon_high, of "cispo" they are for advantages of either
    sign; a surrogate that does not clip leaves them 0. `ratio`: that of the level, before any clipping; `approx_kl`:
    old_logps - logps; `kl`: the KL estimates, before beta and bias correction, 0 without ref_logps.
    """

    num_tokens: Tensor
    num_sequences: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor
    ratio: Tensor
    approx_kl: Tensor
    kl: Tensor

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


# ---------------------------------------------------------------- surrogates


class PolicyTokens(NamedTuple):
    """What a surrogate is a function of: (B, S) each, 0 where masked, but for `length` (B, 1)."""

    logps: Tensor
    advantages: Tensor
    log_ratio: Tensor  # logps - old_logps of the token alone
    ratio: Tensor  # of the level
    length: Tensor  # of the sequence: its valid tokens
    ratio_of: Callable[[Tensor], Tensor]  # the ratio of the level, of other log-ratios


class SurrogateLoss(NamedTuple):
    loss: Tensor
    clipped_low: Tensor | None = None  # nowhere where the advantage is 0, as it is where masked
    clipped_high: Tensor | None = None
    dual_clipped: Tensor | None = None


def _clip(
    x: PolicyTokens, epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float = math.inf
) -> SurrogateLoss:
    ratio, a, low, high = x.ratio, x.advantages, 1 - epsilon_low, 1 + epsilon_high
    dual_clipped = (a < 0) & (ratio > dual_clip)
    loss = torch.maximum(-ratio * a, -clamp(ratio, low, high) * a)
    loss = torch.where(dual_clipped, -dual_clip * a, loss)
    return SurrogateLoss(loss, (a < 0) & (ratio < low), (a > 0) & (ratio > high), dual_clipped)


def _reinforce(x: PolicyTokens) -> SurrogateLoss:
    return SurrogateLoss(-x.advantages * x.logps)


def _cispo(x: PolicyTokens, epsilon_low: float = 1.0, epsilon_high: float = 4.0) -> SurrogateLoss:
    ratio, low, high, counts = x.ratio.detach(), 1 - epsilon_low, 1 + epsilon_high, x.advantages != 0
    loss = -ratio.clamp(low, high) * x.advantages * x.logps
    return SurrogateLoss(loss, counts & (ratio < low), counts & (ratio > high))


def _sapo(x: PolicyTokens, tau_positive: float = 1.0, tau_negative: float = 1.05) -> SurrogateLoss:
    tau = torch.where(x.advantages > 0, x.logps.new_tensor(tau_positive), tau_negative)
    return SurrogateLoss(-x.advantages * 4 / tau * (tau * (x.ratio - 1)).sigmoid())


def _gmpo(x: PolicyTokens, epsilon_low: float = 0.4, epsilon_high: float = 0.4) -> SurrogateLoss:
    d, a, sign = x.log_ratio, x.advantages, x.advantages.sign()
    terms = sign * torch.minimum(sign * d, sign * clamp(d, -epsilon_low, epsilon_high))
    ratio = x.ratio_of(torch.where(a == 0, 0.0, terms))
    return SurrogateLoss(-a * ratio, (a < 0) & (d < -epsilon_low), (a > 0) & (d > epsilon_high))


SURROGATES: dict[str, Callable[..., SurrogateLoss]] = {
    "clip": _clip,
    "reinforce": _reinforce,
    "cispo": _cispo,
    "sapo": _sapo,
    "gmpo": _gmpo,
}


# ---------------------------------------------------------------- the loss


def policy_loss(
    logps: Tensor,  # (B, S) or (T,)
    old_logps: Tensor | None,  # same, constant; None: logps.detach(), an exactly on-policy step
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    surrogate: str = "clip",
    epsilon_low: float | None = None,  # None: the surrogate's own
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    tau_positive: float | None = None,
    tau_negative: float | None = None,
    importance_sampling_level: str = "token",
    weights: Tensor | None = None,  # shape of logps, constant
    ref_logps: Tensor | None = None,  # shape of logps, constant
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_clamp: float | None = None,
    kl_bias_correction: bool = False,
    entropy: Tensor | None = None,  # shape of logps
    entropy_coef: float = 0.0,
    log_ratio_clamp: float = 20.0,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> PolicyLoss:
    """Minimise l_t = weights_t * surrogate_t + beta * KL_t - entropy_coef * entropy_t, reduced.

        "clip"       -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), and where A < 0 at most -dual_clip * A
                     [PPO eq. 7; R++ eq. 6; dual eq. 5]
        "reinforce"  -A logp
        "cispo"      -sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A logp  [MiniMax-M1 2506.13585]
        "sapo"       -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_positive where A > 0, else tau_negative  [2511.20347]
        "gmpo"       -A r, with sgn(A) min(sgn(A) D, sgn(A) clip(D, -epsilon_low, epsilon_high)) for the D of the mean
                     that makes r [2507.20673]; "sequence" only

    with D = logps - old_logps and the ratio r = exp(clamp(d, +-log_ratio_clamp)) of `importance_sampling_level`:

        "token"           d_t = D_t
        "sequence"        d_t = mean of the sequence's D [GSPO 2507.18071 eq. 7]
        "sequence-sum"    d_t = sum of the sequence's D: the ratio of the whole completion's probabilities
        "sequence-token"  d_t = sg(mean of the sequence's D) + logp_t - sg(logp_t) [GSPO-token, ibid.]

    KL_t = kl_penalty(logps, ref_logps, estimator=kl_estimator, gradient=kl_gradient), with `kl_bias_correction` times
    the r of the level. N = num_items_in_batch, or the count of this call: valid tokens for "token-mean", else sequences
    with a valid token.

        "token-mean"             sum_t l_t / N                        "seq-mean-token-mean"  sum_i mean_t l_t / N
        "seq-mean-token-sum"     sum_i sum_t l_t / N                  "none"                 l_t
        "seq-mean-token-sum-norm"  sum_i sum_t l_t / (max_completion_length * N)  [Dr. GRPO 2503.20783]
    """
    dtype = result_dtype(logps)
    logps = logps.to(dtype)
    old_logps = logps.detach() if old_logps is None else old_logps.detach().to(dtype)
    d, mask, packed_at = padded(logps - old_logps, completion_mask, cu_seqlens)
    d, length = select(d, mask), mask.sum(1, keepdim=True)

    def tokens(x: Tensor) -> Tensor:
        return select(padded(x.to(dtype), completion_mask, cu_seqlens)[0], mask)

    def ratio_of(log_ratio: Tensor) -> Tensor:
        total = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
        mean = total / length.clamp(min=1)
        if importance_sampling_level == "sequence":
            log_ratio = mean
        elif importance_sampling_level == "sequence-sum":
            log_ratio = total
        elif importance_sampling_level == "sequence-token":
            # Its value is the mean, and its gradient that of the token; a log-ratio of -inf has none.
            log_ratio = mean.detach() + select(log_ratio - log_ratio.detach(), log_ratio.isfinite())
        return clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp).exp()

    a, ratio = tokens(per_token(advantages.detach(), logps, cu_seqlens)), ratio_of(d)
    x = PolicyTokens(tokens(logps), a, d, ratio, length, ratio_of)
    options = {
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
        "dual_clip": dual_clip,
        "tau_positive": tau_positive,
        "tau_negative": tau_negative,
    }
    loss, *clipped = SURROGATES[surrogate](x, **{k: v for k, v in options.items() if v is not None})
    if weights is not None:
        loss = tokens(weights.detach()) * loss
    kl = torch.zeros_like(d)
    if ref_logps is not None:
        kl = kl_penalty(
            x.logps,
            tokens(ref_logps.detach()),
            estimator=kl_estimator,
            gradient=kl_gradient,
            log_ratio_clamp=log_ratio_clamp,
            kl_clamp=kl_clamp,
        )
        loss = loss + beta * (kl * ratio if kl_bias_correction else kl)
    if entropy is not None:
        loss = loss - entropy_coef * tokens(entropy)
    loss = select(loss, mask)
    low, high, dual = (torch.zeros_like(mask) if x is None else x for x in clipped)
    stats = PolicyStats(
        num_tokens=mask.sum().double(),
        num_sequences=mask.any(1).sum().double(),
        clipped_low=low.sum().double(),
        clipped_high=high.sum().double(),
        dual_clipped=dual.sum().double(),
        ratio=select(ratio, mask).detach().double().sum(),
        approx_kl=-d.detach().double().sum(),
        kl=kl.detach().double().sum(),
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
        clipped_values = old_values + clamp(values - old_values, -epsilon, epsilon)
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
