"""reinforce_pp_advantages beyond test_every_op.py: the fused pipeline is its parts, step by step."""

import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels.testing import assert_close_to_reference, evaluate, make_batch

assert_close = torch.testing.assert_close

DIFFERENTIABLE = ("scores", "old_logps", "ref_logps")
OPTIONS = [
    {},
    {"beta": 0.5},
    {"beta": -0.5, "gamma": 0.9},
    {"beta": 0.5, "gamma": 0.0},
    {"beta": 0.5, "kl_estimator": "k2", "gamma": 0.9},
    {"beta": 0.5, "kl_estimator": "k3"},
    {"beta": 0.5, "kl_estimator": "abs", "kl_clamp": 0.1},
    {"beta": 0.5, "eps": 100.0},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "defaults")


def fused(f, x, **options):
    tensors = x["scores"], x["old_logps"], x["ref_logps"], x["completion_mask"]
    return f.reinforce_pp_advantages(*tensors, cu_seqlens=x.get("cu_seqlens"), **options)


def step_by_step(x, *, beta=0.01, gamma=1.0, kl_estimator="k1", kl_clamp=None, eps=1e-8):
    mask, cu_seqlens = x["completion_mask"], x.get("cu_seqlens")
    kl = rpp.kl_penalty(x["old_logps"], x["ref_logps"], mask, estimator=kl_estimator, kl_clamp=kl_clamp)
    rewards = rpp.token_rewards(x["scores"], kl, mask, beta=beta, cu_seqlens=cu_seqlens)
    return rpp.whiten(rpp.returns(rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens), mask, eps=eps)


@pytest.mark.kernels
@every_option
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_spec(options, packed, dtype, device):
    x = make_batch(7, 50, packed=packed, dtype=dtype, device=device)
    assert_close_to_reference(partial(fused, **options), x, DIFFERENTIABLE)


@every_option
@pytest.mark.parametrize("packed", [False, True])
def test_fused_is_the_chain_of_its_parts(options, packed, backend, device):
    x = make_batch(5, 20, packed=packed, dtype=torch.float64, device=device)
    got = evaluate(lambda x: fused(rpp, x, **options), x, DIFFERENTIABLE)
    want = evaluate(lambda x: step_by_step(x, **options), x, DIFFERENTIABLE)
    assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 15, 17, 1023, 1024, 1025, 2049])
def test_sequences_around_the_size_of_a_block(length, device, backend):
    # Against the chain, whose scan does not know blocks; the spec walks too slowly.
    x = make_batch(2, length, device=device)
    x["completion_mask"][1, length // 3 : length // 2] = False
    options = {"beta": 0.3, "gamma": 0.999, "kl_estimator": "k3"}
    assert_close(fused(rpp, x, **options), step_by_step(x, **options), rtol=1e-4, atol=1e-5)


@every_option
def test_gradcheck(options, backend, device):
    x = make_batch(3, 4, dtype=torch.float64, device=device)

    def function(*inputs):
        return fused(rpp, {**x, **dict(zip(DIFFERENTIABLE, inputs, strict=True))}, **options)

    assert torch.autograd.gradcheck(function, [x[name].requires_grad_() for name in DIFFERENTIABLE])


def test_closed_form_for_k1(backend, device):
    # Eq. 7: A_t = score - beta * sum over i >= t of log(old / ref); eq. 8: whitened over all valid tokens.
    x = make_batch(4, 9, device=device, dtype=torch.float64)
    mask = x["completion_mask"]
    k1 = torch.where(mask, x["old_logps"] - x["ref_logps"], 0)
    a = (x["scores"][:, None] - 0.3 * k1.flip(1).cumsum(1).flip(1))[mask]
    assert_close(fused(rpp, x, beta=0.3)[mask], (a - a.mean()) / a.std(correction=0))


def test_without_a_reference_policy(backend, device):
    x = make_batch(4, 9, device=device)
    tensors = x["scores"], x["old_logps"]
    none = rpp.reinforce_pp_advantages(*tensors, None, x["completion_mask"], beta=0.0)
    unused = torch.full_like(x["ref_logps"], math.nan)
    assert_close(rpp.reinforce_pp_advantages(*tensors, unused, x["completion_mask"], beta=0.0), none, rtol=0, atol=0)
    same = rpp.reinforce_pp_advantages(*tensors, x["old_logps"], x["completion_mask"], beta=0.3)
    assert_close(same, none)


def test_inputs_that_did_not_matter_have_gradient_0(backend, device):
    x = make_batch(3, 5, device=device)
    scores, old_logps = x["scores"].requires_grad_(), x["old_logps"].requires_grad_()
    out = rpp.reinforce_pp_advantages(scores, old_logps, None, x["completion_mask"], beta=0.0, gamma=0.9)
    dscores, dold_logps = torch.autograd.grad(
        (out * x["advantages"]).sum(), [scores, old_logps], allow_unused=True, materialize_grads=True
    )
    assert dscores.abs().sum() > 0
    assert (dold_logps == 0).all()


def test_a_nan_score_is_not_lost_and_does_not_reach_masked_tokens(backend, device):
    x = make_batch(3, 5, device=device)
    x["scores"][1] = math.nan
    assert (fused(rpp, x).isnan() == x["completion_mask"]).all()


def test_a_nan_log_prob_is_not_lost(backend, device):
    x = make_batch(3, 5, device=device)
    x["old_logps"][1, 0] = math.nan
    assert fused(rpp, x)[x["completion_mask"]].isnan().all()


def test_equal_returns_are_no_advantage(backend, device):
    x = make_batch(3, 5, device=device)
    x["scores"].fill_(0.5)
    x["ref_logps"] = x["old_logps"]
    assert (fused(rpp, x) == 0).all()


BATCH = {"scores": torch.zeros(2), "old_logps": torch.zeros(2, 3), "ref_logps": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"old_logps": torch.zeros(2, 3).int()}, "old_logps: want a float32"),
        ({"old_logps": torch.zeros(6)}, r"old_logps: want \(B, S\), or \(T,\) together with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, r"old_logps: want \(T,\) when cu_seqlens is given"),
        ({"scores": torch.zeros(3)}, r"scores: want the shape \(2,\) of one for each sequence"),
        ({"scores": torch.zeros(2).long()}, "scores: want a float32"),
        ({"scores": torch.zeros(2, device="meta")}, "scores: want a tensor on cpu"),
        ({"ref_logps": torch.zeros(3, 2)}, r"ref_logps: want the shape \(2, 3\) of old_logps"),
        ({"ref_logps": None}, "ref_logps: want a tensor, for beta = 0.01, got None"),
        ({"completion_mask": torch.ones(2, 3).int()}, "completion_mask: want a bool tensor"),
        ({"completion_mask": torch.ones(6).bool()}, r"completion_mask: want the shape \(2, 3\) of old_logps"),
        ({"beta": math.nan}, "beta: want a finite number"),
        ({"gamma": 1.5}, "gamma: want a number from 0 to 1"),
        ({"kl_estimator": "none"}, "kl_estimator: want one of 'k1', 'k2', 'k3', 'abs', got 'none'"),
        ({"kl_clamp": 0.0}, "kl_clamp: want a positive number or None"),
        ({"eps": 0.0}, "eps: want a positive number"),
    ],
)
def test_reinforce_pp_advantages_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.reinforce_pp_advantages(**{**BATCH, **changes})
