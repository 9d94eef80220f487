"""dpo_loss, a program for each pair; copg_loss, one for each sequence, of which the last compares all; and the gradient
of both. Numbers of whole completions are float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import counter, kernel, launch
from rpp_kernels.backends.triton.math import at_least, number, pair_loss
from rpp_kernels.backends.triton.sequences import bounds_of, valid_of
from rpp_kernels.backends.triton.sums import add_up, is_last

__all__ = ["copg_loss_fwd", "dpo_loss_fwd", "preference_loss_bwd"]

DPO_STATS = tl.constexpr(5)  # PreferenceStats


@triton.jit
def log_ratio_of(logps, ref_logps, mask, cu_seqlens, sequence, B, BLOCK: tl.constexpr):
    """(the sum over a sequence of logps - ref_logps, of how many valid tokens), in float64."""
    begin, end = bounds_of(cu_seqlens, sequence, B)
    lanes = tl.zeros((BLOCK,), tl.float64)  # terms of both signs cancel
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = valid_of(mask, at, end)
        lanes += tl.load(logps + at, mask=valid, other=0.0).to(tl.float64)
        if ref_logps is not None:
            lanes -= tl.load(ref_logps + at, mask=valid, other=0.0).to(tl.float64)
        count += valid.to(tl.int32)
    return tl.sum(lanes), tl.sum(count).to(tl.float64)


# ---------------------------------------------------------------- pairs


@kernel
def dpo_kernel(
    pair_losses,  # (P,); None where only the sum is wanted
    slope,  # (B,)
    loss,  # (); None with pair_losses
    stats,  # (5,)
    partials,  # (programs, 6)
    finished,  # (1,)
    logps,  # (T,)
    ref_logps,  # (T,); may be None
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    B: tl.int64,
    beta: tl.float64,
    label_smoothing: tl.float64,
    margin: tl.float64,
    loss_type: tl.constexpr,
    length_normalized: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = slope.dtype.element_ty
    pair = tl.program_id(0).to(tl.int64)
    inside = 2 * pair < B  # but in the one program of an empty batch
    chosen, w_valid = log_ratio_of(logps, ref_logps, mask, cu_seqlens, 2 * pair, B, BLOCK)
    rejected, l_valid = log_ratio_of(logps, ref_logps, mask, cu_seqlens, 2 * pair + 1, B, BLOCK)
    w_share, l_share = number(1.0, tl.float64), number(1.0, tl.float64)
    if length_normalized:
        w_share, l_share = 1.0 / at_least(w_valid, 1.0), 1.0 / at_least(l_valid, 1.0)
    chosen, rejected = chosen * w_share, rejected * l_share
    rate, smoothing, gap = number(beta, tl.float64), number(label_smoothing, tl.float64), number(margin, tl.float64)
    each, dchosen, drejected = pair_loss(loss_type, chosen, rejected, rate, smoothing, gap)
    counted = w_valid + l_valid > 0.0
    each = tl.where(counted, each, 0.0)
    if pair_losses is not None:
        tl.store(pair_losses + pair, each.to(F), mask=inside)
    tl.store(slope + 2 * pair, (dchosen * w_share).to(F), mask=inside)
    tl.store(slope + 2 * pair + 1, (drejected * l_share).to(F), mask=inside)
    r_w, r_l, margins = rate * chosen, rate * rejected, rate * (chosen - rejected)
    add_up((each, counted, r_w, r_l, margins, chosen > rejected), partials, finished, loss, stats, DPO_STATS, BLOCK)


def dpo_loss_fwd(
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    margin: float,
    length_normalized: bool,
    per_pair: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = cu_seqlens.numel() - 1
    loss, slope, stats = _outputs(logps, batch, batch // 2, per_pair, DPO_STATS.value)
    programs = max(batch // 2, 1)
    partials = logps.new_empty(programs, DPO_STATS.value + 1, dtype=torch.float64)
    launch(
        dpo_kernel,
        programs,
        *(loss if per_pair else None, slope, None if per_pair else loss, stats, partials, counter(logps)),
        *(logps, ref_logps, mask, cu_seqlens, batch, beta, label_smoothing, margin),
        like=logps,
        loss_type=loss_type,
        length_normalized=length_normalized,
    )
    return loss, slope, stats


def _outputs(like: Tensor, batch: int, groups: int, per_group: bool, num_stats: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, stats)."""
    loss, stats = like.new_empty(groups if per_group else ()), like.new_empty(num_stats, dtype=torch.float64)
    return loss, like.new_empty(batch), stats


