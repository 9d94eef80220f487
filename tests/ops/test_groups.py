"""group_advantages, which has no tokens and is not in test_every_op.py."""

import itertools
import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.testing import assert_close_to_reference, evaluate

assert_close = torch.testing.assert_close

BASELINES, STDS = ("mean", "leave-one-out"), ("none", "group", "batch")
MODES = [
    {"baseline": b, "std": s, "unbiased": u, "singleton": k}
    for b, s, u, k in itertools.product(BASELINES, STDS, (True, False), ("zero", "keep"))
]
modes = pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
# Groups of one, two, three, and five, in no order, with ids that are neither small nor positive.
IDS = torch.tensor([7, -3, 7, 1 << 40, 0, 0, -3, 0, 7, 5, 0, 0])


def scores_of(n, dtype=torch.float32, device="cpu"):
    return (1 + 2 * torch.randn(n, dtype=torch.float64)).to(dtype).to(device)


@pytest.mark.kernels
@modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_the_spec(mode, dtype, device):
    by_id = lambda f, x: f.group_advantages(x["scores"], group_ids=x["ids"], **mode)  # noqa: E731
    assert_close_to_reference(by_id, {"scores": scores_of(12, dtype, device), "ids": IDS.to(device)}, ["scores"])
    for size in (1, 2, 3, 12):
        by_size = lambda f, x, size=size: f.group_advantages(x["scores"], group_size=size, **mode)  # noqa: E731
        assert_close_to_reference(by_size, {"scores": scores_of(12, dtype, device)}, ["scores"])


