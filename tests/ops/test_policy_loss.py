"""policy_loss and value_loss beyond test_every_op.py: every reduction, clip and level, statistics, errors."""

import dataclasses
import inspect
import math
from functools import partial

import pytest
import torch
from calls import BOUNDS, LEVELS
from calls import SURROGATES as CALLED

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.ops.policy_loss import OPTIONS, SURROGATES
from rpp_kernels.reference.policy_loss import SURROGATES as SPEC_SURROGATES
from rpp_kernels.testing import assert_close_to_reference, evaluate, make_batch

assert_close = torch.testing.assert_close

DTYPES = [torch.float32, torch.bfloat16]  # the others: test_every_op.py
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none")
every_surrogate = pytest.mark.parametrize(
    ("name", "level"), [(name, level) for name, levels in CALLED.items() for level in levels]
)
both_levels = pytest.mark.parametrize("level", ["token", "sequence"])


def f32(*rows, device="cpu"):
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32, device=device)


def norm(reduction):
    return {"max_completion_length": 11} if reduction == "seq-mean-token-sum-norm" else {}


def policy(f, x, **options):
    tensors = x["logps"], x["old_logps"], x["advantages"], x["completion_mask"]
    return f.policy_loss(*tensors, cu_seqlens=x.get("cu_seqlens"), **options)


def critic(f, x, **options):
    tensors = x["values"], x["old_values"], x["returns"], x["completion_mask"]
    return f.value_loss(*tensors, cu_seqlens=x.get("cu_seqlens"), **options)


# ---------------------------------------------------------------- against the spec


@pytest.mark.kernels
@both_levels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_in_every_reduction(level, reduction, packed, dtype, device):
    x = make_batch(7, 50, packed=packed, dtype=dtype, device=device)
    call = partial(policy, reduction=reduction, importance_sampling_level=level, dual_clip=1.5, **norm(reduction))
    assert_close_to_reference(call, x, ["logps"])


@pytest.mark.kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("epsilon", [None, 0.2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_loss_in_every_reduction(reduction, epsilon, packed, dtype, device):
    x = make_batch(7, 50, packed=packed, dtype=dtype, device=device)
    assert_close_to_reference(partial(critic, reduction=reduction, epsilon=epsilon, **norm(reduction)), x, ["values"])


@pytest.mark.kernels
@both_levels
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_low": 0.0, "epsilon_high": 0.0},
        {"epsilon_low": 1.0, "epsilon_high": math.inf},
        {"epsilon_low": 0.1, "epsilon_high": 0.28},
        {"dual_clip": 1.1},
        {"dual_clip": 1.1, "epsilon_high": 3.0},
        {"log_ratio_clamp": 0.1},
        {"log_ratio_clamp": 0.1, "epsilon_low": 0.01, "epsilon_high": 0.01},
        {"num_items_in_batch": 1000},
    ],
    ids=str,
)
def test_every_clip(level, options, device):
    x = make_batch(7, 50, device=device)
    assert_close_to_reference(partial(policy, importance_sampling_level=level, **options), x, ["logps"])


@pytest.mark.kernels
@both_levels
@pytest.mark.parametrize("scale", [0.0, 1e-4, 5.0, 100.0])
def test_every_size_of_log_ratio(level, scale, device):
    x = make_batch(7, 50, device=device)
    x["logps"] = x["old_logps"] + scale * x["kl"]
    call = partial(policy, importance_sampling_level=level, reduction="none")
    assert_close_to_reference(call, x, ["logps"])


@pytest.mark.kernels
@pytest.mark.parametrize("S", [1, 3, 15, 16, 17, 33, 64, 4095, 4096, 4097])
@both_levels
def test_every_length(S, level, device):
    x = make_batch(3, S, device=device)
    # A mean of losses of both signs may be near 0: atol is half a unit in the last place of one token's loss.
    call = partial(policy, importance_sampling_level=level)
    assert_close_to_reference(call, x, ["logps"], atol=6e-8)
    assert_close_to_reference(critic, x, ["values"])


