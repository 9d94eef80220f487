"""csrc/formulas.h and csrc/cuda/index.h as CUDA has them: values against the specification in float64, slopes against
its autograd, and columns that are each taken once. Edges first, then what hypothesis finds.

Errors are counted in eps of the dtype, of a size that the formula could not do without: by default the value's own.
"""

import itertools
import math
from decimal import Decimal, localcontext

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpp_kernels import reference
from rpp_kernels.ops.preference import LOSS_TYPES
from rpp_kernels.reference.policy_loss import SURROGATES, PolicyTokens
from rpp_kernels.reference.preference import pair_loss

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(bool(emulated.PROBLEM), reason=str(emulated.PROBLEM))

INF, NAN = math.inf, math.nan
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TINY = {"float32": 2e-38, "float64": 3e-308}  # what an exponential that underflows gives instead of 0
LOWEST, HIGHEST = {"float32": -87.336, "float64": -708.39}, {"float32": 88.37, "float64": 709.43}

precisions = pytest.mark.parametrize("precision", list(DTYPES))
FEW = settings(max_examples=200, deadline=None)


def of(precision):
    return getattr(emulated.formulas(), precision)


def numbers(precision, low=-30.0, high=30.0):
    """Numbers of that precision, the special ones among them."""
    width = 32 if precision == "float32" else 64
    usual = st.floats(low, high, width=width)
    return usual | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, INF, -INF, NAN])


def rounded(precision, *x):
    return [float(torch.tensor(value, dtype=DTYPES[precision])) for value in x]


def close(got, want, precision, times=4, size=None, tiny=None):
    """Equal but for rounding; NaN and infinities are equal to themselves alone."""
    if math.isnan(want) or math.isinf(want):
        assert got == want or (math.isnan(want) and math.isnan(got)), (got, want)
        return
    bound = times * torch.finfo(DTYPES[precision]).eps * (abs(want) if size is None else size)
    assert abs(got - want) <= bound + (TINY[precision] if tiny is None else tiny), (got, want, bound)


def slopes(function, *x):
    """Value and derivatives in float64."""
    x = [torch.tensor([float(value)], dtype=torch.float64, requires_grad=True) for value in x]
    value = function(*x)
    found = torch.autograd.grad(value.sum(), x, allow_unused=True) if value.requires_grad else [None] * len(x)
    return float(value.detach()), *(0.0 if g is None else float(g) for g in found)


# ---------------------------------------------------------------- exponentials, softcap

SPECIAL = [
    0.0,
    -0.0,
    1e-40,
    -1e-40,
    1e-30,
    1e-5,
    -1e-5,
    0.3465,
    0.3466,
    -0.3465,
    -0.3466,
    1.0,
    -1.0,
    20.0,
    -20.0,
    80.0,
    -80.0,
]


@precisions
def test_the_exponential_at_its_edges(precision):
    f = of(precision).exponential
    assert f(0.0) == 1
    assert f(INF) == INF == f(1e4)
    assert math.isnan(f(NAN))
    for x in (-INF, -1e4, LOWEST[precision] - 1):
        assert 0 < f(x) <= TINY[precision]  # never 0, so that 0 * -inf does not arise
    assert f(HIGHEST[precision]) < INF


@precisions
@FEW
@given(data=st.data())
def test_the_exponential_and_what_it_is_beyond_its_tangent(precision, data):
    bounds = LOWEST[precision], HIGHEST[precision]
    exponentials(precision, *rounded(precision, data.draw(st.floats(*bounds))))


@precisions
@pytest.mark.parametrize("x", SPECIAL)
def test_exponentials_at_special_numbers(precision, x):
    exponentials(precision, *rounded(precision, x))


def exponentials(precision, x):
    with localcontext() as context:
        context.prec = 400  # enough to keep exp(x) - 1 - x for x = 1e-40
        power = Decimal(x).exp()
        beyond = float(power - 1 - Decimal(x))
    close(of(precision).exponential(x), float(power), precision, 2)
    near = abs(x) < 0.34  # where nothing cancels
    size = abs(beyond) if near else max(float(power), abs(x), 1)
    close(of(precision).exp_minus_1_minus_x(x), beyond, precision, 4, size)


