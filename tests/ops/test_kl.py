"""kl_penalty beyond test_every_op.py: every pair of estimators, both clamps, the neighbourhood of 0, errors."""

import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels.testing import assert_close_to_reference, evaluate

ESTIMATORS = ("k1", "k2", "k3", "abs")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

assert_close = torch.testing.assert_close


def pair(d, device="cpu", dtype=torch.float32):
    """Log-probs whose difference is d, exactly: the reference policy has the other half."""
    d = torch.as_tensor(d, dtype=dtype, device=device)
    return {"logps": d / 2, "ref_logps": -d / 2}


def kl(f, x, mask=None, **options):
    return f.kl_penalty(x["logps"], x["ref_logps"], mask, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("gradient", [None, "none", *ESTIMATORS])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kl_clamp", [None, 0.3])
def test_every_pair_of_estimators(estimator, gradient, kl_clamp, device):
    x = pair(torch.linspace(-3, 3, 1001), device)
    call = partial(kl, estimator=estimator, gradient=gradient, kl_clamp=kl_clamp)
    assert_close_to_reference(call, x, [] if gradient == "none" else ["logps", "ref_logps"])


def test_gradient_none_is_a_constant_in_effect(backend, device):
    x = {k: v.requires_grad_() for k, v in pair([1.0, -1.0], device).items()}
    out = kl(rpp, x, gradient="none")
    assert_close(out.detach(), torch.tensor([1.0, -1.0], device=device))
    if out.requires_grad:
        assert (torch.autograd.grad(out.sum(), x["logps"])[0] == 0).all()


@pytest.mark.kernels
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 19.0, 100.0])
def test_every_size_of_log_ratio(estimator, dtype, scale, device):
    d = scale * torch.linspace(-1, 1, 517, dtype=torch.float64)
    x = {k: v.to(dtype) for k, v in pair(d, device, torch.float64).items()}
    # A few units more: k3 is some e^20, whose last place differs by the rounding of -d.
    assert_close_to_reference(partial(kl, estimator=estimator), x, ["logps", "ref_logps"])


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 31, 33, 64, 4099])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_length_down_to_the_last_token(n, estimator, backend, device):
    # All but the last vector are whole: what a token is worth must not depend on where it stands.
    d = torch.linspace(-2, 2, 4099, device=device)
    whole = kl(rpp, pair(d, device), estimator=estimator)
    assert_close(kl(rpp, pair(d[:n], device), estimator=estimator), whole[:n], rtol=1e-6, atol=0)


@pytest.mark.parametrize("exponent", [-4, -8, -12, -20, -40])
def test_k3_keeps_its_digits_near_0(exponent, backend, device):
    # k3 = d^2 / 2 - d^3 / 6 + d^4 / 24 - ...; exp(-d) - 1 + d would have lost all of it below 2^-12.
    d = 2.0**exponent
    for sign in (1, -1):
        got = kl(rpp, pair([sign * d], device), estimator="k3").item()
        expected = math.fsum((-sign * d) ** k / math.factorial(k) for k in range(2, 9))
        assert got == pytest.approx(expected, rel=2.0**-22 if backend != "reference" else d / 8 + 2.0**-11)


def test_k2_k3_and_abs_are_never_below_0_and_0_where_the_policies_agree(backend, device):
    d = torch.linspace(-1e-3, 1e-3, 2001, device=device)
    for estimator in ("k2", "k3", "abs"):
        assert (kl(rpp, pair(d, device), estimator=estimator) >= 0).all()
        x = {k: v.requires_grad_() for k, v in pair([0.0], device).items()}
        out = kl(rpp, x, estimator=estimator)
        assert out.item() == 0
        assert torch.autograd.grad(out.sum(), x["logps"])[0].item() == 0


