"""returns, gae and whiten beyond test_every_op.py: discounts, holes, sizes that are summed in parts, errors."""

import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels.testing import assert_close_to_reference, evaluate, make_batch

assert_close = torch.testing.assert_close
assert_golden = partial(assert_close, rtol=1e-6, atol=1e-6)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def f32(*rows, device="cpu"):
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32, device=device)


# ---------------------------------------------------------------- returns and gae


@pytest.mark.kernels
@pytest.mark.parametrize("gamma", [0, 0.5, 0.99, 1])
@pytest.mark.parametrize("S", [1, 3, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_returns_for_every_discount_and_length(gamma, S, dtype, device):
    x = make_batch(5, S, dtype=dtype, device=device)
    call = lambda f, x: f.returns(x["rewards"], x["completion_mask"], gamma=gamma)  # noqa: E731
    assert_close_to_reference(call, x, ["rewards"])


@pytest.mark.kernels
@pytest.mark.parametrize("gae_lambda", [0, 0.95, 1])
@pytest.mark.parametrize("gamma", [0, 0.9, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gae_for_every_discount(gae_lambda, gamma, packed, dtype, device):
    x = make_batch(5, 33, packed=packed, dtype=dtype, device=device)

    def call(f, x):
        options = {"gamma": gamma, "gae_lambda": gae_lambda, "cu_seqlens": x.get("cu_seqlens")}
        return f.gae(x["rewards"], x["values"], x["completion_mask"], **options)

    assert_close_to_reference(call, x, ["rewards", "values"])


def test_a_hole_neither_pays_nor_discounts_nor_resets(backend, device):
    rewards, mask = f32([[1, 99, 2, 4]], device=device), f32([[1, 0, 1, 1]], device=device).bool()
    assert_golden(rpp.returns(rewards, mask, gamma=0.5), f32([[3, 0, 4, 4]], device=device))
    rewards, values = f32([[1, 99, 2, 3, 99]], device=device), f32([[0.5, 99, 1, 1.5, 99]], device=device)
    mask = f32([[1, 0, 1, 1, 0]], device=device).bool()
    out = rpp.gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert_golden(out.advantages, f32([[1.53125, 0, 2.125, 1.5, 0]], device=device))
    assert_golden(out.returns, f32([[2.03125, 0, 3.125, 3.0, 0]], device=device))


@pytest.mark.kernels
@pytest.mark.parametrize("gap", ["carry", "reset", "step"])
@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holes_of_every_kind(packed, gamma, gap, dtype, device):
    x = make_batch(9, 33, packed=packed, dtype=dtype, device=device)
    x["completion_mask"] &= torch.rand_like(x["rewards"], dtype=torch.float32) < 0.7
    options = {"gamma": gamma, "gap": gap}

    def call(f, x):
        return f.returns(x["rewards"], x["completion_mask"], cu_seqlens=x.get("cu_seqlens"), **options)

    assert_close_to_reference(call, x, ["rewards"])
    if gap == "reset":
        return

    def call_gae(f, x):
        tensors = x["rewards"], x["values"], x["completion_mask"]
        return f.gae(*tensors, gae_lambda=0.9, cu_seqlens=x.get("cu_seqlens"), **options)

    assert_close_to_reference(call_gae, x, ["rewards", "values"])


def test_what_a_hole_does_to_the_sum_that_passes_it(backend, device):
    rewards, mask = f32([[1, 99, 2, 4]], device=device), f32([[1, 0, 1, 1]], device=device).bool()
    returns = partial(rpp.returns, rewards, mask, gamma=0.5)
    assert_golden(returns(gap="reset"), f32([[1, 0, 4, 4]], device=device))
    assert_golden(returns(gap="step"), f32([[2, 0, 4, 4]], device=device))
    assert_golden(returns(gap="carry"), returns())


def test_nan_behind_a_hole_that_resets_stays_there(backend, device):
    rewards, mask = f32([[1, 99, 2, math.nan]], device=device), f32([[1, 0, 1, 1]], device=device).bool()
    assert rpp.returns(rewards, mask, gap="reset").isnan().tolist() == [[False, False, True, True]]
    for gap in ("carry", "step"):
        assert rpp.returns(rewards, mask, gap=gap).isnan().tolist() == [[True, False, True, True]]
    inputs = rewards.requires_grad_()
    weights = f32([[math.nan, 1, 1, 1]], device=device)  # forwards as well
    (drewards,) = torch.autograd.grad(rpp.returns(inputs, mask, gap="reset"), inputs, weights)
    assert drewards.isnan().tolist() == [[True, False, False, False]]


def test_packed_sequences_do_not_see_each_other(backend, device):
    cu_seqlens = torch.tensor([0, 2, 2, 3], device=device)
    assert_golden(
        rpp.returns(f32([1, 2, 4], device=device), gamma=0.5, cu_seqlens=cu_seqlens), f32([2, 2, 4], device=device)
    )
    rewards = f32([1, 2, math.nan], device=device)
    assert rpp.returns(rewards, cu_seqlens=cu_seqlens).isnan().tolist() == [False, False, True]


def test_nan_reaches_the_tokens_before_it_in_its_sequence_only(backend, device):
    rewards = f32([1, math.nan, 3], [1, 2, 3], device=device)
    assert rpp.returns(rewards).isnan().tolist() == [[True, True, False], [False] * 3]
    out = rpp.gae(rewards, torch.zeros(2, 3, device=device))
    assert out.advantages.isnan().tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("which", ["advantages", "returns"])
def test_gradient_of_one_result_of_gae_alone(which, backend, device):
    x = make_batch(3, 5, dtype=torch.float64, device=device)
    inputs = x["rewards"].requires_grad_(), x["values"].requires_grad_()
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    assert torch.autograd.gradcheck(lambda r, v: getattr(rpp.gae(r, v, x["completion_mask"], **options), which), inputs)


def test_long_float32_sums_keep_their_digits(run, device):
    # 2^16 rewards of 0.1: a float32 carry drifts by 1e-3 of the sum, a float64 one by nothing visible.
    if run[0] == "reference":
        pytest.skip("the spec carries in the dtype of the input, and walks 65536 steps in Python")
    n = 1 << (13 if run == ("triton", "cpu") else 16)  # an interpreter is slow, and sees 1e-5 of the sum as well
    rewards = torch.full((1, n), 0.1, device=device)
    exact = rewards.double().flip(1).cumsum(1).flip(1)
    assert_close(rpp.returns(rewards).double(), exact, rtol=2.0**-23, atol=0)


# ---------------------------------------------------------------- whiten

# Below, at and above a vector, two vectors, one block and several blocks of the sums; kernels merge blocks.
SIZES = [1, 2, 15, 16, 17, 31, 1023, 1024, 1025, 4097, 100_003]
MODES = [(s, u, m) for s in (True, False) for u in (True, False) for m in ("floor", "add_var", "add_std")]


def whiten(f, x, **options):
    return f.whiten(x["values"], x.get("mask"), **options)


@pytest.mark.kernels
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whiten_of_every_size(n, dtype, device):
    values = (1 + 3 * torch.randn(n, dtype=torch.float64)).to(dtype).to(device)
    # The gradient for one value is 0, a difference of numbers as large as 1 / sqrt(eps).
    mask = torch.rand(n, device=device) < 0.8
    assert_close_to_reference(whiten, {"values": values, "mask": mask}, ["values"], atol=4e-3 if n == 1 else 0.0)


@pytest.mark.kernels
@pytest.mark.parametrize(("shift_mean", "unbiased", "eps_mode"), MODES)
@pytest.mark.parametrize("eps", [1e-8, 0.5, 100.0])
def test_whiten_in_every_mode(shift_mean, unbiased, eps_mode, eps, device):
    call = partial(whiten, shift_mean=shift_mean, unbiased=unbiased, eps_mode=eps_mode, eps=eps)
    values = 2 + 3 * torch.randn(7, 40, device=device)
    assert_close_to_reference(call, {"values": values, "mask": torch.rand(7, 40, device=device) < 0.7}, ["values"])


@pytest.mark.parametrize(("shift_mean", "unbiased", "eps_mode"), MODES)
@pytest.mark.parametrize("eps", [1e-8, 100.0])
def test_gradcheck_of_whiten_in_every_mode(shift_mean, unbiased, eps_mode, eps, backend, device):
    values = torch.tensor([1.0, 2.5, -0.3, 4.0, 7.0], dtype=torch.float64, device=device, requires_grad=True)
    mask = f32([1, 1, 0, 1, 1], device=device).bool()
    function = partial(
        rpp.whiten, completion_mask=mask, shift_mean=shift_mean, unbiased=unbiased, eps_mode=eps_mode, eps=eps
    )
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.kernels
@pytest.mark.parametrize("offset", [1e3, -1e6])
def test_whiten_far_from_0_loses_no_more_than_the_spec(offset, device):
    values = offset + torch.randn(5000, device=device)
    assert_close_to_reference(whiten, {"values": values}, ["values"])


@pytest.mark.kernels
def test_whitened_values_have_mean_0_and_variance_1_however_far_they_were_from_0(device):
    values = 1e4 + torch.randn(100_003, device=device)
    whitened = rpp.whiten(values).double()
    assert abs(whitened.mean().item()) < 1e-5
    assert whitened.var(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("eps_mode", ["floor", "add_var", "add_std"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n", [1, 2, 100])
def test_equal_values_whiten_to_0_with_a_finite_gradient(n, unbiased, eps_mode, backend, device):
    values = torch.full((n,), 0.5, device=device)
    options = {"eps_mode": eps_mode, "unbiased": unbiased}
    got = evaluate(lambda x: rpp.whiten(x["values"], **options), {"values": values}, ["values"])
    assert (got["result"] == 0).all()
    assert got["dvalues"].isfinite().all()
    assert (rpp.whiten(values, shift_mean=False, **options) == 0.5).all()


def test_a_nan_makes_the_whole_batch_nan(backend, device):
    whitened = rpp.whiten(f32([1, math.nan, 3, 99], device=device), f32([1, 1, 1, 0], device=device).bool())
    assert whitened.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (6, 1, 1, 1)])
def test_whiten_of_any_shape_is_that_of_its_elements(shape, backend, device):
    values, mask = torch.arange(6.0, device=device), torch.arange(6, device=device) != 2
    assert_close(rpp.whiten(values.reshape(shape), mask.reshape(shape)), rpp.whiten(values, mask).reshape(shape))


# ---------------------------------------------------------------- refusals

REWARDS = torch.zeros(2, 3)
CU_SEQLENS = torch.tensor([0, 3, 6])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": REWARDS.int()}, "rewards: want a float32"),
        ({"rewards": REWARDS[None]}, "rewards: want .* of 1 or 2 dimension"),
        ({"rewards": REWARDS[0]}, r"rewards: want \(B, S\), or \(T,\) together with cu_seqlens"),
        ({"cu_seqlens": CU_SEQLENS}, r"rewards: want \(T,\) when cu_seqlens is given"),
        ({"rewards": REWARDS[0], "cu_seqlens": CU_SEQLENS}, "cu_seqlens: want 0, never falling, up to the 3 tokens"),
        ({"completion_mask": REWARDS}, "completion_mask: want a bool tensor"),
        ({"completion_mask": REWARDS.T.bool()}, r"completion_mask: want the shape \(2, 3\) of rewards"),
        ({"gamma": 1.1}, "gamma: want a number from 0 to 1"),
        ({"gamma": -0.1}, "gamma: want a number from 0 to 1"),
        ({"gamma": math.nan}, "gamma: want a number from 0 to 1"),
        ({"gamma": None}, "gamma: want a number from 0 to 1"),
        ({"gap": "skip"}, "gap: want one of 'carry', .*'step', got 'skip'"),
    ],
)
def test_returns_and_gae_refuse(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.returns(**{"rewards": REWARDS, **changes})
    values = torch.zeros(changes.get("rewards", REWARDS).shape)
    with pytest.raises(ValueError, match=words):
        rpp.gae(**{"rewards": REWARDS, "values": values, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": REWARDS.T}, r"values: want the shape \(2, 3\) of rewards"),
        ({"values": REWARDS[0]}, "values: want .* of 2 dimension"),
        ({"values": REWARDS.int()}, "values: want a float32"),
        ({"values": REWARDS.to("meta")}, "values: want a tensor on cpu"),
        ({"gae_lambda": 2}, "gae_lambda: want a number from 0 to 1"),
        ({"gap": "reset"}, "gap: want one of 'carry', 'step', got 'reset'"),
    ],
)
def test_gae_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.gae(**{"rewards": REWARDS, "values": REWARDS, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": REWARDS.int()}, "values: want a float32"),
        ({"values": torch.zeros(())}, "values: want .* dimension"),
        ({"completion_mask": torch.ones(3).bool()}, r"completion_mask: want the shape \(2, 3\) of values"),
        ({"eps": 0}, "eps: want a positive number"),
        ({"eps": -1e-8}, "eps: want a positive number"),
        ({"eps": math.inf}, "eps: want a positive number"),
        ({"eps_mode": "add"}, "eps_mode: want one of 'floor', 'add_var', 'add_std', got 'add'"),
    ],
)
def test_whiten_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.whiten(**{"values": REWARDS, **changes})
