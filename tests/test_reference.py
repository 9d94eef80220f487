"""The specification, held to numbers worked out by hand and to identities from the papers.

Three parts: golden values (the arithmetic is in the comments), identities, and properties of random ragged batches.
Nothing here was obtained by running the code under test.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, packed, permuted, poisoned, ragged_batches, random_batch, rows
from torch import Tensor

from rpp_kernels import reference

LN2, LN3, LN6 = 0.693147, 1.098612, 1.791759
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "k2", "k3", "abs")

assert_close = torch.testing.assert_close
assert_golden = partial(assert_close, rtol=1e-5, atol=2e-6)
few_examples = settings(max_examples=12, derandomize=True, deadline=None, database=None)

# A full sequence; one with a hole (a tool call); an empty one; one that is padded on the left and has a hole.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 0, 1, 1],
    ]
).bool()
LENGTHS = torch.tensor([5, 4, 0, 5])


@pytest.fixture
def batch() -> Batch:
    return random_batch(MASK, LENGTHS)


def f32(*rows) -> Tensor:
    """Of the rows, or of the one nested list."""
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32)


def bools(*rows) -> Tensor:
    return f32(*rows).bool()


def randn(*shape) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grad(output: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(output, x)[0]


# ---------------------------------------------------------------- golden values: log-probs


def test_logps_from_logits_golden():
    # exp of the logits is 1, 2, 3: their sum is 6, so lse = ln 6 and the probabilities are 1/6, 1/3, 1/2.
    # entropy = ln 6 - (2 ln 2 + 3 ln 3) / 6 = 1.791759 - (1.386294 + 3.295837) / 6 = 1.011404
    logits = f32([0, LN2, LN3], [0, LN2, LN3])
    out = reference.logps_from_logits(logits, torch.tensor([1, 2]))
    assert_golden(out.logps, f32([-LN3, -LN2]))  # ln 1/3, ln 1/2
    assert_golden(out.entropy, f32([1.011404, 1.011404]))
    assert_golden(out.lse, f32([LN6, LN6]))
    assert out.sum_squares is None


def test_sum_of_squares_golden():
    # (1 + 4 + 9) / 36; at temperature 1/2 the weights are 1, 4, 9 of 14: (1 + 16 + 81) / 196; a half twice; masked
    logits = f32([0, LN2, LN3], [0, LN2, LN3], [-torch.inf, 5, 5], [math.nan] * 3).requires_grad_()
    temperature, ids = f32([1, 0.5, 3, math.nan]), torch.tensor([0, 0, 0, -100])
    mask = bools([1, 1, 1, 0])
    out = reference.logps_from_logits(logits, ids, mask, temperature=temperature, sum_squares=True)
    assert_golden(out.sum_squares, f32([14 / 36, 0.5, 0.5, 0]))
    assert not out.sum_squares.requires_grad


@pytest.mark.parametrize("temperature", [2.0, torch.tensor(2.0), torch.tensor([2.0])], ids=["float", "0-dim", "1-dim"])
def test_temperature_divides_the_logits_and_lse_and_entropy_are_of_the_divided_ones(temperature):
    out = reference.logps_from_logits(f32([[0, 2 * LN2, 2 * LN3]]), torch.tensor([1]), temperature=temperature)
    assert_golden(out.logps, f32([-LN3]))
    assert_golden(out.entropy, f32([1.011404]))
    assert_golden(out.lse, f32([LN6]))


def test_each_token_has_its_own_temperature():
    logits = f32([0, LN2, LN3], [0, 2 * LN2, 2 * LN3])
    out = reference.logps_from_logits(logits, torch.tensor([0, 2]), temperature=torch.tensor([1.0, 2.0]))
    assert_golden(out.logps, f32([-LN6, -LN2]))


def test_masked_tokens_have_logps_entropy_and_lse_0():
    out = reference.logps_from_logits(f32([0, LN2], [5, 7]), torch.tensor([1, -100]), bools(1, 0))
    assert_golden(out.logps, f32([LN2 - LN3, 0]))  # p = 2/3
    assert_golden(out.entropy, f32([LN3 - 2 / 3 * LN2, 0]))  # (1/3) ln 3 + (2/3) (ln 3 - ln 2)
    assert_golden(out.lse, f32([LN3, 0]))


def test_linear_logps_golden():
    # hidden @ weight.T = (1, -1, 0); the bias brings it to (0, ln 2, ln 3), as above.
    hidden_states, weight, bias = f32([[1, -1]]), f32([1, 0], [0, 1], [1, 1]), f32([-1, 1 + LN2, LN3])
    out = reference.linear_logps(hidden_states, weight, torch.tensor([2]), bias=bias)
    assert_golden(out.logps, f32([-LN2]))
    assert_golden(out.entropy, f32([1.011404]))
    assert_golden(out.lse, f32([LN6]))


def test_linear_logps_divides_the_biased_logits_by_the_temperature():
    hidden_states, weight, bias = f32([[2, -2]]), f32([1, 0], [0, 1], [1, 1]), f32([-2, 2 + 2 * LN2, 2 * LN3])
    out = reference.linear_logps(hidden_states, weight, torch.tensor([0]), bias=bias, temperature=2.0)
    assert_golden(out.logps, f32([-LN6]))


# ---------------------------------------------------------------- golden values: KL and rewards


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = -1 + 1.5 = 0.5 and d = -2 + 1 = -1
        ("k1", [0.5, -1.0]),
        ("k2", [0.125, 0.5]),  # 0.25 / 2, 1 / 2
        ("k3", [0.106531, 0.718282]),  # 0.606531 - 1 + 0.5, 2.718282 - 1 - 1
        ("abs", [0.5, 1.0]),
    ],
)
def test_kl_penalty_golden(estimator, expected):
    kl = reference.kl_penalty(f32([-1, -2]), f32([-1.5, -1]), estimator=estimator)
    assert_golden(kl, f32(expected))


def test_log_ratio_clamp_acts_on_k3_and_kl_clamp_on_the_result():
    logps, ref_logps = f32([-4, -1]), f32([-1, -4])  # d = -3, 3
    kl = partial(reference.kl_penalty, logps, ref_logps)
    assert_golden(kl(estimator="k3", log_ratio_clamp=1.0), f32([0.718282, 0.367879]))  # d = -1: e - 2; d = 1: 1/e
    assert_golden(kl(estimator="k1", log_ratio_clamp=1.0), f32([-3, 3]))
    assert_golden(kl(estimator="k1", kl_clamp=2.0), f32([-2, 2]))
    assert_golden(kl(estimator="k2", kl_clamp=2.0), f32([2, 2]))  # 4.5 before
    assert_golden(kl(estimator="k3", kl_clamp=5.0), f32([5, 2.049787]))  # e^3 - 4 = 16.1, e^-3 + 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_kl_clamp_stops_the_gradient_of_the_estimator_and_of_no_other(estimator, gradient):
    logps = f32([-4, -1]).requires_grad_()  # d = -3, 3: every estimator is beyond 1
    kl = partial(reference.kl_penalty, logps, f32([-1, -4]))
    clamped = kl(estimator=estimator, gradient=gradient, kl_clamp=1.0)
    assert_close(clamped, kl(estimator=estimator).clamp(-1, 1))
    expected = torch.zeros(2) if gradient == estimator else grad(kl(estimator=gradient).sum(), logps)
    assert_close(grad(clamped.sum(), logps), expected)


def test_token_rewards_golden():
    kl = f32([0.5, 1, 0], [0.25, 7, 7], [7, 7, 7], [1, 7, -2])
    mask = bools([1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1])
    rewards = reference.token_rewards(f32([2, -1, 5, 3]), kl, mask, beta=0.1)
    # -0.05, -0.1, 2 - 0 | -1 - 0.025 | the empty sequence is not paid | -0.1, hole, 3 + 0.2
    assert_golden(rewards, f32([-0.05, -0.1, 2], [-1.025, 0, 0], [0, 0, 0], [-0.1, 0, 3.2]))


def test_token_rewards_golden_packed():
    rewards = reference.token_rewards(
        f32([2, 5, -1]), f32([0.5, 1, 0.25, 7]), bools(1, 1, 1, 0), beta=0.1, cu_seqlens=torch.tensor([0, 2, 2, 4])
    )
    assert_golden(rewards, f32([-0.05, 1.9, -1.025, 0]))


def test_normalize_rewards_golden():
    # mean 3; deviations -2, -1, 0, 3; variance (4 + 1 + 0 + 9) / 4 = 3.5; std 1.870829
    scores = f32([1, 2, 3, 6])
    assert_golden(reference.normalize_rewards(scores), f32([-1.069045, -0.534522, 0, 1.603567]))
    assert_golden(reference.normalize_rewards(scores, clip=(-1, 1.5), scale=2.0), f32([-2, -1.069045, 0, 3]))
    assert_golden(reference.normalize_rewards(f32([-20, 3]), zscore=False, scale=0.5), f32([-5, 1.5]))
    assert_golden(reference.normalize_rewards(f32([-20, 3]), zscore=False, clip=None), f32([-20, 3]))
    assert_golden(reference.normalize_rewards(f32([2, 2])), f32([0, 0]))
    assert_golden(reference.normalize_rewards(f32([-1, 1]), eps=4.0), f32([-0.5, 0.5]))  # variance 1, floored at 4


# ---------------------------------------------------------------- golden values: returns and advantages


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (1.0, [6.0, 5.0, 3.0]),
        (0.5, [2.75, 3.5, 3.0]),  # 3; 2 + 3 / 2; 1 + 3.5 / 2
        (0.0, [1.0, 2.0, 3.0]),
    ],
)
def test_returns_golden(gamma, expected):
    assert_golden(reference.returns(f32([[1, 2, 3]]), gamma=gamma), f32([expected]))


def test_returns_carry_through_a_hole_without_discount():
    # 4; 2 + 4 / 2 = 4; hole; 1 + 4 / 2 = 3
    rewards, mask = f32([[1, 99, 2, 4]]), bools([1, 0, 1, 1])
    assert_golden(reference.returns(rewards, mask[None], gamma=0.5), f32([[3, 0, 4, 4]]))


def test_returns_do_not_cross_packed_sequences():
    cu_seqlens = torch.tensor([0, 2, 2, 3])
    assert_golden(reference.returns(f32([1, 2, 4]), gamma=0.5, cu_seqlens=cu_seqlens), f32([2, 2, 4]))


def test_gae_golden():
    # delta = 1 + 0.5 - 0.5 = 1; 2 + 0.75 - 1 = 1.75; 3 - 1.5 = 1.5.   gamma lambda = 1/4:
    # A = 1.5; 1.75 + 0.375 = 2.125; 1 + 0.53125 = 1.53125.   returns = A + V
    out = reference.gae(f32([[1, 2, 3]]), f32([[0.5, 1, 1.5]]), gamma=0.5, gae_lambda=0.5)
    assert_golden(out.advantages, f32([[1.53125, 2.125, 1.5]]))
    assert_golden(out.returns, f32([[2.03125, 3.125, 3.0]]))


def test_gae_looks_over_a_hole_to_the_next_valid_token():
    rewards, values, mask = f32([[1, 99, 2, 3, 99]]), f32([[0.5, 99, 1, 1.5, 99]]), bools([1, 0, 1, 1, 0])
    out = reference.gae(rewards, values, mask[None], gamma=0.5, gae_lambda=0.5)
    assert_golden(out.advantages, f32([[1.53125, 0, 2.125, 1.5, 0]]))
    assert_golden(out.returns, f32([[2.03125, 0, 3.125, 3.0, 0]]))


@pytest.mark.parametrize(
    ("eps_mode", "eps", "unbiased", "expected"),
    [
        # 2 and 6: mean 4, deviations -2 and 2, variance 8 / 2 = 4, unbiased 8 / 1 = 8
        ("floor", 1.0, False, 1.0),  # 2 / sqrt 4
        ("floor", 16.0, False, 0.5),  # 2 / sqrt 16
        ("floor", 1.0, True, 0.707107),  # 2 / sqrt 8
        ("add_var", 12.0, False, 0.5),  # 2 / sqrt(4 + 12)
        ("add_var", 1.0, True, 0.666667),  # 2 / sqrt(8 + 1)
        ("add_std", 6.0, False, 0.25),  # 2 / (2 + 6)
        ("add_std", 1.0, True, 0.522408),  # 2 / (2.828427 + 1)
    ],
)
def test_whiten_golden(eps_mode, eps, unbiased, expected):
    values, mask = f32([2, 99], [6, 99]), bools([1, 0], [1, 0])
    options = {"eps_mode": eps_mode, "eps": eps, "unbiased": unbiased}
    assert_golden(reference.whiten(values, mask, **options), f32([-expected, 0], [expected, 0]))
    assert_golden(
        reference.whiten(values, mask, shift_mean=False, **options), f32([4 - expected, 0], [4 + expected, 0])
    )


def test_whiten_defaults_are_those_of_openrlhf():
    # deviations of (1, 2, 3, 6) over their population std sqrt 3.5, as for normalize_rewards
    assert_golden(reference.whiten(f32([1, 2, 3, 6])), f32([-1.069045, -0.534522, 0, 1.603567]))


@pytest.mark.parametrize("eps_mode", ["floor", "add_var", "add_std"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_whiten_of_one_element_is_0_or_its_mean(eps_mode, unbiased):
    values, mask = f32([3, 99]), bools(1, 0)
    assert_golden(reference.whiten(values, mask, unbiased=unbiased, eps_mode=eps_mode), f32([0, 0]))
    assert_golden(reference.whiten(values, mask, unbiased=unbiased, eps_mode=eps_mode, shift_mean=False), f32([3, 0]))


# Two groups of three: (1, 2, 6) with mean 3, squares 4 + 1 + 9 = 14; (0, 0, 3) with mean 1, squares 1 + 1 + 4 = 6.
GROUPED = (1, 2, 6, 0, 0, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [-2, -1, 3, -1, -1, 2]),
        # 1 - 4, 2 - 3.5, 6 - 1.5; 0 - 1.5, 0 - 1.5, 3 - 0
        ({"baseline": "leave-one-out"}, [-3, -1.5, 4.5, -1.5, -1.5, 3]),
        # unbiased std: sqrt(14 / 2) = 2.645751, sqrt(6 / 2) = 1.732051
        ({"std": "group", "eps": 1e-6}, [-0.755929, -0.377964, 1.133893, -0.577350, -0.577350, 1.154700]),
        ({"std": "group", "eps": 1.0}, [-0.548584, -0.274292, 0.822876, -0.366025, -0.366025, 0.732051]),
        # population std: sqrt(14 / 3) = 2.160247, sqrt(6 / 3) = 1.414214
        (
            {"std": "group", "eps": 1e-6, "unbiased": False},
            [-0.925820, -0.462910, 1.388730, -0.707106, -0.707106, 1.414213],
        ),
        # the spread is about the group's own mean whatever the baseline: -3 / 2.645751, ...
        (
            {"std": "group", "eps": 1e-6, "baseline": "leave-one-out"},
            [-1.133893, -0.566946, 1.700840, -0.866025, -0.866025, 1.732050],
        ),
        # all six: mean 2, squares 1 + 0 + 16 + 4 + 4 + 1 = 26; std sqrt(26 / 5) = 2.280351
        ({"std": "batch", "eps": 1e-6}, [-0.877058, -0.438529, 1.315587, -0.438529, -0.438529, 0.877058]),
        # sqrt(26 / 6) = 2.081666; 2 / 3.081666 = 0.649000
        ({"std": "batch", "eps": 1.0, "unbiased": False}, [-0.649, -0.3245, 0.9735, -0.3245, -0.3245, 0.649]),
    ],
)
def test_group_advantages_golden(options, expected):
    expected = f32(expected)
    assert_golden(reference.group_advantages(f32(GROUPED), group_size=3, **options), expected)
    # The same two groups with their members apart and under any names.
    order = torch.tensor([3, 0, 1, 4, 2, 5])
    group_ids = torch.tensor([9, 9, 9, -4, -4, -4])[order]
    shuffled = reference.group_advantages(f32(GROUPED)[order], group_ids=group_ids, **options)
    assert_golden(shuffled, expected[order])


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("std", ["none", "group"])
@pytest.mark.parametrize(("singleton", "alone"), [("zero", 0.0), ("keep", 5.0)])
def test_a_group_of_one_gets_0_or_its_score(baseline, std, singleton, alone):
    out = reference.group_advantages(
        f32([1, 5, 3]), group_ids=torch.tensor([0, 1, 0]), baseline=baseline, std=std, singleton=singleton
    )
    pair = 1.0 if baseline == "mean" else 2.0  # 3 - (1 + 3) / 2, or 3 - 1
    if std == "group":
        pair /= 1.414215  # unbiased std of 1 and 3, plus 1e-6
    assert_golden(out, f32([-pair, alone, pair]))


def test_reinforce_pp_advantages_golden():
    # KL k1: (0.5, -0.5), (1). rewards with beta 0.2: (-0.1, 1 + 0.1), (0 - 0.2). returns: (1, 1.1), (-0.2).
    # mean 1.9 / 3 = 0.633333; deviations 0.366667, 0.466667, -0.833333; variance 1.046667 / 3; std 0.590668
    old_logps, ref_logps = f32([-1, -1], [-1, 99]), f32([-1.5, -0.5], [-2, 99])
    advantages = reference.reinforce_pp_advantages(f32([1, 0]), old_logps, ref_logps, bools([1, 1], [1, 0]), beta=0.2)
    assert_golden(advantages, f32([0.620766, 0.790066], [-1.410832, 0]))
    # gamma 1/2. returns: (-0.1 + 0.55, 1.1), (-0.2); mean 0.45; deviations 0, 0.65, -0.65; variance 0.845 / 3
    advantages = reference.reinforce_pp_advantages(
        f32([1, 0]), old_logps, ref_logps, bools([1, 1], [1, 0]), beta=0.2, gamma=0.5
    )
    assert_golden(advantages, f32([0, 1.224745], [-1.224745, 0]))


def test_reinforce_pp_advantages_without_a_reference_is_the_whitened_score():
    # three tokens of score 1, one of score -3: mean 0, variance (1 + 1 + 1 + 9) / 4 = 3
    logps, mask = f32([-1, -2, -3], [-4, 99, 99]), bools([1, 1, 1], [1, 0, 0])
    advantages = reference.reinforce_pp_advantages(f32([1, -3]), logps, None, mask, beta=0.0)
    assert_golden(advantages, f32([0.577350, 0.577350, 0.577350], [-1.732051, 0, 0]))


# ---------------------------------------------------------------- golden values: losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "fate"),
    [
        (1.5, 2, {}, -2.4, "clipped_high"),  # min(3, 1.2 * 2)
        (0.5, 2, {}, -1.0, None),  # min(1, 0.8 * 2)
        (1.1, 2, {}, -2.2, None),
        (1.5, -2, {}, 3.0, None),  # min(-3, -2.4)
        (0.5, -2, {}, 1.6, "clipped_low"),  # min(-1, -1.6)
        (1.5, 2, {"epsilon_high": 0.28}, -2.56, "clipped_high"),
        (1.25, 2, {"epsilon_high": 0.28}, -2.5, None),
        (0.5, -2, {"epsilon_low": 0.1}, 1.8, "clipped_low"),
        (4.0, -2, {}, 8.0, None),
        (4.0, -2, {"dual_clip": 3.0}, 6.0, "dual_clipped"),  # max(min(-8, -2.4), 3 * -2)
        (2.0, -2, {"dual_clip": 3.0}, 4.0, None),
        (4.0, 2, {"dual_clip": 3.0}, -2.4, "clipped_high"),  # dual clip is for A < 0
        (1.5, 0, {}, 0.0, None),
        (0.5, 0, {}, 0.0, None),
        (math.exp(3), -1, {"log_ratio_clamp": 1.0}, 2.718282, None),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])  # a sequence of one token is that token
def test_policy_loss_of_one_token_golden(ratio, advantage, options, loss, fate, level):
    old_logps = f32([[-4]])
    logps = old_logps + math.log(ratio)
    out = reference.policy_loss(logps, old_logps, f32([[advantage]]), importance_sampling_level=level, **options)
    assert_golden(out.loss, torch.tensor(loss))
    fates = {name: getattr(out.stats, name).item() for name in ("clipped_low", "clipped_high", "dual_clipped")}
    assert fates == {name: float(name == fate) for name in fates}


REDUCED = {
    # l = -A: (-1, -2, -3), (), (-4, hole, -2). Five tokens in two sequences; sums -6 and -6, means -2 and -3.
    ("token-mean", None): -2.4,  # -12 / 5
    ("token-mean", 8): -1.5,
    ("seq-mean-token-mean", None): -2.5,  # -(2 + 3) / 2
    ("seq-mean-token-mean", 4): -1.25,
    ("seq-mean-token-sum", None): -6.0,  # -(6 + 6) / 2
    ("seq-mean-token-sum", 4): -3.0,
    ("seq-mean-token-sum-norm", None): -0.6,  # -12 / (10 * 2)
    ("seq-mean-token-sum-norm", 4): -0.3,
}


@pytest.mark.parametrize(("reduction", "num_items_in_batch"), REDUCED)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_reductions_golden(reduction, num_items_in_batch, as_tensor):
    expected = torch.tensor(REDUCED[reduction, num_items_in_batch])
    if as_tensor and num_items_in_batch is not None:
        num_items_in_batch = torch.tensor(num_items_in_batch)
    options = {
        "reduction": reduction,
        "num_items_in_batch": num_items_in_batch,
        "max_completion_length": 10 if reduction.endswith("norm") else None,
    }
    mask = bools([1, 1, 1], [0, 0, 0], [1, 0, 1])
    l_t = f32([-1, -2, -3], [99, 99, 99], [-4, 99, -2])
    zeros = torch.zeros(3, 3)
    assert_golden(reference.policy_loss(zeros, zeros, -l_t, mask, **options).loss, expected)
    # (V - R)^2 / 2 is -l_t for R = 0 and V = sqrt(-2 l_t)
    values = (-2 * l_t).clamp(min=0).sqrt()
    assert_golden(reference.value_loss(values, values, zeros, mask, **options).loss, -expected)


def test_reduction_none_golden():
    zeros, mask = torch.zeros(1, 3), bools([[1, 0, 1]])
    out = reference.policy_loss(zeros, zeros, f32([[1, 99, 3]]), mask, reduction="none")
    assert_golden(out.loss, f32([[-1, 0, -3]]))
    values = f32([[2, 99, 1]])
    out = reference.value_loss(values, values, zeros, mask, reduction="none")
    assert_golden(out.loss, f32([[2, 0, 0.5]]))


@pytest.mark.parametrize(
    ("d", "advantage", "loss"),
    [
        ([math.log(4), 0], 1, -1.2),  # ratio 4^(1/2) = 2, clipped
        ([math.log(4), 0], -1, 2.0),
        ([math.log(1.21), 0], 1, -1.1),  # token by token, the first would have been clipped
        ([-math.log(4), 0], -1, 0.8),  # ratio 1/2
    ],
)
def test_sequence_level_ratio_is_the_geometric_mean_over_valid_tokens(d, advantage, loss):
    logps, mask = f32([[*d, 99]]), bools([[1, 1, 0]])
    for advantages in (f32([advantage]), f32([[advantage] * 3])):
        out = reference.policy_loss(logps, torch.zeros(1, 3), advantages, mask, importance_sampling_level="sequence")
        assert_golden(out.loss, torch.tensor(float(loss)))


def test_sequence_level_clamps_the_mean_and_not_its_terms():
    # The mean of (3, -1) is 1, so the ratio is e. Clamped term by term to +-1 it would be e^0.
    options = {"importance_sampling_level": "sequence", "log_ratio_clamp": 1.0}
    out = reference.policy_loss(f32([[3, -1]]), torch.zeros(1, 2), f32([-1]), **options)
    assert_golden(out.loss, torch.tensor(2.718282))
    out = reference.policy_loss(f32([[9, 1]]), torch.zeros(1, 2), f32([-1]), **options)
    assert_golden(out.loss, torch.tensor(2.718282))


def test_policy_stats_golden():
    ratios = torch.tensor([[1.5, 0.5, 4.0], [0.5, 2.0, 99.0], [99.0, 99.0, 99.0]])
    advantages, mask = f32([1, -1, -1], [1, -1, 99], [99, 99, 99]), bools([1, 1, 1], [1, 1, 0], [0, 0, 0])
    stats = reference.policy_loss(ratios.log(), torch.zeros(3, 3), advantages, mask, dual_clip=3.0).stats
    expected = reference.PolicyStats(
        num_tokens=torch.tensor(5.0),
        num_sequences=torch.tensor(2.0),
        clipped_low=torch.tensor(1.0),  # 0.5 with A < 0
        clipped_high=torch.tensor(1.0),  # 1.5 with A > 0
        dual_clipped=torch.tensor(1.0),  # 4 with A < 0
        ratio=torch.tensor(8.5),  # 1.5 + 0.5 + 4 + 0.5 + 2
        approx_kl=torch.tensor(-1.098612),  # -ln(1.5 * 0.5 * 4 * 0.5 * 2) = -ln 3
        kl=torch.tensor(0.0),
    )
    assert_golden(stats, reference.PolicyStats(*(x.double() for x in expected)))


@pytest.mark.parametrize(
    ("value", "target", "epsilon", "loss", "clipped"),
    [
        (1.0, 3.0, 0.2, 3.92, 1),  # clipped value 0.2: (0.2 - 3)^2 / 2, against 2
        (1.0, -1.0, 0.2, 2.0, 0),  # (1 + 1)^2 / 2, against 0.72
        (-1.0, -3.0, 0.2, 3.92, 1),
        (0.1, 1.0, 0.2, 0.405, 0),  # within epsilon: 0.9^2 / 2
        (1.0, 3.0, None, 2.0, 0),
    ],
)
def test_value_loss_of_one_token_golden(value, target, epsilon, loss, clipped):
    out = reference.value_loss(f32([[value]]), f32([[0]]), f32([[target]]), epsilon=epsilon)
    assert_golden(out.loss, torch.tensor(loss))
    assert out.stats.clipped.item() == clipped
    assert_golden(out.stats.squared_error.item(), (value - target) ** 2)


def test_value_stats_golden():
    values, mask = f32([1, 1, 99], [99, 99, 99]), bools([1, 1, 0], [0, 0, 0])
    stats = reference.value_loss(values, torch.zeros(2, 3), f32([3, -1, 99], [99, 99, 99]), mask).stats
    expected = (2.0, 1.0, 1.0, 8.0)  # two tokens of one sequence, one clipped, 4 + 4
    assert_golden(stats, reference.ValueStats(*(torch.tensor(x).double() for x in expected)))


# ---------------------------------------------------------------- identities: log-probs


@pytest.mark.parametrize("V", [1, 2, 7, 1000])
def test_uniform_logits_have_entropy_log_V(V):
    out = reference.logps_from_logits(torch.full((2, V), 3.0), torch.tensor([0, V - 1]))
    assert_close(out.entropy, torch.full((2,), math.log(V)))
    assert_close(out.logps, torch.full((2,), -math.log(V)))
    assert_close(out.lse, torch.full((2,), 3.0 + math.log(V)))


def test_logps_and_entropy_do_not_change_when_all_logits_shift():
    logits, target_ids = randn(4, 9), torch.arange(4)
    out, shifted = (reference.logps_from_logits(x, target_ids) for x in (logits, logits + 300))
    assert_close(shifted.logps, out.logps)
    assert_close(shifted.entropy, out.entropy)
    assert_close(shifted.lse, out.lse + 300)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logits_masked_by_the_lowest_float_are_as_good_as_minus_infinity(temperature):
    # What `masked_fill(finfo.min)` leaves; half of it as a temperature overflows to -inf.
    logits = f32([[0, temperature * LN2, torch.finfo(torch.float32).min, temperature * LN3]]).requires_grad_()
    out = reference.logps_from_logits(logits, torch.tensor([3]), temperature=temperature)
    assert_golden(out.logps, f32([-LN2]))
    assert_golden(out.entropy, f32([1.011404]))
    assert grad(out.logps.sum() + out.entropy.sum(), logits).isfinite().all()


def test_large_logits_do_not_overflow():
    out = reference.logps_from_logits(f32([1e30, 0, -1e30], [1e30, 0, -1e30]), torch.tensor([0, 1]))
    assert_close(out.logps, f32([0, -1e30]))
    assert_close(out.entropy, f32([0, 0]))


def test_logps_gradient_is_one_hot_minus_p_and_entropy_gradient_is_its_closed_form():
    logits = randn(5, 6).requires_grad_()
    target_ids = torch.tensor([0, 5, 2, 2, 1])
    out = reference.logps_from_logits(logits, target_ids, temperature=0.5)
    p = (logits.detach() / 0.5).softmax(-1)
    one_hot = torch.nn.functional.one_hot(target_ids, 6)
    assert_close(torch.autograd.grad(out.logps.sum(), logits, retain_graph=True)[0], (one_hot - p) / 0.5)
    # dH/dz_j = -p_j (log p_j + H)
    dentropy = -p * (p.log() + out.entropy.detach()[:, None]) / 0.5
    assert_close(torch.autograd.grad(out.entropy.sum(), logits, retain_graph=True)[0], dentropy)
    assert_close(torch.autograd.grad(out.lse.sum(), logits)[0], p / 0.5)


def test_a_logit_of_minus_infinity_has_probability_0_and_finite_entropy_and_gradients():
    logits = f32([0, LN2, -torch.inf, LN3], [-torch.inf, 1, -torch.inf, -torch.inf]).requires_grad_()
    out = reference.logps_from_logits(logits, torch.tensor([3, 1]))
    assert_golden(out.logps, f32([-LN2, 0]))
    assert_golden(out.entropy, f32([1.011404, 0]))
    gradient = grad(out.logps.sum() + out.entropy.sum() + out.lse.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[logits == -torch.inf] == 0).all()


@pytest.mark.parametrize("row", [[0, math.nan, 1], [-math.inf] * 3, [math.nan, -math.inf, -math.inf]])
def test_a_row_that_is_no_distribution_is_nan_in_logps_entropy_and_sum_of_squares(row):
    out = reference.logps_from_logits(f32(row, [1, 2, 3]), torch.tensor([1, 1]), sum_squares=True)
    for x in (out.logps, out.entropy, out.sum_squares):
        assert x.isnan().tolist() == [True, False]


def test_a_target_of_probability_0_has_logps_minus_infinity_and_a_finite_gradient():
    logits = f32([[0, -torch.inf, 0]]).requires_grad_()
    out = reference.logps_from_logits(logits, torch.tensor([1]))
    assert out.logps.item() == -torch.inf
    assert_golden(grad(out.logps.sum(), logits), f32([[-0.5, 1, -0.5]]))  # one_hot - p


def test_linear_logps_is_logps_from_logits_of_the_product(batch):
    x = {k: batch.tensors[k].requires_grad_() for k in ("hidden_states", "weight", "bias")}
    ids = batch.tensors["target_ids"]
    fused = reference.linear_logps(x["hidden_states"], x["weight"], ids, MASK, bias=x["bias"], temperature=0.7)
    logits = torch.nn.functional.linear(x["hidden_states"], x["weight"], x["bias"])
    plain = reference.logps_from_logits(logits, ids, MASK, temperature=0.7)
    assert_close(fused, plain)
    objectives = ((out.logps.sin() + out.entropy * out.lse).sum() for out in (fused, plain))
    assert_close(*(torch.autograd.grad(o, list(x.values())) for o in objectives))


# ---------------------------------------------------------------- identities: KL


@pytest.fixture
def small_softmax():
    """Parameters of a policy over five tokens, its log-probs, and those of a reference."""
    theta = torch.tensor([0.3, -1.0, 0.8, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([1.0, 0.2, -0.7, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    return theta, theta.log_softmax(0), ref_logps


def expected_gradient(theta, logps, kl):
    """E_pi[grad kl]: every token once, weighted by its probability, which is not differentiated."""
    return torch.autograd.grad((logps.exp().detach() * kl).sum(), theta, retain_graph=True)[0]


def test_the_expectation_of_k1_and_of_k3_is_the_kl_divergence(small_softmax):
    _, logps, ref_logps = small_softmax
    kl = (logps.exp() * (logps - ref_logps)).sum()
    for estimator in ("k1", "k3"):
        assert_close((logps.exp() * reference.kl_penalty(logps, ref_logps, estimator=estimator)).sum(), kl)


def test_the_expected_gradient_of_k2_is_the_gradient_of_the_reverse_kl(small_softmax):
    theta, logps, ref_logps = small_softmax
    k2 = reference.kl_penalty(logps, ref_logps, estimator="k2")
    reverse_kl = (logps.exp() * (logps - ref_logps)).sum()
    assert_close(expected_gradient(theta, logps, k2), grad(reverse_kl, theta))


def test_the_expected_gradient_of_k1_is_0(small_softmax):
    theta, logps, ref_logps = small_softmax
    k1 = reference.kl_penalty(logps, ref_logps, estimator="k1")
    assert_close(expected_gradient(theta, logps, k1), torch.zeros_like(theta))


def test_the_expected_gradient_of_k3_is_that_of_the_forward_kl_instead(small_softmax):
    theta, logps, ref_logps = small_softmax
    k3 = reference.kl_penalty(logps, ref_logps, estimator="k3")
    gradient = expected_gradient(theta, logps, k3)
    forward_kl = (ref_logps.exp() * (ref_logps - logps)).sum()
    assert_close(gradient, torch.autograd.grad(forward_kl, theta, retain_graph=True)[0])
    reverse_kl = (logps.exp() * (logps - ref_logps)).sum()
    assert not torch.allclose(gradient, grad(reverse_kl, theta), atol=0.01)


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [
        ("k1", torch.ones_like),
        ("k2", lambda d: d),
        ("k3", lambda d: 1 - (-d).exp()),
        ("abs", torch.sign),
    ],
)
def test_gradient_of_each_estimator(estimator, derivative):
    logps = -torch.linspace(0.1, 3.0, 8, dtype=torch.float64)
    ref_logps = logps.flip(0)
    leaf = logps.clone().requires_grad_()
    kl = reference.kl_penalty(leaf, ref_logps, estimator=estimator)
    assert_close(grad(kl.sum(), leaf), derivative(logps - ref_logps))


@pytest.mark.parametrize("gradient", ESTIMATORS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_straight_through_has_the_value_of_one_estimator_and_the_gradient_of_another(batch, estimator, gradient):
    logps, ref_logps = batch.tensors["logps"].requires_grad_(), batch.tensors["ref_logps"]
    kl = partial(reference.kl_penalty, logps, ref_logps, MASK)
    mixed = kl(estimator=estimator, gradient=gradient)
    assert_close(mixed, kl(estimator=estimator), rtol=0, atol=0)
    assert_close(grad(mixed.sin().sum(), logps), grad((mixed.detach().cos() * kl(estimator=gradient)).sum(), logps))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_none_detaches(batch, estimator):
    logps, ref_logps = batch.tensors["logps"].requires_grad_(), batch.tensors["ref_logps"]
    kl = reference.kl_penalty(logps, ref_logps, MASK, estimator=estimator, gradient="none")
    assert not kl.requires_grad
    assert_close(kl, reference.kl_penalty(logps, ref_logps, MASK, estimator=estimator).detach())


def test_k2_k3_and_abs_are_never_negative_and_0_where_the_policies_agree(batch):
    logps, ref_logps = batch.tensors["logps"].float(), batch.tensors["ref_logps"].float()
    for estimator in ("k2", "k3", "abs"):
        assert (reference.kl_penalty(logps, ref_logps, estimator=estimator) >= 0).all()
        assert (reference.kl_penalty(logps, logps, estimator=estimator) == 0).all()


def test_k3_keeps_its_digits_where_the_policies_nearly_agree():
    # k3 = d^2 / 2 - d^3 / 6 + ...; with d = 2^-12 (exact in float32 at -0.5) that is 2.98e-8, lost by exp(-d) - 1 + d.
    d = 2.0**-12
    k3 = reference.kl_penalty(f32([-0.5]), f32([-0.5 - d]), estimator="k3")
    assert_close(k3.item(), d * d / 2 - d**3 / 6, rtol=2e-3, atol=0)


def test_k3_is_finite_for_any_log_probs():
    logps = f32([-1e30, 0, -torch.inf, -1]).requires_grad_()
    k3 = reference.kl_penalty(logps, f32([0, -1e30, -1, -torch.inf]), estimator="k3")
    assert k3.isfinite().all()
    assert grad(k3.sum(), logps).isfinite().all()


# ---------------------------------------------------------------- identities: returns and advantages


def test_returns_at_gamma_1_is_the_reversed_cumulative_sum_over_valid_tokens(batch):
    rewards = batch.tensors["rewards"] * MASK
    assert_close(reference.returns(rewards, MASK), rewards.flip(1).cumsum(1).flip(1) * MASK)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_gae_at_lambda_1_is_returns_minus_values(batch, gamma):
    rewards, values = batch.tensors["rewards"], batch.tensors["values"]
    out = reference.gae(rewards, values, MASK, gamma=gamma)
    returns = reference.returns(rewards, MASK, gamma=gamma)
    assert_close(out.advantages, (returns - values) * MASK)
    assert_close(out.returns, returns)


def test_gae_at_lambda_0_is_the_td_residual(batch):
    rewards, values = batch.tensors["rewards"], batch.tensors["values"]
    out = reference.gae(rewards, values, MASK, gamma=0.9, gae_lambda=0.0)
    for i, valid in enumerate(MASK):
        r, v = rewards[i, valid], values[i, valid]
        next_v = torch.cat([v[1:], v.new_zeros(1)])[: v.numel()]
        assert_close(out.advantages[i, valid], r + 0.9 * next_v - v)


def test_gae_of_a_perfect_critic_is_0_for_every_lambda(batch):
    rewards = batch.tensors["rewards"]
    values = reference.returns(rewards, MASK, gamma=0.9)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages = reference.gae(rewards, values, MASK, gamma=0.9, gae_lambda=gae_lambda).advantages
        assert_close(advantages, torch.zeros_like(rewards))


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitened_values_have_mean_0_and_variance_1(batch, unbiased):
    whitened = reference.whiten(7 + 5 * batch.tensors["advantages"], MASK, unbiased=unbiased)[MASK]
    assert_close(whitened.mean(), torch.zeros_like(whitened[0]))
    assert_close(whitened.var(unbiased=unbiased), torch.ones_like(whitened[0]))


def test_whiten_forgets_scale_and_offset_and_keeps_the_mean_when_asked(batch):
    values = batch.tensors["advantages"]
    whitened = reference.whiten(values, MASK)
    assert_close(reference.whiten(5 * values - 3, MASK), whitened)
    kept = reference.whiten(values, MASK, shift_mean=False)
    assert_close(kept[MASK] - whitened[MASK], values[MASK].mean().expand(int(MASK.sum())))


@pytest.mark.parametrize("eps_mode", ["floor", "add_var", "add_std"])
def test_whiten_of_equal_values_is_0_with_a_finite_gradient(eps_mode):
    values = torch.full((2, 3), 0.5, requires_grad=True)
    whitened = reference.whiten(values, eps_mode=eps_mode)
    assert (whitened == 0).all()
    assert grad((whitened * torch.arange(6.0).reshape(2, 3)).sum(), values).isfinite().all()


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_identity_score_minus_mean_is_a_fraction_of_leave_one_out(k):
    scores = randn(3 * k)
    mean = reference.group_advantages(scores, group_size=k)
    leave_one_out = reference.group_advantages(scores, group_size=k, baseline="leave-one-out")
    assert_close(mean, (k - 1) / k * leave_one_out)
    others = torch.stack([torch.cat([g[:i], g[i + 1 :]]).mean() for g in scores.view(3, k) for i in range(k)])
    assert_close(leave_one_out, scores - others)


@pytest.mark.parametrize("std", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_group_advantages_sum_to_0_in_each_group_and_forget_an_offset_of_the_prompt(baseline, std):
    scores = randn(4, 3)
    options = {"group_size": 3, "baseline": baseline, "std": std}
    advantages = reference.group_advantages(scores.flatten(), **options)
    assert_close(advantages.view(4, 3).sum(1), torch.zeros(4, dtype=torch.float64))
    if std != "batch":  # the spread of the batch does see how far prompts are apart
        offset = scores + torch.tensor([[0.0], [10.0], [-5.0], [3.0]])
        assert_close(reference.group_advantages(offset.flatten(), **options), advantages)


@pytest.mark.parametrize("std", ["none", "group", "batch"])
@pytest.mark.parametrize("score", [0.1, 97.3])
@pytest.mark.parametrize("k", [4, 7, 16])
def test_a_group_of_equal_scores_has_no_advantage_whatever_the_score(score, k, std):
    # The rounding of the mean, over std + 1e-6, must not become a signal.
    advantages = reference.group_advantages(f32([score] * k), group_size=k, std=std)
    assert_close(advantages, torch.zeros(k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("std", ["none", "group", "batch"])
def test_groups_of_equal_scores_have_a_finite_gradient(std):
    scores = f32([0.5, 0.5, 0.5, 1, 2, 3]).requires_grad_()
    advantages = reference.group_advantages(scores, group_size=3, std=std)
    assert grad((advantages * f32(GROUPED)).sum(), scores).isfinite().all()


def test_reinforce_pp_closed_form(batch):
    # [R++] eq. 7: A_t = score - beta * sum over i >= t of log(old / ref), then eq. 8 over all valid tokens
    scores, old_logps, ref_logps = (batch.tensors[k] for k in ("scores", "old_logps", "ref_logps"))
    k1 = (old_logps - ref_logps) * MASK
    advantages = (scores[:, None] - 0.3 * k1.flip(1).cumsum(1).flip(1))[MASK]
    expected = (advantages - advantages.mean()) / advantages.std(unbiased=False)
    actual = reference.reinforce_pp_advantages(scores, old_logps, ref_logps, MASK, beta=0.3)
    assert_close(actual[MASK], expected)


@pytest.mark.parametrize("kl_estimator", ESTIMATORS)
@pytest.mark.parametrize("kl_clamp", [None, 0.2])
def test_reinforce_pp_is_the_chain_of_its_parts(batch, kl_estimator, kl_clamp):
    scores, old_logps, ref_logps = (batch.tensors[k] for k in ("scores", "old_logps", "ref_logps"))
    kl = reference.kl_penalty(old_logps, ref_logps, MASK, estimator=kl_estimator, kl_clamp=kl_clamp)
    rewards = reference.token_rewards(scores, kl, MASK, beta=0.3)
    expected = reference.whiten(reference.returns(rewards, MASK, gamma=0.9), MASK, eps=0.5)
    actual = reference.reinforce_pp_advantages(
        scores, old_logps, ref_logps, MASK, beta=0.3, gamma=0.9, kl_estimator=kl_estimator, kl_clamp=kl_clamp, eps=0.5
    )
    assert_close(actual, expected, rtol=0, atol=0)


def test_reinforce_pp_baseline_is_group_advantages_then_reinforce_pp_without_kl(batch):
    # [R++ v9] eq. 6-7: R - mean of the group, one value for each token of the sequence, normalised over valid tokens
    scores = f32(GROUPED)
    mask = bools([1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1], [0, 0, 1])
    logps = torch.zeros(6, 3)
    centred = reference.group_advantages(scores, group_size=3)
    actual = reference.reinforce_pp_advantages(centred, logps, None, mask, beta=0.0)
    tokens = centred[:, None].expand(6, 3)[mask]
    assert_close(actual[mask], (tokens - tokens.mean()) / tokens.std(unbiased=False))


# ---------------------------------------------------------------- identities: policy loss


def token_weights(mask: Tensor, reduction: str, max_completion_length: int = 7) -> Tensor:
    """What each l_t is multiplied by in the reduced loss."""
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    weights = {
        "token-mean": mask / mask.sum(),
        "seq-mean-token-mean": mask / tokens / mask.any(1).sum(),
        "seq-mean-token-sum": mask / mask.any(1).sum(),
        "seq-mean-token-sum-norm": mask / mask.any(1).sum() / max_completion_length,
    }
    return weights[reduction].double()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_gradient_is_that_of_reinforce(batch, reduction):
    logps = batch.tensors["logps"].requires_grad_()
    advantages = batch.tensors["advantages"]
    loss, stats = reference.policy_loss(logps, logps, advantages, MASK, reduction=reduction, max_completion_length=7)
    assert_close(stats.ratio, stats.num_tokens)
    assert stats.approx_kl == stats.clipped_low == stats.clipped_high == 0
    assert_close(grad(loss, logps), -advantages * token_weights(MASK, reduction), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_gradient_at_sequence_level_spreads_the_mean_advantage(batch, reduction):
    # r_i = exp(mean D), so every token of sequence i receives sum_t(w_t A_t) / n_i; with one A_i and weights that are
    # equal within a sequence that is REINFORCE again.
    logps = batch.tensors["logps"].requires_grad_()
    advantages = batch.tensors["sequence_advantages"]
    loss, _ = reference.policy_loss(
        logps,
        logps,
        advantages,
        MASK,
        reduction=reduction,
        max_completion_length=7,
        importance_sampling_level="sequence",
    )
    assert_close(grad(loss, logps), -advantages[:, None] * token_weights(MASK, reduction), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "passes"),
    [
        (1.3, 2.0, False),  # A > 0, r > 1 + epsilon_high
        (0.7, -2.0, False),  # A < 0, r < 1 - epsilon_low
        (0.7, 2.0, True),  # too low for a good token: pull it back
        (1.3, -2.0, True),  # too high for a bad one
        (1.1, 2.0, True),
        (0.9, -2.0, True),
        (4.0, -2.0, False),  # beyond dual_clip = 3
        (4.0, 2.0, False),
        (2.9, -2.0, True),
    ],
)
def test_gradient_is_minus_ratio_times_advantage_or_0_where_clipped(ratio, advantage, passes):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, stats = reference.policy_loss(logps, torch.zeros_like(logps), logps.new_tensor([[advantage]]), dual_clip=3.0)
    assert_close(grad(loss, logps).item(), -ratio * advantage if passes else 0.0)
    assert (stats.clipped_low + stats.clipped_high + stats.dual_clipped == 0) == passes


def test_dual_clip_bounds_the_loss_and_is_the_two_sided_delta(batch):
    # algorithms.md 2.6: capping r at delta = c >= 1 + epsilon_high is the same loss.
    logps, old_logps, advantages = batch.tensors["logps"] * 3, batch.tensors["old_logps"], batch.tensors["advantages"]
    loss = reference.policy_loss(logps, old_logps, advantages, MASK, dual_clip=1.5, reduction="none").loss
    ratio = (logps - old_logps).exp()
    expected = -torch.minimum(ratio.clamp(max=1.5) * advantages, ratio.clamp(0.8, 1.2) * advantages)
    assert_close(loss, torch.where(MASK, expected, 0.0))
    assert (loss[MASK] <= 1.5 * advantages[MASK].abs()).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss_differentiates_logps_only(batch, level):
    logps, old_logps, advantages = (batch.tensors[k].requires_grad_() for k in ("logps", "old_logps", "advantages"))
    loss, stats = reference.policy_loss(logps, old_logps, advantages, MASK, importance_sampling_level=level)
    loss.backward()
    assert old_logps.grad is None
    assert advantages.grad is None
    assert logps.grad.abs().sum() > 0
    assert not any(s.requires_grad for s in stats)


def test_an_advantage_for_each_sequence_is_the_same_as_for_each_of_its_tokens(batch):
    logps, old_logps, advantages = (batch.tensors[k] for k in ("logps", "old_logps", "sequence_advantages"))
    for_tokens = reference.policy_loss(logps, old_logps, advantages[:, None].expand_as(logps), MASK)
    assert_close(reference.policy_loss(logps, old_logps, advantages, MASK), for_tokens)
    assert_close(reference.policy_loss(logps, old_logps, advantages[:, None], MASK), for_tokens)


def test_a_packed_advantage_for_each_sequence_is_a_column_even_where_tokens_are_as_many_as_sequences():
    # Two tokens of the first sequence, none of the second: (B,) and (T,) have the same shape, (B, 1) is neither.
    loss = partial(
        reference.policy_loss, torch.zeros(2), torch.zeros(2), reduction="none", cu_seqlens=torch.tensor([0, 2, 2])
    )
    assert_golden(loss(f32([[1], [5]])).loss, f32([-1, -1]))
    assert_golden(loss(f32([1, 5])).loss, f32([-1, -5]))


def test_sequence_level_gradient_agrees_with_finite_differences(batch):
    logps, old_logps, advantages = (batch.tensors[k] for k in ("logps", "old_logps", "advantages"))

    def loss(x):
        return reference.policy_loss(
            x, old_logps, advantages, MASK, importance_sampling_level="sequence", dual_clip=3.0
        ).loss

    gradient = torch.func.grad(loss)(logps)
    h = 1e-5
    differences = torch.zeros_like(logps)
    for i, t in MASK.nonzero():
        step = torch.zeros_like(logps)
        step[i, t] = h
        differences[i, t] = (loss(logps + step) - loss(logps - step)) / (2 * h)
    assert_close(gradient, differences, rtol=1e-6, atol=1e-8)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("d", [-1e4, 1e4])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_runaway_ratios_stay_finite(d, level):
    logps = f32([[d, d]]).requires_grad_()
    for advantage in (-1.0, 1.0):
        loss, stats = reference.policy_loss(logps, torch.zeros(1, 2), f32([advantage]), importance_sampling_level=level)
        assert loss.isfinite()
        assert stats.ratio.isfinite()
        assert grad(loss, logps).isfinite().all()


# ---------------------------------------------------------------- identities: value loss


def test_value_loss_differentiates_values_only_and_not_where_clipped():
    values = torch.tensor([[1.0, 1.0, 0.1]], requires_grad=True)
    old_values, targets = torch.zeros(1, 3, requires_grad=True), f32([[3, -1, 1]]).requires_grad_()
    reference.value_loss(values, old_values, targets, reduction="seq-mean-token-sum").loss.backward()
    assert_close(values.grad, f32([[0, 2, -0.9]]))  # clipped; V - R = 1 + 1; 0.1 - 1
    assert old_values.grad is None
    assert targets.grad is None


def test_values_within_epsilon_of_the_old_ones_are_never_counted_as_clipped():
    # old + (V - old) may differ from V in the last bit: that must not look like a clip.
    generator = torch.Generator().manual_seed(0)
    values, targets = (0.1 * torch.randn(10, 100, generator=generator) for _ in range(2))
    old_values = values + 0.19 * (2 * torch.rand(10, 100, generator=generator) - 1)
    loss, stats = reference.value_loss(values, old_values, targets, epsilon=0.2)
    assert stats.clipped == 0
    assert_close(loss, reference.value_loss(values, old_values, targets, epsilon=None).loss)


# ---------------------------------------------------------------- every op on one kind of batch


def call_policy_loss(x, mask, cu_seqlens, advantages="advantages", **options):
    worth = x[advantages][:, None] if advantages == "sequence_advantages" else x[advantages]
    return reference.policy_loss(
        x["logps"], x["old_logps"], worth, mask, max_completion_length=9, cu_seqlens=cu_seqlens, **options
    )


def call_value_loss(x, mask, cu_seqlens, **options):
    return reference.value_loss(
        x["values"], x["old_values"], x["returns"], mask, max_completion_length=9, cu_seqlens=cu_seqlens, **options
    )


OPS = {
    "logps_from_logits": lambda x, mask, _: reference.logps_from_logits(
        x["logits"], x["target_ids"], mask, temperature=x["temperature"], sum_squares=True
    ),
    "linear_logps": lambda x, mask, _: reference.linear_logps(
        x["hidden_states"], x["weight"], x["target_ids"], mask, bias=x["bias"], temperature=0.7
    ),
    **{
        f"kl_penalty {estimator}": lambda x, mask, _, estimator=estimator: reference.kl_penalty(
            x["logps"], x["ref_logps"], mask, estimator=estimator
        )
        for estimator in ESTIMATORS
    },
    "kl_penalty k3 with the gradient of k2": lambda x, mask, _: reference.kl_penalty(
        x["logps"], x["ref_logps"], mask, estimator="k3", gradient="k2", kl_clamp=10.0
    ),
    "token_rewards": lambda x, mask, cu_seqlens: reference.token_rewards(
        x["scores"], x["kl"], mask, beta=0.3, cu_seqlens=cu_seqlens
    ),
    "returns": lambda x, mask, cu_seqlens: reference.returns(x["rewards"], mask, gamma=0.9, cu_seqlens=cu_seqlens),
    "gae": lambda x, mask, cu_seqlens: reference.gae(
        x["rewards"], x["values"], mask, gamma=0.9, gae_lambda=0.8, cu_seqlens=cu_seqlens
    ),
    **{
        f"returns {gap}": lambda x, mask, cu_seqlens, gap=gap: reference.returns(
            x["rewards"], mask, gamma=0.9, gap=gap, cu_seqlens=cu_seqlens
        )
        for gap in ("reset", "step")
    },
    "gae step": lambda x, mask, cu_seqlens: reference.gae(
        x["rewards"], x["values"], mask, gamma=0.9, gae_lambda=0.8, gap="step", cu_seqlens=cu_seqlens
    ),
    "whiten": lambda x, mask, _: reference.whiten(x["advantages"], mask),
    "whiten add_var": lambda x, mask, _: reference.whiten(
        x["advantages"], mask, unbiased=True, eps_mode="add_var", shift_mean=False
    ),
    "whiten add_std": lambda x, mask, _: reference.whiten(x["advantages"], mask, eps=1e-4, eps_mode="add_std"),
    "reinforce_pp_advantages": lambda x, mask, cu_seqlens: reference.reinforce_pp_advantages(
        x["scores"], x["old_logps"], x["ref_logps"], mask, beta=0.3, gamma=0.9, cu_seqlens=cu_seqlens
    ),
    **{
        f"policy_loss {reduction}": partial(call_policy_loss, reduction=reduction)
        for reduction in (*REDUCTIONS, "none")
    },
    "policy_loss dual clip": partial(call_policy_loss, dual_clip=1.3, epsilon_high=0.1),
    "policy_loss sequence level": partial(call_policy_loss, importance_sampling_level="sequence"),
    "policy_loss advantage per sequence": partial(call_policy_loss, advantages="sequence_advantages"),
    **{f"value_loss {reduction}": partial(call_value_loss, reduction=reduction) for reduction in (*REDUCTIONS, "none")},
    "value_loss unclipped": partial(call_value_loss, epsilon=None),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def flat(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result if part is not None for x in flat(part)]


def evaluate(op, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results of op, and the gradient of one smooth function of them for every input it has a gradient for."""
    constants = ("temperature",)
    x = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point() and name not in constants)
        for name, tensor in batch.tensors.items()
    }
    outputs = flat(op(x, batch.mask, batch.cu_seqlens))
    sum((y + 1).sin().sum() for y in outputs if y.requires_grad).backward()
    return [y.detach() for y in outputs], {name: y.grad for name, y in x.items() if y.grad is not None}


