"""The formulas of rpp_kernels/reference, once for Triton; csrc/formulas.h has them for C++.

Every function takes tensors of float32 or float64 and keeps their dtype. No branches on values: they are selected, so
that a NaN passes and nothing at a masked place does. `F` is the dtype to compute in.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693359375)  # of few bits, so that products with integers are exact
LN_2_LOW = tl.constexpr(-0.00021219444005469057)

RECIPROCAL_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(n) for n in range(17)))

# Estimators, in the order of ESTIMATORS in ops/kl.py
K1 = tl.constexpr(1)
K2 = tl.constexpr(2)
K3 = tl.constexpr(3)
ABS = tl.constexpr(4)

# Where eps goes, in the order of EPS_MODES in ops/advantages.py
EPS_FLOOR = tl.constexpr(0)
EPS_ADD_VAR = tl.constexpr(1)
EPS_ADD_STD = tl.constexpr(2)


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
def inverse_or_0(x):
    """1 / x where x > 0, else 0."""
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def exponential(x):
    """exp(x) = 2^n exp(f), n the integer nearest to x / ln 2: rounded as a whole, x / ln 2 would cost |x| units in the
    last place. Below the smallest normal number it stays there, beyond 127.5 ln 2 it is infinite."""
    if x.dtype == tl.float32:
        within = clamp(x, -87.33654, 88.37626)
        n = tl.floor(within * LOG2_E + 0.5)
        f = (within - n * LN_2_HIGH) - n * LN_2_LOW  # the first difference is exact
        scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        out = tl.where(x > 88.37626, float("inf"), tl.exp2(f * LOG2_E) * scale)
        out = tl.where(x == x, out, x)
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
def rescaled(top, to, sums, weighted, squares, rate, with_squares: tl.constexpr):
    """Sums of 2^t, t 2^t and (2^t)^2, t = (x - top) * rate, as those of t = (x - to) * rate. What is -inf so far has
    none. Without squares the last is not touched."""
    shift = (top - to) * rate
    shift = tl.where(shift < lowest_power(top.dtype), lowest_power(top.dtype), shift)
    power = tl.exp2(shift)
    if with_squares:
        squares *= power * power
    return sums * power, (weighted + shift * sums) * power, squares


@triton.jit
def or_0(top):
    """What is -inf so far has no maximum to subtract; 0 keeps its terms at the lowest power."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def add_terms(x, top, sums, weighted, squares, rate, with_squares: tl.constexpr):
    """The logits x (lanes, n) enter the sums of their lanes; one exponential for each of them and one for each lane."""
    raised = tl.maximum(top, tl.max(x, 1))  # passes over NaN, which the sums then keep
    offset = or_0(raised)
    sums, weighted, squares = rescaled(top, offset, sums, weighted, squares, rate, with_squares)
    t = (x - offset[:, None]) * rate
    power = tl.exp2(t)
    products = power * tl.maximum(t, tl.full([], lowest_power(x.dtype), x.dtype))  # 0 for a logit of -inf
    if with_squares:
        squares += tl.sum(power * power, 1)
    return raised, sums + tl.sum(power, 1), weighted + tl.sum(products, 1), squares


@triton.jit
def merged_terms(top, sums, weighted, squares, rate, with_squares: tl.constexpr):
    """Of all lanes together: the maximum, and the sums in float64."""
    highest = tl.max(top, 0)
    sums, weighted, squares = rescaled(top, or_0(highest), sums, weighted, squares, rate, with_squares)
    total_squares = tl.full([], 0.0, tl.float64)
    if with_squares:
        total_squares = tl.sum(squares.to(tl.float64), 0)
    return highest, tl.sum(sums.to(tl.float64), 0), tl.sum(weighted.to(tl.float64), 0), total_squares


@triton.jit
def row_results(top, sums, weighted, target, temperature, F: tl.constexpr):
    """logps, entropy, lse and its rest, with which it has twice the precision."""
    log_sum = tl.log(sums)
    mean = top.to(tl.float64) / temperature
    # Not the difference of two products, of which one may be fused and the other rounded.
    logps = (target.to(tl.float64) - top.to(tl.float64)) / temperature - log_sum
    # A row of nothing but -inf is no distribution.
    entropy = tl.where(tl.abs(mean) == float("inf"), float("nan"), log_sum - weighted / sums * LN_2)
    lse = (mean + log_sum).to(F)
    return logps.to(F), entropy.to(F), lse, ((mean - lse.to(tl.float64)) + log_sum).to(F)


@triton.jit
def row_sum_squares(top, sums, squares, F: tl.constexpr):
    """sum_j p_j^2, of the row_results of which the sums are."""
    return tl.where(tl.abs(top) == float("inf"), float("nan"), squares / (sums * sums)).to(F)


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


# ---------------------------------------------------------------- whitening


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


# ---------------------------------------------------------------- weights against the mismatch of a rollout engine


