"""The formulas of rpp_kernels/reference, once for Triton; csrc/formulas.h has them for C++.

Every function takes tensors of float32 or float64 and keeps their dtype. No branches on values: they are selected, so
that a NaN passes and nothing at a masked place does. `F` is the dtype to compute in.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

RECIPROCAL_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(n) for n in range(17)))

# Estimators, in the order of ESTIMATORS in ops/kl.py
K1 = tl.constexpr(1)
K2 = tl.constexpr(2)
K3 = tl.constexpr(3)
ABS = tl.constexpr(4)

# What a masked token does to a sum that passes it, besides nothing, in the order of GAPS in ops/advantages.py
GAP_RESET = tl.constexpr(1)
GAP_STEP = tl.constexpr(2)

# Where eps goes, in the order of EPS_MODES there
EPS_FLOOR = tl.constexpr(0)
EPS_ADD_VAR = tl.constexpr(1)
EPS_ADD_STD = tl.constexpr(2)


# ---------------------------------------------------------------- programs


@triton.jit
def is_last(counter):
    """Whether this program is the last to come here; it then sees what all others stored before they came."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1


# ---------------------------------------------------------------- numbers


@triton.jit
def number(x, F: tl.constexpr):
    """A parameter `tl.float64` in the dtype F; in the interpreter it is a Python float until here."""
    return tl.full([], x, F)


@triton.jit
def multiply_add(a, b, c):
    """a * b + c, rounded once."""
    if a.dtype == tl.float32:
        out = tl.fma(a, b, c)
    else:  # the interpreter has a fused one for float32 alone
        out = a * b + c
    return out


@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)  # a NaN stays one


@triton.jit
def inverse_or_0(x):
    """1 / x where x > 0, else 0."""
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def exponential(x):
    """exp(x) to 2 ulp: the rounding of x * log2(e), which exp2 would make |x| ulp of, is put back."""
    if x.dtype == tl.float32:
        x = clamp(x, -104.0, 89.0)  # 0 and infinity; beyond them the parts would be infinite and their difference NaN
        high = x * LOG2_E
        low = tl.fma(x, tl.full(x.shape, LOG2_E, tl.float32), -high)
        low = tl.fma(x, tl.full(x.shape, 1.9259629911266174e-08, tl.float32), low)  # log2(e) - float32(log2(e))
        power = tl.exp2(high)
        out = tl.fma(power * low, tl.full(x.shape, LN_2, tl.float32), power)
        out = tl.where(x >= 89.0, float("inf"), out)
    else:
        out = tl.exp(x)
    return out


@triton.jit
def exp_minus_1_minus_x(x):
    """exp(x) - 1 - x without its cancellation near 0, where it is x^2 (1/2! + x (1/3! + ...)): 2 ulp for |x| < 1/2."""
    q = tl.full(x.shape, 0.0, x.dtype)
    if x.dtype == tl.float64:
        q = q + 1 / 355687428096000.0
        for n in tl.static_range(16, 9, -1):
            q = q * x + RECIPROCAL_FACTORIALS[n]
    for n in tl.static_range(9, 1, -1):
        q = q * x + RECIPROCAL_FACTORIALS[n]
    near = q * x * x
    return tl.where(tl.abs(x) < 0.5, near, exponential(x) - 1.0 - x)


# ---------------------------------------------------------------- KL estimators of d = logps - ref_logps


@triton.jit
def unclamped_kl(d, estimator: tl.constexpr, log_ratio_clamp):
    out = tl.zeros_like(d)
    if estimator == K1:
        out = d
    elif estimator == K2:
        out = 0.5 * d * d
    elif estimator == K3:
        out = exp_minus_1_minus_x(-clamp(d, -log_ratio_clamp, log_ratio_clamp))
    elif estimator == ABS:
        out = tl.where(d < 0.0, -d, d)
    return out


@triton.jit
def kl_value(d, estimator: tl.constexpr, log_ratio_clamp, kl_clamp):
    return clamp(unclamped_kl(d, estimator, log_ratio_clamp), -kl_clamp, kl_clamp)


@triton.jit
def kl_slope(d, estimator: tl.constexpr, log_ratio_clamp, kl_clamp):
    """d(kl_value) / d(d)."""
    slope = tl.zeros_like(d)
    if estimator == K1:
        slope = slope + 1.0
    elif estimator == K2:
        slope = d
    elif estimator == K3:
        slope = 1.0 - exponential(-d)
        slope = tl.where((d > log_ratio_clamp) | (d < -log_ratio_clamp), 0.0, slope)
    elif estimator == ABS:
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0)).to(d.dtype)
    kl = unclamped_kl(d, estimator, log_ratio_clamp)
    return tl.where((kl > kl_clamp) | (kl < -kl_clamp), 0.0, slope)


# ---------------------------------------------------------------- scans: carry -> x + factor carry, token after token
#
# In float64, block by block. Places outside of the sequence are steps that change nothing, x = 0 and factor = 1.


@triton.jit
def two_steps(factor, x, next_factor, next_x):
    return factor * next_factor, next_x + next_factor * x


@triton.jit
def two_steps_or_resets(factor, x, next_factor, next_x):
    """As above; a step of a negative factor starts anew. Selected, not multiplied by 0: the sum may be NaN."""
    resets = (factor < 0) | (next_factor < 0)
    x = tl.where(next_factor < 0, next_x, next_x + next_factor * x)
    return tl.where(resets, -1.0, factor * next_factor).to(factor.dtype), x


@triton.jit
def discount_of(valid, inside, gamma, gap: tl.constexpr):
    """What a token multiplies the carry by; -1 where it resets it."""
    if gap == GAP_STEP:
        factor = tl.where(inside, gamma, 1.0)
    elif gap == GAP_RESET:
        factor = tl.where(valid, gamma, tl.where(inside, -1.0, 1.0))
    else:
        factor = tl.where(valid, gamma, 1.0)
    return factor.to(tl.float64)


@triton.jit
def scanned(x, factor, carry, resets: tl.constexpr, forward: tl.constexpr, BLOCK: tl.constexpr):
    """The carry behind each token of a block, and behind the block."""
    if resets:
        factor, x = tl.associative_scan((factor, x), 0, two_steps_or_resets, reverse=not forward)
        out = tl.where(factor < 0, x, x + factor * carry)
    else:
        factor, x = tl.associative_scan((factor, x), 0, two_steps, reverse=not forward)
        out = x + factor * carry
    end: tl.constexpr = BLOCK - 1 if forward else 0
    return out, tl.sum(tl.where(tl.arange(0, BLOCK) == end, out, 0.0))


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
    """Both as one: csrc/cpu/moments.h."""
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


@triton.jit
def degrees_of(count, unbiased: tl.constexpr):
    """What the squares are divided by for a variance."""
    if unbiased:
        count = count - 1.0
    return at_least(count, 1.0)


@triton.jit
def whitening(variance, eps, eps_mode: tl.constexpr):
    """1 / std, and its derivative in the variance."""
    if eps_mode == EPS_ADD_STD:
        std = tl.sqrt(variance)
        inverse = 1.0 / (std + eps)
        slope = -0.5 * inverse * inverse * inverse_or_0(std)
    elif eps_mode == EPS_ADD_VAR:
        inverse = 1.0 / tl.sqrt(variance + eps)
        slope = -0.5 * inverse * inverse * inverse
    else:
        inverse = 1.0 / tl.sqrt(at_least(variance, eps))
        slope = tl.where(variance < eps, 0.0, -0.5 * inverse * inverse * inverse)
    return inverse, slope
