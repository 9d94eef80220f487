"""dpo_loss and copg_loss beyond test_every_op.py: what the papers say of them, any size of log-ratio, and both from
hidden states through linear_loss."""

import math
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from calls import LOSS_TYPES

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.testing import assert_close_to_reference, evaluate, make_batch

assert_close = torch.testing.assert_close
assert_identical = partial(assert_close, rtol=0, atol=0)
assert_close_in_double = partial(assert_close, rtol=1e-12, atol=1e-12)

DTYPES = [torch.float32, torch.bfloat16]  # the others: test_every_op.py
every_loss = pytest.mark.parametrize("loss_type", LOSS_TYPES)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def dpo(f, x, loss_type="sigmoid", **options):
    options = {"label_smoothing": LOSS_TYPES[loss_type], "cu_seqlens": x.get("cu_seqlens"), **options}
    return f.dpo_loss(x["logps"], x.get("ref_logps"), x["completion_mask"], loss_type=loss_type, **options)


def copg(f, x, **options):
    tensors = x["logps"], x["ref_logps"], x["scores"], x["completion_mask"]
    return f.copg_loss(*tensors, cu_seqlens=x.get("cu_seqlens"), **options)


LOSSES = {"dpo": (dpo, "num_pairs", 2), "copg": (partial(copg, group_size=3), "num_items_in_batch", 3)}
both_losses = pytest.mark.parametrize(("loss", "count", "size"), LOSSES.values(), ids=LOSSES)


def log_ratios(x):
    """Of a padded batch: the h of each sequence."""
    d = torch.where(x["completion_mask"], x["logps"] - x["ref_logps"], 0.0)
    return d.sum(1)


def double_batch(B=6, S=20, device="cpu", **options):
    """With a hole, a sequence of nothing and a last one without a valid token."""
    x = make_batch(B, S, dtype=torch.float64, device=device, **options)
    if "cu_seqlens" not in x:
        x["completion_mask"][:, 3] = False
        x["completion_mask"][[2, B - 1]] = False
    return x


# ---------------------------------------------------------------- against the spec


@pytest.mark.kernels
@every_loss
@layouts
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dpo_loss_in_every_mode(loss_type, packed, reduction, dtype, device):
    x = make_batch(8, 50, packed=packed, dtype=dtype, device=device)
    for options in ({}, {"length_normalized": True, "beta": 2.0}):
        assert_close_to_reference(partial(dpo, loss_type=loss_type, reduction=reduction, **options), x, ["logps"])
    without = {k: v for k, v in x.items() if k != "ref_logps"}
    assert_close_to_reference(partial(dpo, loss_type=loss_type, reduction=reduction), without, ["logps"])


@pytest.mark.kernels
@layouts
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 6, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copg_loss_in_every_mode(packed, reduction, group_size, dtype, device):
    x = make_batch(12, 50, packed=packed, dtype=dtype, device=device)
    call = partial(copg, group_size=group_size, reduction=reduction, beta=0.2)
    assert_close_to_reference(call, x, ["logps"])


@pytest.mark.kernels
@pytest.mark.parametrize("S", [1, 3, 15, 16, 17, 33, 64, 4095, 4096, 4097])
def test_every_length(S, device):
    x = make_batch(4, S, device=device)
    assert_close_to_reference(dpo, x, ["logps"])
    assert_close_to_reference(copg, x, ["logps"])


