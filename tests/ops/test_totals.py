"""num_items_in_batch and sum_over_ranks on one process; of many, see test_distributed.py."""

from typing import NamedTuple

import pytest
import torch
from calls import LENGTHS, MASK, REDUCTIONS
from strategies import packed, random_batch

import rpp_kernels as rpp
from rpp_kernels import reference

assert_close = torch.testing.assert_close
reductions = pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r != "none"])


@reductions
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T.contiguous().T], ids=["contiguous", "strided"])
def test_items_are_those_of_the_spec_padded_and_packed(reduction, view, backend, device):
    batch = random_batch(MASK, LENGTHS)
    flat = packed(batch)
    want = reference.num_items_in_batch(batch.mask, reduction).to(device)
    assert_close(rpp.num_items_in_batch(view(batch.mask.to(device)), reduction), want, rtol=0, atol=0)
    got = rpp.num_items_in_batch(flat.mask.to(device), reduction, cu_seqlens=flat.cu_seqlens.to(device))
    assert_close(got, want, rtol=0, atol=0)


@reductions
@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0), (0, 0), (2, 3)])
def test_nothing_to_count_is_1(reduction, B, S, backend, device):
    mask = torch.zeros(B, S, device=device).bool()
    assert rpp.num_items_in_batch(mask, reduction).item() == 1
    cu_seqlens = torch.arange(B + 1, device=device) * S
    assert rpp.num_items_in_batch(mask.flatten(), reduction, cu_seqlens=cu_seqlens).item() == 1


@reductions
def test_they_are_what_a_loss_divides_by_on_its_own(reduction, backend, device):
    x = random_batch(MASK, LENGTHS)
    options = {"reduction": reduction, "max_completion_length": 9 if reduction.endswith("norm") else None}
    tensors = [x.tensors[k].to(device) for k in ("logps", "old_logps", "advantages")]
    mask = x.mask.to(device)
    own = rpp.policy_loss(*tensors, mask, **options).loss
    items = rpp.num_items_in_batch(mask, reduction)
    assert_close(rpp.policy_loss(*tensors, mask, num_items_in_batch=items, **options).loss, own)


@reductions
def test_counting_reads_nothing_back(reduction):
    mask, cu_seqlens = torch.ones(2, 3, device="meta").bool(), torch.arange(3, device="meta")
    assert rpp.num_items_in_batch(mask, reduction).shape == ()
    assert rpp.num_items_in_batch(mask[0], reduction, cu_seqlens=cu_seqlens).dtype == torch.float64


class Pair(NamedTuple):
    first: object
    second: object


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (MASK.int(), {}, r"completion_mask: want a bool tensor \(completion_mask != 0\), got int32"),
        (None, {}, "completion_mask: want a bool tensor"),
        (MASK[0], {}, r"completion_mask: want \(B, S\), or \(T,\) together with cu_seqlens"),
        (MASK, {"cu_seqlens": torch.tensor([0, 35])}, r"completion_mask: want \(T,\) when cu_seqlens is given"),
        (MASK[0], {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: want 0, never falling, up to the 7 tokens"),
        (MASK, {"reduction": "none"}, "reduction: want one of 'token-mean', .* got 'none'"),
        (MASK, {"reduction": "mean"}, "reduction: want one of"),
        (MASK, {"process_group": "world"}, "process_group: want a torch.distributed.ProcessGroup"),
    ],
)
def test_num_items_in_batch_refuses(mask, options, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.num_items_in_batch(mask, **options)


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        ({"loss": ONE}, "stats: want a NamedTuple of tensors, got dict"),
        ((ONE, ONE), "stats: want a NamedTuple of tensors, got tuple"),
        (Pair(ONE, 1.0), "stats.second: want a tensor of floats, int64 or int32, got float 1.0"),
        (Pair(ONE.bool(), ONE), "stats.first: want a tensor of floats, int64 or int32, got bool"),
        (Pair(ONE, Pair(ONE, ONE)), "stats.second: want a tensor of floats"),
        (Pair(ONE, ONE.to("meta")), "stats.second: want a tensor on cpu"),
        (Pair(ONE.clone().requires_grad_(), ONE), "stats.first: want a constant"),
    ],
)
def test_sum_over_ranks_refuses(stats, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.sum_over_ranks(stats, None)


def test_sum_over_ranks_refuses_what_is_no_process_group(backend):
    with pytest.raises(ValueError, match=r"process_group: want a torch.distributed.ProcessGroup"):
        rpp.sum_over_ranks(Pair(ONE, ONE), "world")