@precisions
def test_what_the_exponential_is_beyond_its_tangent_at_its_edges(precision):
    f = of(precision).exp_minus_1_minus_x
    assert f(0.0) == f(-0.0) == 0
    assert f(-INF) == INF == f(HIGHEST[precision] + 1)
    assert math.isnan(f(NAN))


@precisions
@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0, 1e4])
def test_softcap_and_its_slope(precision, cap):
    for x in rounded(precision, *SPECIAL, cap / 3, -cap / 3, cap, -cap, 1e6, -1e6, 1e30, INF, -INF, NAN):
        value, slope = of(precision).softcapped(x, cap)
        want, by_autograd = slopes(lambda x: cap * (x / cap).tanh(), x)
        close(value, want, precision, 5)
        if math.isfinite(x):
            close(slope, by_autograd, precision, 8, 1)
            want = 1 / math.cosh(x / cap) ** 2 if abs(x / cap) < 300 else 0.0
            close(slope, want, precision, 16, tiny=16 * TINY[precision])


@precisions
@FEW
@given(data=st.data())
def test_softcap_anywhere(precision, data):
    cap = data.draw(st.floats(0.1, 1e4))
    (x,) = rounded(precision, data.draw(numbers(precision, -1e5, 1e5)))
    value, slope = of(precision).softcapped(x, cap)
    close(value, slopes(lambda x: cap * (x / cap).tanh(), x)[0], precision, 5)
    if math.isnan(x):
        assert math.isnan(slope)
    else:
        assert 0 <= slope <= 1 + 1e-6


# ---------------------------------------------------------------- rows of logits


def of_row(row, target, temperature, precision):
    """What the kernels sum up, and row_results of that."""
    x = torch.tensor(row, dtype=torch.float64)
    top = float(x.max())
    t = (x - (top if top > -INF else 0)) / temperature
    power = t.exp()
    weighted = torch.where(power == 0, 0.0, t * power)
    sums = top, float(power.sum()), float(weighted.sum())
    squares = of(precision).row_sum_squares(top, sums[1], float(power.square().sum()))
    return *of(precision).row_results(*sums, row[target], temperature), squares


ROWS = [
    [0.0],
    [1.0, 2.0, 3.0],
    [5.0] * 40,
    [1e4, 1e4 - 1, -1e4],
    [-1e30, 3.0, 3.0],
    [-INF, 0.5, -INF, 2.0],
    [88.0, -88.0, 0.0],
    [1e-30, -1e-30, 0.0],
    [3.0e4] * 3 + [2.9e4],
]


@precisions
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_results_and_gradients_of_rows(precision, temperature, row):
    row = rounded(precision, *row)
    for target in range(min(len(row), 4)):
        row_is_right(row, target, temperature, precision, (0.7, -0.4, 0.3))


@precisions
@FEW
@given(data=st.data())
def test_results_and_gradients_of_any_row(precision, data):
    width = 32 if precision == "float32" else 64
    row = data.draw(st.lists(st.floats(-50, 50, width=width) | st.just(-INF), min_size=1, max_size=8))
    target = data.draw(st.integers(0, len(row) - 1))
    d = rounded(precision, *(data.draw(st.floats(-2, 2)) for _ in range(3)))
    if max(row) > -INF:
        row_is_right(row, target, data.draw(st.floats(0.1, 5)), precision, d)


def row_is_right(row, target, temperature, precision, d):
    logits = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    want = reference.logps_from_logits(logits, torch.tensor([target]), temperature=temperature, sum_squares=True)
    lse = (logits / temperature).logsumexp(-1)
    logps, entropy, got_lse, rest, squares = of_row(row, target, temperature, precision)
    terms = abs(max(row) / temperature) + 1  # of which log-sum-exp is the sum, in double
    double = 64 * torch.finfo(torch.float64).eps * terms
    close(logps, float(want.logps), precision, 1, tiny=double)
    close(entropy, float(want.entropy), precision, 1, tiny=double)
    close(got_lse, float(lse), precision, 1, tiny=double)
    close(squares, float(want.sum_squares), precision, 1, tiny=double)
    assert got_lse + rest == pytest.approx(float(lse), rel=1e-13, abs=double)

    dlogps, dentropy, dlse = rounded(precision, *d)
    if row[target] == -INF:
        return  # its log-prob has no gradient
    loss = dlogps * want.logps + dentropy * want.entropy + dlse * lse
    wanted = torch.autograd.grad(loss.sum(), logits)[0][0].nan_to_num(0.0)  # autograd's of an entropy at -inf
    weight = (abs(dlogps) + abs(dentropy) * (2 + float(want.entropy.detach())) + abs(dlse)) / temperature
    for j, logit in enumerate(row):
        got = of(precision).dlogit(logit, got_lse + rest, entropy, temperature, dlogps, dentropy, dlse, True)
        got += dlogps / temperature if j == target else 0
        distance = 1 + min(abs(max(row) - logit) / temperature, 100)
        close(got, float(wanted[j]), precision, 16, weight * distance, tiny=double * weight + TINY[precision])
        if logit == -INF:
            assert got == 0
        if dentropy == 0:
            without = of(precision).dlogit(logit, got_lse + rest, entropy, temperature, dlogps, 0, dlse, False)
            close(without + (dlogps / temperature if j == target else 0), got, precision, 4, weight)