@every_loss
@pytest.mark.parametrize("size", [0.0, 1e-8, 0.05, 1.0, 50.0, 1e4])
def test_every_size_of_log_ratio(loss_type, size, backend, device):
    """Exact to the rounding of the numbers that a pair is, and finite, in value and slope."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [1, 0], [0, 1], [0, -1], [0.5, 1]], device=device)
    logps = (size * signs.double()).view(-1, 1)
    mask = torch.ones_like(logps, dtype=torch.bool)
    call = partial(dpo, loss_type=loss_type, beta=1.0, reduction="none")
    got = evaluate(partial(call, rpp), {"logps": logps, "completion_mask": mask}, ["logps"])
    want = evaluate(partial(call, reference), {"logps": logps, "completion_mask": mask}, ["logps"])
    assert all(y.isfinite().all() for y in got.values())
    assert_close(got, want, rtol=1e-13, atol=1e-15)
    if loss_type != "hinge":  # which has a kink at z = 1
        single = evaluate(partial(call, rpp), {"logps": logps.float(), "completion_mask": mask}, ["logps"])
        rtol = 2e-5 if backend == "reference" else 1e-6  # kernels compute a pair in double
        assert_close({k: y.double() for k, y in single.items()}, want, rtol=rtol, atol=1e-7)


@every_loss
@pytest.mark.parametrize("name", ["logps", "ref_logps"])
def test_nan_is_not_lost(loss_type, name, backend, device):
    x = make_batch(4, 5, device=device)
    x["completion_mask"][:] = True
    x[name][1, 2] = math.nan
    loss, stats = dpo(rpp, x, loss_type, reduction="none")
    assert loss.isnan().tolist() == [True, False]
    assert dpo(rpp, x, loss_type).loss.isnan()
    assert stats.margins.isnan()
    assert copg(rpp, x, reduction="none").loss.isnan().tolist() == [True, False]


# ---------------------------------------------------------------- pairs


def test_the_slope_of_every_token_is_that_of_its_sequence(backend, device):
    x = double_batch(device=device)
    x["logps"].requires_grad_()
    (dlogps,) = torch.autograd.grad(dpo(rpp, x, beta=0.3, label_smoothing=0.0).loss, x["logps"])
    h = log_ratios(x)
    z = 0.3 * (h[0::2] - h[1::2])
    each = torch.stack([-torch.sigmoid(-z), torch.sigmoid(-z)], 1).view(-1, 1) * 0.3 / 3  # DPO eq. 7
    assert_close_in_double(dlogps, torch.where(x["completion_mask"], each.detach(), 0.0))


@every_loss
@layouts
def test_a_pair_of_nothing_is_none_and_a_lone_completion_is_compared_with_0(loss_type, packed, backend, device):
    lengths = torch.tensor([0, 0, 3, 0, 0, 2, 0, 0])
    mask = torch.arange(3) < lengths[:, None]
    logps = torch.randn(8, 3, dtype=torch.float64)
    x = {"logps": logps[mask] if packed else logps, "completion_mask": mask[mask] if packed else mask}
    if packed:
        x["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    x = {k: y.to(device) for k, y in x.items()}
    loss, stats = dpo(rpp, x, loss_type, reduction="none")
    h = torch.where(mask, logps, 0.0).sum(1).to(device)
    both = {"logps": h[2:6, None], "completion_mask": torch.ones(4, 1, dtype=torch.bool, device=device)}
    assert_close_in_double(loss, torch.nn.functional.pad(dpo(rpp, both, loss_type, reduction="none").loss, (1, 1)))
    assert stats.num_pairs == 2
    assert_close_in_double(dpo(rpp, x, loss_type).loss, loss.sum() / 2)


@layouts
def test_conservative_dpo_and_rdpo_are_mixtures_of_both_labels(packed, backend, device):
    x = make_batch(8, 20, packed=packed, dtype=torch.float64, device=device)
    call = partial(rpp.dpo_loss, completion_mask=x["completion_mask"], cu_seqlens=x.get("cu_seqlens"))
    plain = call(x["logps"], x["ref_logps"]).loss
    flipped = call(-x["logps"], -x["ref_logps"]).loss
    smoothed = call(x["logps"], x["ref_logps"], label_smoothing=0.2).loss
    assert_close_in_double(smoothed, 0.8 * plain + 0.2 * flipped)
    robust = call(x["logps"], x["ref_logps"], label_smoothing=0.2, loss_type="robust").loss
    assert_close_in_double(robust, (0.8 * plain - 0.2 * flipped) / 0.6)


def test_simpo_is_dpo_of_mean_log_probs_with_a_margin(backend, device):
    x = make_batch(8, 20, dtype=torch.float64, device=device)
    loss = rpp.dpo_loss(
        x["logps"], None, x["completion_mask"], beta=2.0, margin=1.4, length_normalized=True, reduction="none"
    ).loss
    mean = torch.where(x["completion_mask"], x["logps"], 0.0).sum(1) / x["completion_mask"].sum(1)
    assert_close_in_double(loss, torch.nn.functional.softplus(1.4 - 2.0 * (mean[0::2] - mean[1::2])))


# ---------------------------------------------------------------- CoPG


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_gradient_of_copg_is_that_of_rloo_of_regularised_rewards(k, beta, backend, device):
    """For k = 2 Prop. 2 of the paper; any k. Here the sequences are those of `logps`, but nothing needs that."""
    x = double_batch(device=device)
    x["logps"].requires_grad_()
    (got,) = torch.autograd.grad(copg(rpp, x, beta=beta, group_size=k).loss, x["logps"])
    rewards = x["scores"] - beta * log_ratios(x).detach()
    advantages = rpp.group_advantages(rewards, group_size=k, baseline="leave-one-out")
    rloo = rpp.policy_loss(
        x["logps"], x["logps"].detach(), advantages, x["completion_mask"], reduction="seq-mean-token-sum"
    ).loss
    assert_close_in_double(got, torch.autograd.grad(rloo, x["logps"])[0])


def test_copg_of_pairs_is_half_of_the_papers_objective_and_its_gradient_eq_18(backend, device):
    x = double_batch(4, device=device)
    x["completion_mask"][:] = True
    logps = x["logps"].requires_grad_()
    loss = copg(rpp, x, beta=0.5).loss
    h, r = log_ratios(x).view(-1, 2), x["scores"].view(-1, 2)
    half = r - 0.25 * h  # R_(beta / 2), differentiated
    pairwise = (half[:, 0] - half[:, 1]) * h[:, 0] + (half[:, 1] - half[:, 0]) * h[:, 1]
    assert_close_in_double(loss, -0.5 * pairwise.mean())
    (got,) = torch.autograd.grad(loss, logps)
    full = (r - 0.5 * h).detach()
    weight = torch.stack([full[:, 0] - full[:, 1], full[:, 1] - full[:, 0]], 1).view(-1, 1)
    assert_close_in_double(got, -0.5 * weight.expand_as(logps) / 2)  # of the mean over two pairs


def test_copg_of_rewards_of_a_quarter_is_ipo(backend, device):
    """Prop. 3: with D = R - R' = 1/2, l = D h - beta / 2 h^2 = 1 / (8 beta) - beta / 2 (h - 1 / (2 beta))^2, and the
    mean over sequences is half of one over pairs."""
    beta = 0.3
    x = double_batch(8, device=device)
    x["completion_mask"][[2, -1]] = True
    x["logps"].requires_grad_()
    x["scores"] = torch.tensor([0.25, -0.25] * 4, dtype=torch.float64, device=device)
    contrastive, ipo = copg(rpp, x, beta=beta).loss, dpo(rpp, x, "ipo", beta=beta).loss
    assert_close_in_double(contrastive, beta / 4 * ipo - 1 / (16 * beta))
    one, two = (torch.autograd.grad(y, x["logps"])[0] for y in (contrastive, ipo))
    assert_close_in_double(one, beta / 4 * two)


@pytest.mark.parametrize("k", [3, 4])
def test_copg_of_a_group_is_the_average_over_its_pairs(k, backend, device):
    x = double_batch(2 * k, device=device)
    x["completion_mask"][[2, -1]] = True
    groups = torch.arange(2 * k).view(2, k)
    pairs = torch.tensor([pair for group in groups.tolist() for pair in combinations(group, 2)]).flatten()

    def of_pairs(y):
        return copg(rpp, {name: y[name][pairs] for name in ("logps", "ref_logps", "scores", "completion_mask")})

    one = evaluate(lambda y: copg(rpp, y, group_size=k).loss, x, ["logps"])
    assert_close_in_double(one, evaluate(lambda y: of_pairs(y).loss, x, ["logps"]))


def test_the_optimum_of_copg_is_the_tilted_reference_from_any_data(backend, device):
    # pi* ~ ref exp(R / beta): h = R / beta up to a constant of the prompt, where the gradient is 0.
    scores = torch.randn(6, dtype=torch.float64, device=device)
    h = scores / 0.3 + torch.tensor([1.0, -2.0], dtype=torch.float64, device=device).repeat_interleave(3)
    logps = h[:, None].clone().requires_grad_()
    loss = rpp.copg_loss(logps, torch.zeros_like(h[:, None]), scores, beta=0.3, group_size=3).loss
    assert_close_in_double(torch.autograd.grad(loss, logps)[0], torch.zeros_like(logps))


def test_of_a_sequence_without_a_token_copg_counts_the_score_for_the_others(backend, device):
    mask = torch.tensor([[True], [False]], device=device)
    logps = torch.tensor([[2.0], [math.nan]], device=device, requires_grad=True)
    scores = torch.tensor([1.0, 4.0], device=device)
    loss, stats = rpp.copg_loss(logps, torch.zeros_like(logps), scores, mask, beta=0.5)
    assert loss.item() == -((1 - 4) * 2 - 0.25 * 2 * 2)
    assert [x.item() for x in stats] == [1, 1, 2]
    (dlogps,) = torch.autograd.grad(loss, logps)
    assert dlogps.tolist() == [[4.0], [0.0]]  # -(R - R' - beta h)


# ---------------------------------------------------------------- counts


@both_losses
def test_losses_and_stats_of_micro_batches_add_up(loss, count, size, backend, device):
    x = double_batch(12, device=device)
    whole = evaluate(partial(loss, rpp), x, ["logps"])
    stats = loss(rpp, x).stats
    total = stats[0]
    parts = [{k: v[i : i + 6] for k, v in x.items()} for i in (0, 6)]
    evaluated = [evaluate(partial(loss, rpp, **{count: total}), part, ["logps"]) for part in parts]
    assert_close_in_double(sum(part["loss"] for part in evaluated), whole["loss"])
    assert_close_in_double(torch.cat([part["dlogps"] for part in evaluated]), whole["dlogps"])
    assert_close_in_double(sum(loss(rpp, part).stats for part in parts), stats)
    assert {(y.dtype, y.dim(), y.requires_grad) for y in stats} == {(torch.float64, 0, False)}


@both_losses
def test_the_divisor_is_a_number_or_a_tensor(loss, count, size, backend, device):
    x = double_batch(device=device)
    each = loss(rpp, x, reduction="none").loss
    assert each.shape == (6 // size,)
    assert_close_in_double(loss(rpp, x).loss, each.sum() / loss(rpp, x).stats[0])
    for items in (7, 7.0, torch.tensor(7, device=device), torch.tensor(7, dtype=torch.float16, device=device)):
        assert_close_in_double(loss(rpp, x, **{count: items}).loss, each.sum() / 7)


@both_losses
@layouts
def test_a_group_that_nobody_asked_for_gets_no_gradient(loss, count, size, packed, backend, device):
    x = make_batch(6, 9, packed=packed, dtype=torch.float64, device=device)
    x["logps"].requires_grad_()
    each = loss(rpp, x, reduction="none").loss
    weight = torch.zeros_like(each)
    weight[1] = 2.0
    (got,) = torch.autograd.grad(each, x["logps"], weight)
    (want,) = torch.autograd.grad(loss(reference, x, reduction="none").loss, x["logps"], weight)
    assert_close_in_double(got, want)
    start, stop = (x["cu_seqlens"][[size, 2 * size]].tolist()) if packed else (size, 2 * size)
    outside = got.clone()
    outside[start:stop] = 0
    assert (outside == 0).all()
    assert (got != 0).any()


# ---------------------------------------------------------------- from hidden states

V, H = 40, 5
LEARNED = ("hidden_states", "weight", "bias")
OURS = ("chunk_bytes", "skip_rows", "batch_invariant")
HOW = [
    {},
    {"chunk_bytes": 4 * V * 8 * 3},  # a few tokens: a group is longer than a chunk
    {"chunk_bytes": 40 * V * 8},  # some groups in a chunk
    {"chunk_bytes": 4 * V * 8, "skip_rows": False},
    {"chunk_bytes": 40 * V * 8, "skip_rows": False},
    {"chunk_bytes": 16 * V * 8, "batch_invariant": True},
]


def linear_batch(packed, device):
    """Twelve sequences with holes; empty ones first, in between and last; the fourth pair masked as a whole."""
    lengths = torch.tensor([0, 0, 9, 4, 13, 0, 5, 6, 1, 30, 0, 0])
    mask = (torch.arange(30) < lengths[:, None]) & (torch.rand(12, 30) > 0.2)
    mask[6:8] = False
    x = {
        "hidden_states": torch.randn(12, 30, H, dtype=torch.float64),
        "target_ids": torch.randint(V, (12, 30)),
        "ref_logps": -4 * torch.rand(12, 30, dtype=torch.float64),
        "completion_mask": mask,
    }
    if packed:
        inside = torch.arange(30) < lengths[:, None]
        x = {k: y[inside] for k, y in x.items()}
        x["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    x["weight"] = torch.randn(V, H, dtype=torch.float64)
    x["bias"] = torch.randn(V, dtype=torch.float64)
    x["scores"] = torch.randn(12, dtype=torch.float64)
    return {k: y.to(device) for k, y in x.items()}


def linear_dpo(f, x, loss_type="sigmoid", **how):
    return f.linear_loss(
        x["hidden_states"],
        x["weight"],
        x["target_ids"],
        lambda logps, entropy, rows, cu_seqlens, _: (
            f.dpo_loss(
                logps,
                x["ref_logps"][rows],
                loss_type=loss_type,
                label_smoothing=LOSS_TYPES[loss_type],
                num_pairs=4,
                cu_seqlens=cu_seqlens,
            ).loss
        ),
        x["completion_mask"],
        cu_seqlens=x.get("cu_seqlens"),
        group_size=2,
        bias=x["bias"],
        **{k: v for k, v in how.items() if f is rpp or k not in OURS},
    )


def linear_copg(f, x, **how):
    return f.linear_loss(
        x["hidden_states"],
        x["weight"],
        x["target_ids"],
        lambda logps, entropy, rows, cu_seqlens, sequences: (
            f.copg_loss(
                logps,
                x["ref_logps"][rows],
                x["scores"][sequences],
                group_size=3,
                num_items_in_batch=9,
                cu_seqlens=cu_seqlens,
            ).loss
        ),
        x["completion_mask"],
        cu_seqlens=x.get("cu_seqlens"),
        group_size=3,
        bias=x["bias"],
        **{k: v for k, v in how.items() if f is rpp or k not in OURS},
    )


def by_logps(loss):
    """What linear_loss is: a loss of linear_logps."""

    def call(x):
        out = rpp.linear_logps(x["hidden_states"], x["weight"], x["target_ids"], x["completion_mask"], bias=x["bias"])
        return rpp.LinearLoss(loss(x, out.logps), out.logps.detach(), out.entropy.detach())

    return call


def dpo_of_logps(x, logps):
    return rpp.dpo_loss(
        logps, x["ref_logps"], x["completion_mask"], num_pairs=4, label_smoothing=0.1, cu_seqlens=x.get("cu_seqlens")
    ).loss


def copg_of_logps(x, logps):
    return rpp.copg_loss(
        logps, x["ref_logps"], x["scores"], x["completion_mask"], group_size=3, num_items_in_batch=9,
        cu_seqlens=x.get("cu_seqlens"),
    ).loss  # fmt: skip


@pytest.mark.kernels
@layouts
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("learned", [LEARNED, LEARNED[:1], LEARNED[1:]], ids=["all", "frozen head", "head alone"])
@pytest.mark.parametrize(
    ("linear", "of_logps"), [(linear_dpo, dpo_of_logps), (linear_copg, copg_of_logps)], ids=["dpo", "copg"]
)
def test_linear_loss_of_groups_is_the_loss_of_linear_logps(linear, of_logps, packed, how, learned, device):
    x = linear_batch(packed, device)
    got = evaluate(lambda y: linear(rpp, y, **how), x, learned)
    assert_close_in_double(got, evaluate(by_logps(of_logps), x, learned))


@pytest.mark.kernels
@layouts
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("linear", [linear_dpo, linear_copg])
def test_linear_loss_of_groups_is_the_spec(linear, packed, how, device):
    x = linear_batch(packed, device)
    assert_close_to_reference(lambda f, y: linear(f, y, **how), x, LEARNED)


@layouts
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 3, 12])
def test_each_group_is_in_one_call_with_all_its_valid_tokens(packed, how, group_size, backend, device):
    x = linear_batch(packed, device)
    seen, lengths, order = torch.zeros_like(x["target_ids"]), [], []

    def token_loss(logps, entropy, rows, cu_seqlens, sequences):
        assert (cu_seqlens.shape[0] - 1) % group_size == 0
        order.extend(range(12)[sequences])
        assert logps.shape == entropy.shape == rows[0].shape == (cu_seqlens[-1],)
        seen[rows] += 1
        lengths.extend(cu_seqlens.diff().tolist())
        return logps  # of each token, which is allowed

    call = partial(rpp.linear_loss, x["hidden_states"], x["weight"], x["target_ids"], token_loss, x["completion_mask"])
    out = call(cu_seqlens=x.get("cu_seqlens"), group_size=group_size, **how)
    mask = x["completion_mask"]
    assert_identical(seen, mask.long())
    assert order == list(range(12))
    starts = x["cu_seqlens"].tolist() if packed else [30 * i for i in range(13)]
    assert lengths == [int(mask.flatten()[a:b].sum()) for a, b in pairwise(starts)]
    assert_close_in_double(out.loss, out.logps.sum())


def test_a_loss_of_groups_without_gradient_or_tokens(backend, device):
    x = linear_batch(False, device)
    with torch.no_grad():
        assert not linear_dpo(rpp, x).loss.requires_grad
    x["completion_mask"][:] = False
    got = evaluate(lambda y: linear_dpo(rpp, y), x, LEARNED)
    assert all((y == 0).all() for y in got.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: want None without group_size"),
        ({"group_size": 0}, "group_size: want an integer from 1, or None"),
        ({"group_size": 2.0}, "group_size: want an integer from 1, or None"),
        ({"group_size": 3}, "target_ids: want whole groups of 3 sequences, got 2 sequences"),
        ({"group_size": 1, "cu_seqlens": torch.tensor([0, 4])}, r"target_ids: want \(T,\) when cu_seqlens is given"),
        ({"group_size": 2, "token_loss": lambda p, *_: p[:1]}, r"token_loss\(...\): want the shape \(8,\)"),
        ({"group_size": 2, "token_loss": lambda p, *_: 0.0}, r"token_loss\(...\): want a float32"),
    ],
)
def test_linear_loss_of_groups_refuses(changes, words, backend):
    arguments = {
        "hidden_states": torch.zeros(2, 4, H),
        "weight": torch.zeros(V, H),
        "target_ids": torch.zeros(2, 4, dtype=torch.int64),
        "token_loss": lambda logps, *_: logps.sum(),
    }
    with pytest.raises(ValueError, match=words):
        rpp.linear_loss(**{**arguments, **changes})


def test_packed_groups_need_to_know_where_they_are(backend):
    with pytest.raises(ValueError, match=r"target_ids: want \(B, S\), or \(T,\) together with cu_seqlens"):
        rpp.linear_loss(torch.zeros(4, H), torch.zeros(V, H), torch.zeros(4).long(), lambda p, *_: p, group_size=2)


# ---------------------------------------------------------------- refusals

ZEROS = torch.zeros(2, 3)
SHARED = [
    ({"logps": ZEROS.int()}, "logps: want a float32"),
    ({"logps": torch.zeros(3, 3), "ref_logps": torch.zeros(3, 3)}, "logps: want whole groups of 2 sequences, got 3"),
    ({"ref_logps": ZEROS.T}, r"ref_logps: want the shape \(2, 3\) of logps"),
    ({"ref_logps": ZEROS.clone().requires_grad_()}, "ref_logps: want a constant"),
    ({"completion_mask": ZEROS}, "completion_mask: want a bool tensor"),
    ({"cu_seqlens": torch.tensor([0, 2, 6])}, r"logps: want \(T,\) when cu_seqlens is given"),
    ({"reduction": "sum"}, "reduction: want one of 'mean', 'none', got 'sum'"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *SHARED,
        ({"beta": 0.0}, "beta: want a positive finite number"),
        ({"beta": math.inf}, "beta: want a positive finite number"),
        ({"beta": math.nan}, "beta: want a positive finite number"),
        ({"loss_type": "dpo"}, "loss_type: want one of 'sigmoid', 'ipo', .*, got 'dpo'"),
        ({"label_smoothing": 0.5}, "label_smoothing: want a number from 0 to below 0.5"),
        ({"label_smoothing": -0.1, "loss_type": "robust"}, "label_smoothing: want a number from 0 to below 0.5"),
        ({"loss_type": "exo_pair"}, "label_smoothing: want a number above 0 to below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing: want 0 with loss_type 'ipo'"),
        ({"margin": math.nan}, "margin: want a finite number"),
        ({"margin": 0.5, "loss_type": "hinge"}, "margin: want 0 with loss_type 'hinge'"),
        ({"length_normalized": 1}, "length_normalized: want True or False"),
        ({"num_pairs": 0}, "num_pairs: want a positive number"),
        ({"num_pairs": 2, "reduction": "none"}, "num_pairs: want None with reduction .none."),
    ],
)
def test_dpo_loss_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.dpo_loss(**{"logps": ZEROS, "ref_logps": ZEROS, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *SHARED,
        ({"ref_logps": None}, "ref_logps: want a float32"),
        ({"scores": torch.zeros(3)}, r"scores: want the shape \(2,\) of one for each sequence"),
        ({"scores": torch.zeros(2, requires_grad=True)}, "scores: want a constant"),
        ({"scores": torch.zeros(2).long()}, "scores: want a float32"),
        ({"beta": -0.1}, "beta: want a finite number from 0"),
        ({"group_size": 1}, "group_size: want an integer from 2"),
        ({"group_size": 3}, "logps: want whole groups of 3 sequences, got 2"),
        ({"num_items_in_batch": -1}, "num_items_in_batch: want a positive number"),
        ({"num_items_in_batch": 2, "reduction": "none"}, "num_items_in_batch: want None with reduction .none."),
    ],
)
def test_copg_loss_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.copg_loss(**{"logps": ZEROS, "ref_logps": ZEROS, "scores": torch.zeros(2), **changes})
