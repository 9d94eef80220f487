"""Sums over programs: each writes its own down in float64, and the last one to finish adds them up, in one order."""

import triton
import triton.language as tl

from rpp_kernels.backends.triton.math import at_least


@triton.jit
def is_last(arrived, count):
    """Whether this program is the last of `count` to ask, with what the others stored before they asked in sight: read
    it with cache_modifier=".cg", past the cache of this multiprocessor. It has to be scalars, stored by the thread that
    counts: a barrier of AMD does not wait for the stores of other threads."""
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1


@triton.jit
def add_up(sums, partials, counter, loss, stats, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """The last program adds up the `sums` of all, (programs, len(sums)), in one order whichever it is. The last of them
    are the stats; the first is the loss, where one is asked for."""
    SUMS: tl.constexpr = len(sums)
    ours = partials + tl.program_id(0).to(tl.int64) * SUMS
    for i in tl.static_range(SUMS):
        tl.store(ours + i, sums[i].to(tl.float64))
    if is_last(counter, tl.num_programs(0)):
        ROWS: tl.constexpr = BLOCK // 8
        row, k = tl.arange(0, ROWS)[:, None], tl.arange(0, 16)
        total = tl.zeros((ROWS, 16), tl.float64)
        for first in range(0, tl.num_programs(0), ROWS):
            at = (first + row).to(tl.int64) * SUMS + k[None, :]
            inside = (first + row < tl.num_programs(0)) & (k[None, :] < SUMS)
            total += tl.load(partials + at, mask=inside, other=0.0, cache_modifier=".cg")
        result = tl.sum(total, 0)
        if loss is not None:
            tl.store(loss + k, result.to(loss.dtype.element_ty), mask=k == 0)
        tl.store(stats + k - (SUMS - STATS), result, mask=(k >= SUMS - STATS) & (k < SUMS))


# ---------------------------------------------------------------- moments: count, mean, sum of squared deviations


@triton.jit
def block_moments(x, valid):
    """Of float64: the mean first, then the deviations from it, so that values far from 0 lose nothing."""
    count = tl.sum(valid.to(tl.float64))
    divisor = at_least(count, 1.0)
    mean = tl.sum(tl.where(valid, x, 0.0)) / divisor
    deviation = tl.where(valid, x - mean, 0.0)
    rest = tl.sum(deviation)  # what the rounding of the mean left
    squares = tl.sum(deviation * deviation) - rest * (rest / divisor)
    return count, mean + rest / divisor, at_least(squares, 0.0)


@triton.jit
def with_moments(count, mean, squares, other_count, other_mean, other_squares):
    """Both as one: csrc/statistics.h."""
    total = count + other_count
    shift = other_mean - mean
    share = other_count / at_least(total, 1.0)
    merged_mean, merged_squares = mean + shift * share, squares + other_squares + shift * shift * count * share
    some = other_count > 0
    return total, tl.where(some, merged_mean, mean), tl.where(some, merged_squares, squares)


@triton.jit
def store_moments(parts, i, count, mean, squares):
    tl.store(parts + 3 * i, count)
    tl.store(parts + 3 * i + 1, mean)
    tl.store(parts + 3 * i + 2, squares)


@triton.jit
def merged_moments(parts, BLOCK: tl.constexpr):
    """Of the parts (programs, 3) that other programs stored, always in the same order."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    n = tl.num_programs(0)
    shift = tl.load(parts + 1, cache_modifier=".cg")  # equal means stay what they are
    counts, sums = tl.full([BLOCK], 0.0, tl.float64), tl.full([BLOCK], 0.0, tl.float64)
    for k in range(0, n, BLOCK):
        at = parts + 3 * (k + lane)
        count = tl.load(at, mask=k + lane < n, other=0.0, cache_modifier=".cg")
        mean = tl.load(at + 1, mask=k + lane < n, other=0.0, cache_modifier=".cg")
        counts += count
        sums += tl.where(count > 0, count * (mean - shift), 0.0)
    total = tl.sum(counts)
    center = shift + tl.sum(sums) / at_least(total, 1.0)
    squares = tl.full([BLOCK], 0.0, tl.float64)
    for k in range(0, n, BLOCK):
        at = parts + 3 * (k + lane)
        count = tl.load(at, mask=k + lane < n, other=0.0, cache_modifier=".cg")
        mean = tl.load(at + 1, mask=k + lane < n, other=0.0, cache_modifier=".cg")
        square = tl.load(at + 2, mask=k + lane < n, other=0.0, cache_modifier=".cg")
        squares += tl.where(count > 0, square + count * (mean - center) * (mean - center), 0.0)
    return total, tl.where(total > 0, center, 0.0), tl.sum(squares)
