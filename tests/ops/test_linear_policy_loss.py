"""linear_policy_loss with every surrogate, level, KL and entropy is policy_loss of linear_logps; see test_linear.py."""

import math
from functools import partial

import pytest
import torch
from calls import BOUNDS, LEVELS, SURROGATES
from test_linear import LEARNED, REDUCTIONS, V, batch, chunks_of, linear_policy_loss, tokens_multiplied, two_calls

import rpp_kernels as rpp
from rpp_kernels.testing import assert_close_to_reference, evaluate

pytestmark = pytest.mark.kernels
assert tokens_multiplied  # a fixture

assert_close = torch.testing.assert_close
assert_close_in_double = partial(assert_close, rtol=1e-11, atol=1e-11)

every_surrogate = pytest.mark.parametrize(
    ("name", "level"), [(name, level) for name, levels in SURROGATES.items() for level in levels]
)
# As in test_linear.py: sequences of 7 to 13 tokens.
CHUNKS = {
    "whole": {},
    "3": {"chunk_bytes": chunks_of(3)},
    "3 all rows": {"chunk_bytes": chunks_of(3), "skip_rows": False},
}
every_chunk = pytest.mark.parametrize("how", CHUNKS.values(), ids=CHUNKS)
KL = {
    "no KL": {},
    "k3": {"beta": 0.3},
    "k2 corrected": {"beta": 0.3, "kl_estimator": "k2", "kl_bias_correction": True},
    "k3 with the gradient of k2": {"beta": 0.3, "kl_gradient": "k2", "kl_clamp": 0.2},
    "k1 constant, corrected": {"beta": 0.3, "kl_estimator": "k1", "kl_gradient": "none", "kl_bias_correction": True},
}


def batch_with_extras(**options):
    x = batch(**options)
    x["weights"] = x["rewards"].sigmoid()
    near = x["old_logps"].double() + 0.2 * x["kl"].double() if "old_logps" in x else -x["kl"].double().exp()
    x["ref_logps"] = near.to(x["weights"])
    for name in ("weights", "ref_logps"):
        x[name] = torch.where(x["completion_mask"], x[name], math.nan)
    return x


def called(f, x, function=linear_policy_loss, extras=("weights", "ref_logps"), **options):
    return function(f, x, **options | {name: x[name] for name in extras})


def assert_equal_to_two_calls(x, learned, **options):
    got, want = (
        evaluate(lambda x, f=f: called(rpp, x, f, **options), x, learned) for f in (linear_policy_loss, two_calls)
    )
    assert_close_in_double(got, want)


@every_surrogate
@every_chunk
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("kl", KL.values(), ids=KL)
@pytest.mark.parametrize("learned", [LEARNED[:3], LEARNED[:1]], ids=["learned", "frozen"])
def test_it_is_the_two_calls_in_value_and_gradient(name, level, kl, entropy_coef, how, learned, device):
    x = batch_with_extras(device=device)
    extras = ("weights", "ref_logps") if kl else ("weights",)
    options = {"surrogate": name, "importance_sampling_level": level, "entropy_coef": entropy_coef, **kl, **how}
    options |= BOUNDS.get(name, {})
    assert_equal_to_two_calls(x, learned, extras=extras, **options)


@every_surrogate
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_it_is_the_two_calls_in_every_reduction(name, level, reduction, packed, old, device):
    x = batch_with_extras(packed=packed, old=old, device=device)
    options = {"surrogate": name, "importance_sampling_level": level, "reduction": reduction, **REDUCTIONS[reduction]}
    options |= {"beta": 0.3, "kl_bias_correction": True, "entropy_coef": 0.1, "chunk_bytes": chunks_of(3)}
    assert_equal_to_two_calls(x, LEARNED[:3], **options)
    assert_equal_to_two_calls(x, LEARNED[:1], **options)


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_spec(name, level, dtype, device):
    x = batch_with_extras(dtype=dtype, device=device)
    options = {"surrogate": name, "importance_sampling_level": level, "beta": 0.1, "entropy_coef": 0.1}
    options |= BOUNDS.get(name, {})
    call = partial(called, chunk_bytes=chunks_of(16), **options)
    # Half a unit in the last place of one token's loss, of which the mean may be near 0.
    assert_close_to_reference(call, x, LEARNED[:3], atol=6e-8)


@pytest.mark.parametrize("level", LEVELS)
def test_a_token_without_advantage_is_skipped_unless_a_kl_or_an_entropy_moves_it(level, tokens_multiplied, device):
    x = batch_with_extras(device=device)
    x["advantages"] = torch.zeros_like(x["advantages"])
    n = int(x["completion_mask"].sum())
    for kl, entropy, moved in (({}, 0.0, 0), ({"beta": 0.1}, 0.0, n), ({}, 0.1, n), ({"beta": 0.0}, 0.0, 0)):
        tokens_multiplied.clear()
        options = {"importance_sampling_level": level, "entropy_coef": entropy, **kl}
        extras = ("weights", "ref_logps") if kl else ("weights",)
        evaluate(partial(called, rpp, extras=extras, **options), x, LEARNED[:3])
        assert tokens_multiplied["weight"] == moved


@pytest.mark.parametrize("level", LEVELS)
def test_a_weight_of_0_leaves_a_token_out(level, tokens_multiplied, device):
    x = batch_with_extras(device=device)
    x["weights"] = torch.zeros_like(x["weights"])
    got = evaluate(partial(called, rpp, importance_sampling_level=level, extras=("weights",)), x, LEARNED[:3])
    assert tokens_multiplied["weight"] == 0
    assert all((got[f"d{k}"] == 0).all() for k in LEARNED[:3])


def test_an_entropy_bonus_through_a_frozen_head_makes_no_logits_again(tokens_multiplied, device):
    x = batch(device=device)
    evaluate(partial(linear_policy_loss, rpp, entropy_coef=0.1), x, LEARNED[:1])
    n = int(x["completion_mask"].sum())
    assert tokens_multiplied == {"logits": n, "hidden_states": n}


ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surrogate": "ppo"}, "surrogate: want one of"),
        ({"surrogate": "cispo", "dual_clip": 2.0}, "dual_clip: want None with surrogate 'cispo'"),
        ({"surrogate": "gmpo"}, "importance_sampling_level: want 'sequence'"),
        ({"beta": 0.1}, "beta: want 0 without ref_logps"),
        ({"ref_logps": ZEROS.T}, r"ref_logps: want the shape \(2, 3\) of target_ids"),
        ({"weights": ZEROS - 1}, "weights: want finite numbers from 0"),
        ({"entropy_coef": math.inf}, "entropy_coef: want a finite number"),
    ],
)
@pytest.mark.parametrize("f", [rpp])
def test_it_refuses_what_policy_loss_refuses(f, changes, words, device):
    with pytest.raises(ValueError, match=words):
        f.linear_policy_loss(torch.zeros(2, 3, 4), torch.zeros(V, 4), ZEROS.long(), ZEROS, ZEROS, **changes)
