"""policy_loss and value_loss: loss, gradient and statistics of a batch in one launch, a program for each sequence."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import counter, kernel, launch
from rpp_kernels.backends.triton.math import (
    at_least,
    clipped_critic_loss,
    kl_slope,
    kl_value,
    log_ratio_term,
    number,
    ratio_of,
    surrogate_loss,
)
from rpp_kernels.backends.triton.sequences import bounds_of, valid_of
from rpp_kernels.backends.triton.sums import add_up

__all__ = ["policy_loss_fwd", "value_loss_fwd"]

# LEVELS in ops/policy_loss.py, but for "sequence-token"
TOKEN = tl.constexpr(0)
SEQUENCE = tl.constexpr(1)
SEQUENCE_SUM = tl.constexpr(3)

POLICY_STATS = tl.constexpr(8)  # PolicyStats
VALUE_STATS = tl.constexpr(4)  # ValueStats


# ---------------------------------------------------------------- policy


@triton.jit
def load_policy(logps, old_logps, advantages, mask, sequence, at, end, sequence_advantages: tl.constexpr):
    """(valid, logp, log_ratio, advantage), 0 where masked."""
    valid = valid_of(mask, at, end)
    logp = tl.load(logps + at, mask=valid, other=0.0)
    log_ratio = logp - tl.load(old_logps + at, mask=valid, other=0.0)
    if sequence_advantages:
        advantage = tl.where(valid, tl.load(advantages + sequence), 0.0)
    else:
        advantage = tl.load(advantages + at, mask=valid, other=0.0)
    return valid, logp, log_ratio, advantage


@triton.jit
def sum_log_ratios(
    logps,
    old_logps,
    advantages,
    mask,
    sequence,
    begin,
    end,
    surrogate: tl.constexpr,
    option_0,
    option_1,
    sequence_advantages: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over a sequence, in float64: (log-ratios, what the surrogate makes of them, valid tokens)."""
    plain = tl.zeros((BLOCK,), tl.float64)
    terms, count = plain, plain
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid, _, d, a = load_policy(logps, old_logps, advantages, mask, sequence, at, end, sequence_advantages)
        plain += d.to(tl.float64)
        terms += log_ratio_term(surrogate, d, a, option_0, option_1)[0].to(tl.float64)
        count += valid.to(tl.float64)
    return tl.sum(plain), tl.sum(terms), tl.sum(count)


@triton.jit
def kl_in_loss(
    logp,
    ref_logp,
    ratio,
    clamped,
    beta,
    log_ratio_clamp,
    kl_clamp,
    kl_estimator: tl.constexpr,
    kl_gradient: tl.constexpr,
    kl_bias_correction: tl.constexpr,
):
    """(KL, its part of the loss, d(loss) / d(logp), d(loss) / d(log of the ratio))."""
    d = logp - ref_logp
    kl = kl_value(d, kl_estimator, log_ratio_clamp, kl_clamp)
    if kl_gradient == kl_estimator:
        slope = kl_slope(d, kl_gradient, log_ratio_clamp, kl_clamp)
    else:
        slope = kl_slope(d, kl_gradient, log_ratio_clamp, float("inf"))
    loss, slope, through = kl * beta, slope * beta, tl.zeros_like(d)
    if kl_bias_correction:
        loss, slope = loss * ratio, slope * ratio
        through = tl.where(clamped, 0.0, loss)
    return kl, loss, slope, through