@pytest.mark.kernels
@pytest.mark.parametrize(
    "lengths", [[0, 1, 511, 0, 513, 1200, 2, 0], [7] * 200, [0, 2500, 0]], ids=["mixed", "short", "long"]
)
@both_levels
def test_sequences_that_share_blocks_of_tokens_and_blocks_that_share_a_sequence(lengths, level, backend, device):
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    T, B = int(cu_seqlens[-1]), len(lengths)
    old_logps, d = torch.randn(T, device=device) / 4 - 1, torch.randn(T, device=device) / 8
    mask = torch.rand(T, device=device) < 0.1
    x = {"logps": old_logps + d, "old_logps": old_logps, "advantages": torch.randn(B, 1, device=device)}
    call = {
        "completion_mask": mask,
        "cu_seqlens": cu_seqlens,
        "importance_sampling_level": level,
        "num_items_in_batch": 1,
    }
    got, want = rpp.policy_loss(**x, **call), reference.policy_loss(**x, **call)
    assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-4)
    assert_close(got.stats.num_tokens, want.stats.num_tokens, rtol=0, atol=0)
    assert_close(got.stats.num_sequences, want.stats.num_sequences, rtol=0, atol=0)


# ---------------------------------------------------------------- by hand


@both_levels
@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "passes", "fate"),
    [
        (1.1, 2.0, {}, -2.2, True, None),
        (1.5, 2.0, {}, -2.4, False, "clipped_high"),
        (0.5, 2.0, {}, -1.0, True, None),  # too low for a good token: pull it back
        (0.5, -2.0, {}, 1.6, False, "clipped_low"),
        (1.5, -2.0, {}, 3.0, True, None),
        (4.0, -2.0, {"dual_clip": 3.0}, 6.0, False, "dual_clipped"),
        (4.0, 2.0, {"dual_clip": 3.0}, -2.4, False, "clipped_high"),
        (0.5, -2.0, {"epsilon_low": 0.6}, 1.0, True, None),
        (1.5, 0.0, {}, 0.0, True, None),
    ],
)
def test_one_token(level, ratio, advantage, options, loss, passes, fate, backend, device):
    old_logps = f32([[-4]], device=device)
    logps = (old_logps + math.log(ratio)).requires_grad_()
    advantages = f32([[advantage]], device=device)
    out = rpp.policy_loss(logps, old_logps, advantages, importance_sampling_level=level, **options)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    (dlogps,) = torch.autograd.grad(out.loss, logps)
    assert dlogps.item() == pytest.approx(-ratio * advantage if passes else 0.0, rel=1e-5)
    fates = {name: getattr(out.stats, name).item() for name in ("clipped_low", "clipped_high", "dual_clipped")}
    assert fates == {name: float(name == fate) for name in fates}


def test_stats_are_sums_over_valid_tokens(backend, device):
    ratios = f32([1.5, 0.5, 4.0], [0.5, 2.0, 99.0], [99.0, 99.0, 99.0], device=device)
    advantages = f32([1, -1, -1], [1, -1, 99], [99, 99, 99], device=device)
    mask = f32([1, 1, 1], [1, 1, 0], [0, 0, 0], device=device).bool()
    stats = rpp.policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, mask, dual_clip=3.0).stats
    expected = rpp.PolicyStats(5.0, 2.0, 1.0, 1.0, 1.0, 8.5, -math.log(3), 0.0)
    assert [x.item() for x in stats] == pytest.approx(list(expected), rel=1e-6)
    assert {(x.dtype, x.dim(), x.device.type, x.requires_grad) for x in stats} == {(torch.float64, 0, device, False)}


@pytest.mark.parametrize("loss", [policy, critic])
def test_stats_of_micro_batches_add_up_and_so_do_their_losses(loss, backend, device):
    x = make_batch(6, 20, device=device)
    name = "logps" if loss is policy else "values"
    tokens, whole = x["completion_mask"].sum(), evaluate(partial(loss, rpp), x, [name])
    parts = [{k: v[i : i + 2] for k, v in x.items()} for i in (0, 2, 4)]
    evaluated = [evaluate(partial(loss, rpp, num_items_in_batch=tokens), part, [name]) for part in parts]
    assert_close(sum(part["loss"] for part in evaluated), whole["loss"])
    assert_close(torch.cat([part[f"d{name}"] for part in evaluated]), whole[f"d{name}"])
    stats = sum(loss(rpp, part).stats for part in parts)
    assert_close(stats, loss(rpp, x).stats)


