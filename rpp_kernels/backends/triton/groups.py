"""group_advantages: a program for a block of rows, each of which is compared with the rows of its group.

In pairs, because a row's own place in its group decides its baseline and its standard deviation: B n comparisons for
groups of n that stand next to each other, B^2 where an index says who is in a group. All in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.advantages import moments as moments_of
from rpp_kernels.backends.triton.launch import blocks, kernel, launch
from rpp_kernels.backends.triton.math import at_least, degrees_of, inverse_or_0, number

__all__ = ["group_advantages_bwd", "group_advantages_fwd"]

# In the order of BASELINES and STDS in ops/groups.py
BASELINE_LEAVE_ONE_OUT = tl.constexpr(1)
STD_NONE = tl.constexpr(0)
STD_GROUP = tl.constexpr(1)
STD_BATCH = tl.constexpr(2)
STD_LEAVE_ONE_OUT = tl.constexpr(3)

# What the backward keeps of each row, in columns (5, B)
COUNT = tl.constexpr(0)  # of its group
SHARE = tl.constexpr(1)  # of its score in the baseline
DCENTERED = tl.constexpr(2)
DSTD = tl.constexpr(3)  # divided by the standard deviation and its degrees of freedom where it is that of the others
CENTER = tl.constexpr(4)  # what its standard deviation is about; with STD_GROUP, d(std) / d(score)
COLUMNS = 5


@triton.jit
def rows_of_block(group_index, B, group_size, BLOCK: tl.constexpr):
    """This program's rows, their groups, and the range in which all members of these lie."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start + tl.arange(0, BLOCK)
    if group_index is not None:
        group = tl.load(group_index + row, mask=row < B, other=-1)
        first, stop = start * 0, start * 0 + B
    else:
        group = row // group_size
        first = start // group_size * group_size
        stop = (start + BLOCK - 1) // group_size * group_size + group_size
        stop = tl.where(stop < B, stop, B)
    return row, group, first, stop


@triton.jit
def members(group_index, k, group, stop, group_size, BLOCK: tl.constexpr):
    """BLOCK others from the k-th on, (1, BLOCK), and which are of each row's group, (BLOCK, BLOCK)."""
    other = k + tl.arange(0, BLOCK).to(tl.int64)
    there = other < stop
    theirs = other // group_size if group_index is None else tl.load(group_index + other, mask=there, other=-2)
    same = (group[:, None] == theirs[None, :]) & there[None, :]
    return other[None, :], same


@triton.jit
def load_as_double(x, at, where):
    return tl.load(x + at, mask=where, other=0.0).to(tl.float64)


@triton.jit
def zeros(BLOCK: tl.constexpr):
    return tl.full([BLOCK, BLOCK], 0.0, tl.float64)


