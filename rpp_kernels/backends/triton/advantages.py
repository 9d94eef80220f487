"""moments, whiten and reinforce_pp: sums of all tokens, which the last program to finish adds up in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import blocks, counter, kernel, launch
from rpp_kernels.backends.triton.math import degrees_of, kl_value, number, whitening
from rpp_kernels.backends.triton.sequences import discount_of, inside_and_valid, scanned, tokens
from rpp_kernels.backends.triton.sums import block_moments, is_last, merged_moments, store_moments, with_moments

__all__ = ["moments", "reinforce_pp_fwd", "whiten_bwd", "whiten_out"]


@triton.jit
def inside_block(mask, T, BLOCK: tl.constexpr):
    """This program's places, which of them there are, and which of these are valid."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, valid = inside_and_valid(mask, at, 0, T)
    return at, inside, valid


# ---------------------------------------------------------------- moments


@kernel
def moments_kernel(
    out,  # (3,): count, mean, sum of squared deviations
    parts,  # (programs, 3)
    done,  # (1,)
    values,  # (T,)
    mask,  # (T,)
    T: tl.int64,
    BLOCK: tl.constexpr,
):
    at, _, valid = inside_block(mask, T, BLOCK)
    x = tl.load(values + at, mask=valid, other=0.0).to(tl.float64)
    count, mean, squares = block_moments(x, valid)
    store_moments(parts, tl.program_id(0).to(tl.int64), count, mean, squares)
    if is_last(done, tl.num_programs(0)):
        count, mean, squares = merged_moments(parts, BLOCK)
        store_moments(out, 0, count, mean, squares)


def _doubles(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64)


def moments(values: Tensor, mask: Tensor | None) -> Tensor:
    programs = max(blocks(moments_kernel, values), 1)  # of no values too there are moments
    out, parts = _doubles(values, 3), _doubles(values, programs, 3)
    launch(moments_kernel, programs, out, parts, counter(values), values, mask, values.numel(), like=values)
    return out


# ---------------------------------------------------------------- whitening