@pytest.mark.parametrize("loss", [policy, critic])
def test_reduced_losses_are_those_of_the_tokens(loss, backend, device):
    x = make_batch(6, 20, dtype=torch.float64, device=device)
    x["completion_mask"][2] = False
    mask = x["completion_mask"]
    tokens = loss(rpp, x, reduction="none").loss
    n, sequences = mask.sum(1).clamp(min=1), mask.any(1).sum()
    assert_close(loss(rpp, x, reduction="token-mean").loss, tokens.sum() / mask.sum())
    assert_close(loss(rpp, x, reduction="seq-mean-token-mean").loss, (tokens.sum(1) / n).sum() / sequences)
    assert_close(loss(rpp, x, reduction="seq-mean-token-sum").loss, tokens.sum() / sequences)
    summed = loss(rpp, x, reduction="seq-mean-token-sum-norm", max_completion_length=20)
    assert_close(summed.loss, tokens.sum() / sequences / 20)


@pytest.mark.parametrize("loss", [policy, critic])
@pytest.mark.parametrize("reduction", REDUCTIONS[:4])
def test_num_items_in_batch_is_a_number_or_a_tensor(loss, reduction, backend, device):
    x = make_batch(6, 20, device=device)
    call = partial(loss, rpp, x, reduction=reduction, **norm(reduction))
    as_number = call(num_items_in_batch=7).loss
    for items in (torch.tensor(7, device=device), torch.tensor(7.0, device=device), 7.0):
        assert_close(call(num_items_in_batch=items).loss, as_number)
    long = {"max_completion_length": 1 << 28} if reduction == "seq-mean-token-sum-norm" else {}
    for dtype in (torch.uint8, torch.int32, torch.float16):  # in which the product of both would overflow
        items = torch.tensor(100, dtype=dtype, device=device)
        assert_close(call(**long, num_items_in_batch=items).loss, call(**long, num_items_in_batch=100).loss)
    stats = call().stats
    count = stats.num_tokens if reduction == "token-mean" else stats.num_sequences
    assert_close(call(num_items_in_batch=count).loss, call().loss)


@pytest.mark.parametrize("packed", [False, True])
@both_levels
def test_an_advantage_for_each_sequence_is_that_of_its_tokens(packed, level, backend, device):
    x = make_batch(5, 9, packed=packed, device=device)
    if packed:
        x["advantages"] = torch.repeat_interleave(x["scores"], x["cu_seqlens"].diff())
    else:
        x["advantages"] = x["scores"][:, None].expand(5, 9)
    call = partial(policy, rpp, importance_sampling_level=level)
    for each in [x["scores"][:, None]] + [x["scores"]] * (not packed):
        got = evaluate(call, {**x, "advantages": each}, ["logps"])
        assert_close(got, evaluate(call, x, ["logps"]))


def test_as_many_packed_tokens_as_sequences_is_not_ambiguous(backend, device):
    # Two tokens of the first sequence, none of the second: (T,) and (B,) have the same shape, (B, 1) is neither.
    zeros, cu_seqlens = torch.zeros(2, device=device), torch.tensor([0, 2, 2], device=device)
    call = partial(rpp.policy_loss, zeros, zeros, reduction="none", cu_seqlens=cu_seqlens)
    assert call(f32([1, 5], device=device)).loss.tolist() == [-1, -5]
    assert call(f32([[1], [5]], device=device)).loss.tolist() == [-1, -1]


def test_one_sequence_of_one_token_and_square_batches_are_not_ambiguous(backend, device):
    # B == S: (B,) is for sequences, (B, 1) too, and (B, S) for tokens.
    zeros = torch.zeros(2, 2, device=device)
    call = partial(rpp.policy_loss, zeros, zeros, reduction="none")
    assert call(f32([1, 5], device=device)).loss.tolist() == [[-1, -1], [-5, -5]]
    assert call(f32([[1], [5]], device=device)).loss.tolist() == [[-1, -1], [-5, -5]]
    assert call(f32([1, 2], [3, 4], device=device)).loss.tolist() == [[-1, -2], [-3, -4]]