@kernel
def group_advantages_kernel(
    out,  # (B,), of the forward
    columns,  # (5, B) float64, of the backward
    dadvantages,  # (B,), of the backward
    scores,  # (B,)
    group_index,  # (B,) int64
    lengths,  # (B,) float64
    of_all,  # (3,): moments of all scores, with STD_BATCH
    B: tl.int64,
    group_size: tl.int64,
    eps: tl.float64,
    baseline: tl.constexpr,
    std: tl.constexpr,
    unbiased: tl.constexpr,
    keep_singletons: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group, first, stop = rows_of_block(group_index, B, group_size, BLOCK)
    score = load_as_double(scores, row, row < B)

    # Who is the first of the others: their scores less this one are exactly 0 where they are equal.
    shift = score
    if std == STD_LEAVE_ONE_OUT:
        first_other = tl.full([BLOCK, BLOCK], 0, tl.int64) + B
        for k in range(first, stop, BLOCK):
            other, same = members(group_index, k, group, stop, group_size, BLOCK)
            same = same & (other != row[:, None]) & (other < first_other)
            first_other = tl.where(same, other, first_other)
        one = tl.min(first_other, axis=1)
        shift = load_as_double(scores, one, one < B)

    counts, weights, weighted, sums, sums_of_others = (
        zeros(BLOCK),
        zeros(BLOCK),
        zeros(BLOCK),
        zeros(BLOCK),
        zeros(BLOCK),
    )
    for k in range(first, stop, BLOCK):
        other, same = members(group_index, k, group, stop, group_size, BLOCK)
        their = load_as_double(scores, other, other < stop)
        counts += same.to(tl.float64)
        sums += tl.where(same, their - score[:, None], 0.0)
        if lengths is not None:  # a score that weighs nothing may be anything
            weight = tl.where(same, load_as_double(lengths, other, other < stop), 0.0)
            weights += weight
            weighted += tl.where(weight > 0, weight * their, 0.0)
        if std == STD_LEAVE_ONE_OUT:
            sums_of_others += tl.where(same & (other != row[:, None]), their - shift[:, None], 0.0)

    count = tl.sum(counts, axis=1)
    others = count - 1.0
    less_mean = -tl.sum(sums, axis=1) / at_least(count, 1.0)
    share = 1.0 / at_least(count, 1.0)
    centered = less_mean
    if lengths is not None:
        weight = tl.sum(weights, axis=1)
        divisor = tl.where(weight > 0, weight, 1.0)
        centered = score - tl.sum(weighted, axis=1) / divisor
        share = load_as_double(lengths, row, row < B) / divisor
    if baseline == BASELINE_LEAVE_ONE_OUT:
        centered = centered * (count / at_least(others, 1.0))
    centered = tl.where(others > 0, centered, score if keep_singletons else 0.0)

    # The standard deviation about `center`, two passes.
    center = score - less_mean
    degrees = degrees_of(count, unbiased)
    if std == STD_LEAVE_ONE_OUT:
        center = shift + tl.sum(sums_of_others, axis=1) / at_least(others, 1.0)
        degrees = degrees_of(others, unbiased)
    deviation = tl.full([BLOCK], 0.0, tl.float64)
    inverse_std = tl.full([BLOCK], 1.0, tl.float64)
    if std == STD_BATCH:
        deviation += tl.sqrt(tl.load(of_all + 2) / degrees_of(tl.load(of_all), unbiased))
        inverse_std = 1.0 / (deviation + number(eps, tl.float64))
    elif std != STD_NONE:
        squares = zeros(BLOCK)
        for k in range(first, stop, BLOCK):
            other, same = members(group_index, k, group, stop, group_size, BLOCK)
            if std == STD_LEAVE_ONE_OUT:
                same = same & (other != row[:, None])
            away = tl.where(same, load_as_double(scores, other, other < stop) - center[:, None], 0.0)
            squares += away * away
        deviation = tl.sqrt(tl.sum(squares, axis=1) / degrees)
        undivided = deviation == 0 if std == STD_LEAVE_ONE_OUT else count == 1
        inverse_std = tl.where(undivided, 1.0, 1.0 / (deviation + number(eps, tl.float64)))

    if dadvantages is None:
        tl.store(out + row, (centered * inverse_std).to(out.dtype.element_ty), mask=row < B)
    else:
        dcentered = load_as_double(dadvantages, row, row < B) * inverse_std
        dstd = -dcentered * centered * inverse_std
        # d(std) / d(score) = (score - center) / (degrees std), and 0 where all scores are equal
        rate = inverse_or_0(degrees * deviation)
        if std == STD_GROUP:
            dstd = tl.where(others > 0, dstd, 0.0)
            center = tl.where(rate > 0, rate * less_mean, 0.0)
        elif std == STD_LEAVE_ONE_OUT:
            dstd = tl.where(rate > 0, rate * dstd, 0.0)
        tl.store(columns + COUNT * B + row, count, mask=row < B)
        tl.store(columns + SHARE * B + row, share, mask=row < B)
        tl.store(columns + DCENTERED * B + row, dcentered, mask=row < B)
        tl.store(columns + DSTD * B + row, dstd, mask=row < B)
        tl.store(columns + CENTER * B + row, center, mask=row < B)


@kernel
def group_gradient_kernel(
    dscores,  # (B,)
    columns,  # (5, B) float64
    scores,  # (B,)
    group_index,  # (B,) int64
    of_all,  # (3,): moments of all scores, with STD_BATCH
    B: tl.int64,
    group_size: tl.int64,
    baseline: tl.constexpr,
    std: tl.constexpr,
    unbiased: tl.constexpr,
    keep_singletons: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group, first, stop = rows_of_block(group_index, B, group_size, BLOCK)
    score = load_as_double(scores, row, row < B)
    dcentered, dstds = zeros(BLOCK), zeros(BLOCK)
    for k in range(first, stop, BLOCK):
        other, same = members(group_index, k, group, stop, group_size, BLOCK)
        dcentered += tl.where(same, load_as_double(columns + DCENTERED * B, other, other < stop), 0.0)
        dstd = load_as_double(columns + DSTD * B, other, other < stop)
        if std == STD_GROUP:
            dstds += tl.where(same, dstd, 0.0)
        elif std == STD_LEAVE_ONE_OUT:
            center = load_as_double(columns + CENTER * B, other, other < stop)
            dstds += tl.where(same & (other != row[:, None]), dstd * (score[:, None] - center), 0.0)

    count = load_as_double(columns + COUNT * B, row, row < B)
    others = count - 1.0
    own = load_as_double(columns + DCENTERED * B, row, row < B)
    result = own - load_as_double(columns + SHARE * B, row, row < B) * tl.sum(dcentered, axis=1)
    if baseline == BASELINE_LEAVE_ONE_OUT:
        result = result * (count / at_least(others, 1.0))
    result = tl.where(others > 0, result, own if keep_singletons else 0.0)
    if std == STD_GROUP:
        result += tl.sum(dstds, axis=1) * load_as_double(columns + CENTER * B, row, row < B)
    elif std == STD_LEAVE_ONE_OUT:
        result += tl.sum(dstds, axis=1)
    elif std == STD_BATCH:
        sums = tl.full([BLOCK], 0.0, tl.float64)
        for k in range(0, B, BLOCK):
            other = k + tl.arange(0, BLOCK).to(tl.int64)
            sums += load_as_double(columns + DSTD * B, other, other < B)
        degrees = degrees_of(tl.load(of_all), unbiased)
        deviation = tl.sqrt(tl.load(of_all + 2) / degrees)
        rate = inverse_or_0(degrees * deviation)
        result += tl.where(rate > 0, tl.sum(sums) * (score - tl.load(of_all + 1)) * rate, 0.0)
    tl.store(dscores + row, result.to(dscores.dtype.element_ty), mask=row < B)


def group_advantages_fwd(
    scores: Tensor,
    group_index: Tensor | None,
    lengths: Tensor | None,
    moments: Tensor | None,
    group_size: int,
    num_groups: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
) -> Tensor:
    out = torch.empty_like(scores)
    if std == STD_BATCH.value and moments is None:
        moments = moments_of(scores, None)
    tensors = out, None, None, scores, group_index, lengths, moments
    _group_advantages(tensors, group_size, baseline, std, unbiased, eps, keep_singletons)
    return out


def group_advantages_bwd(
    dadvantages: Tensor,
    scores: Tensor,
    group_index: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    num_groups: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
) -> Tensor:
    dscores, columns = torch.empty_like(scores), scores.new_empty(COLUMNS, scores.numel(), dtype=torch.float64)
    moments = moments_of(scores, None) if std == STD_BATCH.value else None
    tensors = None, columns, dadvantages, scores, group_index, lengths, moments
    _group_advantages(tensors, group_size, baseline, std, unbiased, eps, keep_singletons)
    options = {"baseline": baseline, "std": std, "unbiased": unbiased, "keep_singletons": keep_singletons}
    sizes = scores.numel(), group_size
    programs = blocks(group_gradient_kernel, scores)
    launch(
        group_gradient_kernel, programs, dscores, columns, scores, group_index, moments, *sizes, like=scores, **options
    )
    return dscores


def _group_advantages(
    tensors: tuple[Tensor | None, ...],
    group_size: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
) -> None:
    scores = tensors[3]
    assert scores is not None
    options = {"baseline": baseline, "std": std, "unbiased": unbiased, "keep_singletons": keep_singletons}
    numbers = scores.numel(), group_size, eps
    launch(group_advantages_kernel, blocks(group_advantages_kernel, scores), *tensors, *numbers, like=scores, **options)