@pytest.mark.kernels
@pytest.mark.parametrize(
    "options", [{"log_ratio_clamp": 1.0}, {"kl_clamp": 1.5}, {"log_ratio_clamp": 2, "kl_clamp": 1}]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clamps_in_value_and_gradient_and_at_the_very_bound(estimator, options, device):
    d = torch.cat([torch.linspace(-3, 3, 100), torch.tensor([-2.0, -1.5, -1.0, 1.0, 1.5, 2.0])])
    assert_close_to_reference(partial(kl, estimator=estimator, **options), pair(d, device), ["logps", "ref_logps"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_is_not_lost(estimator, backend, device):
    x = {"logps": torch.tensor([-1.0, math.nan, -2.0], device=device), "ref_logps": torch.zeros(3, device=device)}
    for options in ({}, {"kl_clamp": 1.0}):
        assert kl(rpp, x, estimator=estimator, **options).isnan().tolist() == [False, True, False]


@pytest.mark.kernels
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_infinite_log_probs_are_those_of_the_spec(estimator, device):
    x = {
        "logps": torch.tensor([-math.inf, -1.0, -1e30, -1.0], device=device),
        "ref_logps": torch.tensor([-1.0, -math.inf, -1.0, -1e30], device=device),
    }
    assert_close_to_reference(partial(kl, estimator=estimator), x)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_shape_of_at_least_one_dimension(shape, backend, device):
    x = pair(torch.linspace(-1, 1, math.prod(shape)).reshape(shape), device)
    if not shape:
        with pytest.raises(ValueError, match=r"logps: want .* dimension"):
            kl(rpp, x)
        return
    got = evaluate(partial(kl, rpp, estimator="k2"), x, ["logps", "ref_logps"])
    assert {y.shape for y in got.values()} == {torch.Size(shape)}
    assert_close(got["dlogps"], -got["dref_logps"])


def test_dtypes_may_differ_and_each_gradient_has_its_own(backend, device):
    x = {"logps": torch.randn(4, device=device), "ref_logps": torch.randn(4, device=device).bfloat16()}
    got = evaluate(partial(kl, rpp, estimator="k2"), x, ["logps", "ref_logps"])
    assert (got["result"].dtype, got["dlogps"].dtype, got["dref_logps"].dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    assert_close(got["result"], 0.5 * (x["logps"] - x["ref_logps"].float()) ** 2)


LOGPS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logps": LOGPS.int()}, "logps: want a float32"),
        ({"logps": 0.0}, "logps: want a float32.* got float 0.0"),
        ({"ref_logps": LOGPS[0]}, "ref_logps: want .* of 2 dimension"),
        ({"ref_logps": LOGPS.T}, r"ref_logps: want the shape \(2, 3\) of logps"),
        ({"ref_logps": LOGPS.to("meta")}, "ref_logps: want a tensor on cpu"),
        ({"completion_mask": LOGPS}, "completion_mask: want a bool tensor"),
        ({"completion_mask": LOGPS[0].bool()}, r"completion_mask: want the shape \(2, 3\) of logps"),
        ({"estimator": "k4"}, "estimator: want one of 'k1', 'k2', 'k3', 'abs', got 'k4'"),
        ({"estimator": "none"}, "estimator: want one of"),
        ({"gradient": "k4"}, "gradient: want one of 'none', 'k1', 'k2', 'k3', 'abs'"),
        ({"log_ratio_clamp": 0}, "log_ratio_clamp: want a positive number"),
        ({"log_ratio_clamp": math.nan}, "log_ratio_clamp: want a positive number"),
        ({"log_ratio_clamp": "20"}, "log_ratio_clamp: want a positive number"),
        ({"log_ratio_clamp": None}, "log_ratio_clamp: want a positive number"),
        ({"kl_clamp": -1.0}, "kl_clamp: want a positive number or None"),
        ({"kl_clamp": torch.tensor(1.0)}, "kl_clamp: want a positive number or None"),
    ],
)
def test_kl_penalty_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.kl_penalty(**{"logps": LOGPS, "ref_logps": LOGPS, **changes})
