"""token_rewards and normalize_rewards beyond test_every_op.py: who is paid, every step of normalisation, errors."""

import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels.testing import assert_close_to_reference, evaluate

assert_close = torch.testing.assert_close
assert_golden = partial(assert_close, rtol=1e-6, atol=1e-6)


def f32(*rows, device="cpu"):
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32, device=device)


def test_the_last_valid_token_is_paid_the_score_and_every_token_pays_for_its_kl(backend, device):
    kl = f32([0.5, 1, 0], [0.25, 7, 7], [7, 7, 7], [1, 7, -2], device=device)
    mask = f32([1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1], device=device).bool()
    rewards = rpp.token_rewards(f32([2, -1, 5, 3], device=device), kl, mask, beta=0.1)
    expected = f32([-0.05, -0.1, 2], [-1.025, 0, 0], [0, 0, 0], [-0.1, 0, 3.2], device=device)
    assert_golden(rewards, expected)


def test_packed_sequences_that_are_empty_or_wholly_masked_are_not_paid(backend, device):
    rewards = rpp.token_rewards(
        f32([2, 5, -1, 9], device=device),
        f32([0.5, 1, 0.25, 7, 3], device=device),
        f32([1, 1, 1, 0, 0], device=device).bool(),
        beta=0.1,
        cu_seqlens=torch.tensor([0, 2, 2, 4, 5], device=device),
    )
    assert_golden(rewards, f32([-0.05, 1.9, -1.025, 0, 0], device=device))


def test_the_score_of_a_sequence_without_a_token_has_gradient_0(backend, device):
    scores = f32([1, 2, 3], device=device).requires_grad_()
    mask = f32([1, 1], [0, 0], [0, 1], device=device).bool()
    rpp.token_rewards(scores, torch.zeros(3, 2, device=device), mask, beta=0.1).sum().backward()
    assert scores.grad.tolist() == [1, 0, 1]


def test_a_nan_score_reaches_its_own_token_only(backend, device):
    scores = f32([math.nan, 2], device=device)
    rewards = rpp.token_rewards(scores, torch.zeros(2, 2, device=device), beta=0.1)
    assert rewards.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("beta", [0.0, -0.5, 1, 1e10])
def test_any_finite_beta(beta, backend, device):
    kl = torch.linspace(-1, 1, 6, device=device).reshape(2, 3)
    rewards = rpp.token_rewards(torch.zeros(2, device=device), kl, beta=beta)
    assert_close(rewards, -beta * kl)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_cu_seqlens_of_either_width(cu_dtype, backend, device):
    cu_seqlens = torch.tensor([0, 2, 3], dtype=cu_dtype, device=device)
    rewards = rpp.token_rewards(
        f32([1, 2], device=device), torch.zeros(3, device=device), beta=0.1, cu_seqlens=cu_seqlens
    )
    assert rewards.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- normalize_rewards

NORMALISATIONS = [
    {},
    {"zscore": False},
    {"clip": None},
    {"clip": (-0.5, 0.7), "scale": 2.0},
    {"zscore": False, "clip": (-1.0, 1.0), "scale": -0.5},
    {"eps": 4.0},
]


@pytest.mark.kernels
@pytest.mark.parametrize("options", NORMALISATIONS)
@pytest.mark.parametrize("B", [0, 1, 2, 17, 4099])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_normalize_rewards_is_the_spec(options, B, dtype, device):
    scores = (3 + 2 * torch.randn(B)).to(dtype).to(device)
    call = lambda f, x: f.normalize_rewards(x["scores"], **options)  # noqa: E731
    # The gradient for one score or two is 0, a difference of numbers as large as 1 / sqrt(eps) and 1 / std.
    atol = {1: 4e-3, 2: 1e-6}.get(B, 0.0)
    assert_close_to_reference(call, {"scores": scores}, ["scores"], atol=atol)