@kernel
def policy_kernel(
    token_loss,  # (T,); None where only the sum is wanted
    slope,  # (T,)
    entropy_slope,  # (T,); None without entropy
    loss,  # (); None with token_loss
    stats,  # (8,)
    partials,  # (programs, 9)
    finished,  # (1,)
    logps,  # (T,)
    old_logps,  # (T,)
    advantages,  # (T,) or (B,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    weights,  # (T,); may be None, as the next three
    ref_logps,  # (T,)
    entropy,  # (T,)
    dloss,  # (T,)
    B: tl.int64,
    option_0: tl.float64,
    option_1: tl.float64,
    option_2: tl.float64,
    log_ratio_clamp: tl.float64,
    beta: tl.float64,
    kl_clamp: tl.float64,
    entropy_coef: tl.float64,
    surrogate: tl.constexpr,
    level: tl.constexpr,
    kl_estimator: tl.constexpr,
    kl_gradient: tl.constexpr,
    kl_bias_correction: tl.constexpr,
    sequence_advantages: tl.constexpr,
    sequence_mean: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = slope.dtype.element_ty
    x_0, x_1, x_2, most = number(option_0, F), number(option_1, F), number(option_2, F), number(log_ratio_clamp, F)
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(cu_seqlens, sequence, B)
    shared: tl.constexpr = (level == SEQUENCE) | (level == SEQUENCE_SUM)
    none, none_wide, never = tl.zeros((BLOCK,), F), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    of_sequence = number(1.0, F)  # the weight of each of its tokens
    if (level != TOKEN) | sequence_mean:
        plain, terms, tokens = sum_log_ratios(
            logps, old_logps, advantages, mask, sequence, begin, end, surrogate, x_0, x_1, sequence_advantages, BLOCK
        )
        length = at_least(tokens, 1.0)
        if sequence_mean:
            of_sequence = (1.0 / length).to(F)
        if level == SEQUENCE_SUM:
            length = number(1.0, tl.float64)
        plain_ratio, plain_clamped = ratio_of(plain / length, most.to(tl.float64))
        terms_ratio, terms_clamped = ratio_of(terms / length, most.to(tl.float64))

    losses, log_ratios = none_wide, none_wide  # of both signs
    ratios, kls, moved, kl_moved = none, none, none, none
    count, lows, highs, duals = never, never, never, never
    for turn in tl.static_range(1 + shared):  # a ratio that is shared moves by 1 / length with each token: see below
        if turn == 1:
            share = (tl.sum(moved.to(tl.float64)) / length).to(F)
            kl_share = (tl.sum(kl_moved.to(tl.float64)) / length).to(F)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid, logp, d, a = load_policy(logps, old_logps, advantages, mask, sequence, at, end, sequence_advantages)
            if level == TOKEN:
                ratio, clamped = ratio_of(d, most)
                r, r_clamped = ratio, clamped
            else:
                ratio, clamped = none + plain_ratio.to(F), plain_clamped
                r, r_clamped = none + terms_ratio.to(F), terms_clamped
            each, through, dlogp, low, high, dual = surrogate_loss(surrogate, logp, a, d, r, x_0, x_1, x_2)
            through, kl_through, weight = tl.where(r_clamped, 0.0, through), none, none + of_sequence
            if weights is not None:
                w = tl.load(weights + at, mask=valid, other=0.0)
                each, through, dlogp = each * w, through * w, dlogp * w
            if dloss is not None:
                weight *= tl.load(dloss + at, mask=valid, other=0.0)
            if ref_logps is not None:
                ref_logp = tl.load(ref_logps + at, mask=valid, other=0.0)
                kl, of_kl, kl_dlogp, kl_through = kl_in_loss(
                    *(logp, ref_logp, ratio, clamped, number(beta, F), most, number(kl_clamp, F)),
                    *(kl_estimator, kl_gradient, kl_bias_correction),
                )
                each, dlogp = each + of_kl, dlogp + kl_dlogp
            if not shared:
                dlogp += through + kl_through
            dlogp *= weight
            if turn == 1:
                dlogp += share * log_ratio_term(surrogate, d, a, x_0, x_1)[1] + kl_share
            if turn == shared:
                tl.store(slope + at, tl.where(valid, dlogp, 0.0), mask=at < end)
            if turn == 0:
                if entropy is not None:
                    coefficient = number(entropy_coef, F)
                    each -= tl.load(entropy + at, mask=valid, other=0.0) * coefficient
                    tl.store(entropy_slope + at, tl.where(valid, -coefficient * of_sequence, 0.0), mask=at < end)
                each = tl.where(valid, each, 0.0)
                if token_loss is not None:
                    tl.store(token_loss + at, each, mask=at < end)
                losses += each.to(tl.float64)
                lows, highs, duals = lows + low.to(tl.int32), highs + high.to(tl.int32), duals + dual.to(tl.int32)
                if level == TOKEN:
                    log_ratios, count = log_ratios + d.to(tl.float64), count + valid.to(tl.int32)
                    ratios += tl.where(valid, ratio, 0.0)
                if ref_logps is not None:
                    kls += kl
                if shared:
                    moved += tl.where(valid, through * weight, 0.0)
                if shared & kl_bias_correction:
                    kl_moved += tl.where(valid, kl_through * weight, 0.0)

    if level == TOKEN:
        plain, tokens, ratio_sum = tl.sum(log_ratios), tl.sum(count).to(tl.float64), tl.sum(ratios.to(tl.float64))
    else:
        ratio_sum = plain_ratio * tokens
    total = tl.sum(losses) * of_sequence.to(tl.float64)
    sums = (total, tokens, tokens > 0.0, tl.sum(lows), tl.sum(highs), tl.sum(duals))
    more = (ratio_sum, -plain, tl.sum(kls.to(tl.float64)))
    add_up(sums + more, partials, finished, loss, stats, POLICY_STATS, BLOCK)


def policy_loss_fwd(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    dloss: Tensor | None,
    option_0: float,
    option_1: float,
    option_2: float,
    option_3: float,  # which no surrogate has
    log_ratio_clamp: float,
    beta: float,
    kl_clamp: float,
    entropy_coef: float,
    surrogate: int,
    level: int,
    kl_estimator: int,
    kl_gradient: int,
    kl_bias_correction: bool,
    sequence_advantages: bool,
    sequence_mean: bool,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slope, entropy_slope = torch.empty_like(logps), None if entropy is None else torch.empty_like(logps)
    loss, *sums, batch = _outputs(logps, cu_seqlens, per_token, POLICY_STATS.value)
    inputs = logps, old_logps, advantages, mask, cu_seqlens, weights, ref_logps, entropy, dloss
    numbers = option_0, option_1, option_2, log_ratio_clamp, beta, kl_clamp, entropy_coef
    launch(
        policy_kernel,
        max(batch, 1),
        *(loss if per_token else None, slope, entropy_slope, None if per_token else loss),
        *(*sums, *inputs, batch, *numbers),
        like=logps,
        surrogate=surrogate,
        level=level,
        kl_estimator=kl_estimator,
        kl_gradient=kl_gradient,
        kl_bias_correction=bool(kl_bias_correction),
        sequence_advantages=bool(sequence_advantages),
        sequence_mean=bool(sequence_mean),
    )
    return loss, slope, logps.new_empty(0) if entropy_slope is None else entropy_slope, sums[0]


def _outputs(like: Tensor, cu_seqlens: Tensor, per_token: bool, num_stats: int) -> tuple[Any, ...]:
    """(loss, stats, partials, finished, how many sequences there are)."""
    batch = cu_seqlens.numel() - 1
    loss = torch.empty_like(like) if per_token else like.new_empty(())
    wide = functools.partial(like.new_empty, dtype=torch.float64)
    return loss, wide(num_stats), wide(max(batch, 1), num_stats + 1), counter(like), batch


# ---------------------------------------------------------------- critic


@kernel
def value_kernel(
    token_loss,  # (T,); None where only the sum is wanted
    slope,  # (T,)
    loss,  # (); None with token_loss
    stats,  # (4,)
    partials,  # (programs, 5)
    finished,  # (1,)
    values,  # (T,)
    old_values,  # (T,)
    returns,  # (T,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    B: tl.int64,
    epsilon: tl.float64,
    sequence_mean: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = slope.dtype.element_ty
    begin, end = bounds_of(cu_seqlens, tl.program_id(0).to(tl.int64), B)
    weight = number(1.0, F)
    if sequence_mean:
        lanes = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            lanes += valid_of(mask, start + tl.arange(0, BLOCK), end).to(tl.float64)
        weight = (1.0 / at_least(tl.sum(lanes), 1.0)).to(F)
    losses, errors = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), F)
    count, clipped = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = valid_of(mask, at, end)
        value = tl.load(values + at, mask=valid, other=0.0)
        old_value = tl.load(old_values + at, mask=valid, other=0.0)
        target = tl.load(returns + at, mask=valid, other=0.0)
        each, dvalue, squared_error, is_clipped = clipped_critic_loss(value, old_value, target, number(epsilon, F))
        tl.store(slope + at, dvalue * weight, mask=at < end)
        if token_loss is not None:
            tl.store(token_loss + at, each, mask=at < end)
        losses, errors = losses + each.to(tl.float64), errors + squared_error
        count, clipped = count + valid.to(tl.int32), clipped + is_clipped.to(tl.int32)
    tokens, total = tl.sum(count), tl.sum(losses) * weight.to(tl.float64)
    sums = (total, tokens, tokens > 0, tl.sum(clipped), tl.sum(errors.to(tl.float64)))
    add_up(sums, partials, finished, loss, stats, VALUE_STATS, BLOCK)


def value_loss_fwd(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    epsilon: float,
    sequence_mean: bool,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    slope = torch.empty_like(values)
    loss, *sums, batch = _outputs(values, cu_seqlens, per_token, VALUE_STATS.value)
    launch(
        value_kernel,
        max(batch, 1),
        *(loss if per_token else None, slope, None if per_token else loss, *sums),
        *(values, old_values, returns, mask, cu_seqlens, batch, epsilon),
        like=values,
        sequence_mean=bool(sequence_mean),
    )
    return loss, slope, sums[0]