@kernel
def whiten_kernel(
    out,  # (T,)
    values,  # (T,), may be out
    mask,  # (T,)
    of_all,  # (3,): moments
    T: tl.int64,
    eps: tl.float64,
    shift_mean: tl.constexpr,
    unbiased: tl.constexpr,
    eps_mode: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = out.dtype.element_ty
    mean = tl.load(of_all + 1)
    variance = tl.load(of_all + 2) / degrees_of(tl.load(of_all), unbiased)
    inverse_std, _ = whitening(variance, number(eps, tl.float64), eps_mode)
    shift = mean.to(F)
    offset = (shift.to(tl.float64) - mean) * inverse_std  # what the rounding of the mean left
    if not shift_mean:
        offset += mean
    at, inside, valid = inside_block(mask, T, BLOCK)
    result = (tl.load(values + at, mask=valid, other=0.0) - shift) * inverse_std.to(F) + offset.to(F)
    tl.store(out + at, tl.where(valid, result, 0.0), mask=inside)


def whiten_out(
    out: Tensor,
    values: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    eps_mode: int,
) -> None:
    options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps_mode": eps_mode}
    programs = blocks(whiten_kernel, values)
    launch(whiten_kernel, programs, out, values, mask, moments, values.numel(), eps, like=values, **options)


# dvalues = inverse_std (dout - mean dout) + slope sum(dout (x - mean)) 2 (x - mean) / degrees; without shift_mean the
# mean is added back, and with it mean dout.


@kernel
def whiten_sums_kernel(
    terms,  # (3,): what x - mean is multiplied by, what dout is, and what is added
    parts,  # (programs, 2): sums of dout and of dout (x - mean)
    done,  # (1,)
    dout,  # (T,)
    values,  # (T,)
    mask,  # (T,)
    of_all,  # (3,): moments
    T: tl.int64,
    eps: tl.float64,
    shift_mean: tl.constexpr,
    unbiased: tl.constexpr,
    eps_mode: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, _, valid = inside_block(mask, T, BLOCK)
    count, mean = tl.load(of_all), tl.load(of_all + 1)
    d = tl.load(dout + at, mask=valid, other=0.0).to(tl.float64)
    x = tl.load(values + at, mask=valid, other=0.0).to(tl.float64)
    part = parts + 2 * tl.program_id(0).to(tl.int64)
    tl.store(part, tl.sum(d))
    tl.store(part + 1, tl.sum(tl.where(valid, d * (x - mean), 0.0)))
    if is_last(done, tl.num_programs(0)):
        sums, products = tl.full([BLOCK], 0.0, tl.float64), tl.full([BLOCK], 0.0, tl.float64)
        n = tl.num_programs(0)
        for k in range(0, n, BLOCK):
            i = k + tl.arange(0, BLOCK).to(tl.int64)
            sums += tl.load(parts + 2 * i, mask=i < n, other=0.0, cache_modifier=".cg")
            products += tl.load(parts + 2 * i + 1, mask=i < n, other=0.0, cache_modifier=".cg")
        degrees = degrees_of(count, unbiased)
        inverse_std, slope = whitening(tl.load(of_all + 2) / degrees, number(eps, tl.float64), eps_mode)
        mean_dout = tl.sum(sums) / degrees_of(count, False)
        offset = -inverse_std * mean_dout
        if not shift_mean:
            offset += mean_dout
        tl.store(terms, 2.0 * slope * tl.sum(products) / degrees)
        tl.store(terms + 1, inverse_std)
        tl.store(terms + 2, offset)


@kernel
def whiten_bwd_kernel(
    dvalues,  # (T,)
    dout,  # (T,)
    values,  # (T,)
    mask,  # (T,)
    of_all,  # (3,): moments
    terms,  # (3,)
    T: tl.int64,
    BLOCK: tl.constexpr,
):
    F = dvalues.dtype.element_ty
    mean, scale = tl.load(of_all + 1), tl.load(terms)
    shift = mean.to(F)
    offset = tl.load(terms + 2) + scale * (shift.to(tl.float64) - mean)  # what the rounding of the mean left
    at, inside, valid = inside_block(mask, T, BLOCK)
    result = (tl.load(values + at, mask=valid, other=0.0) - shift) * scale.to(F) + offset.to(F)
    result += tl.load(dout + at, mask=valid, other=0.0) * tl.load(terms + 1).to(F)
    tl.store(dvalues + at, tl.where(valid, result, 0.0), mask=inside)


def whiten_bwd(
    dout: Tensor,
    values: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
    eps_mode: int,
) -> Tensor:
    options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps_mode": eps_mode}
    dvalues, terms, T = torch.empty_like(values), _doubles(values, 3), values.numel()
    programs = blocks(whiten_sums_kernel, values)
    sums = terms, _doubles(values, programs, 2), counter(values)
    launch(whiten_sums_kernel, programs, *sums, dout, values, mask, moments, T, eps, like=values, **options)
    programs = blocks(whiten_bwd_kernel, values)
    launch(whiten_bwd_kernel, programs, dvalues, dout, values, mask, moments, terms, T, like=values)
    return dvalues


# ---------------------------------------------------------------- reinforce_pp


@kernel
def reinforce_pp_kernel(
    returns,  # (T,)
    out,  # (3,): moments of the returns
    parts,  # (programs, 3)
    done,  # (1,)
    scores,  # (B,)
    old_logps,  # (T,)
    ref_logps,  # (T,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    B: tl.int64,
    beta: tl.float64,
    gamma: tl.float64,
    log_ratio_clamp: tl.float64,
    kl_clamp: tl.float64,
    estimator: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KL, terminal reward, return and moments of a sequence, block by block from its end: one read, one write."""
    F = returns.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens + i, mask=i < B, other=0)  # of no sequences one program finds that there are none
    end = tl.load(cu_seqlens + i + 1, mask=i < B, other=0)
    score = tl.load(scores + i, mask=i < B, other=0.0)
    price, most, highest = -number(beta, F), number(log_ratio_clamp, F), number(kl_clamp, F)
    discount, carry = number(gamma, tl.float64), tl.full([], 0.0, tl.float64)
    count, mean, squares = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    last = tl.full([], -1, tl.int64)
    for k in range(0, end - begin, BLOCK):
        at = tokens(k, begin, end, False, BLOCK)
        inside, valid = inside_and_valid(mask, at, begin, end)
        reward = tl.full([BLOCK], 0.0, F)
        if ref_logps is not None:
            d = tl.load(old_logps + at, mask=valid, other=0.0) - tl.load(ref_logps + at, mask=valid, other=0.0)
            reward = price * kl_value(d, estimator, most, highest)
        last = tl.where(last < 0, tl.max(tl.where(valid, at, -1)), last)
        reward = tl.where(at == last, reward + score, reward)
        factor = discount_of(valid, inside, discount, 0)
        sums, carry = scanned(tl.where(valid, reward, 0.0).to(tl.float64), factor, carry, False, False, BLOCK)
        result = tl.where(valid, sums, 0.0).to(F)
        tl.store(returns + at, result, mask=inside)
        block_count, block_mean, block_squares = block_moments(result.to(tl.float64), valid)
        count, mean, squares = with_moments(count, mean, squares, block_count, block_mean, block_squares)
    store_moments(parts, i, count, mean, squares)
    if is_last(done, tl.num_programs(0)):
        count, mean, squares = merged_moments(parts, BLOCK)
        store_moments(out, 0, count, mean, squares)


def reinforce_pp_fwd(
    scores: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    beta: float,
    gamma: float,
    estimator: int,
    log_ratio_clamp: float,
    kl_clamp: float,
) -> tuple[Tensor, Tensor]:
    count = scores.numel()
    programs = max(count, 1)
    returns, out, parts = torch.empty_like(old_logps), _doubles(scores, 3), _doubles(scores, programs, 3)
    tensors = returns, out, parts, counter(scores), scores, old_logps, ref_logps, mask, cu_seqlens
    numbers = count, beta, gamma, log_ratio_clamp, kl_clamp
    launch(reinforce_pp_kernel, programs, *tensors, *numbers, like=old_logps, estimator=estimator)
    return returns, out
