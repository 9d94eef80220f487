"""What is relative to a group, which has no tokens and is not in test_every_op.py."""

import itertools
import math
from functools import partial

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.testing import assert_close_to_reference, evaluate

assert_close = torch.testing.assert_close

BASELINES = ("mean", "leave-one-out", "length-weighted")
STDS = ("none", "group", "batch", "leave-one-out")
MODES = [
    {"baseline": b, "std": s, "unbiased": u, "singleton": k}
    for b, s, u, k in itertools.product(BASELINES, STDS, (True, False), ("zero", "keep"))
]
modes = pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
# Groups of one, two, three, and five, in no order, with ids that are neither small nor positive.
IDS = torch.tensor([7, -3, 7, 1 << 40, 0, 0, -3, 0, 7, 5, 0, 0])


def advantages(scores, *, f=rpp, lengths=None, **options):
    """With lengths where the baseline asks for them: 1, 2, 3, 0, and so on."""
    if options.get("baseline") == "length-weighted":
        options["lengths"] = torch.arange(1, len(scores) + 1, device=scores.device) % 4 if lengths is None else lengths
    return f.group_advantages(scores, **options)


def scores_of(n, dtype=torch.float32, device="cpu"):
    return (1 + 2 * torch.randn(n, dtype=torch.float64)).to(dtype).to(device)


@pytest.mark.kernels
@modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_the_spec(mode, dtype, device):
    by_id = lambda f, x: advantages(x["scores"], f=f, group_ids=x["ids"], **mode)  # noqa: E731
    assert_close_to_reference(by_id, {"scores": scores_of(12, dtype, device), "ids": IDS.to(device)}, ["scores"])
    for size in (1, 2, 3, 12):
        by_size = lambda f, x, size=size: advantages(x["scores"], f=f, group_size=size, **mode)  # noqa: E731
        assert_close_to_reference(by_size, {"scores": scores_of(12, dtype, device)}, ["scores"])


@modes
def test_gradcheck(mode, backend, device):
    scores = scores_of(12, torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(partial(advantages, group_ids=IDS.to(device), **mode), scores)


@modes
def test_a_group_size_is_as_good_as_the_ids_it_stands_for(mode, backend, device):
    scores = scores_of(12, device=device)
    ids = torch.arange(12, device=device) // 3
    by_size = advantages(scores, group_size=3, **mode)
    assert_close(advantages(scores, group_ids=ids, **mode), by_size, rtol=1e-6, atol=1e-7)
    order = torch.randperm(12, device=device)
    lengths = (torch.arange(1, 13, device=device) % 4)[order]
    shuffled = advantages(scores[order], group_ids=100 - ids[order], lengths=lengths, **mode)
    assert_close(shuffled, by_size[order], rtol=1e-6, atol=1e-6)


@modes
def test_groups_of_equal_scores_have_no_advantage_and_a_finite_gradient(mode, backend, device):
    for score in (0.1, 97.3):
        x = {"scores": torch.tensor([score] * 7 + [1.0, 2, 3, 4, 5, 6, 7], device=device)}
        got = evaluate(lambda x: advantages(x["scores"], group_size=7, **mode), x, ["scores"])
        assert got["result"][:7].abs().max() < 1e-5
        assert got["dscores"].isfinite().all()
    x = {"scores": torch.full((6,), 0.1, device=device)}
    got = evaluate(lambda x: advantages(x["scores"], group_size=3, **mode), x, ["scores"])
    assert got["result"].abs().max() < 1e-5
    assert got["dscores"].isfinite().all()


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_group_of_one_has_advantage_0_or_keeps_its_score(baseline, std, backend, device):
    scores, ids = torch.tensor([5.0, 1.0, 2.0], device=device), torch.tensor([0, 1, 1], device=device)
    function = partial(advantages, scores, group_ids=ids, baseline=baseline, std=std)
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
            for baseline in BASELINES:
                out = advantages(scores, std=std, baseline=baseline, **options)
                assert out.shape == (0,)
                assert torch.autograd.grad(out.sum(), scores)[0].shape == (0,)
        assert rpp.best_of_group(scores, **options).shape == (0,)
        assert rpp.informative_groups(scores, **options).shape == (0,)


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


def test_others_that_are_equal_do_not_divide_however_they_round(backend, device):
    # 0.1 + 0.1 + 0.1 is not 0.3: a standard deviation of 1e-17 would make 1e6 of the outlier's advantage.
    scores = torch.tensor([0.1, 0.1, 0.1, 1.1], dtype=torch.float64, device=device)
    for baseline in BASELINES:
        out = by_others(scores, baseline)
        expected = {"mean": 0.75, "leave-one-out": 1.0, "length-weighted": 1.0}[baseline]
        assert out[3].item() == pytest.approx(expected, abs=1e-12)


def by_others(scores, baseline):
    lengths = torch.tensor([2, 1, 3, 0], device=scores.device)
    return advantages(scores, group_size=4, baseline=baseline, std="leave-one-out", lengths=lengths)


def test_a_pair_has_one_other_and_is_not_divided(backend, device):
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0], device=device)
    out = advantages(scores, group_size=2, baseline="leave-one-out", std="leave-one-out")
    assert out.tolist() == [-2, 2, 0, 0]