@triton.jit
def rollout_weight(log_ratio, low, high, log_ratio_clamp, truncate: tl.constexpr):
    """(weight, whether the ratio is below low, whether it is above high)."""
    ratio = exponential(clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    is_low, is_high = ratio < low, ratio > high
    if truncate:
        weight = tl.where(is_low, low, tl.where(is_high, high, ratio))
    else:
        weight = tl.where(is_low | is_high, 0.0, ratio)
    return weight, is_low, is_high


# ---------------------------------------------------------------- surrogates of the policy
#
# Options are in the order of SURROGATES in ops/policy_loss.py, whose order this is too. `ratio` is that of the level,
# `log_ratio` that of the token alone; clipped is nothing where the advantage is 0.

CLIP = tl.constexpr(0)
REINFORCE = tl.constexpr(1)
CISPO = tl.constexpr(2)
SAPO = tl.constexpr(3)
GMPO = tl.constexpr(4)


@triton.jit
def ratio_of(log_ratio, log_ratio_clamp):
    """(ratio, whether its logarithm is beyond the clamp, where the ratio is constant)."""
    clamped = (log_ratio > log_ratio_clamp) | (log_ratio < -log_ratio_clamp)
    return exponential(clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp)), clamped


@triton.jit
def clip_surrogate(advantage, ratio, epsilon_low, epsilon_high, dual_clip):
    bottom, top = 1.0 - epsilon_low, 1.0 + epsilon_high
    low = (advantage < 0.0) & (ratio < bottom)
    high = (advantage > 0.0) & (ratio > top)
    dual = (advantage < 0.0) & (ratio > dual_clip)
    bound = tl.where(low, bottom, tl.where(high, top, tl.where(dual, dual_clip, ratio)))
    return -bound * advantage, tl.where(low | high | dual, 0.0, -ratio * advantage), low, high, dual


@triton.jit
def cispo_surrogate(logp, advantage, ratio, epsilon_low, epsilon_high):
    bottom, top, counts = 1.0 - epsilon_low, 1.0 + epsilon_high, advantage != 0.0
    low, high = ratio < bottom, ratio > top
    slope = -tl.where(low, bottom, tl.where(high, top, ratio)) * advantage
    return slope * logp, slope, counts & low, counts & high


@triton.jit
def sapo_surrogate(advantage, ratio, tau_positive, tau_negative):
    tau = tl.where(advantage > 0.0, tau_positive, tau_negative)
    x = tau * (ratio - 1.0)
    below = tl.where(x > 0.0, -x, x)
    e = exponential(below)
    larger = 1.0 / (1.0 + e)
    sigmoid = tl.where(x < 0.0, e * larger, larger)
    slope = -4.0 * advantage * ratio * (e * larger * larger)
    nothing = below < lowest_power(ratio.dtype) * LN_2  # and the ratio may be infinite
    return -4.0 * advantage / tau * sigmoid, tl.where(nothing, 0.0, slope)


@triton.jit
def gmpo_surrogate(advantage, log_ratio, ratio, epsilon_low, epsilon_high):
    loss = -ratio * advantage
    low = (advantage < 0.0) & (log_ratio < -epsilon_low)
    high = (advantage > 0.0) & (log_ratio > epsilon_high)
    return loss, low, high


@triton.jit
def log_ratio_term(surrogate: tl.constexpr, log_ratio, advantage, option_0, option_1):
    """What the ratio of a sequence is the mean of, and its derivative by the log-ratio of the token."""
    value, slope = log_ratio, tl.full(log_ratio.shape, 1.0, log_ratio.dtype)
    if surrogate == GMPO:
        low = (advantage < 0.0) & (log_ratio < -option_0)
        high = (advantage > 0.0) & (log_ratio > option_1)
        nothing = advantage == 0.0
        value = tl.where(low, -option_0, tl.where(high, option_1, tl.where(nothing, 0.0, log_ratio)))
        slope = tl.where(low | high | nothing, 0.0, slope)
    return value, slope


@triton.jit
def surrogate_loss(surrogate: tl.constexpr, logp, advantage, log_ratio, ratio, option_0, option_1, option_2):
    """(loss, d(loss) / d(log of the ratio), d(loss) / d(logp) beside that, clipped low, clipped high, dual clipped)."""
    ratio_slope = tl.zeros_like(advantage)
    logp_slope = ratio_slope
    low = ratio_slope > 0.0
    high, dual = low, low
    if surrogate == CLIP:
        loss, ratio_slope, low, high, dual = clip_surrogate(advantage, ratio, option_0, option_1, option_2)
    elif surrogate == REINFORCE:
        loss, logp_slope = -advantage * logp, -advantage
    elif surrogate == CISPO:
        loss, logp_slope, low, high = cispo_surrogate(logp, advantage, ratio, option_0, option_1)
    elif surrogate == SAPO:
        loss, ratio_slope = sapo_surrogate(advantage, ratio, option_0, option_1)
    else:
        loss, low, high = gmpo_surrogate(advantage, log_ratio, ratio, option_0, option_1)
        ratio_slope = loss
    return loss, ratio_slope, logp_slope, low, high, dual


