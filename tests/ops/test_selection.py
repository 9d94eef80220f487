"""The functions that choose tokens beyond test_every_op.py: any size, ties, draws, their use, ranks, errors."""

import math
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.multiprocessing

import rpp_kernels as rpp
from rpp_kernels.testing import make_batch

dist = torch.distributed
assert_close = torch.testing.assert_close

# ---------------------------------------------------------------- top_entropy_mask


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 4099])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.55, 1.0])
def test_the_threshold_is_that_of_torch_quantile(n, fraction, backend, device):
    entropy = torch.rand(2, n, device=device, dtype=torch.float64)
    mask = torch.rand(2, n, device=device) < 0.7
    mask[0, 0] = True
    threshold = torch.quantile(entropy[mask], 1 - fraction)
    chosen = rpp.top_entropy_mask(entropy, mask, fraction=fraction)
    # The quantile may lie on a token, and rounding on either side of it.
    assert_close(chosen, mask & (entropy >= threshold - 1e-12), rtol=0, atol=0)


def test_more_tokens_than_torch_quantile_takes(device):
    n = (1 << 24) + 7
    entropy = torch.arange(n, device=device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropy, 0.5)
    assert rpp.top_entropy_mask(entropy, fraction=0.25).sum() == (n + 3) // 4


def test_equal_entropies_are_all_chosen_and_a_nan_is(backend, device):
    assert rpp.top_entropy_mask(torch.full((5,), 0.7, device=device)).all()
    assert rpp.top_entropy_mask(torch.zeros(5, device=device)).all()
    entropy = torch.tensor([0.1, math.nan, 0.3, 0.2, 0.0, 0.4], device=device)
    for fraction in (0.01, 0.3, 0.9):
        assert rpp.top_entropy_mask(entropy, fraction=fraction)[1]


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_any_shape_of_at_least_one_dimension(shape, backend, device):
    chosen = rpp.top_entropy_mask(torch.rand(shape, device=device))
    assert (chosen.shape, chosen.dtype) == (shape, torch.bool)


def test_nothing_is_read_back():
    # A tensor on meta has a shape and no values.
    x = torch.empty(3, 4, device="meta")
    assert rpp.top_entropy_mask(x, x.bool()).shape == (3, 4)
    assert rpp.kl_cov_mask(x, x[:, 0], x.bool()).shape == (3, 4)
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta")
    assert rpp.kl_cov_mask(x[0], x[:, :1].new_empty(4, 1), cu_seqlens=cu_seqlens).shape == (4,)
    assert rpp.rollout_weights(x, x).weights.shape == (3, 4)


# ---------------------------------------------------------------- covariance


def covariances(x):
    """In float64, -inf where masked, in another way than the spec."""
    mask = x["completion_mask"]
    a, logps = x["advantages"].double(), x["logps"].double()
    return ((a - a[mask].mean()) * (logps - logps[mask].mean())).masked_fill(~mask, -math.inf)


def clip_cov(x, **options):
    return rpp.clip_cov_weights(x["logps"], x["old_logps"], x["advantages"], x["completion_mask"], **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.05, 1.0])
def test_clip_cov_chooses_as_many_of_the_candidates_as_asked(packed, fraction, backend, device):
    x = make_batch(8, 200, packed=packed, device=device)
    mask, cov = x["completion_mask"], covariances(x)
    ratio, sign = (x["logps"] - x["old_logps"]).exp(), x["advantages"].sign()
    clipped = ((ratio > 1.2) & (sign > 0)) | ((ratio < 0.8) & (sign < 0))
    candidates = (cov > 0.5) & (cov < 2.0) & ~clipped
    weights = clip_cov(x, fraction=fraction, low=0.5, high=2.0)
    chosen = mask & (weights == 0)
    assert not (chosen & ~candidates).any()
    assert chosen.sum() == min(max(int(fraction * int(mask.sum())), 1), int(candidates.sum()))
    assert_close(weights, (mask & ~chosen).float(), rtol=0, atol=0)