def result_dtypes(op, batch: Batch) -> set[torch.dtype]:
    """Of everything but the stats, which are float64 always."""
    result = op(batch.tensors, batch.mask, batch.cu_seqlens)
    return {y.dtype for y in flat(result.loss if hasattr(result, "stats") else result)}


def is_per_token(x: Tensor, batch: Batch) -> bool:
    return x.shape[: batch.mask.dim()] == batch.mask.shape


def assert_masked_positions_are_0(op, batch: Batch) -> None:
    outputs, gradients = evaluate(op, batch)
    assert all(x.isfinite().all() for x in (*outputs, *gradients.values()))
    assert all((y[~batch.mask] == 0).all() for y in outputs if is_per_token(y, batch))
    for name in gradients.keys() - {"weight", "bias", "scores"}:
        assert (gradients[name][~batch.mask] == 0).all()


def assert_padded_equals_packed(op, batch: Batch) -> None:
    outputs, gradients = evaluate(op, batch)
    packed_outputs, packed_gradients = evaluate(op, packed(batch))
    inside = batch.inside
    assert_close(packed_outputs, [y[inside] if is_per_token(y, batch) else y for y in outputs])
    apart = {"weight", "bias", "scores"}
    assert_close(packed_gradients, {k: g if k in apart else g[inside] for k, g in gradients.items()})


