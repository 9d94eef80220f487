"""rollout_weights beyond test_every_op.py: its bounds, what NaN does, what its sums say, errors."""

import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels.testing import assert_close_to_reference, make_batch

assert_close = torch.testing.assert_close
LEVELS = ("token", "sequence", "geometric")
every_level = pytest.mark.parametrize("level", LEVELS)


def weights(f, x, mask=None, **options):
    return f.rollout_weights(x["old_logps"], x["sampling_logps"], mask, **options)


def rows_of(d, device="cpu"):
    """One sequence for each row of log-ratios."""
    d = torch.as_tensor(d, dtype=torch.float32, device=device)
    return {"old_logps": d / 2, "sampling_logps": -d / 2}


@pytest.mark.kernels
@every_level
@pytest.mark.parametrize("outside", ["truncate", "mask"])
@pytest.mark.parametrize(
    "options",
    [{}, {"low": 0.5, "high": 5.0}, {"high": math.inf}, {"low": 1.0, "high": 1.0}, {"log_ratio_clamp": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 15.0])
def test_every_bound_and_every_size_of_log_ratio(level, outside, options, scale, device):
    x = rows_of(scale * torch.linspace(-1, 1.1, 7 * 33).reshape(7, 33), device)
    mask = torch.arange(33, device=device) % 5 != 1
    assert_close_to_reference(partial(weights, mask=mask.expand(7, 33), level=level, outside=outside, **options), x)


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 31, 33, 64, 4099])
def test_every_length_down_to_the_last_token(n, backend, device):
    d = torch.linspace(-1, 1, 4099, device=device)[None]
    whole = weights(rpp, rows_of(d, device)).weights
    x = rows_of(d[:, :n], device)
    assert_close(weights(rpp, x).weights, whole[:, :n], rtol=1e-6, atol=0)
    got = weights(rpp, x, level="geometric").weights
    assert_close(got, d[:, :n].mean().exp().expand(1, n), rtol=1e-5, atol=0)


@pytest.mark.parametrize("d", [-1.5, -0.2, 0.0, 0.3, 0.6, 3.0])
@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_a_sequence_of_one_token_has_one_weight_at_every_level(d, outside, backend, device):
    results = [weights(rpp, rows_of([[d]], device), level=level, outside=outside, low=0.5) for level in LEVELS]
    assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


def test_bounds_belong_to_the_inside(backend, device):
    x = rows_of([[0.0, 1.0, -1.0]], device)  # e^0 is 1 exactly
    for low, high in ((1.0, 1.0), (0.0, 1.0), (1.0, math.inf)):
        result = weights(rpp, x, outside="mask", low=low, high=high)
        assert result.weights[0, 0] == 1
    assert weights(rpp, x, outside="mask", low=1.0, high=1.0).weights.tolist() == [[1, 0, 0]]


@every_level
@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_nan_is_not_lost_and_not_spread_to_other_sequences(level, outside, backend, device):
    x = rows_of([[0.1, math.nan, 0.2], [0.1, 0.2, 0.3]], device)
    got = weights(rpp, x, level=level, outside=outside).weights.isnan().tolist()
    assert got == [[level != "token", True, level != "token"], [False] * 3]


@every_level
def test_sums_of_parts_add_up_to_those_of_the_whole(level, backend, device):
    batch = make_batch(6, 11, device=device)
    x = {"old_logps": batch["old_logps"], "sampling_logps": batch["ref_logps"]}
    mask = batch["completion_mask"]
    call = partial(weights, rpp, level=level, outside="mask", low=0.8, high=1.2)
    whole = call(x, mask)
    parts = [call({k: v[i : i + 2] for k, v in x.items()}, mask[i : i + 2]) for i in (0, 2, 4)]
    assert_close(sum(part.stats for part in parts), whole.stats)
    assert {s.dtype for s in whole.stats} == {torch.float64}
    assert whole.stats.num_tokens == mask.sum()
    assert_close(whole.stats.weights, whole.weights.double().sum(), rtol=1e-6, atol=0)
    d = torch.where(mask, x["sampling_logps"] - x["old_logps"], 0.0).double()
    assert_close(whole.stats.kl, d.sum(), rtol=1e-5, atol=1e-5)
    dropped = (mask & (whole.weights == 0)).sum()
    assert whole.stats.outside_low + whole.stats.outside_high == dropped


def test_the_same_policy_has_weights_of_1(backend, device):
    x = make_batch(3, 5, device=device)
    for level in LEVELS:
        result = rpp.rollout_weights(x["old_logps"], x["old_logps"], x["completion_mask"], level=level)
        assert_close(result.weights, x["completion_mask"].float(), rtol=0, atol=0)
        assert result.stats.kl == result.stats.outside_low == result.stats.outside_high == 0


def test_weights_carry_the_sampling_policy_to_the_old_one(backend, device):
    # E_q[p / q f] = E_p[f], for tokens that are drawn with q and all of one sequence each.
    p, q = torch.tensor([0.5, 0.3, 0.2], device=device), torch.tensor([0.2, 0.5, 0.3], device=device)
    f = torch.tensor([1.0, -2.0, 5.0], device=device)
    rho = rpp.rollout_weights(p.log()[:, None], q.log()[:, None], level="sequence", high=math.inf).weights[:, 0]
    assert_close((q * rho * f).sum(), (p * f).sum())


def test_dtypes_may_differ(backend, device):
    old, sampling = torch.randn(2, 4, device=device), torch.randn(2, 4, device=device).bfloat16()
    got = rpp.rollout_weights(old, sampling, high=math.inf).weights
    assert got.dtype == torch.float32
    assert_close(got, (old - sampling.float()).exp())


@pytest.mark.kernels
def test_a_forward_mode_derivative_is_refused_rather_than_zero(device):
    x = torch.zeros(1, 2, device=device)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda y: rpp.rollout_weights(y, x).weights, (x,), (x,))


LOGPS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"old_logps": LOGPS.int()}, "old_logps: want a float32"),
        ({"old_logps": LOGPS[0]}, "sampling_logps: want .* of 1 dimension"),
        ({"old_logps": LOGPS[0], "sampling_logps": LOGPS[0]}, r"old_logps: want \(B, S\), or \(T,\) together with"),
        ({"sampling_logps": LOGPS.T}, r"sampling_logps: want the shape \(2, 3\) of old_logps"),
        ({"sampling_logps": LOGPS.to("meta")}, "sampling_logps: want a tensor on cpu"),
        ({"old_logps": LOGPS.clone().requires_grad_()}, "old_logps: want a constant"),
        ({"sampling_logps": LOGPS.clone().requires_grad_()}, "sampling_logps: want a constant"),
        ({"completion_mask": LOGPS}, "completion_mask: want a bool tensor"),
        ({"level": "tokens"}, "level: want one of 'token', 'sequence', 'geometric', got 'tokens'"),
        ({"outside": "clip"}, "outside: want one of 'truncate', 'mask', got 'clip'"),
        ({"low": -0.1}, "low: want a number from 0"),
        ({"low": None}, "low: want a number from 0"),
        ({"low": 3.0}, "high: want a number from low, which is 3.0, got 2.0"),
        ({"high": math.nan}, "high: want a number from low"),
        ({"high": None}, "high: want a number from low"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp: want a positive number"),
        ({"cu_seqlens": torch.tensor([0, 2])}, r"old_logps: want \(T,\) when cu_seqlens is given"),
    ],
)
def test_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.rollout_weights(**{"old_logps": LOGPS, "sampling_logps": LOGPS, **changes})