@both_levels
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_policy_gradient_is_that_of_reinforce(level, reduction, backend, device):
    x = make_batch(5, 9, dtype=torch.float64, device=device)
    advantages = x["scores"][:, None].expand(5, 9).contiguous()
    logps = x["logps"].requires_grad_()
    mask = x["completion_mask"]
    call = partial(rpp.policy_loss, logps, logps.detach(), advantages, mask, reduction=reduction, **norm(reduction))
    loss, stats = call(importance_sampling_level=level)
    weight = call(importance_sampling_level="token")[0]
    (got,) = torch.autograd.grad(loss.sum(), logps)
    (want,) = torch.autograd.grad(weight.sum(), logps)
    assert_close(got, want)
    assert_close(stats.ratio, stats.num_tokens)
    assert stats.approx_kl == 0


@both_levels
@pytest.mark.parametrize("d", [-1e4, 1e4, -math.inf])
def test_runaway_ratios_stay_finite(level, d, backend, device):
    for advantage in (-1.0, 1.0):
        x = {"logps": f32([d, -1, d], device=device)[None], "advantages": torch.full((1, 3), advantage, device=device)}

        def call(x):
            zeros = torch.zeros_like(x["logps"])
            return rpp.policy_loss(x["logps"], zeros, x["advantages"], importance_sampling_level=level)

        got = evaluate(call, x, ["logps"])
        assert all(y.isfinite().all() for name, y in got.items() if name != "stats.approx_kl")


@both_levels
@pytest.mark.parametrize("name", ["logps", "old_logps", "advantages"])
def test_nan_is_not_lost(level, name, backend, device):
    x = make_batch(2, 5, device=device)
    x["completion_mask"][:] = True
    x[name][1, 2] = math.nan
    tokens = policy(rpp, x, reduction="none", importance_sampling_level=level).loss.isnan()
    assert tokens[1, 2]
    assert not tokens[0].any()
    out = policy(rpp, x, importance_sampling_level=level)
    assert out.loss.isnan()
    if name != "advantages":
        assert out.stats.ratio.isnan()
        assert out.stats.approx_kl.isnan()


@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
def test_nan_is_not_lost_by_the_critic(name, backend, device):
    x = make_batch(2, 5, device=device)
    x["completion_mask"][:] = True
    x[name][1, 2] = math.nan
    assert critic(rpp, x, reduction="none").loss.isnan().nonzero().tolist() == [[1, 2]]
    assert critic(rpp, x).loss.isnan()


def test_values_within_epsilon_are_never_counted_as_clipped(backend, device):
    # old + (V - old) may differ from V in the last bit: that must not look like a clip.
    x = make_batch(10, 100, device=device)
    x["values"] = x["old_values"] + 0.19 * x["kl"].tanh()
    loss, stats = critic(rpp, x, epsilon=0.2)
    assert stats.clipped == 0
    assert_close(loss, critic(rpp, x, epsilon=None).loss)


@both_levels
def test_gradient_of_tokens_that_nobody_asked_for(level, backend, device):
    x = make_batch(3, 5, dtype=torch.float64, device=device)
    logps = x["logps"] = x["old_logps"].clone().requires_grad_()  # where nothing is clipped
    loss = policy(rpp, x, reduction="none", importance_sampling_level=level).loss
    weight = torch.zeros_like(loss)
    weight[1, 0] = 2.0
    (got,) = torch.autograd.grad(loss, logps, weight)
    moved = (got != 0).any(1).tolist()
    assert moved == [False, True, False]
    want = policy(reference, x, reduction="none", importance_sampling_level=level).loss
    assert_close(got, torch.autograd.grad(want, logps, weight)[0])


def test_loss_is_backward_through_in_one_line(backend, device):
    x = make_batch(3, 5, device=device)
    logps = x["logps"].requires_grad_()
    loss = policy(rpp, x).loss
    (3 * loss).backward()
    assert loss.dim() == 0
    assert_close(logps.grad, 3 * torch.autograd.grad(policy(rpp, x).loss, logps)[0])


# ---------------------------------------------------------------- surrogates, KL and entropy