def assert_poison_does_not_leak(op, batch: Batch, fill: float, layout=lambda batch: batch) -> None:
    outputs, gradients = evaluate(op, layout(poisoned(batch, fill)))
    clean_outputs, clean_gradients = evaluate(op, layout(batch))
    assert_close(outputs, clean_outputs, rtol=0, atol=0)
    assert_close(gradients, clean_gradients, rtol=0, atol=0)


@every_op
def test_masked_results_and_gradients_are_exactly_0(op, batch):
    assert_masked_positions_are_0(op, batch)


@every_op
def test_padded_equals_packed(op, batch):
    assert_padded_equals_packed(op, batch)


@every_op
@pytest.mark.parametrize("layout", [lambda batch: batch, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_poison_at_masked_positions_does_not_leak(op, batch, layout, fill):
    assert_poison_does_not_leak(op, batch, fill, layout)


@every_op
def test_no_mask_is_a_mask_of_ones(op):
    ones = torch.ones(3, 4, dtype=torch.bool)
    batch = random_batch(ones, torch.tensor([4, 4, 4]))
    assert_close(evaluate(op, batch._replace(mask=None)), evaluate(op, batch), rtol=0, atol=0)


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_widened_before_any_arithmetic(op, dtype):
    half = random_batch(MASK.repeat(9, 1), LENGTHS.repeat(9), dtype=dtype)
    wide = half._replace(tensors={k: x.float() if x.is_floating_point() else x for k, x in half.tensors.items()})
    outputs, gradients = evaluate(op, half)
    wide_outputs, wide_gradients = evaluate(op, wide)
    assert result_dtypes(op, half) == {torch.float32}
    assert_close(outputs, wide_outputs, rtol=0, atol=0)
    assert_close(gradients, {k: g.to(dtype) for k, g in wide_gradients.items()})


def test_half_precision_log_ratio_is_not_rounded_to_half():
    # 8 - 2^-7 takes ten bits, and bfloat16 has eight.
    logps, old_logps = f32([[-8]]).bfloat16(), f32([[-0.0078125]]).bfloat16()
    stats = reference.policy_loss(logps, old_logps, f32([[1]])).stats
    assert stats.approx_kl.item() == 7.9921875


@every_op
def test_results_of_float64_are_float64(op, batch):
    assert result_dtypes(op, batch) == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [call_policy_loss, call_value_loss])
def test_stats_are_float64_whatever_the_input(loss, dtype):
    batch = random_batch(MASK, LENGTHS, dtype=dtype)
    assert {x.dtype for x in loss(batch.tensors, batch.mask, None).stats} == {torch.float64}


@every_op
def test_no_input_is_changed(op, batch):
    before = {k: x.clone() for k, x in batch.tensors.items()}
    evaluate(op, batch)
    assert_close(batch.tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(OPS.keys() - {"kl_penalty k3 with the gradient of k2"}))
@pytest.mark.parametrize("layout", [lambda batch: batch, packed], ids=["padded", "packed"])
def test_gradcheck(name, layout):
    op = OPS[name]
    mask = bools([1, 0, 1], [1, 1, 0])
    batch = layout(random_batch(mask, torch.tensor([3, 2]), vocab=3, seed=3))
    _, gradients = evaluate(op, batch)
    names = sorted(gradients)

    def function(*inputs):
        outputs = flat(op({**batch.tensors, **dict(zip(names, inputs, strict=True))}, batch.mask, batch.cu_seqlens))
        return tuple(y for y in outputs if y.requires_grad)

    inputs = tuple(batch.tensors[name].clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("std", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_gradcheck_of_score_functions(baseline, std):
    scores = torch.tensor([1.0, 2.5, -0.3, 0.4, 0.9, 7.0], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 1, 0, 2])
    function = partial(reference.group_advantages, group_ids=ids, baseline=baseline, std=std)
    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradcheck(partial(reference.normalize_rewards, clip=(-1.0, 0.9), scale=2.0), scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_scores_of_any_type_give_float32(dtype):
    scores = torch.tensor([1, 2, 6, 0, 0, 3]).to(dtype)
    assert_golden(reference.group_advantages(scores, group_size=3), f32([-2, -1, 3, -1, -1, 2]))
    assert reference.normalize_rewards(scores).dtype == torch.float32


# ---------------------------------------------------------------- micro-batches


SPLITTABLE = {
    "policy_loss": call_policy_loss,
    "policy_loss sequence level": partial(call_policy_loss, importance_sampling_level="sequence"),
    "policy_loss advantage per sequence": partial(call_policy_loss, advantages="sequence_advantages", dual_clip=1.3),
    "value_loss": call_value_loss,
}


def assert_split_equals_whole(loss, reduction: str, batch: Batch, at: int) -> None:
    items = batch.mask.sum() if reduction == "token-mean" else batch.mask.any(1).sum()

    def differentiate(part: Batch):
        name = "values" if loss is call_value_loss else "logps"
        x = {**part.tensors, name: part.tensors[name].clone().requires_grad_()}
        out = loss(x, part.mask, None, reduction=reduction, num_items_in_batch=items.clamp(min=1))
        return out, grad(out.loss, x[name])

    whole, whole_gradient = differentiate(batch)
    parts, gradients = zip(*(differentiate(rows(batch, s)) for s in (slice(at), slice(at, None))), strict=True)
    assert_close(parts[0].loss + parts[1].loss, whole.loss)
    total = sum(part.stats for part in parts)
    assert_close(total, parts[0].stats + parts[1].stats, rtol=0, atol=0)
    assert_close(total, whole.stats)
    assert type(total) is type(whole.stats)
    assert_close(torch.cat(gradients), whole_gradient)
    alone = loss(batch.tensors, batch.mask, None, reduction=reduction)
    assert_close(whole, alone)  # the global count of one call is the default


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", SPLITTABLE.values(), ids=SPLITTABLE.keys())
@pytest.mark.parametrize("at", [1, 2, 3])
def test_split_batch_equals_whole_batch_given_the_number_of_items(loss, reduction, batch, at):
    assert_split_equals_whole(loss, reduction, batch, at)


# ---------------------------------------------------------------- properties of random ragged batches


@every_op
@few_examples
@given(batch=ragged_batches())
def test_property_finite_and_0_where_masked(op, batch):
    assert_masked_positions_are_0(op, batch)


@every_op
@few_examples
@given(batch=ragged_batches())
def test_property_padded_equals_packed(op, batch):
    assert_padded_equals_packed(op, batch)


@every_op
@few_examples
@given(batch=ragged_batches(), fill=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_property_poison_does_not_leak(op, batch, fill):
    assert_poison_does_not_leak(op, batch, fill)


@every_op
@few_examples
@given(batch=ragged_batches(), data=st.data())
def test_property_permuting_sequences_permutes_results(op, batch, data):
    order = torch.tensor(data.draw(st.permutations(range(batch.mask.shape[0]))))
    outputs, gradients = evaluate(op, batch)
    permuted_outputs, permuted_gradients = evaluate(op, permuted(batch, order))
    assert_close(permuted_outputs, [y[order] if y.dim() else y for y in outputs])
    shared = {"weight", "bias"}
    assert_close(permuted_gradients, {k: g if k in shared else g[order] for k, g in gradients.items()})


@every_op
@few_examples
@given(batch=ragged_batches(), columns=st.integers(1, 3))
def test_property_more_padding_changes_nothing(op, batch, columns):
    def widen(x):
        return torch.cat([x, x[:, :1].expand(-1, columns, *x.shape[2:])], dim=1)

    wide = batch.map_tokens(widen)
    wide = wide._replace(mask=torch.nn.functional.pad(batch.mask, (0, columns)))
    S = batch.mask.shape[1]
    outputs, _ = evaluate(op, batch)
    wide_outputs, _ = evaluate(op, wide)
    assert_close([y[:, :S] if y.dim() else y for y in wide_outputs], outputs)


@pytest.mark.parametrize("loss", SPLITTABLE.values(), ids=SPLITTABLE.keys())
@pytest.mark.parametrize("reduction", REDUCTIONS)
@few_examples
@given(batch=ragged_batches(), data=st.data())
def test_property_split_batch_equals_whole_batch(loss, reduction, batch, data):
    assert_split_equals_whole(loss, reduction, batch, data.draw(st.integers(0, batch.mask.shape[0])))


@few_examples
@given(batch=ragged_batches())
def test_property_logps_are_at_most_0_and_entropy_is_between_0_and_log_V(batch):
    out = OPS["logps_from_logits"](batch.tensors, batch.mask, None)
    assert (out.logps <= 1e-12).all()
    assert (out.entropy >= -1e-12).all()
    assert (out.entropy <= math.log(batch.tensors["logits"].shape[-1]) + 1e-12).all()


@few_examples
@given(batch=ragged_batches())
def test_property_rewards_add_up_to_the_score_of_every_sequence_that_is_not_empty(batch):
    scores, kl = batch.tensors["scores"], batch.tensors["kl"]
    rewards = reference.token_rewards(scores, kl, batch.mask, beta=0.3)
    expected = torch.where(batch.mask.any(1), scores, 0.0) - 0.3 * (kl * batch.mask).sum(1)
    assert_close(rewards.sum(1), expected)


@few_examples
@given(batch=ragged_batches())
def test_property_clipped_loss_is_at_least_the_unclipped_one_and_dual_clip_bounds_it(batch):
    x, mask = batch.tensors, batch.mask
    loss = call_policy_loss(x, mask, None, reduction="none").loss
    assert (loss >= torch.where(mask, -(x["logps"] - x["old_logps"]).exp() * x["advantages"], 0.0) - 1e-12).all()
    dual = call_policy_loss(x, mask, None, reduction="none", dual_clip=1.3).loss
    assert (dual <= loss).all()
    assert (dual <= 1.3 * x["advantages"].abs() + 1e-12).all()


@pytest.mark.parametrize("std", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@few_examples
@given(data=st.data())
def test_property_group_advantages_follow_permutations_and_renamed_groups(data, baseline, std):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=8))  # singletons among them
    B = len(groups)
    scores = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=B, max_size=B))).double()
    order = torch.tensor(data.draw(st.permutations(range(B))))
    group_ids = torch.tensor(groups)
    function = partial(reference.group_advantages, baseline=baseline, std=std)
    advantages = function(scores, group_ids=group_ids)
    assert advantages.isfinite().all()
    assert_close(function(scores[order], group_ids=100 - 7 * group_ids[order]), advantages[order])
    for g in set(groups):
        assert_close(advantages[group_ids == g].sum(), torch.tensor(0.0).double(), rtol=0, atol=1e-9)