# ---------------------------------------------------------------- groups


@kernel
def copg_kernel(
    group_losses,  # (groups,); None where only the sum is wanted
    slope,  # (B,)
    loss,  # (); None with group_losses
    stats,  # (3,)
    log_ratios,  # (programs, 2), each with how many valid tokens it is of
    finished,  # (1,)
    logps,  # (T,)
    ref_logps,  # (T,)
    scores,  # (B,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    B: tl.int64,
    group_size: tl.int64,
    beta: tl.float64,
    BLOCK: tl.constexpr,
):
    F = slope.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    sum_of_sequence, length = log_ratio_of(logps, ref_logps, mask, cu_seqlens, sequence, B, BLOCK)
    tl.store(log_ratios + 2 * sequence, sum_of_sequence)
    tl.store(log_ratios + 2 * sequence + 1, length)
    if is_last(finished, tl.num_programs(0)):
        GROUPS: tl.constexpr = BLOCK // 4
        rate, others = number(beta, tl.float64), number(group_size, tl.float64) - 1.0
        none = tl.zeros((GROUPS,), tl.float64)
        losses, sequences, rewards, all_h = none, none, none, none
        for start in range(0, B // group_size, GROUPS):
            group = start + tl.arange(0, GROUPS).to(tl.int64)
            inside = group < B // group_size
            sum_h, sum_r, each = none, none, none
            for i in range(group_size):
                at = group * group_size + i
                sum_h += tl.load(log_ratios + 2 * at, mask=inside, other=0.0, cache_modifier=".cg")
                sum_r += tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
            for i in range(group_size):
                at = group * group_size + i
                h = tl.load(log_ratios + 2 * at, mask=inside, other=0.0, cache_modifier=".cg")
                r = tl.load(scores + at, mask=inside, other=0.0).to(tl.float64)
                h_gap, r_gap = h - (sum_h - h) / others, r - (sum_r - r) / others
                tl.store(slope + at, (rate * h_gap - r_gap).to(F), mask=inside)
                valid = tl.load(log_ratios + 2 * at + 1, mask=inside, other=0.0, cache_modifier=".cg") > 0.0
                each += tl.where(valid, h * (0.5 * rate * h_gap - r_gap), 0.0)
                sequences, rewards = sequences + valid.to(tl.float64), rewards + tl.where(valid, r, 0.0)
            losses, all_h = losses + each, all_h + sum_h
            if group_losses is not None:
                tl.store(group_losses + group, each.to(F), mask=inside)
        if loss is not None:
            tl.store(loss, tl.sum(losses).to(F))
        tl.store(stats, tl.sum(sequences))
        tl.store(stats + 1, tl.sum(rewards))
        tl.store(stats + 2, tl.sum(all_h))


def copg_loss_fwd(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    group_size: int,
    beta: float,
    per_group: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = cu_seqlens.numel() - 1
    loss, slope, stats = _outputs(logps, batch, batch // group_size, per_group, 3)
    programs = max(batch, 1)
    log_ratios = logps.new_empty(programs, 2, dtype=torch.float64)
    launch(
        copg_kernel,
        programs,
        *(loss if per_group else None, slope, None if per_group else loss, stats, log_ratios, counter(logps)),
        *(logps, ref_logps, scores, mask, cu_seqlens, batch, group_size, beta),
        like=logps,
    )
    return loss, slope, stats


# ---------------------------------------------------------------- the gradient of both


@kernel
def spread_kernel(
    out,  # (T,)
    each,  # (B,)
    mask,  # (T,)
    cu_seqlens,  # (B+1,)
    B: tl.int64,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(cu_seqlens, sequence, B)
    value = tl.load(each + sequence)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + at, tl.where(valid_of(mask, at, end), value, 0.0), mask=at < end)


def preference_loss_bwd(each: Tensor, mask: Tensor | None, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    dlogps, batch = each.new_empty(num_tokens), cu_seqlens.numel() - 1
    launch(spread_kernel, batch, dlogps, each, mask, cu_seqlens, batch, like=each)
    return dlogps
