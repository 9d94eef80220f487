"""Our stand-in for TRL's Triton kernel against that kernel, which Triton's interpreter runs where there is no GPU."""

import inspect

import hosts
import pytest
import torch

from rpp_kernels.backends import triton
from rpp_kernels.integrations.trl import selective_log_softmax_and_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def theirs():
    if triton.why_not(DEVICE):
        pytest.skip(f"no Triton here: {triton.why_not(DEVICE)}")
    return hosts.module("trl.kernels").selective_log_softmax_and_entropy


def test_the_signature_is_theirs(theirs):
    names, ours = (inspect.signature(f).parameters for f in (theirs, selective_log_softmax_and_entropy))
    assert {k: v.default for k, v in names.items()} == {k: v.default for k, v in ours.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients_are_theirs(dtype, masked, theirs):
    logits = 3 * torch.randn(2, 5, 300, device=DEVICE).to(dtype)
    index = torch.randint(300, (2, 5), device=DEVICE)
    mask = (torch.rand(2, 5, device=DEVICE) < 0.7).long() if masked else None

    def results(function):
        x = logits.clone().requires_grad_()
        logps, entropy = function(x, index, temperature=0.7, row_mask=mask)
        (logps.sum() + 2 * (entropy * entropy).sum()).backward()
        return logps.detach(), entropy.detach(), x.grad

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    for got, want in zip(results(selective_log_softmax_and_entropy), results(theirs), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)