# ---------------------------------------------------------------- clipped critic loss


@triton.jit
def clipped_critic_loss(value, old_value, target, epsilon):
    """(loss, d(loss) / d(value), squared error of the value, clipped); epsilon is infinite for no clip."""
    change = value - old_value
    inside = (change <= epsilon) & (change >= -epsilon)
    error = value - target
    clipped_error = tl.where(inside, value, old_value + clamp(change, -epsilon, epsilon)) - target
    # Asked this way round, a NaN anywhere is chosen; and the slope of the clipped branch is 0, or NaN.
    unclipped = error * error >= clipped_error * clipped_error
    chosen = tl.where(unclipped, error, clipped_error)
    slope = tl.where(unclipped, error, clipped_error - clipped_error)
    return 0.5 * chosen * chosen, slope, error * error, clipped_error * clipped_error > error * error


# ---------------------------------------------------------------- losses of a pair of completions, in float64
#
# In the order of LOSS_TYPES in ops/preference.py

SIGMOID = tl.constexpr(0)
IPO = tl.constexpr(1)
HINGE = tl.constexpr(2)
ROBUST = tl.constexpr(3)
EXO = tl.constexpr(4)
NCA = tl.constexpr(5)
SPPO = tl.constexpr(6)
APO_ZERO = tl.constexpr(7)
APO_DOWN = tl.constexpr(8)
DISCOPOP = tl.constexpr(9)


@triton.jit
def log_1_plus(x):
    """log(1 + x) for x > -1/2: log(u) x / (u - 1), in which the rounding of u = 1 + x cancels to first order."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def logistic(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def log_logistic(x):
    return tl.where(x < 0.0, x, 0.0) - log_1_plus(tl.exp(-tl.abs(x)))


@triton.jit
def pair_loss(loss_type: tl.constexpr, chosen, rejected, beta, smoothing, margin):
    """(loss, its slope in chosen, its slope in rejected); z = beta (chosen - rejected) - margin, whose slope dz all
    losses of the difference go through."""
    z, half = beta * (chosen - rejected) - margin, 0.5 / beta
    won, lost = logistic(z), logistic(-z)
    r_w, r_l = beta * chosen, beta * rejected
    dz = tl.zeros_like(z)
    if loss_type == SIGMOID:
        value = -(1.0 - smoothing) * log_logistic(z) - smoothing * log_logistic(-z)
        dz = smoothing * won - (1.0 - smoothing) * lost
    elif loss_type == HINGE:
        value = tl.where(z > 1.0, 0.0, 1.0 - z)  # so that a NaN stays one
        dz = tl.where(z >= 1.0, 0.0, -1.0).to(tl.float64)
    elif loss_type == ROBUST:
        value = (smoothing * log_logistic(-z) - (1.0 - smoothing) * log_logistic(z)) / (1.0 - 2.0 * smoothing)
        dz = -(smoothing * won + (1.0 - smoothing) * lost) / (1.0 - 2.0 * smoothing)
    elif loss_type == EXO:
        log_right, log_wrong = log_1_plus(-smoothing), tl.log(smoothing)
        value = won * (log_logistic(z) - log_right) + lost * (log_logistic(-z) - log_wrong)
        dz = won * lost * (z - log_right + log_wrong)
    elif loss_type == DISCOPOP:
        rate = 1 / 0.05
        late, early = logistic(z * rate), logistic(-z * rate)
        power = tl.exp(log_logistic(z * rate) - z)  # late * exp(-z), which may overflow
        value = power - early * log_logistic(z)
        dz = power * (early * rate - 1.0) - early * (lost - late * rate * log_logistic(z))
    dchosen, drejected = beta * dz, -beta * dz
    if loss_type == IPO:
        gap = chosen - rejected - half
        value, dchosen, drejected = gap * gap, 2.0 * gap, -2.0 * gap
    elif loss_type == NCA:
        value = -log_logistic(r_w) - 0.5 * (log_logistic(-r_w) + log_logistic(-r_l))
        dchosen, drejected = beta * (0.5 * logistic(r_w) - logistic(-r_w)), beta * 0.5 * logistic(r_l)
    elif loss_type == SPPO:
        value = (chosen - half) * (chosen - half) + (rejected + half) * (rejected + half)
        dchosen, drejected = 2.0 * (chosen - half), 2.0 * (rejected + half)
    elif loss_type == APO_ZERO:
        value = logistic(-r_w) + logistic(r_l)
        dchosen, drejected = -beta * logistic(r_w) * logistic(-r_w), beta * logistic(r_l) * logistic(-r_l)
    elif loss_type == APO_DOWN:
        value = logistic(r_w) + lost
        dchosen = beta * (logistic(r_w) * logistic(-r_w) - won * lost)
        drejected = beta * won * lost
    return value, dchosen, drejected