@every_op
@pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_a_batch_without_a_valid_token_gives_0_and_no_nan(op, B, S):
    batch = poisoned(random_batch(torch.zeros(B, S, dtype=torch.bool), torch.full((B,), S), vocab=1), math.nan)
    for layout in (batch, packed(batch)):
        outputs, gradients = evaluate(op, layout)
        assert all((y == 0).all() for y in outputs)
        assert all((g == 0).all() for g in gradients.values())


@every_op
def test_a_packed_batch_of_empty_sequences_has_no_tokens_and_no_nan(op):
    batch = packed(random_batch(torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0, 0])))
    assert batch.mask.shape == (0,)
    outputs, _ = evaluate(op, batch)
    assert all((y == 0).all() for y in outputs)


# ---------------------------------------------------------------- golden values: groups, holes and totals


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # (1, 2, 6) of lengths 1, 2, 3: (1 + 4 + 18) / 6 = 3.833333; (0, 0, 3) of lengths 1, 0, 2: (0 + 6) / 3 = 2
        ({"baseline": "length-weighted"}, [-2.833333, -1.833333, 2.166667, -2, -2, 1]),
        # over the unbiased std of the group, 2.645751 and 1.732051
        (
            {"baseline": "length-weighted", "std": "group"},
            [-1.070899, -0.692935, 0.818923, -1.154700, -1.154700, 0.577350],
        ),
        # The others of 1 are (2, 6): mean 4, std sqrt 8; of 2 (1, 6): 3.5, sqrt 12.5; of 6 (1, 2): 1.5, sqrt 0.5.
        # Those of a 0 are (0, 3): 1.5, sqrt 4.5; those of 3 are (0, 0), which do not divide.
        (
            {"baseline": "leave-one-out", "std": "leave-one-out"},
            [-1.060660, -0.424264, 6.363952, -0.707106, -0.707106, 3],
        ),
        # Their population std is 2, 2.5, 0.5 and 1.5, to which 0.5 is added.
        (
            {"baseline": "leave-one-out", "std": "leave-one-out", "unbiased": False, "eps": 0.5},
            [-1.2, -0.5, 4.5, -0.75, -0.75, 3],
        ),
        # From the group's mean: -2, -1, 3, -1, -1, 2
        ({"std": "leave-one-out", "unbiased": False, "eps": 0.5}, [-0.8, -0.333333, 3, -0.5, -0.5, 2]),
    ],
)
def test_group_advantages_by_length_and_by_the_others_golden(options, expected):
    lengths, order = torch.tensor([1, 2, 3, 1, 0, 2]), torch.tensor([3, 0, 1, 4, 2, 5])
    weigh = options.get("baseline") == "length-weighted"
    function = partial(reference.group_advantages, **options)
    out = function(f32(GROUPED), group_size=3, lengths=lengths if weigh else None)
    assert_golden(out, f32(expected))
    group_ids = torch.tensor([9, 9, 9, -4, -4, -4])[order]
    out = function(f32(GROUPED)[order], group_ids=group_ids, lengths=lengths[order] if weigh else None)
    assert_golden(out, f32(expected)[order])


