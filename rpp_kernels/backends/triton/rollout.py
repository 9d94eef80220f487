"""rollout_weights: a program for each sequence, which is read twice where all its tokens have one weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import counter, kernel, launch
from rpp_kernels.backends.triton.math import at_least, number, rollout_weight
from rpp_kernels.backends.triton.sequences import bounds_of, valid_of
from rpp_kernels.backends.triton.sums import add_up

__all__ = ["rollout_weights_fwd"]

# LEVELS in ops/rollout.py, but for "sequence"
TOKEN = tl.constexpr(0)
GEOMETRIC = tl.constexpr(2)

STATS = tl.constexpr(5)  # RolloutStats


@triton.jit
def load_log_ratio(old_logps, sampling_logps, mask, at, end):
    """(valid, log_ratio), 0 where masked."""
    valid = valid_of(mask, at, end)
    old_logp = tl.load(old_logps + at, mask=valid, other=0.0)
    return valid, old_logp - tl.load(sampling_logps + at, mask=valid, other=0.0)


@kernel
def rollout_kernel(
    weights,  # (T,)
    stats,  # (5,)
    partials,  # (programs, 5)
    finished,  # (1,)
    old_logps,  # (T,)
    sampling_logps,  # (T,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    B: tl.int64,
    low: tl.float64,
    high: tl.float64,
    log_ratio_clamp: tl.float64,
    level: tl.constexpr,
    truncate: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = weights.dtype.element_ty
    bottom, top, most = number(low, F), number(high, F), number(log_ratio_clamp, F)
    begin, end = bounds_of(cu_seqlens, tl.program_id(0).to(tl.int64), B)
    none, none_wide = tl.zeros((BLOCK,), F), tl.zeros((BLOCK,), tl.float64)
    log_ratio = none
    if level != TOKEN:
        total, length = none_wide, none_wide
        for start in range(begin, end, BLOCK):
            valid, d = load_log_ratio(old_logps, sampling_logps, mask, start + tl.arange(0, BLOCK), end)
            total, length = total + d.to(tl.float64), length + valid.to(tl.float64)
        of_sequence = tl.sum(total)
        if level == GEOMETRIC:
            of_sequence = of_sequence / at_least(tl.sum(length), 1.0)
        log_ratio = none + of_sequence.to(F)

    sum_weights, log_ratios = none, none_wide
    count, lows, highs = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid, d = load_log_ratio(old_logps, sampling_logps, mask, at, end)
        if level == TOKEN:
            weight, is_low, is_high = rollout_weight(d, bottom, top, most, truncate)
        else:
            weight, is_low, is_high = rollout_weight(log_ratio, bottom, top, most, truncate)
        weight = tl.where(valid, weight, 0.0)
        tl.store(weights + at, weight, mask=at < end)
        sum_weights, log_ratios = sum_weights + weight, log_ratios - d.to(tl.float64)
        count, lows = count + valid.to(tl.int32), lows + (valid & is_low).to(tl.int32)
        highs += (valid & is_high).to(tl.int32)
    sums = (tl.sum(count), tl.sum(lows), tl.sum(highs), tl.sum(sum_weights.to(tl.float64)), tl.sum(log_ratios))
    add_up(sums, partials, finished, None, stats, STATS, BLOCK)


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
) -> tuple[Tensor, Tensor]:
    weights, batch = torch.empty_like(old_logps), cu_seqlens.numel() - 1
    programs = max(batch, 1)  # of an empty batch the statistics are 0
    stats = old_logps.new_empty(STATS.value, dtype=torch.float64)
    partials = old_logps.new_empty(programs, STATS.value, dtype=torch.float64)
    launch(
        rollout_kernel,
        programs,
        *(weights, stats, partials, counter(old_logps), old_logps, sampling_logps, mask, cu_seqlens),
        *(batch, low, high, log_ratio_clamp),
        like=old_logps,
        level=level,
        truncate=truncate,
    )
    return weights, stats