@precisions
def test_rows_that_are_no_distribution(precision):
    logps, entropy, lse, _, squares = of_row([-INF, -INF], 0, 1.0, precision)
    assert math.isnan(logps)
    assert math.isnan(entropy)
    assert lse == -INF
    assert math.isnan(squares)
    logps, entropy, lse, *_ = of(precision).row_results(1.0, NAN, NAN, 1.0, 1.0)
    assert all(math.isnan(x) for x in (logps, entropy, lse))
    assert math.isnan(of(precision).row_results(1.0, 1.0, 0.0, NAN, 1.0)[0])  # of an id that is unknown
    assert math.isnan(of(precision).dlogit(NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, True))


# ---------------------------------------------------------------- KL, ratios, weights of a rollout

ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "abs": 4}
EDGES = [
    0.0,
    -0.0,
    1e-30,
    -1e-30,
    1e-4,
    -1e-4,
    0.3,
    -0.5,
    2.0,
    -2.0,
    5.0,
    -5.0,
    19.9,
    -19.9,
    20.0,
    -20.0,
    20.5,
    -20.5,
    1e30,
    -1e30,
]
CLAMPS = [(20.0, INF), (5.0, 2.0), (2.0, INF), (60.0, 10.0)]


@precisions
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("clamps", CLAMPS, ids=str)
def test_kl_estimators_and_their_slopes(precision, estimator, clamps):
    for d in rounded(precision, *EDGES, INF, -INF):
        kl_is_right(precision, estimator, clamps, d)
    assert math.isnan(of(precision).kl(ESTIMATORS[estimator], NAN, *clamps)[0])


@precisions
@FEW
@given(data=st.data())
def test_kl_estimators_anywhere(precision, data):
    estimator, clamps = data.draw(st.sampled_from(list(ESTIMATORS))), data.draw(st.sampled_from(CLAMPS))
    (d,) = rounded(precision, data.draw(numbers(precision)))
    if not math.isnan(d):
        kl_is_right(precision, estimator, clamps, d)


def kl_is_right(precision, estimator, clamps, d):
    if precision == "float32" and estimator == "k2" and 1e19 < abs(d) < INF:
        return  # its square is infinite there
    most, kl_clamp = clamps

    def spec(x):
        options = {"estimator": estimator, "log_ratio_clamp": most, "kl_clamp": None if kl_clamp == INF else kl_clamp}
        return reference.kl_penalty(x, torch.zeros_like(x), **options)

    value, slope = of(precision).kl(ESTIMATORS[estimator], d, *clamps)
    want, wanted_slope = slopes(spec, d)
    size = abs(want)
    if estimator == "k3":
        within = max(-most, min(most, d))
        # The specification's own expm1(-d) + d cancels in float64 where ours does not.
        size = abs(want) if abs(d) < 0.34 and precision == "float32" else max(math.exp(-within), abs(within), 1)
        if abs(d) > 1e-7:
            close(value, want, precision, 4, size)
    else:
        close(value, want, precision, 2)
    if abs(abs(want) - kl_clamp) > 1e-5 * size or estimator != "k3":  # k3 may be rounded to the other side
        if math.isinf(d) and kl_clamp < INF:
            wanted_slope = 0.0  # where autograd has 0 times infinity
        close(slope, wanted_slope, precision, 4, max(abs(wanted_slope), 1))