def test_clip_cov_draws_the_first_of_a_permutation_of_the_candidates(backend, device):
    # What other implementations draw of the same seed.
    x = make_batch(8, 200, device=device)
    candidates = (covariances(x) > 0.5) & (covariances(x) < 2.0)
    options = {"fraction": 0.01, "low": 0.5, "high": 2.0, "epsilon_low": 1.0, "epsilon_high": math.inf}
    where = candidates.nonzero()
    torch.manual_seed(5)
    chosen = where[torch.randperm(len(where))[: int(0.01 * int(x["completion_mask"].sum()))].to(device)]
    expected = x["completion_mask"].float()
    expected[chosen[:, 0], chosen[:, 1]] = 0
    torch.manual_seed(5)
    assert_close(clip_cov(x, **options), expected, rtol=0, atol=0)
    state = torch.get_rng_state()
    assert_close(clip_cov(x, **options, generator=torch.Generator().manual_seed(5)), expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_clip_cov_without_a_candidate_leaves_all_as_it_is_and_draws_nothing(backend, device):
    x = make_batch(2, 9, device=device)
    state = torch.get_rng_state()
    weights = clip_cov(x, low=1e9, high=math.inf)
    assert_close(weights, x["completion_mask"].float(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.3, 1.0])
def test_kl_cov_chooses_the_greatest(packed, fraction, backend, device):
    x = make_batch(8, 200, packed=packed, device=device)
    chosen = rpp.kl_cov_mask(x["logps"], x["advantages"], x["completion_mask"], fraction=fraction)
    count = max(1, int(int(x["completion_mask"].sum()) * fraction))
    expected = torch.zeros_like(chosen).flatten()
    expected[covariances(x).flatten().topk(count).indices] = True
    assert_close(chosen, expected.view(chosen.shape), rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_an_advantage_for_each_sequence_is_one_for_each_of_its_tokens(packed, backend, device):
    x = make_batch(4, 9, packed=packed, device=device)
    cu_seqlens, mask = x.get("cu_seqlens"), x["completion_mask"]
    lengths = cu_seqlens.diff() if packed else torch.full((4,), 9, device=device)
    spread = x["scores"].repeat_interleave(lengths).view(mask.shape)
    each = [x["scores"][:, None]] + ([] if packed else [x["scores"]])
    options = {"fraction": 0.2, "cu_seqlens": cu_seqlens}
    draw = {"low": 0.0, "generator": torch.Generator()}
    for worth in each:
        got = rpp.kl_cov_mask(x["logps"], worth, mask, **options)
        assert_close(got, rpp.kl_cov_mask(x["logps"], spread, mask, **options))
        draws = []
        for advantages in (worth, spread):
            draw["generator"].manual_seed(0)
            draws.append(rpp.clip_cov_weights(x["logps"], x["old_logps"], advantages, mask, **options, **draw))
        assert_close(*draws)


def test_choices_take_what_requires_grad_and_are_constants(backend, device):
    x = make_batch(3, 7, device=device)
    logps = x["logps"].requires_grad_()
    assert not clip_cov({**x, "logps": logps}).requires_grad
    assert not rpp.kl_cov_mask(logps, x["advantages"]).requires_grad
    assert not rpp.top_entropy_mask(logps).requires_grad


def test_an_unbounded_ratio_is_what_kl_cov_asks_of_policy_loss(backend, device):
    # Nothing is clipped with epsilon_low=1 and epsilon_high=inf: -A r.
    x = make_batch(3, 7, device=device)
    result = rpp.policy_loss(
        x["logps"],
        x["old_logps"],
        x["advantages"],
        x["completion_mask"],
        epsilon_low=1,
        epsilon_high=math.inf,
        reduction="none",
    )
    expected = -x["advantages"] * (x["logps"] - x["old_logps"]).exp()
    assert_close(result.loss, torch.where(x["completion_mask"], expected, 0.0))
    assert result.stats.clipped_low == result.stats.clipped_high == 0


# ---------------------------------------------------------------- ranks

ENTROPIES = [torch.tensor([[0.1, 0.9, 0.5], [7.0, 0.3, 7.0]]), torch.tensor([[0.8, 0.2], [0.7, 7.0], [0.4, 0.6]])]
MASKS = [torch.tensor([[1, 1, 1], [0, 1, 0]]).bool(), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()]
SCORES = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-3.0])]
LIMIT = 60  # seconds


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=LIMIT), world_size=2, rank=rank)
    group = dist.group.WORLD
    entropy, mask = ENTROPIES[rank], MASKS[rank]
    none = entropy[:0] if rank else entropy
    mean = rpp.RunningMean.zero().updated(SCORES[rank], group)
    results = {
        **{f: rpp.top_entropy_mask(entropy, mask, fraction=f, process_group=group) for f in (0.2, 0.35, 1.0)},
        "one of nothing": rpp.top_entropy_mask(none, mask[: len(none)], process_group=group),
        "one masked": rpp.top_entropy_mask(entropy, mask & (rank == 1), process_group=group),
        "all masked": rpp.top_entropy_mask(entropy, mask & False, process_group=group),
        "mean": mean,
        "mean after": mean.updated(SCORES[rank][: 1 - rank], group),
    }
    torch.save({k: tuple(v) if isinstance(v, tuple) else v for k, v in results.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo to start a world with")
    folder = tmp_path_factory.mktemp("world")
    processes = torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + LIMIT
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, f"it did not end within {LIMIT} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_the_quantile_is_that_of_all_ranks(ranks):
    everything, valid = (torch.cat([x.flatten() for x in both]) for both in (ENTROPIES, MASKS))
    for fraction in (0.2, 0.35, 1.0):
        whole = rpp.top_entropy_mask(everything, valid, fraction=fraction)
        got = torch.cat([results[fraction].flatten() for results in ranks])
        assert got.tolist() == whole.tolist()
        assert 0 < got.sum() <= valid.sum()
    alone = [rpp.top_entropy_mask(x, m) for x, m in zip(ENTROPIES, MASKS, strict=True)]
    assert ranks[0]["one of nothing"].tolist() == alone[0].tolist()
    assert ranks[1]["one of nothing"].shape == (0, 2)
    assert not ranks[0]["one masked"].any()
    assert ranks[1]["one masked"].tolist() == alone[1].tolist()
    assert not any(results["all masked"].any() for results in ranks)


def test_the_running_mean_is_that_of_all_ranks(ranks):
    for results in ranks:
        assert [x.item() for x in results["mean"]] == [4, 4]  # 1 + 2 + 4 - 3 of four scores
        assert [x.item() for x in results["mean after"]] == [5, 5]  # and 1 of the first rank, nothing of the other


# ---------------------------------------------------------------- refusals

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entropy": X.int()}, "entropy: want a float32"),
        ({"entropy": X[0, 0]}, "entropy: want .* dimension"),
        ({"completion_mask": X}, "completion_mask: want a bool tensor"),
        ({"completion_mask": X[0].bool()}, r"completion_mask: want the shape \(2, 3\) of entropy"),
        ({"fraction": 0.0}, "fraction: want a number above 0, up to 1"),
        ({"fraction": 1.1}, "fraction: want a number above 0, up to 1"),
        ({"fraction": math.nan}, "fraction: want a number above 0, up to 1"),
        ({"process_group": "WORLD"}, "process_group: want a torch.distributed.ProcessGroup"),
    ],
)
def test_top_entropy_mask_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.top_entropy_mask(**{"entropy": X, **changes})