def test_lengths_that_are_equal_weigh_as_none_do():
    scores = randn(12)
    weighted = reference.group_advantages(
        scores, group_size=4, baseline="length-weighted", lengths=torch.full((12,), 7)
    )
    assert_close(weighted, reference.group_advantages(scores, group_size=4))


def test_a_length_weighted_baseline_has_no_sum_over_tokens_left():
    # sum_i l_i (s_i - b) = 0: the gradient's mean over tokens has none of the prompt's offset in it
    scores, lengths = randn(12), torch.arange(12) % 5
    advantages = reference.group_advantages(scores, group_size=4, baseline="length-weighted", lengths=lengths)
    assert_close((lengths * advantages).view(3, 4).sum(1), torch.zeros(3).double())


def test_the_best_and_the_informative_golden():
    scores = f32([1, 6, 6, 2, 2, 2, 5])
    group_ids = torch.tensor([8, 8, 8, -1, -1, -1, 0])
    assert reference.best_of_group(scores, group_ids=group_ids).tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert reference.informative_groups(scores, group_ids=group_ids).tolist() == [True] * 3 + [False] * 4
    assert reference.best_of_group(scores[:6], group_size=2).tolist() == [0, 1, 1, 0, 1, 0]
    assert reference.informative_groups(scores[:6], group_size=2).tolist() == [True, True, True, True, False, False]


