"""What stands in for functions of TRL. Against TRL itself: tests/parity/test_trl_kernels.py."""

import pytest
import torch

from rpp_kernels import reference
from rpp_kernels.integrations.trl import selective_log_softmax_and_entropy


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64, torch.float32])
def test_any_number_of_dimensions_and_any_mask(run, device, leading, mask_dtype):
    logits = torch.randn(*leading, 11, device=device, requires_grad=True)
    index = torch.randint(11, leading, device=device)
    mask = None if mask_dtype is None else (torch.rand(leading, device=device) < 0.7).to(mask_dtype)
    logps, entropy = selective_log_softmax_and_entropy(logits, index, 0.7, mask)
    (dlogits,) = torch.autograd.grad((2 * logps + entropy).sum(), logits)
    flat = logits.detach().reshape(-1, 11).requires_grad_()
    want = reference.logps_from_logits(
        flat, index.reshape(-1), None if mask is None else mask.reshape(-1) != 0, temperature=0.7
    )
    (dflat,) = torch.autograd.grad((2 * want.logps + want.entropy).sum(), flat)
    torch.testing.assert_close(logps, want.logps.view(leading))
    torch.testing.assert_close(entropy, want.entropy.view(leading))
    torch.testing.assert_close(dlogits, dflat.view(dlogits.shape))


def test_a_masked_row_may_be_nan_and_have_any_index():
    logits = torch.randn(2, 3, 5)
    logits[0, 1] = torch.nan
    index = torch.tensor([[1, -100, 2], [0, 4, 3]])
    logps, entropy = selective_log_softmax_and_entropy(logits, index, row_mask=index >= 0)
    assert logps[0, 1] == entropy[0, 1] == 0
    assert logps.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integers_are_an_index(dtype):
    logits, index = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    for got, want in zip(
        selective_log_softmax_and_entropy(logits, index.to(dtype)),
        selective_log_softmax_and_entropy(logits, index),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], torch.zeros(1).long()), r"logits: want a tensor of shape \(..., V\)"),
        ((torch.zeros(()), torch.zeros(()).long()), r"logits: want a tensor of shape \(..., V\)"),
        ((torch.zeros(2, 3), torch.zeros(3).long()), r"index: want the shape \(2,\)"),
        ((torch.zeros(2, 3), torch.zeros(2)), "index: want integers"),
        ((torch.zeros(2, 3), torch.zeros(2).long(), 1.0, torch.ones(3)), r"row_mask: want the shape \(2,\)"),
        ((torch.zeros(2, 3), torch.zeros(2).long(), 0.0), "temperature: want a positive number"),
        ((torch.zeros(2, 3), torch.full((2,), 3)), r"target_ids: want ids in \[0, 3\)"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        selective_log_softmax_and_entropy(*arguments)