PER_SEQUENCE = [
    ({"advantages": X[:, 0], "cu_seqlens": torch.tensor([0, 2])}, r"logps: want \(T,\) when cu_seqlens is given"),
    ({"advantages": torch.zeros(3)}, r"advantages: want \(2, 3\), one for each token, or"),
    ({"advantages": X.clone().requires_grad_()}, "advantages: want a constant"),
    ({"advantages": X.int()}, "advantages: want a float32"),
    ({"logps": X.int()}, "logps: want a float32"),
    ({"completion_mask": X}, "completion_mask: want a bool tensor"),
    ({"fraction": 0}, "fraction: want a number above 0, up to 1"),
    ({"fraction": 2.0}, "fraction: want a number above 0, up to 1"),
]
PACKED = dict.fromkeys(("logps", "old_logps", "advantages"), X[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *PER_SEQUENCE,
        ({"old_logps": X.T}, r"old_logps: want the shape \(2, 3\) of logps"),
        ({"low": math.nan}, "low: want a number"),
        ({"low": 6.0}, "high: want a number from low, which is 6.0"),
        ({"epsilon_low": 1.5}, "epsilon_low: want a number from 0 to 1"),
        ({"epsilon_high": -0.1}, "epsilon_high: want a number from 0"),
        ({"generator": 5}, "generator: want a torch.Generator or None, got 5"),
        (PACKED | {"advantages": X[:, :1]}, "advantages: want .* of 1 dimension"),
        (PACKED | {"advantages": X[0, :2]}, r"advantages: want the shape \(3,\) of logps"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens: want 0, never falling"),
    ],
)
def test_clip_cov_weights_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.clip_cov_weights(**{"logps": X, "old_logps": X, "advantages": X, **changes})


@pytest.mark.parametrize(("changes", "words"), PER_SEQUENCE)
def test_kl_cov_mask_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.kl_cov_mask(**{"logps": X, "advantages": X, **changes})


@pytest.mark.parametrize("function", [partial(rpp.clip_cov_weights, old_logps=X[0]), rpp.kl_cov_mask])
def test_packed_tokens_with_an_advantage_each_need_no_cu_seqlens(function, backend):
    function(logps=X[0], advantages=X[0])
    function(logps=X[0], advantages=X[0], cu_seqlens=torch.tensor([0, 1, 3]))
