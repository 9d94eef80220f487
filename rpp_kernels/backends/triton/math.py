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


# ---------------------------------------------------------------- numbers


@triton.jit
def number(x, F: tl.constexpr):
    """A parameter `tl.float64` in the dtype F; in the interpreter it is a Python float until here."""
    return tl.full([], x, F)


@triton.jit
def multiply_add(a, b, c):
    """a * b + c, rounded once in float32, which is all that the interpreter can."""
    return tl.fma(a, b, c) if a.dtype == tl.float32 else a * b + c


@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)  # a NaN stays one


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


@triton.jit
def exp_minus_1(x):
    near = x + exp_minus_1_minus_x(x)
    return tl.where(tl.abs(x) < 0.5, near, exponential(x) - 1.0)


@triton.jit
def lowest_power(F: tl.constexpr):
    """An exponent whose power of 2 is all but 0, and finite: 0 * -inf never arises."""
    out: tl.constexpr = -126.0 if F.primitive_bitwidth == 32 else -1022.0
    return out


@triton.jit
def is_last(arrived, count):
    """Whether this program is the last of `count` to ask, with all that the others stored before they asked in sight;
    read that with cache_modifier=".cg", past the cache of this multiprocessor."""
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1


# ---------------------------------------------------------------- softcap
#
# z = c tanh(x / c) = -c s E / (2 + E), E = exp(-2 |x| / c) - 1, s the sign of x; dz / dx = 4 (1 + E) / (2 + E)^2


@triton.jit
def minus_expm1_of(x, cap):
    below = -2.0 * tl.abs(x) / cap
    return exp_minus_1(tl.where(below < -200.0, -200.0, below))


@triton.jit
def softcapped(x, cap):
    e = minus_expm1_of(x, cap)
    value = cap * e / (2.0 + e)
    return tl.where(x < 0.0, value, -value)


@triton.jit
def softcap_slope(x, cap):
    e = minus_expm1_of(x, cap)
    return 4.0 * (1.0 + e) / ((2.0 + e) * (2.0 + e))


# ---------------------------------------------------------------- log-probs
#
# With p = softmax(z), z = logits / temperature, logp = log p, d(logps)/dz_j = [j = y] - p_j,
# d(entropy)/dz_j = -p_j (logp_j + entropy), d(lse)/dz_j = p_j. Sums are of powers of 2, rate = log2(e) / temperature.


@triton.jit
def rescaled(top, to, sums, weighted, rate):
    """Sums of 2^t and t 2^t, t = (x - top) * rate, as those of t = (x - to) * rate. What is -inf so far has none."""
    shift = (top - to) * rate
    shift = tl.where(shift < lowest_power(top.dtype), lowest_power(top.dtype), shift)
    power = tl.exp2(shift)
    return sums * power, (weighted + shift * sums) * power


@triton.jit
def or_0(top):
    """What is -inf so far has no maximum to subtract; 0 keeps its terms at the lowest power."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_terms(x, top, sums, weighted, rate):
    """The logits x (lanes, n) enter the sums of their lanes; one exponential for each of them and one for each lane."""
    raised = tl.maximum(top, tl.max(x, 1))  # passes over NaN, which the sums then keep
    offset = or_0(raised)
    sums, weighted = rescaled(top, offset, sums, weighted, rate)
    t = (x - offset[:, None]) * rate
    t = tl.maximum(t, tl.full([], lowest_power(x.dtype), x.dtype), propagate_nan=tl.PropagateNan.ALL)
    power = tl.exp2(t)
    return raised, sums + tl.sum(power, 1), weighted + tl.sum(power * t, 1)


@triton.jit
def merged_terms(top, sums, weighted, rate):
    """Of all lanes together: the maximum, and the sums in float64."""
    highest = tl.max(top, 0)
    sums, weighted = rescaled(top, or_0(highest), sums, weighted, rate)
    return highest, tl.sum(sums.to(tl.float64), 0), tl.sum(weighted.to(tl.float64), 0)


@triton.jit
def row_results(top, sums, weighted, target, temperature, F: tl.constexpr):
    """logps, entropy, lse and its rest, with which it has twice the precision."""
    log_sum = tl.log(sums)
    mean = top.to(tl.float64) / temperature
    # Not the difference of two products, of which one may be fused and the other rounded.
    logps = (target.to(tl.float64) - top.to(tl.float64)) / temperature - log_sum
    # A row of nothing but -inf is no distribution, though the terms of its sum are there.
    entropy = tl.where(tl.abs(mean) == float("inf"), float("nan"), log_sum - weighted / sums * LN_2)
    lse = (mean + log_sum).to(F)
    return logps.to(F), entropy.to(F), lse, ((mean - lse.to(tl.float64)) + log_sum).to(F)


@triton.jit
def row_gradient(lse, lse_rest, entropy, temperature, dlogps, dentropy, dlse, F: tl.constexpr):
    """logp = (logit - shift) * inverse_temperature - rest, with shift near the largest logits, where the difference is
    exact: logit * inverse_temperature - lse would carry the rounding of two large numbers into every probability.
    Then dlogits_j = p_j * (weight + entropy_weight * logp_j), the target's own term aside."""
    whole = lse.to(tl.float64) + lse_rest.to(tl.float64)
    shift = (whole * temperature).to(F)
    rest = (whole - shift.to(tl.float64) / temperature).to(F)
    inverse_temperature = (1.0 / temperature).to(F)
    weight = (dlse - dlogps - dentropy * entropy) * inverse_temperature
    return shift, rest, inverse_temperature, weight, -dentropy * inverse_temperature


@triton.jit
def dlogits_of(x, is_target, g, dlogps, cap, with_entropy: tl.constexpr, with_softcap: tl.constexpr):
    """From logits x and what row_gradient gives."""
    shift, rest, inverse_temperature, weight, entropy_weight = g
    z = x
    if with_softcap:
        z = softcapped(x, cap)
    logp = multiply_add(z - shift, tl.zeros_like(x) + inverse_temperature, tl.zeros_like(x) - rest)
    if with_entropy:
        low = lowest_power(x.dtype) * LN_2  # p log p -> 0 for a logit of -inf
        weight += entropy_weight * tl.where(logp < low, low, logp)
    out = tl.exp2(logp * LOG2_E) * weight
    out = tl.where(is_target, out + dlogps * inverse_temperature, out)
    if with_softcap:
        out *= softcap_slope(x, cap)
    return out


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