@pytest.mark.parametrize("options", NORMALISATIONS)
def test_gradcheck_of_normalize_rewards(options, backend, device):
    scores = torch.tensor([0.8, 2.5, -0.3, 0.4, 7.0], dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(partial(rpp.normalize_rewards, **options), scores)


def test_equal_scores_normalise_to_0_with_a_finite_gradient(backend, device):
    got = evaluate(lambda x: rpp.normalize_rewards(x["s"]), {"s": torch.full((5,), 0.1, device=device)}, ["s"])
    assert got["result"].abs().max() < 1e-3  # the rounding of the mean, over 1e-4
    assert got["ds"].isfinite().all()


def test_scores_are_not_changed(backend, device):
    scores = f32([1, 2, 3, 6], device=device)
    rpp.normalize_rewards(scores, clip=(-1, 1))
    rpp.normalize_rewards(scores, zscore=False, clip=None)
    assert scores.tolist() == [1, 2, 3, 6]
    assert scores._version == 0


def test_nothing_asked_for_is_not_an_alias_that_could_be_written_through(backend, device):
    scores = f32([1, 2], device=device)
    assert rpp.normalize_rewards(scores, zscore=False, clip=None).data_ptr() != scores.data_ptr()


# ---------------------------------------------------------------- refusals

REWARDS = {"scores": torch.zeros(2), "kl": torch.zeros(2, 3), "beta": 0.1}
PACKED = {"kl": torch.zeros(6), "cu_seqlens": torch.tensor([0, 4, 6])}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl": torch.zeros(2, 3).int()}, "kl: want a float32"),
        ({"kl": torch.zeros(2, 3, 1)}, "kl: want .* of 1 or 2 dimension"),
        ({"kl": torch.zeros(6)}, r"kl: want \(B, S\), or \(T,\) together with cu_seqlens"),
        ({"scores": torch.zeros(3)}, r"scores: want the shape \(2,\) of one for each sequence"),
        ({"scores": torch.zeros(2, 1)}, "scores: want .* of 1 dimension"),
        ({"scores": torch.zeros(2).int()}, "scores: want a float32"),
        ({"scores": torch.zeros(2, device="meta")}, "scores: want a tensor on cpu"),
        ({"completion_mask": torch.ones(2, 3)}, "completion_mask: want a bool tensor"),
        ({"completion_mask": torch.ones(3, 2).bool()}, r"completion_mask: want the shape \(2, 3\) of kl"),
        ({"beta": math.inf}, "beta: want a finite number"),
        ({"beta": math.nan}, "beta: want a finite number"),
        ({"beta": torch.tensor(0.1)}, "beta: want a finite number"),
        ({"beta": None}, "beta: want a finite number"),
        ({"cu_seqlens": torch.tensor([0, 4, 6])}, r"kl: want \(T,\) when cu_seqlens is given"),
        (PACKED | {"cu_seqlens": torch.tensor([0.0, 4.0, 6.0])}, r"cu_seqlens: want an int32 or int64 .* \(B\+1,\)"),
        (PACKED | {"cu_seqlens": [0, 4, 6]}, "cu_seqlens: want an int32 or int64"),
        (PACKED | {"cu_seqlens": torch.tensor([[0, 4, 6]])}, r"cu_seqlens: want an int32 or int64 .* \(B\+1,\)"),
        (PACKED | {"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "cu_seqlens: want at least one element"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 4, 6], device="meta")}, "cu_seqlens: want .* on cpu"),
        (
            PACKED | {"cu_seqlens": torch.tensor([0, 4, 5])},
            "cu_seqlens: want 0, never falling, up to the 6 tokens of kl",
        ),
        (PACKED | {"cu_seqlens": torch.tensor([1, 4, 6])}, "cu_seqlens: want 0, never falling"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 7, 6])}, "cu_seqlens: want 0, never falling"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 2, 4, 6])}, r"scores: want the shape \(3,\)"),
    ],
)
def test_token_rewards_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.token_rewards(**{**REWARDS, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": torch.zeros(2, 1)}, "scores: want .* of 1 dimension"),
        ({"scores": torch.zeros(2).int()}, "scores: want a float32"),
        ({"clip": (1.0, -1.0)}, r"clip: want \(low, high\) with low < high"),
        ({"clip": (1.0,)}, r"clip: want \(low, high\)"),
        ({"clip": 1.0}, r"clip: want \(low, high\)"),
        ({"clip": (math.nan, 1.0)}, r"clip: want \(low, high\)"),
        ({"scale": math.inf}, "scale: want a finite number"),
        ({"eps": 0.0}, "eps: want a positive number"),
    ],
)
def test_normalize_rewards_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.normalize_rewards(**{"scores": torch.zeros(2), **changes})


# ---------------------------------------------------------------- overlong_penalty


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_overlong_penalty_falls_over_the_buffer_and_no_further(dtype, backend, device):
    lengths = torch.arange(0, 40, dtype=dtype, device=device)
    penalty = rpp.overlong_penalty(lengths, max_completion_length=30, buffer_length=10, scale=0.5)
    expected = [-0.5 * min(max((n - 20) / 10, 0), 1) for n in range(40)]
    assert penalty.dtype == torch.float32
    assert_golden(penalty, f32(expected, device=device))
    assert not penalty[:21].signbit().any()  # no -0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": torch.zeros(2)}, r"lengths: want an int32 or int64 tensor of shape \(B,\), got float32"),
        ({"lengths": torch.zeros(2, 1).int()}, "lengths: want an int32 or int64"),
        ({"lengths": [3, 4]}, "lengths: want an int32 or int64"),
        ({"max_completion_length": 0}, "max_completion_length: want a positive integer"),
        ({"max_completion_length": 10.0}, "max_completion_length: want a positive integer"),
        ({"buffer_length": 0}, "buffer_length: want a positive integer"),
        ({"buffer_length": 11}, "buffer_length: want at most max_completion_length, which is 10, got 11"),
        ({"scale": -1.0}, "scale: want a finite number from 0"),
        ({"scale": math.inf}, "scale: want a finite number from 0"),
    ],
)
def test_overlong_penalty_refuses(changes, words, backend):
    arguments = {"lengths": torch.zeros(2).int(), "max_completion_length": 10, "buffer_length": 4}
    with pytest.raises(ValueError, match=words):
        rpp.overlong_penalty(**{**arguments, **changes})