@precisions
@FEW
@given(data=st.data())
def test_ratios(precision, data):
    most = data.draw(st.sampled_from([0.5, 20.0, 60.0]))
    (x,) = rounded(precision, data.draw(numbers(precision, -100, 100) | st.sampled_from([most, -most])))
    log_ratio, ratio, clamped = of(precision).ratio_of(x, most)
    want, slope = slopes(lambda x: x.clamp(-most, most).exp(), x)
    close(ratio, want, precision, 2)
    assert math.isnan(log_ratio) if math.isnan(x) else log_ratio == max(-most, min(most, x))
    assert math.isnan(x) or clamped == (slope == 0)


@precisions
@pytest.mark.parametrize("outside", ["truncate", "mask"])
@FEW
@given(data=st.data())
def test_weights_of_a_rollout(precision, outside, data):
    low, high = rounded(precision, *data.draw(st.sampled_from([(0.0, 2.0), (0.5, 1.5), (1.0, 1.0), (0.0, INF)])))
    (x,) = rounded(precision, data.draw(numbers(precision, -30, 30)))
    beyond = (low, high) if outside == "truncate" else (0.0, 0.0)
    got, below, above = of(precision).rollout_weight(x, 20.0, low, high, *beyond)
    ratio = math.exp(max(-20, min(20, x))) if not math.isnan(x) else NAN
    if any(ratio != bound and abs(ratio - bound) < 1e-5 * bound for bound in (low, high) if bound < INF):
        return  # on which side of a bound it is may be rounding
    one = torch.tensor([x], dtype=torch.float64)
    want = reference.rollout_weights(one, torch.zeros(1, dtype=torch.float64), outside=outside, low=low, high=high)
    close(got, float(want.weights), precision, 2)
    assert (below, above) == (bool(want.stats.outside_low), bool(want.stats.outside_high))


# ---------------------------------------------------------------- losses