@modes
def test_gradcheck(mode, backend, device):
    scores = scores_of(12, torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(partial(rpp.group_advantages, group_ids=IDS.to(device), **mode), scores)


@modes
def test_a_group_size_is_as_good_as_the_ids_it_stands_for(mode, backend, device):
    scores = scores_of(12, device=device)
    ids = torch.arange(12, device=device) // 3
    by_size = rpp.group_advantages(scores, group_size=3, **mode)
    assert_close(rpp.group_advantages(scores, group_ids=ids, **mode), by_size, rtol=1e-6, atol=1e-7)
    order = torch.randperm(12, device=device)
    shuffled = rpp.group_advantages(scores[order], group_ids=100 - ids[order], **mode)
    assert_close(shuffled, by_size[order], rtol=1e-6, atol=1e-6)


@modes
def test_groups_of_equal_scores_have_no_advantage_and_a_finite_gradient(mode, backend, device):
    for score in (0.1, 97.3):
        x = {"scores": torch.tensor([score] * 7 + [1.0, 2, 3, 4, 5, 6, 7], device=device)}
        got = evaluate(lambda x: rpp.group_advantages(x["scores"], group_size=7, **mode), x, ["scores"])
        assert got["result"][:7].abs().max() < 1e-5
        assert got["dscores"].isfinite().all()
    x = {"scores": torch.full((6,), 0.1, device=device)}
    got = evaluate(lambda x: rpp.group_advantages(x["scores"], group_size=3, **mode), x, ["scores"])
    assert got["result"].abs().max() < 1e-5
    assert got["dscores"].isfinite().all()


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_group_of_one_has_advantage_0_or_keeps_its_score(baseline, std, backend, device):
    scores, ids = torch.tensor([5.0, 1.0, 2.0], device=device), torch.tensor([0, 1, 1], device=device)
    function = partial(rpp.group_advantages, scores, group_ids=ids, baseline=baseline, std=std)
    assert function()[0] == 0
    kept = function(singleton="keep")[0].item()
    assert kept == pytest.approx(5.0 if std != "batch" else 5 / scores.std().item(), rel=1e-5)


def test_every_score_its_own_group(backend, device):
    scores = scores_of(5, device=device)
    assert (rpp.group_advantages(scores, group_size=1) == 0).all()
    assert_close(rpp.group_advantages(scores, group_size=1, std="group", singleton="keep"), scores)


def test_no_scores_at_all(backend, device):
    scores = torch.zeros(0, device=device, requires_grad=True)
    for options in ({"group_size": 4}, {"group_ids": torch.zeros(0, dtype=torch.int64, device=device)}):
        for std in STDS:
            advantages = rpp.group_advantages(scores, std=std, **options)
            assert advantages.shape == (0,)
            assert torch.autograd.grad(advantages.sum(), scores)[0].shape == (0,)


@pytest.mark.parametrize("std", STDS)
def test_a_nan_stays_in_its_group_unless_the_batch_is_its_group(std, backend, device):
    scores = torch.tensor([1.0, math.nan, 3.0, 4.0], device=device)
    nan = rpp.group_advantages(scores, group_size=2, std=std).isnan().tolist()
    assert nan == ([True] * 4 if std == "batch" else [True, True, False, False])


def test_scores_far_from_0_keep_their_digits(backend, device):
    scores = 1e7 + torch.tensor([0.0, 1.0, 2.0, 3.0], device=device)
    advantages = rpp.group_advantages(scores, group_size=4)
    assert advantages.tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_strided_scores_and_ids(backend, device):
    scores, ids = scores_of(24, device=device), torch.arange(24, device=device) // 6
    strided = rpp.group_advantages(scores[::2], group_ids=ids[::2], std="group")
    assert_close(strided, rpp.group_advantages(scores[::2].clone(), group_size=3, std="group"))


def test_nothing_is_changed(backend, device):
    scores, ids = scores_of(12, device=device), IDS.to(device)
    before = scores.clone(), ids.clone()
    rpp.group_advantages(scores, group_ids=ids, std="group")
    assert_close((scores, ids), before, rtol=0, atol=0)
    assert (scores._version, ids._version) == (0, 0)


@pytest.mark.kernels
def test_many_groups_are_those_of_the_spec(device):
    scores = scores_of(1200, device=device)
    for std in STDS:
        got = rpp.group_advantages(scores, group_size=8, std=std)
        assert_close(got, reference.group_advantages(scores, group_size=8, std=std), rtol=1e-6, atol=1e-6)


SCORES = torch.zeros(6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": SCORES.int()}, "scores: want a float32"),
        ({"scores": SCORES.view(2, 3)}, "scores: want .* of 1 dimension"),
        ({"group_size": None}, "group_size, group_ids: want exactly one of them, got neither"),
        ({"group_ids": torch.zeros(6).long()}, "group_size, group_ids: want exactly one of them, got both"),
        ({"group_size": 4}, "group_size: want a positive divisor of the 6 scores, got 4"),
        ({"group_size": 0}, "group_size: want a positive divisor"),
        ({"group_size": -3}, "group_size: want a positive divisor"),
        ({"group_size": 1.5}, "group_size: want a positive divisor"),
        ({"group_size": None, "group_ids": torch.zeros(6).int()}, "group_ids: want an int64 tensor"),
        ({"group_size": None, "group_ids": [0] * 6}, "group_ids: want an int64 tensor"),
        ({"group_size": None, "group_ids": torch.zeros(5).long()}, r"group_ids: want the shape \(6,\) of scores"),
        ({"group_size": None, "group_ids": torch.zeros(6, device="meta").long()}, "group_ids: want .* on cpu"),
        ({"baseline": "median"}, "baseline: want one of 'mean', 'leave-one-out', 'length-weighted', got 'median'"),
        ({"std": "sequence"}, "std: want one of 'none', 'group', 'batch', 'leave-one-out', got 'sequence'"),
        ({"singleton": "drop"}, "singleton: want one of 'zero', 'keep', got 'drop'"),
        ({"eps": 0.0}, "eps: want a positive number"),
    ],
)
def test_group_advantages_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.group_advantages(**{"scores": SCORES, "group_size": 3, **changes})