def test_returns_over_a_hole_golden():
    rewards, mask = f32([[1, 99, 2, 4]]), bools([[1, 0, 1, 1]])
    returns = partial(reference.returns, rewards, mask, gamma=0.5)
    assert_golden(returns(gap="reset"), f32([[1, 0, 4, 4]]))  # 4; 2 + 4 / 2; 0; 1 + 0
    assert_golden(returns(gap="step"), f32([[2, 0, 4, 4]]))  # 4; 2 + 4 / 2; 0 + 4 / 2 = 2; 1 + 2 / 2


def test_gae_that_steps_over_a_hole_golden():
    # gamma lambda = 1/4. t = 3: delta 3 - 1.5; t = 2: 2 + 0.75 - 1 + 1.5 / 4 = 2.125; in the hole 0 + 1 / 2 - 0
    # + 2.125 / 4 = 1.03125; t = 0: 1 + 0 - 0.5 + 1.03125 / 4 = 0.7578125
    rewards, values, mask = f32([[1, 99, 2, 3, 99]]), f32([[0.5, 99, 1, 1.5, 99]]), bools([[1, 0, 1, 1, 0]])
    out = reference.gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5, gap="step")
    assert_golden(out.advantages, f32([[0.7578125, 0, 2.125, 1.5, 0]]))
    assert_golden(out.returns, f32([[1.2578125, 0, 3.125, 3.0, 0]]))


