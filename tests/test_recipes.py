"""Each named algorithm, held to numbers worked out by hand from the equation of its paper.

One small batch serves all: the arithmetic below is on Python floats, token by token, and calls nothing of the package.
Where an equation clips, what is left of the ratio is written out.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

import rpp_kernels as rpp
from rpp_kernels.ops.running_mean import RunningMean
from rpp_kernels.recipes import ALGORITHMS, DIALECTS, EXTRAS, Recipe, recipe

Tokens = list[list[float]]  # of each sequence, the valid tokens alone: 4, 2, 3 and 1 of them

# ---------------------------------------------------------------- the batch: two prompts, two completions of each

# A full row; a row padded on both sides; one with a hole; one of a single token. N = 10 tokens.
PLACES = [(0, 1, 2, 3), (1, 2), (0, 2, 3), (0,)]
SPANS = [4, 3, 4, 1]  # of each row, the part that is packed: masked tokens at a start and in the middle stay

SCORES = [1.0, -1.0, 4.0, 0.0]  # means of the prompts 0 and 2, deviations +-1 and +-2
TIED = [1.0, -1.0, 2.0, 2.0]  # nothing to learn from the second prompt
FAR = [1.0, -1.0, 12.0, 0.0]  # beyond a clip of 10

LOGPS: Tokens = [[-0.5, -1.0, -1.5, -2.0], [-0.25, -0.75], [-1.25, -0.1, -0.4], [-3.0]]  # sums -5, -1, -1.75, -3
RATIOS: Tokens = [[1.0, 1.25, 2.0, 0.75], [0.5, 1.5], [1.25, 0.5, 1.0], [6.0]]  # pi / pi_old

# What is left of those ratios by min(r A, clip(r, 0.8, 1.2) A) where A is > 0, < 0, > 0, < 0.
CLIPPED: Tokens = [[1.0, 1.2, 1.2, 0.75], [0.8, 1.5], [1.2, 0.5, 1.0], [6.0]]

# log pi_old / pi_ref, its sums .2, .3, .4, -.6, and the sums from each token to the end.
KL: Tokens = [[0.1, -0.2, 0.3, 0.0], [-0.1, 0.4], [0.2, -0.3, 0.5], [-0.6]]
KL_TO_GO: Tokens = [[0.2, 0.1, 0.3, 0.0], [0.3, 0.4], [0.4, 0.2, 0.5], [-0.6]]

# log pi / pi_ref of losses with a reference, in units of log 2: pi_ref / pi is then 1/2, 2, 1, 1/4 and so on.
L = log(2)
LOG_RATIO: Tokens = [[L, -L, 0.0, 2 * L], [0.0, L], [-L, L, 0.0], [-2 * L]]  # sums 2 L, L, 0, -2 L
K2: Tokens = [[L**2 / 2, L**2 / 2, 0.0, 2 * L**2], [0.0, L**2 / 2], [L**2 / 2, L**2 / 2, 0.0], [2 * L**2]]
K3: Tokens = [
    [0.5 - 1 + L, 2 - 1 - L, 0.0, 0.25 - 1 + 2 * L],  # pi_ref / pi - 1 + log pi / pi_ref
    [0.0, 0.5 - 1 + L],
    [2 - 1 - L, 0.5 - 1 + L, 0.0],
    [4 - 1 - 2 * L],
]

VALUES: Tokens = [[0.5, 0.0, -0.5, 0.8], [-1.0, 0.25], [0.5, 1.0, 2.0], [-0.5]]
GREEDY = [0.5, 0.5, 1.0, 1.0]
SEEN = (1.0, 4)  # of the scores before: their sum and their number
ENTROPY: Tokens = [[0.1, 1.0, 0.3, 0.4], [0.5, 0.6], [0.7, 0.8, 0.9], [0.2]]  # sum 5.5
# pi_old / pi_sampler, just inside and just outside of every bound. Products 1.96, 2.04, 0.408 and 4.9.
SAMPLED: Tokens = [[1.0, 2.5, 0.49, 1.6], [5.1, 0.4], [1.0, 0.8, 0.51], [4.9]]
NEARLY: Tokens = [[1.0009] * 4, [1.0012] * 2, [0.9991] * 3, [0.9988]]  # the same, of nearly equal policies

# Group-normalised: a deviation of 1 from a std of sqrt(1 + 1), one of 2 from a std of sqrt(4 + 4), eps = 1e-6.
A1 = 1 / (sqrt(2) + 1e-6)
A2 = 2 / (sqrt(8) + 1e-6)
MAX_COMPLETION_LENGTH = 8


def each(of_sequence: list[float]) -> Tokens:
    return [[x] * len(places) for x, places in zip(of_sequence, PLACES, strict=True)]


def times(*factors: Tokens) -> Tokens:
    return [[math.prod(xs) for xs in zip(*rows, strict=True)] for rows in zip(*factors, strict=True)]


def plus(*terms: Tokens) -> Tokens:
    return [[sum(xs) for xs in zip(*rows, strict=True)] for rows in zip(*terms, strict=True)]


def scaled(c: float, x: Tokens) -> Tokens:
    return [[c * e for e in row] for row in x]


def total(x: Tokens) -> float:
    return sum(map(sum, x))


def token_mean(x: Tokens) -> float:
    return total(x) / 10


def mean_of_means(x: Tokens) -> float:
    return (sum(x[0]) / 4 + sum(x[1]) / 2 + sum(x[2]) / 3 + sum(x[3]) / 1) / 4


def whitened(x: Tokens, eps: float = 0.0) -> Tokens:
    """Over the 10 tokens, by a biased std + eps. (A floor of the variance is far off.)"""
    mean = total(x) / 10
    std = sqrt(sum((e - mean) ** 2 for row in x for e in row) / 10) + eps
    return [[(e - mean) / std for e in row] for row in x]


# ---------------------------------------------------------------- what each algorithm makes of it


@dataclass
class Golden:
    name: str
    advantages: Tokens
    loss: float
    gradient: dict[tuple[int, int], float] = field(default_factory=dict)  # by sequence and number of its valid token
    extras: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    scores: list[float] = field(default_factory=lambda: SCORES)
    kept: tuple[int, ...] = (0, 1, 2, 3)
    returns: Tokens | None = None
    sampled: Tokens = field(default_factory=lambda: SAMPLED)
    max_completion_length: int = MAX_COMPLETION_LENGTH

    def __str__(self) -> str:
        return "+".join((self.name, *self.extras))


GOLDEN: list[Golden] = []


def golden(*args: Any, **more: Any) -> None:
    GOLDEN.append(Golden(*args, **more))


# REINFORCE: R = score - 0.03 KL(y), less 1/4, the mean of all before. Summed over tokens, a mean over 4 sequences.
golden(
    "reinforce",
    each([1 - 0.03 * 0.2 - 0.25, -1 - 0.03 * 0.3 - 0.25, 4 - 0.03 * 0.4 - 0.25, 0 + 0.03 * 0.6 - 0.25]),
    -(0.744 * -5 - 1.259 * -1 + 3.738 * -1.75 - 0.232 * -3) / 4,
    {(0, 0): -0.744 / 4, (1, 1): 1.259 / 4, (3, 0): 0.232 / 4},
)

# RLOO: of two, the baseline is the other one. R = .994, -1.009, 3.988, .018.
golden(
    "rloo",
    each([0.994 + 1.009, -1.009 - 0.994, 3.988 - 0.018, 0.018 - 3.988]),
    -(2.003 * -5 - 2.003 * -1 + 3.97 * -1.75 - 3.97 * -3) / 4,
    {(0, 3): -2.003 / 4, (2, 1): -3.97 / 4},
)

# Vanilla policy gradient: what is left of the episode at t, score - 0.03 KL from t on, less the critic's value there.
_to_go: Tokens = [
    [1 - 0.03 * 0.2, 1 - 0.03 * 0.1, 1 - 0.03 * 0.3, 1.0],
    [-1 - 0.03 * 0.3, -1 - 0.03 * 0.4],
    [4 - 0.03 * 0.4, 4 - 0.03 * 0.2, 4 - 0.03 * 0.5],
    [0 + 0.03 * 0.6],
]
_advantages: Tokens = [
    [0.994 - 0.5, 0.997 - 0.0, 0.991 + 0.5, 1.0 - 0.8],
    [-1.009 + 1.0, -1.012 - 0.25],
    [3.988 - 0.5, 3.994 - 1.0, 3.985 - 2.0],
    [0.018 + 0.5],
]
golden(
    "vanilla_pg",
    _advantages,
    -(
        (0.494 * -0.5 + 0.997 * -1.0 + 1.491 * -1.5 + 0.2 * -2.0)
        + (-0.009 * -0.25 - 1.262 * -0.75)
        + (3.488 * -1.25 + 2.994 * -0.1 + 1.985 * -0.4)
        + 0.518 * -3.0
    )
    / 4,
    {(0, 2): -1.491 / 4, (3, 0): -0.518 / 4},
    returns=_to_go,
)

# ReMax: the score less that of the greedy completion (1 - .5, -1 - .5, 4 - 1, 0 - 1), and the KL from t on.
golden(
    "remax",
    [
        [0.5 - 0.03 * 0.2, 0.5 - 0.03 * 0.1, 0.5 - 0.03 * 0.3, 0.5],
        [-1.5 - 0.03 * 0.3, -1.5 - 0.03 * 0.4],
        [3 - 0.03 * 0.4, 3 - 0.03 * 0.2, 3 - 0.03 * 0.5],
        [-1 + 0.03 * 0.6],
    ],
    -(
        (0.494 * -0.5 + 0.497 * -1.0 + 0.491 * -1.5 + 0.5 * -2.0)
        + (-1.509 * -0.25 - 1.512 * -0.75)
        + (2.988 * -1.25 + 2.994 * -0.1 + 2.985 * -0.4)
        - 0.982 * -3.0
    )
    / 4,
    {(0, 1): -0.497 / 4, (2, 2): -2.985 / 4},
)

# RAFT: cross-entropy of the best of each prompt, the first where two are; these have 4 + 3 tokens.
golden(
    "raft",
    each([1, 1, 1, 1]),
    -(-5 - 1.75) / 7,
    {(0, 0): -1 / 7, (1, 0): 0.0, (2, 2): -1 / 7, (3, 0): 0.0},
    scores=TIED,
    kept=(0, 2),
)

# PPO: rewards -0.01 KL_t, and the score at the end; delta_t = reward + V_{t+1} - V_t; A_t = delta_t + 0.95 A_{t+1}.
_a03 = (1 - 0.01 * 0.0) + 0 - 0.8  # 0.2
_a02 = (-0.01 * 0.3) + 0.8 + 0.5 + 0.95 * _a03  # 1.487
_a01 = (0.01 * 0.2) - 0.5 - 0.0 + 0.95 * _a02  # 0.91465
_a00 = (-0.01 * 0.1) + 0.0 - 0.5 + 0.95 * _a01  # 0.3679175
_a11 = (-1 - 0.01 * 0.4) + 0 - 0.25  # -1.254
_a10 = (0.01 * 0.1) + 0.25 + 1.0 + 0.95 * _a11  # 0.0597
_a22 = (4 - 0.01 * 0.5) + 0 - 2.0  # 1.995
_a21 = (0.01 * 0.3) + 2.0 - 1.0 + 0.95 * _a22  # 2.89825
_a20 = (-0.01 * 0.2) + 1.0 - 0.5 + 0.95 * _a21  # 3.2513375
_a30 = (0 + 0.01 * 0.6) + 0 + 0.5  # 0.506
_gae: Tokens = [[_a00, _a01, _a02, _a03], [_a10, _a11], [_a20, _a21, _a22], [_a30]]
_ppo = whitened(_gae)  # their mean is 1.0425855: signs --+-, --, +++, -
golden(
    "ppo",
    _ppo,
    -token_mean(times([[1.0, 1.25, 1.2, 0.8], [0.8, 1.5], [1.2, 0.5, 1.0], [6.0]], _ppo)),
    {(0, 1): -1.25 * _ppo[0][1] / 10, (0, 2): 0.0, (0, 3): 0.0, (2, 1): -0.5 * _ppo[2][1] / 10},
    returns=[
        [_a00 + 0.5, _a01 + 0.0, _a02 - 0.5, _a03 + 0.8],
        [_a10 - 1.0, _a11 + 0.25],
        [_a20 + 0.5, _a21 + 1.0, _a22 + 2.0],
        [_a30 - 0.5],
    ],
)

# REINFORCE++: the clipped score less 0.01 KL from t on, whitened over tokens. Their mean is about
# (4 * 1 + 2 * -1 + 3 * 10 + 0) / 10 = 3.2, so that only the third sequence is better than the batch.
_rpp = whitened(plus(each([1, -1, 10, 0]), scaled(-0.01, KL_TO_GO)))
_rpp_clipped: Tokens = [[1.0, 1.25, 2.0, 0.8], [0.8, 1.5], [1.2, 0.5, 1.0], [6.0]]
golden(
    "reinforce_pp",
    _rpp,
    -token_mean(times(_rpp_clipped, _rpp)),
    {(0, 2): -2.0 * _rpp[0][2] / 10, (0, 3): 0.0, (2, 0): 0.0, (2, 1): -0.5 * _rpp[2][1] / 10},
    scores=FAR,
)

# Its v9 prints no clip, divides by std + eps and takes a mean over each sequence first.
_v9 = whitened(plus(each([1, -1, 12, 0]), scaled(-0.01, KL_TO_GO)), eps=1e-8)
golden(
    "reinforce_pp_v9",
    _v9,
    -mean_of_means(times(_rpp_clipped, _v9)),
    {(0, 2): -2.0 * _v9[0][2] / 4 / 4, (2, 1): -0.5 * _v9[2][1] / 3 / 4},
    scores=FAR,
)

# With a baseline: deviations 1, -1, 2, -2; over tokens their mean is (4 - 2 + 6 - 2) / 10 = 0.6 and their variance
# (4 * 0.4^2 + 2 * 1.6^2 + 3 * 1.4^2 + 2.6^2) / 10 = 1.84.
_std = sqrt(1.84) + 1e-8
_rppb = each([0.4 / _std, -1.6 / _std, 1.4 / _std, -2.6 / _std])
golden(
    "reinforce_pp_baseline",
    _rppb,
    -mean_of_means(times(CLIPPED, _rppb)) + 0.01 * mean_of_means(K2),
    {
        (0, 0): (-1.0 * 0.4 / _std + 0.01 * L) / 4 / 4,
        (0, 1): 0.01 * -L / 4 / 4,  # the surrogate is clipped
        (3, 0): (6.0 * 2.6 / _std + 0.01 * -2 * L) / 4,
    },
)

# GRPO, summed up to each sequence: CLIPPED has sums 4.15, 2.3, 2.7 and 6.
_grpo_surrogate = -(A1 * 4.15 / 4 - A1 * 2.3 / 2 + A2 * 2.7 / 3 - A2 * 6.0) / 4
_grpo = each([A1, -A1, A2, -A2])
golden(
    "grpo",
    _grpo,
    _grpo_surrogate + 0.04 * mean_of_means(K3),
    {
        (0, 0): (-A1 + 0.04 * (1 - 0.5)) / 4 / 4,
        (0, 1): 0.04 * (1 - 2) / 4 / 4,  # the surrogate is clipped
        (1, 1): (1.5 * A1 + 0.04 * (1 - 0.5)) / 2 / 4,
        (3, 0): (6.0 * A2 + 0.04 * (1 - 4)) / 4,
    },
)

# Dr. GRPO: deviations as they are, and a constant divisor: 4 sequences of at most 8 tokens.
golden(
    "dr_grpo",
    each([1, -1, 2, -2]),
    -(1 * 4.15 - 1 * 2.3 + 2 * 2.7 - 2 * 6.0) / (4 * 8),
    {(0, 0): -1 / 32, (0, 1): 0.0, (1, 0): 0.0, (2, 1): -2 * 0.5 / 32, (3, 0): 2 * 6.0 / 32},
)

# DAPO: of at most 4 tokens the last one costs: the first sequence has all 4 and scores 1 - 1 = 0 against -1, which is
# +-0.5 from a std of sqrt(0.25 + 0.25). The second prompt is left out; N = 6. The upper clip is 1.28.
_dapo = 0.5 / (sqrt(0.5) + 1e-6)
golden(
    "dapo",
    each([_dapo, -_dapo, 0, 0]),
    -(_dapo * (1.0 + 1.25 + 1.28 + 0.75) - _dapo * (0.8 + 1.5)) / 6,
    {(0, 1): -1.25 * _dapo / 6, (0, 2): 0.0, (1, 1): 1.5 * _dapo / 6, (2, 0): 0.0, (3, 0): 0.0},
    scores=TIED,
    kept=(0, 1),
    max_completion_length=4,
)

# GSPO: geometric means 1.875^(1/4) > 1.0004, 0.75^(1/2) < 0.9997, 0.625^(1/3) and 6.
_s2 = 0.625 ** (1 / 3)
_gspo_loss = -(A1 * (1 + 4e-4) - A1 * (1 - 3e-4) + A2 * _s2 - A2 * 6.0) / 4
_gspo_gradient = {
    (0, 0): 0.0,
    (1, 1): 0.0,
    (2, 0): -A2 * _s2 / 3 / 4,
    (2, 2): -A2 * _s2 / 3 / 4,
    (3, 0): A2 * 6.0 / 4,
}
golden("gspo", _grpo, _gspo_loss, _gspo_gradient)
golden("gspo_token", _grpo, _gspo_loss, _gspo_gradient)

# CISPO: a constant weight, at most 5, on each log-prob.
golden(
    "cispo",
    _grpo,
    -(
        A1 * (1.0 * -0.5 + 1.25 * -1.0 + 2.0 * -1.5 + 0.75 * -2.0)
        - A1 * (0.5 * -0.25 + 1.5 * -0.75)
        + A2 * (1.25 * -1.25 + 0.5 * -0.1 + 1.0 * -0.4)
        - A2 * 5.0 * -3.0
    )
    / 10,
    {(0, 2): -A1 * 2.0 / 10, (1, 0): A1 * 0.5 / 10, (3, 0): A2 * 5.0 / 10},
)

# GMPO: log-ratios are clipped to +-0.4 where that is the lesser gain: log 2 down to 0.4 for A > 0, log 0.5 up to -0.4
# for A < 0. log 6 and log 1.5 for A < 0 and log 0.5 for A > 0 stay.
_g0 = exp((0 + log(1.25) + 0.4 + log(0.75)) / 4)
_g1 = exp((-0.4 + log(1.5)) / 2)
_g2 = exp((log(1.25) + log(0.5) + 0) / 3)
golden(
    "gmpo",
    _grpo,
    -(A1 * _g0 - A1 * _g1 + A2 * _g2 - A2 * 6.0) / 4,
    {
        (0, 0): -A1 * _g0 / 4 / 4,
        (0, 2): 0.0,
        (1, 0): 0.0,
        (1, 1): A1 * _g1 / 2 / 4,
        (2, 1): -A2 * _g2 / 3 / 4,
        (3, 0): A2 * 6.0 / 4,
    },
)


# SAPO: (4 / tau) sigmoid(tau (r - 1)), whose derivative in log r is 4 s (1 - s) r. tau is 1 above 0, 1.05 below.
def _logistic(x: float) -> float:
    return 1 / (1 + exp(-x))


_s = _logistic(1.05 * (1.5 - 1))
golden(
    "sapo",
    _grpo,
    -(
        A1 * 4.0 * (0.5 + _logistic(0.25) + _logistic(1.0) + _logistic(-0.25)) / 4
        - A1 * (4 / 1.05) * (_logistic(1.05 * -0.5) + _logistic(1.05 * 0.5)) / 2
        + A2 * 4.0 * (_logistic(0.25) + _logistic(-0.5) + 0.5) / 3
        - A2 * (4 / 1.05) * _logistic(1.05 * 5.0)
    )
    / 4,
    {
        (0, 0): -A1 * 4 * 0.5 * 0.5 * 1.0 / 4 / 4,
        (0, 2): -A1 * 4 * _logistic(1.0) * (1 - _logistic(1.0)) * 2.0 / 4 / 4,
        (1, 1): A1 * 4 * _s * (1 - _s) * 1.5 / 2 / 4,
    },
)

# OPO: baselines weighted by length, (4 * 1 + 2 * -1) / 6 = 1/3 and (3 * 4 + 1 * 0) / 4 = 3; sums over 4 sequences.
golden(
    "opo",
    each([1 - 1 / 3, -1 - 1 / 3, 4 - 3, 0 - 3]),
    -(2 / 3 * -5 - 4 / 3 * -1 + 1 * -1.75 - 3 * -3) / 4,
    {(0, 0): -2 / 3 / 4, (1, 0): 4 / 3 / 4, (3, 0): 3 / 4},
)

# GPG: 2 of 4 sequences have a gradient, so alpha = 2. The others count as tokens: N = 10.
golden(
    "gpg",
    each([2 * 1, 2 * -1, 0, 0]),
    -(2 * -5 - 2 * -1) / 10,
    {(0, 0): -2 / 10, (1, 1): 2 / 10, (2, 0): 0.0},
    scores=TIED,
)

# Clip-Cov and KL-Cov: mean of log pi -1.075, mean of A about (4 - 2 + 3 - 1) / 10 = 0.4 of A1, A2 = .7071. The last
# token has (-.7071 - .2828)(-3 + 1.075) = 1.906, all others at most (.7071 - .2828)(-.1 + 1.075) = 0.414.
golden(
    "clip_cov",
    _grpo,
    -(A1 * 4.15 - A1 * 2.3 + A2 * 2.7) / 10,
    {(0, 0): -A1 / 10, (0, 1): 0.0, (3, 0): 0.0},
)
golden(
    "kl_cov",
    _grpo,
    (-(A1 * 5.0 - A1 * 2.0 + A2 * 2.75 - A2 * 6.0) + log(6)) / 10,  # sums of RATIOS: nothing is clipped
    {(0, 2): -A1 * 2.0 / 10, (1, 0): A1 * 0.5 / 10, (3, 0): (A2 * 6.0 + 1) / 10},
)

# ---------------------------------------------------------------- what each extra adds to one of them

# Scores have the mean 1 and the variance (0 + 4 + 9 + 1) / 4: they become 0, -2, 3 and -1 over sqrt(3.5).
_z = sqrt(3.5)
_rz0 = 0 - 0.006 - (-2 / _z - 0.009)
_rz2 = 3 / _z - 0.012 - (-1 / _z + 0.018)
golden(
    "rloo",
    each([_rz0, -_rz0, _rz2, -_rz2]),
    -(_rz0 * (-5 + 1) + _rz2 * (-1.75 + 3)) / 4,
    extras=("reward_zscore",),
)

# Of at most 4 tokens: the first sequence scores 0 against -1, as for DAPO above.
golden(
    "dr_grpo",
    each([0.5, -0.5, 2, -2]),
    -(0.5 * 4.15 - 0.5 * 2.3 + 2 * 2.7 - 2 * 6.0) / (4 * 4),
    extras=("overlong",),
    max_completion_length=4,
)

golden(
    "grpo",
    each([A1, -A1, 0, 0]),
    (-(A1 * 4.15 / 4 - A1 * 2.3 / 2) + 0.04 * (sum(K3[0]) / 4 + sum(K3[1]) / 2)) / 2,
    {(0, 0): (-A1 + 0.04 * 0.5) / 4 / 2, (2, 0): 0.0},
    extras=("dynamic_sampling",),
    scores=TIED,
    kept=(0, 1),
)

# The last token, A = -2 and r = 6, loses 2 c and has no gradient.
for _extra, _c in (("dual_clip", 3.0), ("two_sided", 4.0)):
    golden(
        "dr_grpo",
        each([1, -1, 2, -2]),
        -(1 * 4.15 - 1 * 2.3 + 2 * 2.7 - 2 * _c) / (4 * 8),
        {(1, 1): 1.5 / 32, (3, 0): 0.0},
        extras=(_extra,),
    )

golden(
    "grpo",
    _grpo,
    _grpo_surrogate + 0.04 * mean_of_means(K2),
    {(0, 0): (-A1 + 0.04 * L) / 4 / 4, (0, 1): 0.04 * -L / 4 / 4, (3, 0): (6.0 * A2 + 0.04 * -2 * L) / 4},
    extras=("k2_loss",),
)

# r k3, whose gradient is r (k3 + 1 - pi_ref / pi) = r log pi / pi_ref.
golden(
    "grpo",
    _grpo,
    _grpo_surrogate + 0.04 * mean_of_means(times(RATIOS, K3)),
    {
        (0, 1): 0.04 * 1.25 * -L / 4 / 4,
        (2, 1): (-0.5 * A2 + 0.04 * 0.5 * L) / 3 / 4,
        (3, 0): (6.0 * A2 + 0.04 * 6.0 * -2 * L) / 4,
    },
    extras=("unbiased_kl",),
)

golden(
    "gpg",
    each([2 * 1, 2 * -1, 0, 0]),
    0.8 - 0.001 * 5.5 / 10,
    {(0, 0): -2 / 10},
    extras=("entropy_bonus",),
    scores=TIED,
)

# The entropies .1, .2 ... 1.0 have their quantile 0.8 at .8 + .2 * .1 = .82: left are those of .9 and of 1.0. The KL
# of the others stays.
golden(
    "grpo",
    _grpo,
    -(A1 * 1.2 / 4 + A2 * 1.0 / 3) / 4 + 0.04 * mean_of_means(K3),
    {(0, 0): 0.04 * 0.5 / 4 / 4, (2, 2): -A2 / 3 / 4, (3, 0): 0.04 * (1 - 4) / 4},
    extras=("top_entropy",),
)

# Weights multiply the surrogate and not the KL. By token up to 2; by sequence 1.96, 2.04, 0.408 and 4.9, up to 2.
golden(
    "grpo",
    _grpo,
    -(
        A1 * (1.0 * 1.0 + 2.0 * 1.2 + 0.49 * 1.2 + 1.6 * 0.75) / 4
        - A1 * (2.0 * 0.8 + 0.4 * 1.5) / 2
        + A2 * (1.0 * 1.2 + 0.8 * 0.5 + 0.51 * 1.0) / 3
        - A2 * 2.0 * 6.0
    )
    / 4
    + 0.04 * mean_of_means(K3),
    {(0, 3): (-A1 * 1.6 * 0.75 + 0.04 * (1 - 0.25)) / 4 / 4, (3, 0): (2.0 * 6.0 * A2 + 0.04 * (1 - 4)) / 4},
    extras=("tis",),
)
golden(
    "grpo",
    _grpo,
    -(1.96 * A1 * 4.15 / 4 - 2.0 * A1 * 2.3 / 2 + 0.408 * A2 * 2.7 / 3 - 2.0 * A2 * 6.0) / 4 + 0.04 * mean_of_means(K3),
    {(0, 0): (-1.96 * A1 + 0.04 * 0.5) / 4 / 4},
    extras=("sequence_tis",),
)
# IcePop: 0.49, 0.4 and 5.1 are outside of [0.5, 5]; all others stay as they are, 2.5 and 4.9 too.
golden(
    "grpo",
    _grpo,
    -(
        A1 * (1.0 * 1.0 + 2.5 * 1.2 + 0.0 * 1.2 + 1.6 * 0.75) / 4
        - A1 * (0.0 * 0.8 + 0.0 * 1.5) / 2
        + A2 * (1.0 * 1.2 + 0.8 * 0.5 + 0.51 * 1.0) / 3
        - A2 * 4.9 * 6.0
    )
    / 4
    + 0.04 * mean_of_means(K3),
    {(1, 1): 0.04 * 0.5 / 2 / 4, (3, 0): (4.9 * 6.0 * A2 + 0.04 * (1 - 4)) / 4},
    extras=("icepop",),
)
# Sequences of 2.04 and 4.9 are above 2.
golden(
    "grpo",
    _grpo,
    -(1.96 * A1 * 4.15 / 4 + 0.408 * A2 * 2.7 / 3) / 4 + 0.04 * mean_of_means(K3),
    {(1, 1): 0.04 * 0.5 / 2 / 4, (2, 1): (-0.408 * 0.5 * A2 + 0.04 * 0.5) / 3 / 4},
    extras=("sequence_mask",),
)
# Geometric means 1.0009, 1.0012, 0.9991 and 0.9988: the second and the fourth are out; nothing else is weighted.
golden(
    "grpo",
    _grpo,
    -(A1 * 4.15 / 4 + A2 * 2.7 / 3) / 4 + 0.04 * mean_of_means(K3),
    {(0, 0): (-A1 + 0.04 * 0.5) / 4 / 4, (3, 0): 0.04 * (1 - 4) / 4},
    extras=("geometric_mask",),
    sampled=NEARLY,
)

# The preferences: the first of each two is the better one. Loss, and its gradient in the tokens of each sequence.
_p0, _p1 = _logistic(-0.1 * L), _logistic(-0.1 * 2 * L)  # h = 2 L - L and 0 + 2 L
PREFERENCES = {
    # -log sigmoid(0.1 h) = log(1 + 2^-0.1) and log(1 + 2^-0.2)
    "dpo": (
        (log(1 + 2**-0.1) + log(1 + 2**-0.2)) / 2,
        [-0.1 * _p0 / 2, 0.1 * _p0 / 2, -0.1 * _p1 / 2, 0.1 * _p1 / 2],
        2,
        SCORES,
    ),
    # 1 / (2 * 0.1) = 5
    "ipo": (
        ((L - 5) ** 2 + (2 * L - 5) ** 2) / 2,
        [2 * (L - 5) / 2, -2 * (L - 5) / 2, 2 * (2 * L - 5) / 2, -2 * (2 * L - 5) / 2],
        2,
        SCORES,
    ),
    # R - R' is 2 and 4; a mean over the 4 sequences
    "copg": (
        -(2 * L - 0.03 * L**2 + 4 * 2 * L - 0.03 * (2 * L) ** 2) / 4,
        [-(2 - 0.06 * L) / 4, (2 - 0.06 * L) / 4, -(4 - 0.06 * 2 * L) / 4, (4 - 0.06 * 2 * L) / 4],
        2,
        SCORES,
    ),
    # All 6 pairs of scores 1, -1, 2, 2 and log-ratios 2 L, L, 0, -2 L, of which each sequence is in 3
    "copg of 4": (
        -(
            (2 * L - 0.03 * L**2)  # 1 and -1, 2 L and L
            + (-1 * 2 * L - 0.03 * (2 * L) ** 2)  # 1 and 2, 2 L and 0
            + (-1 * 4 * L - 0.03 * (4 * L) ** 2)  # 1 and 2, 2 L and -2 L
            + (-3 * L - 0.03 * L**2)  # -1 and 2, L and 0
            + (-3 * 3 * L - 0.03 * (3 * L) ** 2)  # -1 and 2, L and -2 L
            + (0 * 2 * L - 0.03 * (2 * L) ** 2)  # 2 and 2, 0 and -2 L
        )
        / 3
        / 4,
        [
            -((2 - 0.06 * L) + (-1 - 0.06 * 2 * L) + (-1 - 0.06 * 4 * L)) / 3 / 4,
            -((-2 + 0.06 * L) + (-3 - 0.06 * L) + (-3 - 0.06 * 3 * L)) / 3 / 4,
            -((1 + 0.06 * 2 * L) + (3 + 0.06 * L) + (0 - 0.06 * 2 * L)) / 3 / 4,
            -((1 + 0.06 * 4 * L) + (3 + 0.06 * 3 * L) + (0 + 0.06 * 2 * L)) / 3 / 4,
        ],
        4,
        TIED,
    ),
}

# ---------------------------------------------------------------- as tensors


@dataclass
class Batch:
    """The batch in float64, NaN wherever it is masked; padded, or packed with `cu_seqlens`."""

    layout: str
    device: str = "cpu"

    def of(self, tokens: Tokens, elsewhere: float = math.nan) -> Tensor:
        x = torch.full((4, 4), elsewhere, dtype=torch.float64, device=self.device)
        for i, (row, places) in enumerate(zip(tokens, PLACES, strict=True)):
            x[i, list(places)] = torch.tensor(row, dtype=torch.float64, device=self.device)
        return x if self.layout == "padded" else torch.cat([x[i, :span] for i, span in enumerate(SPANS)])

    def of_sequences(self, x: list[float]) -> Tensor:
        return torch.tensor(x, dtype=torch.float64, device=self.device)

    def expanded(self, advantages: Tensor) -> Tensor:
        """One for each sequence, as one for each token."""
        if advantages.dim() == 1 or advantages.shape[1] == 4:
            return advantages
        if self.layout == "padded":
            return advantages.expand(4, 4)
        return advantages[:, 0].repeat_interleave(torch.tensor(SPANS, device=self.device))

    def place(self, i: int, t: int) -> Any:
        return (i, PLACES[i][t]) if self.layout == "padded" else sum(SPANS[:i]) + PLACES[i][t]

    def mask(self, kept: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
        return self.of(each([float(i in kept) for i in range(4)]), 0.0).bool()

    @property
    def cu_seqlens(self) -> Tensor | None:
        starts = [0, 4, 7, 11, 12]
        return None if self.layout == "padded" else torch.tensor(starts, dtype=torch.int32, device=self.device)

    @property
    def logps(self) -> Tensor:
        return self.of(LOGPS).requires_grad_()

    @property
    def old_logps(self) -> Tensor:
        return self.of(LOGPS) - self.of(RATIOS).log()

    @property
    def ref_of_old(self) -> Tensor:
        return self.old_logps - self.of(KL)

    @property
    def ref_logps(self) -> Tensor:
        return self.of(LOGPS) - self.of(LOG_RATIO)

    def sampling_logps(self, sampled: Tokens = SAMPLED) -> Tensor:
        return self.old_logps - self.of(sampled).log()

    def everything(self, scores: list[float] = SCORES, max_completion_length: int = 8) -> dict[str, Any]:
        """The arguments of `Recipe.advantages`."""
        return {
            "scores": self.of_sequences(scores),
            "completion_mask": self.mask(),
            "old_logps": self.old_logps,
            "ref_logps": self.ref_of_old,
            "values": self.of(VALUES),
            "greedy_scores": self.of_sequences(GREEDY),
            "running_mean": RunningMean(*self.of_sequences(list(SEEN)).unbind()),
            "group_size": 2,
            "max_completion_length": max_completion_length,
            "cu_seqlens": self.cu_seqlens,
        }

    def everything_else(self, sampled: Tokens = SAMPLED, max_completion_length: int = 8) -> dict[str, Any]:
        """Those of `Recipe.loss`, but for log-probs, advantages and mask."""
        return {
            "ref_logps": self.ref_logps,
            "entropy": self.of(ENTROPY),
            "sampling_logps": self.sampling_logps(sampled),
            "max_completion_length": max_completion_length,
            "cu_seqlens": self.cu_seqlens,
        }


@pytest.fixture(params=["padded", "packed"])
def batch(request, device) -> Batch:
    return Batch(request.param, device)


@pytest.fixture(params=["padded", "packed"])
def cpu_batch(request) -> Batch:
    return Batch(request.param)


def assert_golden(actual: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64, device=actual.device)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=1e-14)


def loss_and_gradient(algorithm: Recipe, batch: Batch, advantages: Tensor, mask: Tensor, **more: Any):
    logps = batch.logps
    loss, _ = algorithm.loss(logps, batch.old_logps, advantages, mask, **batch.everything_else() | more)
    return loss, torch.autograd.grad(loss, logps)[0]


# ---------------------------------------------------------------- golden values


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_advantages_golden(case: Golden, batch: Batch):
    algorithm = recipe(case.name, *case.extras, **case.overrides)
    worth = algorithm.advantages(**batch.everything(case.scores, case.max_completion_length))
    mask = batch.mask(case.kept)
    assert torch.equal(worth.completion_mask, mask)
    assert_golden(batch.expanded(worth.advantages)[mask], batch.of(case.advantages)[mask])
    assert (worth.returns is None) == (case.returns is None)
    if case.returns is not None:
        assert_golden(worth.returns[mask], batch.of(case.returns)[mask])


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_loss_golden(case: Golden, batch: Batch):
    """Of the advantages by hand, so that a wrong one fails its own test alone."""
    algorithm, mask = recipe(case.name, *case.extras, **case.overrides), batch.mask(case.kept)
    more = batch.everything_else(case.sampled, case.max_completion_length)
    loss, gradient = loss_and_gradient(algorithm, batch, batch.of(case.advantages), mask, **more)
    assert_golden(loss, case.loss)
    for (i, t), expected in case.gradient.items():
        assert_golden(gradient[batch.place(i, t)], expected)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_advantages_and_loss_compose(case: Golden, batch: Batch):
    algorithm = recipe(case.name, *case.extras, **case.overrides)
    worth = algorithm.advantages(**batch.everything(case.scores, case.max_completion_length))
    more = batch.everything_else(case.sampled, case.max_completion_length)
    loss, _ = loss_and_gradient(algorithm, batch, worth.advantages, worth.completion_mask, **more)
    assert_golden(loss, case.loss)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_golden(name: str, batch: Batch):
    expected, gradients, group_size, scores = PREFERENCES[name]
    logps = batch.logps
    loss, _ = recipe(name.split()[0]).preference_loss(
        logps,
        batch.ref_logps,
        batch.mask(),
        scores=batch.of_sequences(scores),
        group_size=group_size,
        cu_seqlens=batch.cu_seqlens,
    )
    assert_golden(loss, expected)
    assert_golden(torch.autograd.grad(loss, logps)[0], batch.of(each(gradients), 0.0))


def test_every_algorithm_and_every_extra_has_a_golden_value():
    assert {case.name for case in GOLDEN} | {name.split()[0] for name in PREFERENCES} == set(ALGORITHMS)
    assert {extra for case in GOLDEN for extra in case.extras} == set(EXTRAS)


def test_entropy_bonus_is_differentiated_in_the_entropy(batch: Batch):
    entropy, mask = batch.of(ENTROPY).requires_grad_(), batch.mask()
    more = batch.everything_else() | {"entropy": entropy}
    advantages = batch.of(each([2.0, -2.0, 0.0, 0.0]))
    loss, _ = recipe("gpg", "entropy_bonus").loss(batch.logps, batch.old_logps, advantages, mask, **more)
    assert_golden(torch.autograd.grad(loss, entropy)[0], batch.of(each([-0.001 / 10] * 4), 0.0))


@pytest.mark.parametrize("name", ["dapo", "overlong"])
def test_the_penalty_on_length_begins_a_fifth_before_the_end(name: str, run, device):
    # Of at most 100 tokens the last 20 cost 1/20 each: lengths 80, 85, 90 and 100 lose 0, .25, .5 and 1.
    mask = torch.arange(100, device=device) < torch.tensor([80, 85, 90, 100], device=device)[:, None]
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64, device=device)
    algorithm = recipe("dapo", std="none") if name == "dapo" else recipe("dr_grpo", "overlong")
    worth = algorithm.advantages(scores, mask, group_size=2, max_completion_length=100)
    # 1 and -0.25, 0.5 and 0. The scores of the second prompt are equal without the penalty, so DAPO leaves it out.
    kept = 2 if name == "dapo" else 4
    assert_golden(worth.advantages[:kept, 0], [0.625, -0.625, 0.25, -0.25][:kept])
    assert torch.equal(worth.completion_mask[kept:], torch.zeros_like(mask[kept:]))


def test_lone_completions_have_no_group(run, device):
    scores, mask = torch.tensor([3.0, 1.0], device=device), torch.ones(2, 2, dtype=torch.bool, device=device)
    assert recipe("grpo").advantages(scores, mask, group_size=1).advantages.tolist() == [[0.0], [0.0]]
    kept = recipe("grpo", singleton="keep").advantages(scores, mask, group_size=1)
    assert kept.advantages.tolist() == [[3.0], [1.0]]


CONSTANTS = {  # those that no batch of 10 tokens can tell from others
    ("clip_cov",): {"token_fraction": 2e-4},
    ("kl_cov",): {"token_fraction": 2e-4},
    ("grpo", "top_entropy"): {"token_fraction": 0.2},
    ("reinforce_pp", "reward_zscore"): {"reward_clip": (-10.0, 10.0), "reward_scale": 1.0},
    ("reinforce_pp",): {"gamma": 1.0, "whiten_eps": 1e-8, "whiten_eps_mode": "floor", "kl_clamp": None},
    ("ppo",): {"whiten_eps": 1e-8, "whiten_eps_mode": "floor", "log_ratio_clamp": 20.0},
}


@pytest.mark.parametrize("names", CONSTANTS, ids="+".join)
def test_constants(names):
    algorithm = recipe(*names)
    assert {name: getattr(algorithm, name) for name in CONSTANTS[names]} == CONSTANTS[names]


# ---------------------------------------------------------------- identities


def test_reinforce_pp_is_its_steps(batch: Batch):
    given = batch.everything(FAR)
    worth = recipe("reinforce_pp").advantages(**given)
    packing = {"cu_seqlens": batch.cu_seqlens}
    kl = rpp.kl_penalty(given["old_logps"], given["ref_logps"], batch.mask())
    scores = rpp.normalize_rewards(given["scores"], zscore=False, clip=(-10.0, 10.0))
    rewards = rpp.token_rewards(scores, kl, batch.mask(), beta=0.01, **packing)
    steps = rpp.whiten(rpp.returns(rewards, batch.mask(), gamma=1.0, **packing), batch.mask())
    assert_golden(worth.advantages, steps)
    at_once = rpp.reinforce_pp_advantages(
        scores, given["old_logps"], given["ref_logps"], batch.mask(), beta=0.01, **packing
    )
    assert_golden(worth.advantages, at_once)


@pytest.mark.parametrize("group_size", [2, 4])
def test_rloo_and_copg_have_one_gradient_on_policy(group_size: int, batch: Batch):
    """[2406.19185 prop. 2]: of samples of pi itself."""
    given = batch.everything() | {"old_logps": batch.of(LOGPS), "ref_logps": batch.ref_logps, "group_size": group_size}
    worth = recipe("rloo", beta=0.06).advantages(**given)
    _, of_rloo = loss_and_gradient(recipe("rloo"), batch, worth.advantages, worth.completion_mask)
    logps = batch.logps
    loss, _ = recipe("copg").preference_loss(
        logps,
        batch.ref_logps,
        batch.mask(),
        scores=given["scores"],
        group_size=group_size,
        cu_seqlens=batch.cu_seqlens,
    )
    assert_golden(torch.autograd.grad(loss, logps)[0], of_rloo)


def test_gspo_token_is_gspo_where_advantages_are_of_sequences(batch: Batch):
    for extras in ((), ("tis",)):
        advantages = batch.of(each([1.0, -1.0, 2.0, -2.0]))
        both = [
            loss_and_gradient(
                recipe(name, *extras, epsilon_low=1.0, epsilon_high=10.0), batch, advantages, batch.mask()
            )
            for name in ("gspo", "gspo_token")
        ]
        assert_golden(both[0][0], both[1][0])
        same = torch.allclose(both[0][1], both[1][1], rtol=1e-12, atol=1e-14)
        assert same == (extras == ())  # a weight of its own for each token is an advantage of its own


def test_gspo_token_gives_each_token_its_own_advantage(batch: Batch):
    # The third sequence has the ratio 0.625^(1/3). Its tokens are worth 1, 2 and 6, on average 3.
    advantages = batch.of([[0.0] * 4, [0.0] * 2, [1.0, 2.0, 6.0], [0.0]])
    of_tokens = loss_and_gradient(recipe("gspo_token"), batch, advantages, batch.mask())[1]
    of_sequence = loss_and_gradient(recipe("gspo"), batch, advantages, batch.mask())[1]
    for t, worth in enumerate((1.0, 2.0, 6.0)):
        assert_golden(of_tokens[batch.place(2, t)], -worth * _s2 / 3 / 4)
        assert_golden(of_sequence[batch.place(2, t)], -3.0 * _s2 / 3 / 4)


@pytest.mark.parametrize("bound", [3.0, 4.0])
def test_a_two_sided_bound_is_a_dual_clip(bound: float, batch: Batch):
    """min(min(r, delta) A, clip(r) A) of 2505.07291, worked out by hand, against the dual clip of 1912.09729."""
    advantages = batch.of(each([1.0, -1.0, 2.0, -2.0]))
    algorithm = recipe("dr_grpo", dual_clip=bound)
    loss, gradient = loss_and_gradient(algorithm, batch, advantages, batch.mask())
    two_sided = [[min(1.0, 1.0), min(1.25, 1.2), min(2.0, 1.2), 0.75], [0.8, 1.5], [1.2, 0.5, 1.0], [min(6.0, bound)]]
    assert_golden(loss, -total(times(two_sided, each([1.0, -1.0, 2.0, -2.0]))) / 32)
    assert_golden(gradient[batch.place(3, 0)], 0.0)


def test_kl_in_the_score_loses_its_mean_over_the_group(batch: Batch):
    # KL sums .2 and .3, .4 and -.6: less their means .25 and -.1 these are -.05, .05, .5 and -.5.
    worth = recipe("dr_grpo", kl_place="score", beta=0.1).advantages(**batch.everything())
    expected = each([1 + 0.1 * 0.05, -1 - 0.1 * 0.05, 2 - 0.1 * 0.5, -2 + 0.1 * 0.5])
    assert_golden(batch.expanded(worth.advantages)[batch.mask()], batch.of(expected)[batch.mask()])


def test_a_running_mean_is_of_scores_with_their_penalties(batch: Batch):
    """[2402.14740 eq. 3]: the R of REINFORCE's baseline has the KL in it; DAPO's score its length."""
    worth = recipe("reinforce").advantages(**batch.everything())
    assert_golden(worth.scores, [1 - 0.03 * 0.2, -1 - 0.03 * 0.3, 4 - 0.03 * 0.4, 0 + 0.03 * 0.6])
    assert_golden(recipe("reinforce_pp").advantages(**batch.everything(FAR)).scores, [1.0, -1.0, 10.0, 0.0])
    assert_golden(recipe("dapo").advantages(**batch.everything(TIED, 4)).scores, [0.0, -1.0, 2.0, 2.0])


def test_kl_is_taken_off_once(batch: Batch):
    """Wherever it is: in the score each token pays for the whole sequence, in the reward for what follows, or alone."""
    off = {"score": each([0.2, 0.3, 0.4, -0.6]), "reward": KL_TO_GO, "token": KL}
    for place, kl in off.items():
        for time in {"score": ("sequence", "returns"), "reward": ("returns",), "token": ("sequence",)}[place]:
            worth = recipe("gpg", kl_place=place, time=time, beta=0.5, group_scale="none").advantages(
                **batch.everything()
            )
            expected = plus(each([1, -1, 2, -2]), scaled(-0.5, kl))
            if place == "score":  # and it is part of the baseline
                expected = plus(expected, each([0.5 * 0.25, 0.5 * 0.25, 0.5 * -0.1, 0.5 * -0.1]))
            assert_golden(batch.expanded(worth.advantages)[batch.mask()], batch.of(expected)[batch.mask()])


def test_kl_cov_wants_no_reference_policy(batch: Batch):
    more = batch.everything_else() | {"ref_logps": None}
    loss, _ = recipe("kl_cov").loss(batch.logps, batch.old_logps, batch.of(_grpo), batch.mask(), **more)
    assert_golden(loss, (-(A1 * 5.0 - A1 * 2.0 + A2 * 2.75 - A2 * 6.0) + log(6)) / 10)


def test_advantages_are_those_of_group_ids_in_any_order(batch: Batch):
    given = batch.everything() | {"group_size": None, "group_ids": torch.tensor([7, 3, 3, 7], device=batch.device)}
    worth = recipe("dr_grpo").advantages(**given)  # 1 and 0; -1 and 4
    assert_golden(worth.advantages[:, 0], [0.5, -2.5, 2.5, -0.5])


def test_tensors_that_a_recipe_does_not_use_are_left_alone(batch: Batch):
    nonsense = torch.full((1,), math.nan, device=batch.device)
    given = batch.everything() | {"values": nonsense, "greedy_scores": nonsense, "running_mean": None}
    given |= {"old_logps": nonsense, "ref_logps": nonsense}
    worth = recipe("dr_grpo").advantages(**given)
    more = batch.everything_else() | {"ref_logps": nonsense, "entropy": nonsense, "sampling_logps": nonsense}
    loss, _ = recipe("dr_grpo").loss(batch.logps, batch.old_logps, worth.advantages, worth.completion_mask, **more)
    assert_golden(loss, -(1 * 4.15 - 1 * 2.3 + 2 * 2.7 - 2 * 6.0) / 32)


# ---------------------------------------------------------------- recipe() itself

POLICY = sorted(name for name in ALGORITHMS if ALGORITHMS[name].get("loss_function", "policy") == "policy")
OF_PREFERENCES = sorted(set(ALGORITHMS) - set(POLICY))


def test_preferences_are_dpo_ipo_and_copg():
    assert OF_PREFERENCES == ["copg", "dpo", "ipo"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_recipe_knows_its_name_paper_and_equation(name: str):
    algorithm = recipe(name)
    assert (algorithm.name, algorithm.dialect) == (name, "rpp")
    assert all((algorithm.paper, algorithm.equation))


@pytest.mark.parametrize("name", POLICY)
def test_an_algorithm_has_what_its_paper_has_and_no_more(name: str, cpu_batch: Batch):
    """What the batch of the golden values does not tell: sequences left out, lone completions, and extras."""
    algorithm = recipe(name)
    worth = algorithm.advantages(**cpu_batch.everything(TIED))
    kept = {"dapo": (0, 1), "raft": (0, 2)}.get(name, (0, 1, 2, 3))
    assert torch.equal(worth.completion_mask, cpu_batch.mask(kept))
    assert algorithm.group_scale == ("informative" if name == "gpg" else "none")
    assert algorithm.token_selection == {"clip_cov": "clip-cov", "kl_cov": "kl-cov"}.get(name, "none")
    assert {algorithm.rollout_level, algorithm.rollout_mask} == {"none"}
    assert (algorithm.singleton, algorithm.gap) == ("zero", "carry")


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_leaves_the_paper_of_the_algorithm(extra: str):
    assert recipe("grpo", extra).paper == recipe("grpo").paper


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (("grop",), {}, ("name", "'grpo'", "'grop'", "did you mean")),
        (("grpo", "icepopp"), {}, ("extras", "'icepop'", "'icepopp'")),
        (("grpo",), {"dialect": "verll"}, ("dialect", "'verl'", "'verll'")),
        (("raft",), {"dialect": "verl"}, ("dialect", "'verl'", "'raft'")),
        (("grpo",), {"betta": 0.1}, ("overrides", "'beta'", "'betta'")),
    ],
)
def test_unknown_names_are_refused(args, kwargs, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        recipe(*args, **kwargs)
    for word in words[1:]:
        assert word in str(error.value)


AXES = (
    "sequences",
    "baseline",
    "std",
    "singleton",
    "group_scale",
    "time",
    "gap",
    "whiten",
    "whiten_eps_mode",
    "kl_place",
    "kl_estimator",
    "kl_gradient",
    "loss_function",
    "surrogate",
    "importance_sampling_level",
    "reduction",
    "preference",
    "token_selection",
    "rollout_level",
    "rollout_mask",
)


@pytest.mark.parametrize("axis", AXES)
def test_an_unknown_choice_of_an_axis_is_refused(axis: str):
    for make in (lambda **choice: recipe("grpo", **choice), Recipe):
        with pytest.raises(ValueError, match=axis) as error:
            make(**{axis: "nonsense"})
        assert "nonsense" in str(error.value)


def test_every_axis_of_names_is_checked():
    names = {f.name for f in dataclasses.fields(Recipe) if f.type in ("str", str, "str | None", str | None)}
    assert names - {"name", "paper", "equation", "dialect"} == set(AXES)


def test_overrides_come_after_extras_and_extras_after_the_dialect():
    assert recipe("grpo", "k2_loss", kl_estimator="k1").kl_estimator == "k1"
    assert recipe("grpo", "dual_clip", dialect="verl").dual_clip == 3.0
    assert recipe("grpo", "two_sided", dialect="verl").dual_clip == 4.0
    assert recipe("grpo", dialect="verl").dialect == "verl"


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (("grpo", "tis", "sequence_tis"), {}, "'sequence_tis' and 'tis' both set rollout_level"),
        (("grpoo",), {}, "did you mean 'grpo'"),
        (("GRPO",), {}, "did you mean 'grpo'"),
        (("clip_cov", "top_entropy"), {}, "'top_entropy' and 'clip_cov' both set token_selection"),
        (("dr_grpo",), {"beta": 0.1}, "beta: has no effect on 'dr_grpo': no KL is paid"),
        (("grpo",), {"gamma": 0.9}, "gamma: has no effect on 'grpo': time is 'sequence'"),
        (("reinforce_pp",), {"kl_gradient": "k2"}, "kl_gradient: has no effect"),
        (("raft",), {"reward_clip": (-1.0, 1.0)}, "reward_clip: has no effect on 'raft': every advantage is 1"),
        (("dpo",), {"baseline": "mean"}, "baseline: has no effect on 'dpo'"),
        (("grpo",), {"preference": "ipo"}, "preference: has no effect on 'grpo'"),
        (("dapo", "k2_loss"), {}, "beta: want a positive number for the KL of 'k2_loss'"),
        (("rloo",), {"beta": -1.0}, "beta: want a finite number from 0, got -1.0"),
        (("rloo",), {"beta": "much"}, "beta: want a finite number"),
        (("rloo",), {"epsilon_low": 0.1}, "epsilon_low: want None with surrogate 'reinforce'"),
        (("grpo",), {"epsilon_low": 2.0}, "epsilon_low"),
        (("grpo",), {"dual_clip": 0.5}, "dual_clip"),
        (("grpo",), {"surrogate": "gmpo"}, "importance_sampling_level: want 'sequence' with surrogate 'gmpo'"),
        (("grpo", "top_entropy"), {"token_fraction": 0.0}, "token_fraction"),
        (("grpo", "tis"), {"rollout_high": -1.0}, "rollout_high"),
        (("dapo",), {"overlong_buffer": -1.0}, "overlong_buffer"),
        (("dpo",), {"beta": 0.0}, "beta: a loss of preferences needs a positive one"),
        (("dpo", "tis"), {}, "extras: want none for 'dpo'"),
        (("grpo",), {"name": "x"}, "overrides: want one of"),
    ],
)
def test_what_would_have_no_effect_or_no_meaning_is_refused(arguments, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe(*arguments, **overrides)


@pytest.mark.parametrize("extras", [(), ("tis",), ("icepop",), ("entropy_bonus",), ("geometric_mask", "dual_clip")])
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "reinforce_pp_baseline"])
def test_linear_loss_is_the_loss_of_linear_logps(name, extras):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, S, H, V = 4, 5, 6, 7
    made = recipe(name, *extras)
    x = {"hidden_states": normal(B, S, H).requires_grad_(), "weight": normal(V, H).requires_grad_()}
    ids, mask = torch.randint(V, (B, S), generator=generator), torch.rand(B, S, generator=generator) < 0.8
    out = rpp.linear_logps(**x, target_ids=ids)
    old, ref, sampled = (out.logps.detach() + 0.2 * normal(B, S) for _ in range(3))
    worth = made.advantages(normal(B), mask, group_size=2, max_completion_length=S)
    shared = {"ref_logps": ref, "sampling_logps": sampled, "max_completion_length": S}
    arguments = old, worth.advantages, worth.completion_mask
    one = made.linear_loss(x["hidden_states"], x["weight"], ids, *arguments, **shared).loss
    two = made.loss(out.logps, *arguments, **shared, entropy=out.entropy).loss
    torch.testing.assert_close(one, two)
    for a, b in zip(*(torch.autograd.grad(loss, list(x.values())) for loss in (one, two)), strict=True):
        torch.testing.assert_close(a, b)


def test_linear_loss_cannot_choose_tokens_before_it_has_them():
    with pytest.raises(ValueError, match="linear_logps, then loss"):
        recipe("clip_cov").linear_loss(None, None, None, None, None)


def test_a_recipe_is_constant():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("grpo").beta = 0.1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_differs_in_its_listed_fields_alone(dialect: str):
    for name, row in DIALECTS[dialect].items():
        assert name in ALGORITHMS
        theirs, ours = recipe(name, dialect=dialect), recipe(name)
        changed = {f.name for f in dataclasses.fields(Recipe) if getattr(theirs, f.name) != getattr(ours, f.name)}
        assert changed <= set(row) | {"dialect"}, name
        assert {field: getattr(theirs, field) for field in row} == row


@pytest.mark.parametrize("dialect", ["rpp", *DIALECTS])
def test_policy_loss_takes_the_options_of_every_recipe(dialect: str, cpu_batch: Batch):
    names = ALGORITHMS if dialect == "rpp" else DIALECTS[dialect]
    for name in names:
        algorithm = recipe(name, dialect=dialect)
        if name in OF_PREFERENCES:
            continue
        options = algorithm.loss_options
        if "beta" in options:
            options["ref_logps"] = cpu_batch.ref_logps
        if "entropy_coef" in options:
            options["entropy"] = cpu_batch.of(ENTROPY)
        if algorithm.reduction == "seq-mean-token-sum-norm":
            options["max_completion_length"] = 8
        loss, _ = rpp.policy_loss(
            cpu_batch.logps,
            cpu_batch.old_logps,
            cpu_batch.of(_grpo),
            cpu_batch.mask(),
            cu_seqlens=cpu_batch.cu_seqlens,
            **options,
        )
        assert loss.isfinite(), name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_recipe_of_a_dialect_computes(dialect: str, cpu_batch: Batch):
    for name in set(DIALECTS[dialect]) - set(OF_PREFERENCES):
        algorithm = recipe(name, dialect=dialect)
        worth = algorithm.advantages(**cpu_batch.everything())
        loss, gradient = loss_and_gradient(algorithm, cpu_batch, worth.advantages, worth.completion_mask)
        assert loss.isfinite(), name
        assert gradient.isfinite().all(), name


CONTRADICTIONS = [  # by the name of the field that would be without effect
    ("kl_place", {"kl_place": "reward", "time": "sequence", "beta": 0.1}),
    ("kl_place", {"kl_place": "token", "time": "returns", "beta": 0.1}),
    ("std", {"std": "group", "baseline": "greedy"}),
    ("whiten", {"whiten": "sequences", "time": "returns"}),
    ("baseline", {"baseline": "critic"}),
    ("baseline", {"time": "gae"}),
    ("kl_bias_correction", {"kl_bias_correction": True, "kl_place": "none"}),
]


@pytest.mark.parametrize(("name", "choices"), CONTRADICTIONS, ids=[str(c) for _, c in CONTRADICTIONS])
def test_a_choice_that_would_be_ignored_is_refused(name: str, choices: dict[str, Any]):
    with pytest.raises(ValueError, match=name):
        Recipe(**choices)


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_changes_what_it_names(extra: str):
    changes = {name: value for name, value in EXTRAS[extra].items() if name != "paper"}
    assert changes
    changed = recipe("grpo", extra)
    assert {name: getattr(changed, name) for name in changes} == changes


def test_scores_in_half_precision_give_float32_and_exact_lengths(run, device):
    mask = torch.arange(257, device=device) < torch.tensor([257, 3], device=device)[:, None]  # bfloat16 has no 257
    scores = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, device=device)
    worth = recipe("opo").advantages(scores, mask, group_size=2)
    expected = torch.tensor([[1 - 257 / 260], [0 - 257 / 260]], device=device)
    torch.testing.assert_close(worth.advantages, expected)
    greedy = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, device=device)
    for name, given in (
        ("remax", {"greedy_scores": greedy}),
        ("reinforce", {"running_mean": RunningMean.zero(device)}),
    ):
        worth = recipe(name, beta=0.0).advantages(scores, mask, **given)
        assert worth.advantages.dtype == torch.float32


def test_a_kl_that_is_not_finite_stays_in_its_sequence(batch: Batch):
    given = batch.everything()
    given["old_logps"][batch.place(0, 1)] = -math.inf
    given["ref_logps"][batch.place(0, 1)] = -1.0
    advantages = batch.expanded(recipe("reinforce").advantages(**given).advantages)
    assert advantages[batch.place(0, 0)] == math.inf
    assert_golden(advantages[batch.place(2, 0)], 3.738)


def test_clip_cov_knows_an_epsilon_of_zero(batch: Batch):
    # The last token alone is a candidate, and at A < 0 it is clipped below 1 - epsilon_low: at r = 0.9 only if
    # epsilon_low is less than 0.1, and then it is no candidate.
    near = batch.logps
    old = batch.old_logps
    old[batch.place(3, 0)] = -3.0 - log(0.9)
    algorithm = recipe("clip_cov", epsilon_low=0.0)
    more = batch.everything_else()
    loss, _ = algorithm.loss(near, old, batch.of(_grpo), batch.mask(), **more)
    # 0.5 at A < 0 becomes 1, and so does 0.9
    assert_golden(loss, -(A1 * 4.15 - A1 * (1.0 + 1.5) + A2 * 2.7 - A2 * 1.0) / 10)


@pytest.mark.parametrize("name", OF_PREFERENCES)
def test_recipes_of_preferences_have_no_policy_loss(name: str, cpu_batch: Batch):
    algorithm = recipe(name)
    for call in (
        lambda: algorithm.advantages(**cpu_batch.everything()),
        lambda: algorithm.loss(cpu_batch.logps, cpu_batch.old_logps, cpu_batch.of(_grpo)),
        lambda: algorithm.loss_options,
    ):
        with pytest.raises(ValueError, match=f"{name}.*preference_loss"):
            call()


@pytest.mark.parametrize("name", POLICY)
def test_recipes_of_a_policy_loss_have_no_preference_loss(name: str, cpu_batch: Batch):
    with pytest.raises(ValueError, match=f"{name}.*advantages and loss"):
        recipe(name).preference_loss(cpu_batch.logps, cpu_batch.ref_logps, cpu_batch.mask())


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("reinforce", "running_mean"),
        ("reinforce", "ref_logps"),
        ("reinforce", "old_logps"),
        ("rloo", "group_size"),
        ("rloo", "ref_logps"),
        ("raft", "group_size"),
        ("remax", "greedy_scores"),
        ("remax", "ref_logps"),
        ("ppo", "values"),
        ("ppo", "ref_logps"),
        ("vanilla_pg", "values"),
        ("reinforce_pp", "old_logps"),
        ("reinforce_pp", "ref_logps"),
        ("grpo", "group_size"),
        ("dapo", "group_size"),
        ("dapo", "max_completion_length"),
        ("gpg", "group_size"),
        ("opo", "group_size"),
    ],
)
def test_what_advantages_are_made_of_must_be_there(name: str, missing: str, cpu_batch: Batch):
    with pytest.raises(ValueError, match=missing):
        recipe(name).advantages(**cpu_batch.everything() | {missing: None})


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("grpo",), "ref_logps"),
        (("reinforce_pp_baseline",), "ref_logps"),
        (("dr_grpo",), "max_completion_length"),
        (("dapo", "entropy_bonus"), "entropy"),
        (("dapo", "top_entropy"), "entropy"),
        *(((("dapo", extra)), "sampling_logps") for extra in ("tis", "sequence_tis", "icepop", "sequence_mask")),
        (("dapo", "geometric_mask"), "sampling_logps"),
    ],
)
def test_what_the_loss_is_made_of_must_be_there(names, missing: str, cpu_batch: Batch):
    more = cpu_batch.everything_else() | {missing: None}
    with pytest.raises(ValueError, match=missing):
        recipe(*names).loss(cpu_batch.logps, cpu_batch.old_logps, cpu_batch.of(_grpo), cpu_batch.mask(), **more)


@pytest.mark.parametrize("names", [("dapo", "tis"), ("clip_cov",), ("kl_cov",)], ids="+".join)
def test_what_compares_with_the_old_policy_wants_it(names, cpu_batch: Batch):
    with pytest.raises(ValueError, match="old_logps"):
        recipe(*names).loss(cpu_batch.logps, None, cpu_batch.of(_grpo), cpu_batch.mask(), **cpu_batch.everything_else())


@pytest.mark.parametrize(("name", "missing"), [("copg", "scores"), ("copg", "ref_logps"), ("ipo", "ref_logps")])
def test_what_preferences_are_made_of_must_be_there(name: str, missing: str, cpu_batch: Batch):
    given = {"ref_logps": cpu_batch.ref_logps, "scores": cpu_batch.of_sequences(SCORES)} | {missing: None}
    ref_logps = given.pop("ref_logps")
    algorithm = recipe(name)
    with pytest.raises(ValueError, match=missing):
        algorithm.preference_loss(
            cpu_batch.logps, ref_logps, cpu_batch.mask(), cu_seqlens=cpu_batch.cu_seqlens, **given
        )