def test_options_and_defaults_of_surrogates_are_those_of_the_spec():
    assert list(SURROGATES) == list(SPEC_SURROGATES) == list(CALLED)
    for name, (options, levels) in SURROGATES.items():
        _, *spec = inspect.signature(SPEC_SURROGATES[name]).parameters.values()
        assert [(k, option.default) for k, option in options.items()] == [(p.name, p.default) for p in spec]
        assert set(levels) == set(CALLED[name])
        assert len(options) <= 4
        assert not options or name == "clip" or name in BOUNDS
        for function in (rpp.policy_loss, rpp.linear_policy_loss):
            assert set(options) <= inspect.signature(function).parameters.keys()
        assert f'"{name}"' in rpp.policy_loss.__doc__
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(rpp.Recipe)}  # whose loss_options passes them on


@pytest.mark.kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@every_surrogate
def test_every_surrogate_with_everything_in_every_reduction(name, level, estimator, packed, reduction, device):
    x = make_batch(7, 50, packed=packed, device=device)
    x["weights"] = x["rewards"].sigmoid()

    def call(f, x):
        extras = {"weights": x["weights"], "ref_logps": x["ref_logps"], "entropy": x["kl"]}
        how = {"surrogate": name, "importance_sampling_level": level, "reduction": reduction, **norm(reduction)}
        kl = {"beta": 0.3, "kl_estimator": estimator, "kl_clamp": 0.1, "kl_bias_correction": True}
        return policy(f, x, **extras, **how, **kl, entropy_coef=0.1)

    assert_close_to_reference(call, x, ["logps", "kl"])


