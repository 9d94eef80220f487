"""RunningMean: the plain mean of all scores so far. That of several ranks is in test_selection.py's world."""

import math

import pytest
import torch

import rpp_kernels as rpp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_the_mean_of_batches_of_any_size_is_that_of_all_scores(device):
    mean = rpp.RunningMean.zero(device)
    assert mean.mean == 0
    seen = []
    for scores in ([1.0, 2.0], [], [6.0], [-1.0, -2.0, 0.0]):
        mean = mean.updated(torch.tensor(scores, device=device))
        seen += scores
        assert mean.mean.item() == pytest.approx(sum(seen) / len(seen))
        assert mean.count == len(seen)
    assert {x.dtype for x in (*mean, mean.mean)} == {torch.float64}
    assert {x.shape for x in (*mean, mean.mean)} == {()}


def test_updated_changes_nothing_that_was_there(device):
    zero, scores = rpp.RunningMean.zero(device), torch.ones(3, device=device)
    zero.updated(scores)
    assert [*zero, scores.sum()] == [0, 0, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_every_dtype_and_a_baseline_that_keeps_it(dtype, device):
    scores = torch.tensor([0.5, 2.0], dtype=dtype, device=device)
    mean = rpp.RunningMean.zero(device).updated(scores)
    assert mean.mean.item() == 1.25
    assert (scores - mean.mean).dtype == dtype


def test_a_million_batches_do_not_wear_the_mean_out(device):
    # In float32 the sum would stop growing at 2^24 * 0.7.
    mean = rpp.RunningMean(*torch.tensor([0.7 * 2.0**30, 2.0**30], dtype=torch.float64, device=device))
    for _ in range(3):
        mean = mean.updated(torch.full((4,), 0.7, device=device))
    assert mean.mean.item() == pytest.approx(0.7, rel=1e-9)
    assert mean.count == 2**30 + 12


def test_nothing_is_read_back():
    mean = rpp.RunningMean.zero("meta").updated(torch.empty(3, device="meta"))
    assert mean.mean.device.type == "meta"


def test_it_is_kept_in_a_checkpoint(tmp_path, device):
    mean = rpp.RunningMean.zero(device).updated(torch.tensor([3.0, 4.0], device=device))
    torch.save(tuple(mean), tmp_path / "mean.pt")
    assert rpp.RunningMean(*torch.load(tmp_path / "mean.pt")) == mean


def test_a_nan_stays(device):
    mean = rpp.RunningMean.zero(device).updated(torch.tensor([math.nan], device=device))
    assert mean.updated(torch.ones(1, device=device)).mean.isnan()


def test_it_compiles_into_one_graph():
    def step(mean, scores):
        return scores - mean.mean, mean.updated(scores)

    mean, scores = rpp.RunningMean.zero().updated(torch.ones(2)), torch.tensor([1.0, 4.0])
    advantages, after = torch.compile(step, fullgraph=True, backend="aot_eager")(mean, scores)
    assert advantages.tolist() == [0, 3]
    assert after.mean == 7 / 4


@pytest.mark.parametrize(
    ("scores", "group", "words"),
    [
        (torch.zeros(2, 1), None, "scores: want .* of 1 dimension"),
        (torch.zeros(2).int(), None, "scores: want a float32"),
        (torch.zeros(2, device="meta"), None, "scores: want a tensor on cpu"),
        (torch.zeros(2, requires_grad=True), None, "scores: want a constant"),
        (torch.zeros(2), "WORLD", "process_group: want a torch.distributed.ProcessGroup"),
    ],
)
def test_refuses(scores, group, words):
    with pytest.raises(ValueError, match=words):
        rpp.RunningMean.zero().updated(scores, group)