OPTIONS = {  # two of each, in the order of SURROGATES in ops/policy_loss.py, and by the names of the specification
    "clip": [
        {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": INF},
        {"epsilon_low": 0.5, "epsilon_high": 0.25, "dual_clip": 3.0},
    ],
    "reinforce": [{}],
    "cispo": [{"epsilon_low": 1.0, "epsilon_high": 4.0}, {"epsilon_low": 0.5, "epsilon_high": 0.25}],
    "sapo": [{"tau_positive": 1.0, "tau_negative": 1.05}, {"tau_positive": 4.0, "tau_negative": 8.0}],
    "gmpo": [{"epsilon_low": 0.4, "epsilon_high": 0.4}, {"epsilon_low": 0.25, "epsilon_high": 0.5}],
}
LOG_RATIOS = [
    0.0,
    -0.0,
    1e-30,
    0.1,
    -0.1,
    0.25,
    -0.25,
    0.5,
    -0.5,
    1.0,
    -1.0,
    2.0,
    -2.0,
    19.0,
    -19.0,
    20.0,
    -20.0,
    21.0,
    -21.0,
]
ADVANTAGES = [0.0, 1.0, -1.0, 0.3, -2.5, 1e-20, -1e10]
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


@precisions
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_surrogates_and_their_slopes(precision, name, options):
    for advantage, log_ratio in itertools.product(ADVANTAGES, [*LOG_RATIOS, INF, -INF]):
        surrogate_is_right(precision, name, options, -1.5, *rounded(precision, advantage, log_ratio))
    loss = of(precision).surrogate_loss
    given = [*options.values(), 0.0, 0.0, 0.0, 0.0][:4]
    at = list(SURROGATES).index(name)
    assert math.isnan(loss(at, -1.0, NAN, 0.1, 0.1, 20.0, given)[0])
    if name == "reinforce":
        assert math.isnan(loss(at, NAN, 1.0, NAN, NAN, 20.0, given)[0])
    elif name != "cispo":
        assert all(math.isnan(x) for x in loss(at, NAN, 1.0, NAN, NAN, 20.0, given)[:2])


@precisions
@FEW
@given(data=st.data())
def test_surrogates_anywhere(precision, data):
    name, options = data.draw(st.sampled_from(CASES))
    drawn = [data.draw(st.floats(*bounds)) for bounds in ((-40, 0), (-4, 4), (-25, 25))]
    surrogate_is_right(precision, name, options, *rounded(precision, *drawn))


def surrogate_is_right(precision, name, options, logp, advantage, log_ratio):
    most = 20.0
    options = dict(zip(options, rounded(precision, *options.values()), strict=True))
    at, given = list(SURROGATES).index(name), [*options.values(), 0.0, 0.0, 0.0, 0.0][:4]
    module = of(precision)
    term, term_slope = module.log_ratio_term(at, log_ratio, advantage, given)
    loss, by_ratio, by_logp, *clipped = module.surrogate_loss(at, logp, advantage, log_ratio, term, most, given)
    by_ratio *= term_slope * (not module.ratio_of(term, most)[2])

    ratio = math.exp(max(-most, min(most, log_ratio)))
    borders = [1 - given[0], 1 + given[1], given[2]] if name in ("clip", "cispo") else []
    if any(abs(ratio - border) < 1e-5 for border in borders):
        return  # on which side of a border it is may be rounding
    said = {}

    def spec(logps, d):
        def ratio_of(x):
            return x.clamp(-most, most).exp()

        a = torch.tensor([advantage], dtype=torch.float64)
        result = SURROGATES[name](PolicyTokens(logps, a, d, ratio_of(d), torch.ones(1), ratio_of), **options)
        said["clipped"] = [x is not None and bool(x) for x in result[1:]]
        return result.loss

    want, wanted_by_logp, wanted_by_ratio = slopes(spec, logp, log_ratio)
    if math.isinf(log_ratio):
        wanted_by_ratio = 0.0  # constant beyond the clamp; autograd of gmpo's sign times infinity is NaN
    if name == "gmpo" and math.isinf(log_ratio) and advantage == 0:
        want = 0.0
    # A sigmoid's argument is tau (ratio - 1), whose rounding is that of the larger.
    size = abs(advantage) * 4 / min(options.values()) * max(1, min(ratio, 80)) if name == "sapo" else None
    close(loss, want, precision, 16, size)
    close(by_logp, wanted_by_logp, precision, 8)
    if name == "sapo":
        size = 4 * abs(advantage) * ratio * max(1, min(max(options.values()) * ratio, 80))
    close(by_ratio, wanted_by_ratio, precision, 16, size, tiny=1e-37 * max(1, abs(advantage) * ratio * 4))
    assert clipped == said["clipped"], (advantage, log_ratio)


@precisions
@FEW
@given(data=st.data())
def test_what_the_ratio_of_a_sequence_is_the_mean_of(precision, data):
    x, a = rounded(precision, data.draw(numbers(precision, -2, 2)), data.draw(st.sampled_from(ADVANTAGES)))
    low, high = rounded(precision, 0.25, 0.5)
    for name in SURROGATES:
        value, slope = of(precision).log_ratio_term(list(SURROGATES).index(name), x, a, [low, high, 0.0, 0.0])
        if name != "gmpo":
            assert (value == x or math.isnan(x)) and slope == 1  # noqa: PT018
        elif math.isfinite(x):
            sign = float(torch.tensor(a).sign())
            want = slopes(lambda d, s=sign: s * torch.minimum(s * d, s * d.clamp(-low, high)), x)
            assert value == want[0]
            assert slope == want[1]
        elif a != 0:
            assert (
                math.isnan(value)
                if math.isnan(x)
                else value == {1: min(x, high), -1: max(x, -low)}[math.copysign(1, a)]
            )


@precisions
@FEW
@given(data=st.data())
def test_the_clipped_loss_of_a_critic(precision, data):
    some = st.floats(-4, 4) | st.sampled_from([0.0, 1.0, -1.0, 0.2, 1.2, 1e-20, 1e6])
    value, old, target = rounded(precision, *(data.draw(some) for _ in range(3)))
    (epsilon,) = rounded(precision, data.draw(st.sampled_from([0.2, 0.5, 1e-3, INF])))

    def spec(x):
        constants = [torch.tensor([[c]], dtype=torch.float64) for c in (old, target)]
        bound = None if epsilon == INF else epsilon
        return reference.value_loss(x[None], *constants, epsilon=bound, reduction="none").loss

    loss, slope, squared_error, clipped = of(precision).clipped_critic_loss(value, old, target, epsilon)
    want, wanted_slope = slopes(spec, value)
    largest = max(abs(value), abs(old), abs(target))
    close(loss, want, precision, 8, largest * max(largest, 1))
    close(squared_error, (value - target) ** 2, precision, 8, largest * max(largest, 1))
    error, change = value - target, value - old
    of_clipped = old + max(-epsilon, min(epsilon, change)) - target
    if abs(abs(change) - epsilon) > 1e-5 * largest and abs(abs(error) - abs(of_clipped)) > 1e-5 * max(largest, 1):
        close(slope, wanted_slope, precision, 8, largest)  # not where two branches meet
        assert clipped == (abs(change) > epsilon and abs(of_clipped) > abs(error))


@precisions
def test_the_loss_of_a_critic_keeps_a_nan(precision):
    for arguments in ((NAN, 0.0, 0.0), (0.0, NAN, 0.0), (0.0, 0.0, NAN)):
        assert math.isnan(of(precision).clipped_critic_loss(*arguments, 0.2)[0])


PAIRS = [
    (0.0, 0.0),
    (1.0, -1.0),
    (-1.0, 1.0),
    (1e-30, 0.0),
    (100.0, -50.0),
    (-3000.0, 4000.0),
    (7000.0, -7000.0),
    (11.0, 1.0),
]


@pytest.mark.parametrize("loss_type", list(LOSS_TYPES))
def test_losses_of_pairs_and_their_slopes(loss_type):
    for (chosen, rejected), beta in itertools.product(PAIRS, [0.1, 1.0]):
        pair_is_right(loss_type, chosen, rejected, beta, 0.2, 0.0)
    assert math.isnan(emulated.formulas().pair_loss(LOSS_TYPES[loss_type], NAN, 0.0, 0.1, 0.2, 0.0)[0])


@FEW
@given(
    st.sampled_from(list(LOSS_TYPES)),
    st.floats(-300, 300),
    st.floats(-300, 300),
    st.floats(0.01, 2),
    st.floats(0.01, 0.4),
)
def test_losses_of_pairs_anywhere(loss_type, chosen, rejected, beta, smoothing):
    pair_is_right(loss_type, chosen, rejected, beta, smoothing, 0.5 if loss_type == "sigmoid" else 0.0)


def pair_is_right(loss_type, chosen, rejected, beta, smoothing, margin):
    got = emulated.formulas().pair_loss(LOSS_TYPES[loss_type], chosen, rejected, beta, smoothing, margin)
    want = slopes(lambda won, lost: pair_loss(loss_type, won, lost, beta, smoothing, margin), chosen, rejected)
    z = beta * (chosen - rejected) - margin
    if loss_type == "hinge" and abs(z - 1) < 1e-9:
        return
    terms = 1 + abs(z) + beta * (abs(chosen) + abs(rejected))
    for ours, theirs in zip(got, want, strict=True):
        size = max(abs(theirs), terms if loss_type in ("exo_pair", "robust", "sigmoid") else abs(theirs))
        close(ours, theirs, "float64", 64 * (20 if loss_type == "discopop" else 1), size, tiny=1e-14 * terms)


# ---------------------------------------------------------------- numbers of 16 bits


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_number_of_16_bits(name):
    module, dtype = emulated.formulas(), getattr(torch, name)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    widen, narrow = getattr(module, f"of_{name}"), getattr(module, f"{name}_of")
    wide = bits.view(dtype).float()
    got = torch.tensor([widen(int(b) & 0xFFFF) for b in bits])
    assert torch.equal(got.nan_to_num(1e30), wide.nan_to_num(1e30))
    assert torch.equal(got.isnan(), wide.isnan())
    for x in (
        wide,
        wide.nextafter(torch.tensor(INF)),
        wide * 1.001953125,
        wide * 1.00390625,
        (wide + wide.roll(1)) / 2,
    ):
        back = torch.tensor([narrow(float(v)) for v in x], dtype=torch.int32).to(torch.int16).view(dtype)
        want = x.to(dtype)
        assert torch.equal(back.isnan(), want.isnan())
        assert torch.equal(back[~want.isnan()], want[~want.isnan()])


# ---------------------------------------------------------------- index.h

VOCABS = [*range(70), 1000, 32000, 65535, 65536, 65537, 131071, 131072, 131073, 151936, 2**31 - 1, 2**31, 2**31 + 3]


def covers(ranges, size):
    """They follow each other from 0 to size."""
    at = 0
    for begin, end in ranges:
        assert begin == at <= end
        at = end
    assert at == size


def test_ceil_div():
    f = emulated.formulas().ceil_div
    for n, by in itertools.product([*range(40), 2**31 - 1, 2**31, 2**40 + 1], [*range(1, 20), 256, 65536]):
        assert f(n, by) == -(-n // by)


@pytest.mark.parametrize("vocab", [*VOCABS, 5 * 2**30 + 7])
def test_parts_cover_each_column_once(vocab):
    m = emulated.formulas()
    parts = [m.part_of(vocab, i) for i in range(m.parts_of(vocab))]
    covers(parts, vocab)
    assert len(parts) >= 1  # of nothing too: its results are to be written
    assert all(end - begin <= m.part for begin, end in parts)
    assert all(end > begin for begin, end in parts[1:])


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 1024])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16])
def test_slices_cover_each_column_once(ranks, unit):
    m = emulated.formulas()
    for vocab in [*VOCABS, *range(990, 1100), 2**40 + 1]:
        slices = [m.slice_of(vocab, rank, ranks, unit) for rank in range(ranks)]
        covers(slices, vocab)
        size = m.slice_size(vocab, ranks, unit)
        assert size % unit == 0
        assert all(begin % unit == 0 or begin == vocab for begin, _ in slices)
        assert max(end - begin for begin, end in slices) <= size < -(-vocab // ranks) + unit


@pytest.mark.parametrize("largest", [1, 8])
@pytest.mark.parametrize(("unit", "item_bytes"), [(2, 8), (4, 4), (8, 4), (8, 2)])
def test_a_cluster_is_as_small_as_is_comfortable(unit, item_bytes, largest):
    """Ampere and Hopper: what a block may have less what the kernel keeps there beside the row."""
    m, most = emulated.formulas(), (163 if largest == 1 else 227) * 1024 - 5000
    for vocab in VOCABS:
        ranks = m.cluster_of(vocab, unit, item_bytes, largest, most)
        each = [m.slice_size(vocab, r, unit) * item_bytes for r in (1, 2, 4, 8) if r <= largest]
        if ranks == 0:
            assert min(each) > most
            continue
        assert ranks in (1, 2, 4, 8)
        assert ranks <= largest
        mine = m.slice_size(vocab, ranks, unit) * item_bytes
        assert mine <= most
        assert mine <= m.comfortable_bytes or ranks == largest
        assert ranks == 1 or m.slice_size(vocab, ranks // 2, unit) * item_bytes > m.comfortable_bytes
    assert m.cluster_of(32000, unit, item_bytes, largest, most) or (largest == 1 and item_bytes == 8)
    assert m.cluster_of(151936, unit, item_bytes, 8, most)


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
@pytest.mark.parametrize("unroll", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 2, 32])
def test_threads_take_each_column_once(threads, unroll, vector):
    """The walk of for_columns in row.h: whole steps, then what is left of the row vector by vector."""
    column_of, step = emulated.formulas().column_of, threads * unroll * vector
    for begin, size in itertools.product(
        [0, 64, 2**31], [0, 1, vector, step - 1, step, step + 1, 3 * step + vector + 1]
    ):
        taken, at = [], begin
        while at + step <= begin + size:
            for thread, k in itertools.product(range(threads), range(unroll)):
                column = column_of(at, thread, threads, k, vector)
                taken += range(column, column + vector)
            at += step
        for thread in range(threads):
            for column in range(column_of(at, thread, threads, 0, vector), begin + size, threads * vector):
                taken += range(column, min(column + vector, begin + size))
        assert sorted(taken) == list(range(begin, begin + size))


def test_rows_lie_where_their_strides_say():
    offset = emulated.formulas().offset
    vocab, seen = 151936, 0
    for inner, padding, row_padding in itertools.product([1, 2, 7, 4096], [0, 5], [0, 64]):
        row_stride = vocab + row_padding
        outer = inner * row_stride + padding
        for row in (0, 1, inner - 1, inner, inner + 1, 3 * inner + inner // 2, 14135, 2**21 + 1, 2**31 - 1):
            want = row // inner * outer + row % inner * row_stride
            assert offset(vocab, inner, outer, row_stride, row) == want
            seen = max(seen, want)
    assert seen > 2**47  # far beyond 32 bits