def test_to_step_over_a_hole_is_to_be_paid_nothing_there(batch):
    rewards, values = (torch.where(batch.mask, batch.tensors[k], 0.0) for k in ("rewards", "values"))
    returns = reference.returns(batch.tensors["rewards"], batch.mask, gamma=0.9, gap="step")
    assert_close(returns, torch.where(batch.mask, reference.returns(rewards, gamma=0.9), 0.0))
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    out = reference.gae(batch.tensors["rewards"], batch.tensors["values"], batch.mask, gap="step", **options)
    unmasked = reference.gae(rewards, values, **options)
    assert_close(out.advantages, torch.where(batch.mask, unmasked.advantages, 0.0))


def test_to_reset_at_a_hole_is_to_be_two_sequences():
    rewards, mask = randn(1, 7), bools([[1, 1, 0, 1, 0, 0, 1]])
    apart = [reference.returns(rewards[:, a:b], gamma=0.9) for a, b in ((0, 2), (3, 4), (6, 7))]
    reset = reference.returns(rewards, mask, gamma=0.9, gap="reset")
    assert_close(reset[mask], torch.cat(apart, 1)[0])


def test_holes_are_all_alike_where_there_are_none(batch):
    rewards, mask = batch.tensors["rewards"], torch.arange(5) < torch.tensor([[5], [2], [0], [1]])
    returns = [reference.returns(rewards, mask, gamma=0.9, gap=gap) for gap in ("carry", "reset", "step")]
    assert_close(returns[1], returns[0], rtol=0, atol=0)
    assert_close(returns[2], returns[0], rtol=0, atol=0)


def test_num_items_in_batch_golden():
    mask = bools([1, 1, 1], [0, 0, 0], [1, 0, 1])
    for reduction, count in zip(REDUCTIONS, (5, 2, 2, 2), strict=True):
        for items in (
            reference.num_items_in_batch(mask, reduction),
            reference.num_items_in_batch(mask.flatten(), reduction, cu_seqlens=torch.tensor([0, 3, 3, 6, 9])),
        ):
            assert (items.item(), items.dtype, items.shape) == (count, torch.float64, ())
        assert reference.num_items_in_batch(mask & False, reduction).item() == 1  # a loss of 0 over it is 0


def test_the_sums_of_one_process_are_its_own():
    logps = randn(2, 3)
    stats = reference.policy_loss(logps, logps, logps).stats
    assert_close(reference.sum_over_ranks(stats, None), stats, rtol=0, atol=0)


# ---------------------------------------------------------------- golden values: weights and choices of tokens

# old_logps - sampling_logps: ln 2, -ln 2, ln 3, of sum ln 3 and mean ln 3 / 3; and ln 2 twice, a hole between them.
ROLLOUT = f32([LN2, -LN2, LN3], [LN2, math.nan, LN2]), f32([0, 0, 0], [0, math.nan, 0]), bools([1, 1, 1], [1, 0, 1])
BOUNDS = {"low": 0.6, "high": 2.5}


@pytest.mark.parametrize(
    ("level", "outside", "expected", "below", "above"),
    [
        ("token", "truncate", [[2, 0.6, 2.5], [2, 0, 2]], 1, 1),
        ("token", "mask", [[2, 0, 0], [2, 0, 2]], 1, 1),
        ("sequence", "truncate", [[2.5, 2.5, 2.5], [2.5, 0, 2.5]], 0, 5),  # 3 and 4
        ("sequence", "mask", [[0, 0, 0], [0, 0, 0]], 0, 5),
        ("geometric", "truncate", [[1.442250] * 3, [2, 0, 2]], 0, 0),  # the cube root of 3; the root of 4
        ("geometric", "mask", [[1.442250] * 3, [2, 0, 2]], 0, 0),
    ],
)
def test_rollout_weights_golden(level, outside, expected, below, above):
    result = reference.rollout_weights(*ROLLOUT, level=level, outside=outside, **BOUNDS)
    assert_golden(result.weights, f32(*expected))
    stats = result.stats
    assert [stats.num_tokens.item(), stats.outside_low.item(), stats.outside_high.item()] == [5, below, above]
    assert stats.weights.item() == pytest.approx(sum(map(sum, expected)), rel=1e-5)
    assert stats.kl.item() == pytest.approx(-LN3 - 2 * LN2, rel=1e-5)  # ln 2 - ln 2 + ln 3, and ln 2 twice


def test_rollout_weights_of_packed_tokens_and_the_clamp_of_the_log_ratio():
    # Sums ln 6 and ln 3 / 2, brought to ln 2 and left alone; means ln 6 / 2 and ln 3 / 2, to ln 2 and left alone.
    d, cu_seqlens = f32([LN2, LN3, LN3 / 2]), torch.tensor([0, 2, 2, 3])
    for level in ("sequence", "geometric"):
        weights = reference.rollout_weights(
            d, 0 * d, level=level, high=math.inf, log_ratio_clamp=LN2, cu_seqlens=cu_seqlens
        ).weights
        assert_golden(weights, f32([2, 2, 1.732051]))


def test_a_sequence_mask_of_token_weights_is_a_product():
    each = reference.rollout_weights(*ROLLOUT, high=math.inf).weights
    kept = reference.rollout_weights(*ROLLOUT, level="geometric", outside="mask", low=1.5, high=5.0).weights
    assert_golden(each * (kept > 0), f32([0, 0, 0], [2, 0, 2]))


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        # Of 1, 2, 3, 4, 5 the quantile lies at place (1 - fraction) * 4:
        (0.2, [0, 0, 0, 0, 1]),  # 3.2, between 4 and 5: 4.2
        (0.5, [0, 1, 0, 1, 1]),  # 2: 3
        (0.55, [0, 1, 0, 1, 1]),  # 1.8: 2.8
        (1.0, [1, 1, 1, 1, 1]),  # 0: 1
        (1e-9, [0, 0, 0, 0, 1]),  # 3.999999996: 4.999999996, and 5 in float32
    ],
)
def test_top_entropy_mask_golden(fraction, expected):
    entropy, mask = f32([1, 3, 2, 4, 5, 9, math.nan]), bools(1, 1, 1, 1, 1, 0, 0)
    assert reference.top_entropy_mask(entropy, mask, fraction=fraction).tolist() == bools(*expected, 0, 0).tolist()


def test_top_entropy_mask_interpolates_between_unequal_neighbours():
    # Place 0.7 * 3 = 2.1 of 0, 2, 4, 14 is 4 + 0.1 * 10 = 5; place 0.4 * 3 = 1.2 is 2.4; ties are all chosen.
    assert reference.top_entropy_mask(f32([14, 2, 0, 4]), fraction=0.3).tolist() == [True, False, False, False]
    assert reference.top_entropy_mask(f32([14, 2, 0, 4]), fraction=0.6).tolist() == [True, False, False, True]
    assert reference.top_entropy_mask(f32([2, 2, 2, 1]), fraction=0.1).tolist() == [True, True, True, False]


# Advantages of mean 0 and log-probs of mean -3, but for what is masked: their products are 6, 0, 0, 2.
COV = {"logps": f32([-1, -3, math.nan], [-3, -5, 0]), "advantages": f32([3, -1, 9], [-1, -1, math.nan])}
COV_MASK = bools([1, 1, 0], [1, 1, 0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, 1, 0], [1, 0, 0]]),  # 1 < 2 < 5, and 6 is beyond
        ({"high": 7.0, "fraction": 0.5}, [[0, 1, 0], [1, 0, 0]]),  # both of 4 * 0.5
        ({"low": 2.0}, [[1, 1, 0], [1, 1, 0]]),  # 2 < 2 is not
        ({"low": -1.0, "high": 1.0, "fraction": 0.5}, [[1, 0, 0], [0, 1, 0]]),
    ],
)
def test_clip_cov_weights_golden(options, expected):
    weights = reference.clip_cov_weights(COV["logps"], COV["logps"], COV["advantages"], COV_MASK, **options)
    assert weights.tolist() == f32(*expected).tolist()


def test_clip_cov_weights_leave_clipped_tokens_alone():
    # The only candidate has A = -1: a ratio of e^-0.3 = 0.74 is clipped, one of e^-0.2 = 0.82 or e^0.3 is not.
    for change, weight in ((-0.3, 1), (-0.2, 0), (0.3, 0)):
        old_logps = COV["logps"] - f32([0, 0, 0], [0, change, 0])
        weights = reference.clip_cov_weights(COV["logps"], old_logps, COV["advantages"], COV_MASK)
        assert weights.tolist() == [[1, 1, 0], [1, weight, 0]]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (2e-4, [[1, 0, 0], [0, 0, 0]]),  # at least one
        (0.6, [[1, 0, 0], [0, 1, 0]]),  # 2.4
        (0.75, [[1, 1, 0], [0, 1, 0]]),  # the first of equal ones
        (1.0, [[1, 1, 0], [1, 1, 0]]),
    ],
)
def test_kl_cov_mask_golden(fraction, expected):
    mask = reference.kl_cov_mask(**COV, completion_mask=COV_MASK, fraction=fraction)
    assert mask.tolist() == bools(*expected).tolist()


def test_overlong_penalty_golden():
    # A buffer of 4 before 10: it begins beyond 6, and every token of it costs a quarter.
    lengths = torch.tensor([0, 6, 7, 8, 10, 15])
    penalty = reference.overlong_penalty(lengths, max_completion_length=10, buffer_length=4)
    assert_golden(penalty, f32([0, 0, -0.25, -0.5, -1, -1]))
    penalty = reference.overlong_penalty(lengths, max_completion_length=10, buffer_length=10, scale=2.0)
    assert_golden(penalty, f32([0, -1.2, -1.4, -1.6, -2, -2]))


# ---------------------------------------------------------------- golden values: preference losses


# beta = 1/2, h_w = 2 ln 2 (a token under the mask aside), h_l = -2 ln 3: r_w = ln 2, r_l = -ln 3, z = ln 6, of which
# the logistic function is 2/3, 1/4 and 6/7.
CHOSEN = [1.5 * LN2, 99.0, 0.5 * LN2], [True, False, True]
REJECTED = [-LN3, -LN3, 99.0], [True, True, False]


def pair(loss_type, *, reference_at=-3.0, swapped=False, **options):
    sequences = [REJECTED, CHOSEN] if swapped else [CHOSEN, REJECTED]
    d, mask = (torch.tensor(x) for x in zip(*sequences, strict=True))
    ref = torch.full_like(d, reference_at)
    return reference.dpo_loss(ref + d, ref, mask, beta=0.5, loss_type=loss_type, **options)


@pytest.mark.parametrize(
    ("loss_type", "options", "loss"),
    [
        ("sigmoid", {}, 0.154151),  # ln 7/6
        ("sigmoid", {"swapped": True}, 1.945910),  # ln 7
        ("sigmoid", {"label_smoothing": 0.1}, 0.333327),  # 0.9 ln 7/6 + 0.1 ln 7
        ("sigmoid", {"margin": LN2}, 0.287682),  # ln 4/3
        ("sigmoid", {"margin": LN2, "label_smoothing": 0.25}, 0.562335),  # 3/4 ln 4/3 + 1/4 ln 4
        ("sigmoid", {"length_normalized": True}, 0.342347),  # z = ln 6 / 2: ln(1 + 1 / sqrt 6)
        ("ipo", {}, 6.674570),  # (2 ln 6 - 1)^2
        ("ipo", {"length_normalized": True}, 0.626882),  # (ln 6 - 1)^2
        ("hinge", {}, 0.0),
        ("hinge", {"swapped": True}, 2.791759),  # 1 + ln 6
        ("robust", {"label_smoothing": 0.25}, -0.741729),  # (3/4 ln 7/6 - 1/4 ln 7) / (1/2)
        ("exo_pair", {"label_smoothing": 0.25}, 0.034510),  # 6/7 ln 8/7 + 1/7 ln 4/7
        ("nca_pair", {}, 1.098612),  # ln 3/2 + ln(3) / 2 + ln(4/3) / 2 = ln 3
        ("sppo_hard", {}, 1.582570),  # (2 ln 2 - 1)^2 + (1 - 2 ln 3)^2
        ("apo_zero", {}, 0.583333),  # 1/3 + 1/4
        ("apo_down", {}, 0.809524),  # 2/3 + 1/7
        ("discopop", {}, 0.166667),  # exp(-ln 6), as 6^-20 is nothing
    ],
)
def test_dpo_loss_golden(loss_type, options, loss):
    assert_golden(pair(loss_type, **options).loss, torch.tensor(loss))