def test_one_of_length_0_weighs_nothing_whatever_its_score(backend, device):
    scores = torch.tensor([1.0, 4.0, math.nan, 7.0, 8.0, 9.0], device=device, requires_grad=True)
    lengths = torch.tensor([2, 1, 0, 0, 0, 0], device=device)
    out = advantages(scores, group_size=3, baseline="length-weighted", lengths=lengths)
    assert_close(out, torch.tensor([-1, 2, math.nan, 7, 8, 9], device=device), equal_nan=True)  # 2 = (2 * 1 + 4) / 3
    (dscores,) = torch.autograd.grad(out[:2].sum() + out[3:].sum(), scores)
    assert_close(dscores, torch.tensor([-1 / 3, 1 / 3, 0, 1, 1, 1], device=device))  # 1 - 2 (2/3), 1 - 2 (1/3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_lengths_of_any_number_type(dtype, backend, device):
    lengths = torch.tensor([3, 1, 4, 1, 5, 9], device=device)
    options = {"group_size": 3, "baseline": "length-weighted"}
    scores = scores_of(6, device=device)
    want = advantages(scores, lengths=lengths, **options)
    strided = torch.stack([lengths, lengths], 1).to(dtype)[:, 0]
    assert_close(advantages(scores, lengths=strided, **options), want, rtol=0, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("std", ["group", "leave-one-out"])
def test_an_outlier_takes_no_digits_from_the_spread_of_the_others(std, device):
    scores = torch.tensor([1e8, 1.0, 1 + 1e-6, 1 - 2e-6], dtype=torch.float64, device=device)
    call = lambda f, x: advantages(x["scores"], f=f, group_size=4, std=std, baseline="leave-one-out")  # noqa: E731
    got, want = call(rpp, {"scores": scores}), call(reference, {"scores": scores})
    assert_close(got, want, rtol=1e-7, atol=0)


@pytest.mark.kernels
def test_many_groups_are_those_of_the_spec(device):
    scores = scores_of(1200, device=device)
    for std in STDS:
        got = advantages(scores, group_size=8, std=std)
        assert_close(got, reference.group_advantages(scores, group_size=8, std=std), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the best, and whether there is a difference


def in_groups(function, scores, ids):
    """Group by group, in plain Python."""
    out = [None] * len(scores)
    for g in set(ids):
        members = [i for i, other in enumerate(ids) if other == g]
        for i, x in zip(members, function([scores[i] for i in members]), strict=True):
            out[i] = x
    return out


def first_best(scores):
    return [float(i == scores.index(max(scores))) for i in range(len(scores))]


def differ(scores):
    return [len(set(scores)) > 1] * len(scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_best_and_informative_are_what_python_finds(dtype, backend, device):
    ids = IDS.tolist()
    for seed in range(8):  # three values, so that there are ties
        torch.manual_seed(seed)
        scores = torch.randint(-1, 2, (12,)).to(dtype).to(device)
        best = rpp.best_of_group(scores, group_ids=IDS.to(device))
        assert best.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert best.tolist() == in_groups(first_best, scores.tolist(), ids)
        informative = rpp.informative_groups(scores, group_ids=IDS.to(device))
        assert informative.dtype == torch.bool
        assert informative.tolist() == in_groups(differ, scores.tolist(), ids)
        for size in (1, 2, 3, 12):
            by_size = [i // size for i in range(12)]
            assert rpp.best_of_group(scores, group_size=size).tolist() == in_groups(
                first_best, scores.tolist(), by_size
            )
            assert rpp.informative_groups(scores, group_size=size).tolist() == in_groups(
                differ, scores.tolist(), by_size
            )


def test_the_comparison_is_exact(backend, device):
    scores = torch.tensor([1.0, 1 + 2.0**-23, 0.1, 0.1], device=device)
    assert rpp.informative_groups(scores, group_size=2).tolist() == [True, True, False, False]
    assert rpp.best_of_group(scores, group_size=2).tolist() == [0, 1, 1, 0]


def test_infinite_scores_compare_and_a_nan_is_seen(backend, device):
    inf, nan = math.inf, math.nan
    scores = torch.tensor([-inf, -inf, inf, 0.0, 1.0, nan, nan, nan], device=device)
    assert rpp.best_of_group(scores, group_size=2).tolist() == [1, 0, 1, 0, 0, 1, 1, 0]
    assert rpp.informative_groups(scores, group_size=2).tolist() == [False, False] + [True] * 6


def test_best_and_informative_are_constants_and_change_nothing(backend, device):
    scores = scores_of(6, device=device).requires_grad_()
    before = scores.detach().clone()
    for f in (rpp.best_of_group, rpp.informative_groups):
        assert not f(scores, group_size=3).requires_grad
        strided = torch.stack([before, before], 1)[:, 0]
        assert_close(f(strided, group_size=3), f(before, group_size=3), rtol=0, atol=0)
    assert_close(scores.detach(), before, rtol=0, atol=0)


@pytest.mark.kernels
def test_compiled_without_graph_breaks(device):
    torch._dynamo.reset()
    scores, ids = scores_of(12, device=device), IDS.to(device)

    def function(scores, ids):
        by_id = {"group_ids": ids}
        a = rpp.group_advantages(scores, lengths=ids.abs(), baseline="length-weighted", std="leave-one-out", **by_id)
        best, informative = rpp.best_of_group(scores, **by_id), rpp.informative_groups(scores, group_size=3)
        return a, best, informative

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(scores, ids), function(scores, ids))
    torch._dynamo.reset()


def test_a_group_size_reads_nothing_back():
    scores = torch.zeros(6, device="meta")  # which there is nothing to read of
    for mode in MODES:
        assert advantages(scores, group_size=3, **mode).shape == (6,)
    assert rpp.best_of_group(scores, group_size=3).shape == (6,)
    assert rpp.informative_groups(scores, group_size=3).dtype == torch.bool


# ---------------------------------------------------------------- refusals

SCORES = torch.zeros(6)
WEIGHTED = {"baseline": "length-weighted"}


GROUPS_REFUSED = [
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
    ({"process_group": "world"}, "process_group: want a torch.distributed.ProcessGroup"),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *GROUPS_REFUSED,
        ({"baseline": "median"}, "baseline: want one of 'mean', 'leave-one-out', 'length-weighted', got 'median'"),
        ({"std": "sequence"}, "std: want one of 'none', 'group', 'batch', 'leave-one-out', got 'sequence'"),
        ({"singleton": "drop"}, "singleton: want one of 'zero', 'keep', got 'drop'"),
        ({"eps": 0.0}, "eps: want a positive number"),
        ({"lengths": SCORES}, r"lengths: want None with baseline 'mean', got float32 \(6,\)"),
        ({**WEIGHTED, "lengths": None}, "lengths: want a tensor of one for each score .* got None"),
        ({**WEIGHTED, "lengths": [1] * 6}, r"lengths: want the shape \(6,\) of scores"),
        ({**WEIGHTED, "lengths": SCORES[:5]}, r"lengths: want the shape \(6,\) of scores"),
        ({**WEIGHTED, "lengths": SCORES.bool()}, "lengths: want integers or floats on cpu"),
        ({**WEIGHTED, "lengths": SCORES.to("meta")}, "lengths: want integers or floats on cpu"),
        ({**WEIGHTED, "lengths": SCORES - 1}, "lengths: want finite numbers from 0, got numbers from -1.0"),
        ({**WEIGHTED, "lengths": SCORES + math.nan}, "lengths: want finite numbers from 0"),
        ({**WEIGHTED, "lengths": SCORES + math.inf}, "lengths: want finite numbers from 0"),
        ({**WEIGHTED, "lengths": SCORES.clone().requires_grad_()}, "lengths: want a constant"),
    ],
)
def test_group_advantages_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.group_advantages(**{"scores": SCORES, "group_size": 3, **changes})


@pytest.mark.parametrize("function", [rpp.best_of_group, rpp.informative_groups])
@pytest.mark.parametrize(("changes", "words"), GROUPS_REFUSED)
def test_best_and_informative_refuse(function, changes, words, backend):
    with pytest.raises(ValueError, match=words):
        function(**{"scores": SCORES, "group_size": 3, **changes})
