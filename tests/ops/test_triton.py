"""What Triton's kernels promise beside the numbers: 64-bit offsets, rows in parts, the same bits in any batch."""

import pytest
import torch

from rpp_kernels import backends, reference
from rpp_kernels.backends import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**31 + 16  # elements; further than 32 bits count

PROBLEM = triton.why_not(DEVICE)
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@pytest.fixture
def kernels():
    return backends.kernels("triton")


def far_rows(V, dtype):
    """Two rows, the second of them beyond 2**31 elements. Memory that is not touched costs nothing."""
    return torch.empty(FAR + V, dtype=dtype, device=DEVICE).as_strided((2, V), (FAR, 1))


def test_rows_of_logits_may_lie_beyond_32_bits(kernels):
    V, ids = 40, torch.tensor([3, 39], device=DEVICE)
    logits, dlogits = far_rows(V, torch.bfloat16), far_rows(V, torch.bfloat16)
    logits.copy_(torch.randn(2, V))
    near, dnear = logits.contiguous(), torch.empty(2, V, dtype=torch.bfloat16, device=DEVICE)
    far = kernels.logps_fwd(logits, ids, None, 0.7, None, True)
    want = kernels.logps_fwd(near, ids, None, 0.7, None, True)
    torch.testing.assert_close(far, want, rtol=0, atol=0)
    slopes = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE), None
    for out, x, mine in ((dlogits, logits, far), (dnear, near, want)):
        kernels.chunk_logps_bwd_out(out, x, None, ids, 0.7, None, 0.0, *mine[1:4], *slopes)
    torch.testing.assert_close(dlogits.contiguous(), dnear, rtol=0, atol=0)


def test_tokens_of_a_sequence_may_lie_beyond_32_bits(kernels):
    n = 50
    rewards = torch.empty(FAR + n, device=DEVICE)
    rewards[FAR:] = torch.randn(n)
    far = kernels.returns_fwd(rewards, None, torch.tensor([FAR, FAR + n], device=DEVICE), 0.9, 0)
    near = kernels.returns_fwd(rewards[FAR:].clone(), None, torch.tensor([0, n], device=DEVICE), 0.9, 0)
    torch.testing.assert_close(far[FAR:], near, rtol=0, atol=0)


def wide(rows, dtype=torch.float32):
    """Rows of three parts, with what they may hold: -inf in all of a part, and in all but one place."""
    from rpp_kernels.backends.triton.launch import block_of
    from rpp_kernels.backends.triton.logps import PART, row_statistics_kernel

    logits = torch.empty(1, dtype=dtype, device=DEVICE)
    part = PART.value * block_of(row_statistics_kernel, logits)
    logits = 3 * torch.randn(rows, 2 * part + 100, device=DEVICE).to(dtype)
    logits[0, :part] = -torch.inf
    logits[1, part:] = -torch.inf
    logits[2, : 2 * part + 99] = -torch.inf
    return logits


def test_rows_in_parts_are_the_spec(kernels):
    logits = wide(4)
    V = logits.shape[1]
    ids = torch.tensor([V - 1, 5, V - 1, V // 2], device=DEVICE)
    mask = torch.tensor([True, True, True, False], device=DEVICE)
    logits[3] = torch.nan
    logps, entropy, lse, rest, squares = kernels.logps_fwd(logits, ids, mask, 0.8, None, True)
    exact = logits.double().requires_grad_()
    want = reference.logps_from_logits(exact, ids, mask, temperature=0.8, sum_squares=True)
    for got, x in zip((logps, entropy, lse.double() + rest, squares), want, strict=True):
        torch.testing.assert_close(got.double(), x.detach(), rtol=2e-6, atol=2e-6)
    assert logps[2] == entropy[2] == 0
    assert squares[2] == 1
    without = kernels.logps_fwd(logits, ids, mask, 0.8, None, False)
    torch.testing.assert_close(without[:4], (logps, entropy, lse, rest), rtol=0, atol=0)
    assert without[4].shape == (0,)
    dlogits = torch.full_like(logits, torch.nan)
    slopes = torch.tensor([1.0, -2.0, 1.0, 1.0], device=DEVICE), torch.ones(4, device=DEVICE), None
    kernels.logps_bwd_out(dlogits, logits, ids, mask, 0.8, None, entropy, lse, rest, *slopes)
    (dexact,) = torch.autograd.grad((want.logps * slopes[0] + want.entropy * slopes[1]).sum(), exact)
    torch.testing.assert_close(dlogits.double(), dexact, rtol=1e-5, atol=1e-6)


def test_a_row_has_the_same_bits_in_any_batch_and_at_any_place(kernels):
    logits = wide(6)[:, :-4].contiguous()  # a multiple of 16 elements
    ids = torch.arange(6, device=DEVICE)
    together = kernels.logps_fwd(logits, ids, None, 1.0, None, True)
    reversed_ = kernels.logps_fwd(logits.flip(0), ids.flip(0), None, 1.0, None, True)
    for i in range(6):
        alone = kernels.logps_fwd(logits[i : i + 1], ids[i : i + 1], None, 1.0, None, True)
        for x, y, z in zip(alone, together, reversed_, strict=True):
            torch.testing.assert_close(x[0], y[i], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(x[0], z[5 - i], rtol=0, atol=0, equal_nan=True)


def test_an_id_beyond_the_vocabulary_is_a_nan_and_no_access_beyond_the_row(kernels):
    """On an accelerator no check reads the ids, which would wait for it."""
    logits, ids = torch.randn(3, 20, device=DEVICE), torch.tensor([20, 4, -1], device=DEVICE)
    logps, entropy, *_ = kernels.logps_fwd(logits, ids, None, 1.0, None, False)
    assert logps.isnan().tolist() == [True, False, True]
    assert entropy.isfinite().all()