@pytest.mark.kernels
@pytest.mark.parametrize("gradient", [None, "none", "k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_the_kl_in_the_loss_is_kl_penalty(level, corrected, estimator, gradient, device):
    x = make_batch(7, 50, dtype=torch.float64, device=device)
    x["advantages"] = torch.zeros_like(x["advantages"])
    x["logps"][0, :9] += 3.0

    def composed(x):
        how = {"estimator": estimator, "gradient": gradient, "log_ratio_clamp": 1.0, "kl_clamp": 0.5}
        kl = rpp.kl_penalty(x["logps"], x["ref_logps"], x["completion_mask"], **how)
        ratio = -policy(
            reference,
            x | {"advantages": torch.ones_like(x["advantages"])},
            surrogate="clip",
            epsilon_low=1.0,
            epsilon_high=math.inf,
            importance_sampling_level=level,
            log_ratio_clamp=1.0,
            reduction="none",
        ).loss
        return 0.7 * kl * (ratio if corrected else 1.0)

    def ours(x):
        how = {"kl_estimator": estimator, "kl_gradient": gradient, "log_ratio_clamp": 1.0, "kl_clamp": 0.5}
        how |= {"importance_sampling_level": level, "kl_bias_correction": corrected, "reduction": "none"}
        return policy(rpp, x, ref_logps=x["ref_logps"], beta=0.7, **how).loss

    if gradient == "none" and not corrected:  # kl_penalty has no gradient to compare with
        assert (evaluate(ours, x, ["logps"])["dlogps"] == 0).all()
        assert_close(ours(x), composed(x))
    else:
        assert_close(evaluate(ours, x, ["logps"]), evaluate(composed, x, ["logps"]))


@every_surrogate
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_old_logps_the_step_is_on_policy(name, level, reduction, backend, device):
    x = make_batch(5, 9, dtype=torch.float64, device=device)
    how = {"surrogate": name, "importance_sampling_level": level, "reduction": reduction, **norm(reduction)}
    how |= {"ref_logps": x["ref_logps"], "beta": 0.1, "kl_bias_correction": True}
    call = partial(policy, rpp, **how)
    got = evaluate(lambda x: call(x | {"old_logps": None}), x, ["logps"])
    assert_close(got, evaluate(lambda x: call(x | {"old_logps": x["logps"].detach()}), x, ["logps"]))
    assert got["stats.ratio"] == got["stats.num_tokens"]


@every_surrogate
def test_the_first_gradient_on_policy_is_that_of_reinforce(name, level, backend, device):
    x = make_batch(5, 9, dtype=torch.float64, device=device)
    x["advantages"] = x["scores"][:, None].expand(5, 9)
    logps = x["logps"].requires_grad_()
    loss = policy(rpp, x | {"old_logps": None}, surrogate=name, importance_sampling_level=level).loss
    want = torch.where(x["completion_mask"], -x["advantages"], 0.0) / x["completion_mask"].sum()
    if level == "sequence-sum" and name in ("clip", "sapo"):  # each of n tokens moves the one ratio of all by the whole
        want = want * x["completion_mask"].sum(1, keepdim=True)
    assert_close(torch.autograd.grad(loss, logps)[0], want)  # of sapo too: 4 sigmoid'(0) = 1 for every tau


@every_surrogate
def test_infinite_clamps_are_no_clamps(name, level, backend, device):
    x = make_batch(5, 9, dtype=torch.float64, device=device)
    call = partial(policy, rpp, surrogate=name, importance_sampling_level=level, ref_logps=x["ref_logps"], beta=0.1)
    assert_close(*(evaluate(lambda x, c=c: call(x, log_ratio_clamp=c), x, ["logps"]) for c in (1e4, math.inf)))


@every_surrogate
@pytest.mark.parametrize("d", [-1e4, 1e4, -math.inf])
def test_runaway_ratios_stay_finite_with_every_surrogate(name, level, d, backend, device):
    unbounded = name in ("cispo", "reinforce")
    if math.isinf(d) and unbounded:
        pytest.skip("the loss is not bounded in the log-prob itself")
    for advantage in (-1.0, 1.0):
        x = {"logps": f32([d, -1, d], device=device)[None], "advantages": torch.full((1, 3), advantage, device=device)}

        def call(x):
            how = {"surrogate": name, "importance_sampling_level": level}
            return rpp.policy_loss(x["logps"], torch.zeros_like(x["logps"]), x["advantages"], **how)

        got = evaluate(call, x, ["logps"])
        assert all(y.isfinite().all() for k, y in got.items() if k != "stats.approx_kl")


def test_a_steep_sapo_ends_in_zeros_rather_than_in_what_exp_leaves(backend, device):
    # The slope at r = exp(20) is 0: what is left of exp(-tau r) must not be multiplied by r.
    logps = f32([[20.0]], device=device).requires_grad_()
    for advantage in (1.0, -1.0):
        out = rpp.policy_loss(logps, torch.zeros_like(logps), f32([[advantage]], device=device), surrogate="sapo")
        (slope,) = torch.autograd.grad(out.loss, logps)
        assert slope == 0


def test_weights_multiply_the_surrogate_and_not_the_kl(backend, device):
    x = make_batch(4, 9, dtype=torch.float64, device=device)
    zeros = torch.zeros_like(x["logps"])
    kl = {"ref_logps": x["ref_logps"], "beta": 0.1}
    assert_close(policy(rpp, x, weights=zeros, **kl).loss, policy(rpp, x | {"advantages": zeros}, **kl).loss)
    assert_close(policy(rpp, x, weights=zeros + 2).loss, 2 * policy(rpp, x).loss)


def test_the_kl_is_counted_whatever_it_weighs(backend, device):
    x = make_batch(4, 9, dtype=torch.float64, device=device)
    kl = rpp.kl_penalty(x["logps"], x["ref_logps"], x["completion_mask"], estimator="k2").sum()
    for beta, corrected in ((0.0, False), (0.5, False), (0.5, True)):
        how = {"beta": beta, "kl_bias_correction": corrected, "kl_estimator": "k2"}
        assert_close(policy(rpp, x, ref_logps=x["ref_logps"], **how).stats.kl, kl)
    assert_close(policy(rpp, x, ref_logps=x["ref_logps"], beta=0.0).loss, policy(rpp, x).loss)
    assert policy(rpp, x).stats.kl == 0


def test_two_sided_delta_is_a_dual_clip(backend, device):
    x = make_batch(9, 50, dtype=torch.float64, device=device)
    ratio, a = (x["logps"] - x["old_logps"]).exp(), x["advantages"]
    delta = -torch.min(ratio.clamp(max=1.3) * a, ratio.clamp(0.8, 1.2) * a)
    got = policy(rpp, x, dual_clip=1.3, reduction="none").loss
    assert_close(got, torch.where(x["completion_mask"], delta, 0.0))


# ---------------------------------------------------------------- refusals

ZEROS = torch.zeros(2, 3)
CU_SEQLENS = torch.tensor([0, 2, 6])
PACKED = {"cu_seqlens": CU_SEQLENS}
SEQUENCE = {"importance_sampling_level": "sequence"}
KL = {"ref_logps": ZEROS}

SHARED = [
    ({"completion_mask": ZEROS}, "completion_mask: want a bool tensor"),
    ({"completion_mask": ZEROS.T.bool()}, r"completion_mask: want the shape \(2, 3\)"),
    ({"completion_mask": ZEROS.bool().to("meta")}, "completion_mask: want a tensor on cpu"),
    ({"reduction": "mean"}, "reduction: want one of 'token-mean', 'seq-mean-token-mean'.* got 'mean'"),
    ({"num_items_in_batch": 0}, "num_items_in_batch: want a positive number"),
    ({"num_items_in_batch": -1.0}, "num_items_in_batch: want a positive number"),
    ({"num_items_in_batch": math.nan}, "num_items_in_batch: want a positive number"),
    ({"num_items_in_batch": torch.tensor(0)}, "num_items_in_batch: want a positive number"),
    ({"num_items_in_batch": torch.ones((), requires_grad=True)}, "num_items_in_batch: want a constant"),
    ({"num_items_in_batch": torch.ones(1)}, r"num_items_in_batch: want the shape \(\) of a number"),
    ({"num_items_in_batch": torch.ones((), device="meta")}, "num_items_in_batch: want a tensor on cpu"),
    ({"num_items_in_batch": 3, "reduction": "none"}, "num_items_in_batch: want None with reduction .none."),
    ({"reduction": "seq-mean-token-sum-norm"}, "max_completion_length: want a positive integer with reduction"),
    ({"max_completion_length": 3}, "max_completion_length: want None with reduction 'token-mean'"),
    (
        {"reduction": "seq-mean-token-sum-norm", "max_completion_length": 0},
        "max_completion_length: want a positive integer",
    ),
    (
        {"reduction": "seq-mean-token-sum-norm", "max_completion_length": 1.5},
        "max_completion_length: want a positive integer",
    ),
    (PACKED, r"want \(T,\) when cu_seqlens is given"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *SHARED,
        ({"logps": ZEROS.int()}, "logps: want a float32"),
        ({"logps": ZEROS[None]}, "logps: want .* of 1 or 2 dimension"),
        ({"logps": ZEROS[0], "old_logps": ZEROS[0]}, r"logps: want \(B, S\), or \(T,\) together with cu_seqlens"),
        ({"old_logps": ZEROS.T}, r"old_logps: want the shape \(2, 3\) of logps"),
        ({"old_logps": ZEROS.to("meta")}, "old_logps: want a tensor on cpu"),
        ({"old_logps": ZEROS.clone().requires_grad_()}, r"old_logps: want a constant \(pass .detach\(\)\)"),
        ({"advantages": ZEROS.clone().requires_grad_()}, "advantages: want a constant"),
        ({"advantages": ZEROS.int()}, "advantages: want a float32"),
        ({"advantages": ZEROS.to("meta")}, "advantages: want a tensor on cpu"),
        (
            {"advantages": ZEROS[0]},
            r"advantages: want \(2, 3\), one for each token, or \(2, 1\) or \(2,\), one for each",
        ),
        ({"advantages": ZEROS[:1]}, r"advantages: want \(2, 3\), one for each token"),
        ({"advantages": torch.zeros(())}, "advantages: want"),
        ({"epsilon_low": -0.1}, "epsilon_low: want a number from 0 to 1"),
        ({"epsilon_low": 1.1}, "epsilon_low: want a number from 0 to 1"),
        ({"epsilon_high": -0.1}, "epsilon_high: want a number from 0"),
        ({"epsilon_high": math.nan}, "epsilon_high: want a number from 0"),
        ({"epsilon_high": torch.tensor(0.2)}, "epsilon_high: want a number from 0"),
        ({"dual_clip": 1.0}, "dual_clip: want a number above 1, or None"),
        ({"importance_sampling_level": "batch"}, "importance_sampling_level: want one of 'token', 'sequence'"),
        ({"log_ratio_clamp": 0}, "log_ratio_clamp: want a positive number"),
        ({"surrogate": "ppo"}, "surrogate: want one of 'clip', 'reinforce', 'cispo', 'sapo', 'gmpo', got 'ppo'"),
        ({"tau_positive": 1.0}, "tau_positive: want None with surrogate 'clip', whose options are epsilon_low, eps"),
        ({"surrogate": "reinforce", "epsilon_low": 0.2}, "epsilon_low: want None with surrogate .*options are none"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip: want None with surrogate 'cispo'"),
        ({"surrogate": "cispo", "epsilon_low": 1.1}, "epsilon_low: want a number from 0 to 1"),
        ({"surrogate": "sapo", "tau_negative": 0.0}, "tau_negative: want a positive finite number"),
        ({"surrogate": "sapo", "tau_positive": math.inf}, "tau_positive: want a positive finite number"),
        ({"surrogate": "gmpo"}, "importance_sampling_level: want 'sequence' with surrogate 'gmpo', got 'token'"),
        ({"surrogate": "gmpo", **SEQUENCE, "epsilon_low": -0.1}, "epsilon_low: want a number from 0, got"),
        ({"beta": 0.1}, "beta: want 0 without ref_logps, got 0.1"),
        ({"kl_estimator": "k1"}, "kl_estimator: want 'k3' without ref_logps"),
        ({"kl_gradient": "k2"}, "kl_gradient: want None without ref_logps"),
        ({"kl_clamp": 1.0}, "kl_clamp: want None without ref_logps"),
        ({"kl_bias_correction": True}, "kl_bias_correction: want False without ref_logps"),
        ({**KL, "beta": -0.1}, "beta: want a finite number from 0"),
        ({**KL, "beta": math.inf}, "beta: want a finite number from 0"),
        ({**KL, "kl_estimator": "none"}, "kl_estimator: want one of 'k1', 'k2', 'k3', 'abs'"),
        ({**KL, "kl_gradient": "k4"}, "kl_gradient: want one of 'none', 'k1'"),
        ({**KL, "kl_clamp": 0.0}, "kl_clamp: want a positive number or None"),
        ({**KL, "kl_bias_correction": 1}, "kl_bias_correction: want a bool"),
        ({"ref_logps": ZEROS.T}, r"ref_logps: want the shape \(2, 3\) of logps"),
        ({"ref_logps": ZEROS.clone().requires_grad_()}, "ref_logps: want a constant"),
        ({"weights": ZEROS.T}, r"weights: want the shape \(2, 3\) of logps"),
        ({"weights": ZEROS.clone().requires_grad_()}, "weights: want a constant"),
        ({"weights": ZEROS - 1}, "weights: want finite numbers from 0 wherever completion_mask is true"),
        ({"weights": ZEROS * math.nan}, "weights: want finite numbers from 0"),
        ({"entropy_coef": 0.1}, "entropy_coef: want 0 without entropy"),
        ({"entropy": ZEROS, "entropy_coef": math.nan}, "entropy_coef: want a finite number"),
        ({"entropy": ZEROS.T}, r"entropy: want the shape \(2, 3\) of logps"),
    ],
)
def test_policy_loss_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.policy_loss(**{"logps": ZEROS, "old_logps": ZEROS, "advantages": ZEROS, **changes})


def test_a_packed_advantage_for_each_sequence_has_to_be_a_column(backend):
    flat = torch.zeros(6)
    with pytest.raises(ValueError, match=r"advantages: want \(6,\), one for each token, or \(2, 1\), one for each seq"):
        rpp.policy_loss(flat, flat, torch.zeros(2), cu_seqlens=CU_SEQLENS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *SHARED,
        ({"values": ZEROS.int()}, "values: want a float32"),
        ({"old_values": ZEROS.T}, r"old_values: want the shape \(2, 3\) of values"),
        ({"returns": ZEROS[0]}, "returns: want .* of 2 dimension"),
        ({"old_values": ZEROS.clone().requires_grad_()}, "old_values: want a constant"),
        ({"returns": ZEROS.clone().requires_grad_()}, "returns: want a constant"),
        ({"epsilon": 0.0}, "epsilon: want a positive number, or None"),
        ({"epsilon": math.nan}, "epsilon: want a positive number, or None"),
    ],
)
def test_value_loss_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.value_loss(**{"values": ZEROS, "old_values": ZEROS, "returns": ZEROS, **changes})
