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