def test_discopop_blends_two_losses():
    # z = ln(3) / 20: s(20 z) = 3/4, exp(-z) = 3^-0.05 = 0.946551, -log s(z) = ln 1.946551 = 0.666059.
    logps = torch.tensor([[0.2 * LN3], [0.1 * LN3]])
    loss = reference.dpo_loss(logps, None, beta=0.5, loss_type="discopop").loss
    assert_golden(loss, torch.tensor(0.876428))  # 0.666059 / 4 + 0.946551 * 3 / 4


def test_preference_stats_golden():
    # The pair above; the same swapped; one of nothing, which is none; one without a rejected token.
    nothing = [9.0] * 3, [False] * 3
    sequences = CHOSEN, REJECTED, REJECTED, CHOSEN, nothing, nothing, ([-4.0] * 3, [False, True, False]), nothing
    d, mask = (torch.tensor(x) for x in zip(*sequences, strict=True))
    loss, stats = reference.dpo_loss(d, torch.zeros_like(d), mask, beta=0.5)
    last = 2.126928  # r_w = -2, r_l = 0: ln(1 + e^2)
    assert_golden(loss, torch.tensor((0.154151 + 1.945910 + last) / 3))
    none = reference.dpo_loss(d, torch.zeros_like(d), mask, beta=0.5, reduction="none").loss
    assert_golden(none, torch.tensor([0.154151, 1.945910, 0.0, last]))
    by_three = reference.dpo_loss(d, torch.zeros_like(d), mask, beta=0.5, num_pairs=3).loss
    assert_golden(by_three, loss)
    expected = reference.PreferenceStats(3.0, LN2 - LN3 - 2, LN2 - LN3, -2.0, 1.0)
    assert_golden(torch.stack(stats), torch.tensor(expected).double())


def test_copg_loss_golden():
    # h = 2, -1; R = 1, 0; beta = 1/2: l = D h - beta/2 h^2 = 3 - 9/4 = 3/4, over two sequences; D - beta h = -1/2.
    logps = torch.tensor([[1.5, 99.0, 0.5], [-1.0, 99.0, 99.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    loss, stats = reference.copg_loss(logps, torch.zeros(2, 3), torch.tensor([1.0, 0.0]), mask, beta=0.5)
    assert_golden(loss, torch.tensor(-0.375))
    (dlogps,) = torch.autograd.grad(loss, logps)
    assert_golden(dlogps, torch.tensor([[0.25, 0.0, 0.25], [-0.25, 0.0, 0.0]]))
    assert_golden(torch.stack(stats), torch.tensor([2.0, 1.0, 1.0]).double())


def test_copg_loss_of_three_golden():
    # h = 1, 0, -1; R = 3, 0, 0; beta = 1. Above the mean of the others: R 3, -3/2, -3/2; h 3/2, 0, -3/2.
    # (3 - 3/4) + 0 + (3/2 - 3/4) = 3, over three sequences.
    logps = torch.tensor([[1.0], [0.0], [-1.0]])
    call = partial(reference.copg_loss, logps, torch.zeros(3, 1), torch.tensor([3.0, 0.0, 0.0]), beta=1.0, group_size=3)
    assert_golden(call().loss, torch.tensor(-1.0))
    assert_golden(call(reduction="none").loss, torch.tensor([-3.0]))
    assert_golden(call(num_items_in_batch=6).loss, torch.tensor(-0.5))


# ---------------------------------------------------------------- surrogates, KL and entropy of policy_loss

# ratio, advantage, logp, options, loss, d(loss) / d(logp)
SURROGATES_BY_HAND = [
    ("clip", 1.5, 2.0, -3.0, {}, -2.4, 0.0),
    ("clip", 1.1, 2.0, -3.0, {}, -2.2, -2.2),
    ("clip", 4.0, -2.0, -3.0, {"dual_clip": 3.0}, 6.0, 0.0),
    ("reinforce", 1.5, 2.0, -3.0, {}, 6.0, -2.0),  # -2 * -3
    ("reinforce", 0.1, -0.5, -3.0, {}, -1.5, 0.5),
    ("cispo", 1.5, 2.0, -3.0, {}, 9.0, -3.0),  # weight 1.5: -1.5 * 2 * -3
    ("cispo", 8.0, 2.0, -3.0, {}, 30.0, -10.0),  # weight 5
    ("cispo", 0.001, -2.0, -3.0, {}, -0.006, 0.002),  # no lower bound
    ("cispo", 0.1, 2.0, -3.0, {"epsilon_low": 0.2, "epsilon_high": 0.2}, 4.8, -1.6),  # weight 0.8
    ("sapo", 1.0, 2.0, -3.0, {}, -4.0, -2.0),  # -2 * 4 * sigmoid(0); slope -2 * 4 / 4
    ("sapo", 1.0, -2.0, -3.0, {}, 3.8095238, 2.0),  # 2 * (4 / 1.05) / 2
    # sigmoid(ln 3) = 3/4 for tau = 2 and r = 1 + ln(3) / 2 = 1.5493061: -2 * 2 * 3/4; slope -2 * 4 * 3/16 * r
    ("sapo", 1.5493061, 2.0, -3.0, {"tau_positive": 2.0}, -3.0, -2.3239592),
    ("sapo", 1.5493061, -2.0, -3.0, {"tau_negative": 2.0}, 3.0, 2.3239592),
]


@pytest.mark.parametrize(("name", "ratio", "advantage", "logp", "options", "loss", "slope"), SURROGATES_BY_HAND)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence-token"])  # a sequence of one token is that token
def test_surrogate_of_one_token_golden(name, ratio, advantage, logp, options, loss, slope, level):
    logps = f32([[logp]]).requires_grad_()
    old_logps = f32([[logp - math.log(ratio)]])
    out = reference.policy_loss(
        logps, old_logps, f32([[advantage]]), surrogate=name, importance_sampling_level=level, **options
    )
    assert_golden(out.loss.detach(), torch.tensor(loss))
    assert_golden(torch.autograd.grad(out.loss, logps)[0], f32([[slope]]))


@pytest.mark.parametrize(
    ("d", "advantages", "loss", "slopes"),
    [
        # exp of the mean of (0.6 clipped to 0.4, -1.0): exp(-0.3) = 0.7408182
        ((0.6, -1.0), (2.0, 2.0), -1.4816364, (0.0, -0.7408182)),
        # (0.6, -1.0 clipped to -0.4): exp(0.1) = 1.1051709
        ((0.6, -1.0), (-2.0, -2.0), 2.2103418, (1.1051709, 0.0)),
        # A token without advantage has no share: exp(mean of (0, -1)) = 0.6065307; loss -(0 + 2) r / 2, slope -2 r / 4
        ((0.6, -1.0), (0.0, 2.0), -0.6065307, (0.0, -0.3032653)),
    ],
)
def test_gmpo_golden(d, advantages, loss, slopes):
    logps = f32([[*d, 99]]).requires_grad_()
    out = reference.policy_loss(
        logps,
        torch.zeros(1, 3),
        f32([[*advantages, 99]]),
        bools([[1, 1, 0]]),
        surrogate="gmpo",
        importance_sampling_level="sequence",
    )
    assert_golden(out.loss.detach(), torch.tensor(loss))
    assert_golden(torch.autograd.grad(out.loss, logps)[0], f32([[*slopes, 0]]))


def test_sequence_token_moves_its_own_token_alone():
    # mean of (ln 4, 0): ratio 2, which A = -1 does not clip. Losses (2, 2); only the first is asked for.
    logps = f32([[math.log(4), 0]]).requires_grad_()
    options = {"reduction": "none", "importance_sampling_level": "sequence-token"}
    loss = reference.policy_loss(logps, torch.zeros(1, 2), f32([[-1, -1]]), **options).loss
    assert_golden(loss.detach(), f32([[2, 2]]))
    assert_golden(torch.autograd.grad(loss[0, 0], logps)[0], f32([[2, 0]]))


# r = exp(0.5) = 1.6487213 and A = -1 (not clipped). d to the reference is ln 2: k1 0.6931472, k2 0.2402265,
# k3 1/2 - 1 + ln 2 = 0.1931472 with the slope 1 - 1/2.
@pytest.mark.parametrize(
    ("options", "loss", "slope", "kl"),
    [
        ({}, 1.6680360, 1.6987213, 0.1931472),  # r + 0.1 k3; r + 0.1 * 0.5
        ({"kl_estimator": "k1"}, 1.7180360, 1.7487213, 0.6931472),
        ({"kl_estimator": "k2"}, 1.6727439, 1.7180360, 0.2402265),
        ({"kl_gradient": "k2"}, 1.6680360, 1.7180360, 0.1931472),
        ({"kl_gradient": "none"}, 1.6680360, 1.6487213, 0.1931472),
        ({"kl_clamp": 0.1}, 1.6587213, 1.6487213, 0.1),
        # r + 0.1 r k3 = 1.6487213 * 1.01931472; r + 0.1 (r k3 + r / 2) = 1.6487213 * (1.01931472 + 0.05)
        ({"kl_bias_correction": True}, 1.6805659, 1.7630020, 0.1931472),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence-token"])
def test_kl_in_the_loss_golden(options, loss, slope, kl, level):
    logps = f32([[-1]]).requires_grad_()
    out = reference.policy_loss(
        logps,
        f32([[-1.5]]),
        f32([[-1]]),
        importance_sampling_level=level,
        ref_logps=f32([[-1 - math.log(2)]]),
        beta=0.1,
        **options,
    )
    assert_golden(out.loss.detach(), torch.tensor(loss))
    assert_golden(torch.autograd.grad(out.loss, logps)[0], f32([[slope]]))
    assert_golden(out.stats.kl, torch.tensor(kl).double())


def test_bias_corrected_kl_of_a_sequence_moves_every_token_of_it():
    # D = (ln 4, 0), so r = 2; A = 0 leaves the KL alone. k1 = (1, 3) to the reference: losses r k = (2, 6).
    # d(sum) / d(logp_t) = r for its own k1, and for the ratio r (1 + 3) / 2 = 4.
    logps = f32([[math.log(4), 0]]).requires_grad_()
    loss = reference.policy_loss(
        logps,
        torch.zeros(1, 2),
        torch.zeros(1, 2),
        importance_sampling_level="sequence",
        ref_logps=logps.detach() - f32([[1, 3]]),
        beta=1.0,
        kl_estimator="k1",
        kl_bias_correction=True,
        reduction="none",
    ).loss
    assert_golden(loss.detach(), f32([[2, 6]]))
    assert_golden(torch.autograd.grad(loss.sum(), logps)[0], f32([[6, 6]]))


def test_weights_and_entropy_golden():
    # on policy, A = (1, 2), weights (3, 0.5): surrogates (-3, -1), entropies (5, 7) at 0.1: (-3.5, -1.7), mean -2.6
    entropy = f32([[5, 7, 99]]).requires_grad_()
    logps = f32([[-1, -2, 99]]).requires_grad_()
    out = reference.policy_loss(
        logps,
        None,
        f32([[1, 2, 99]]),
        bools([[1, 1, 0]]),
        weights=f32([[3, 0.5, math.nan]]),
        entropy=entropy,
        entropy_coef=0.1,
    )
    assert_golden(out.loss.detach(), torch.tensor(-2.6))
    assert_golden(torch.autograd.grad(out.loss, logps, retain_graph=True)[0], f32([[-1.5, -0.5, 0]]))
    assert_golden(torch.autograd.grad(out.loss, entropy)[0], f32([[-0.05, -0.05, 0]]))
