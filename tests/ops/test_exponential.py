"""The exponential of csrc/formulas.h, of which every probability and ratio is made, and that of Triton's ratios: 2 ulp.

Seen through policy_loss: with advantage -1 and nothing clipped the loss of a token is exp(logps), and so is its slope.
"""

import math

import pytest
import torch

import rpp_kernels as rpp

DTYPES = [torch.float32, torch.float64]
# From 2^(n - 1/2) on, n being the first exponent too large, the result is infinite: a little before it would overflow.
HIGHEST = {torch.float32: 127.49999 * math.log(2), torch.float64: 1023.49999 * math.log(2)}
LOWEST = {torch.float32: -87.33, torch.float64: -708.39}


def spread(low, high, count, run, dtype):
    """So many numbers from low to high; an interpreter is slow, and given a hundredth of them."""
    count = count // 100 if run == ("triton", "cpu") else count
    return torch.linspace(low, high, count, dtype=dtype, device=run[1])


def exponential(x, *, slope=False, clamp=1e9):
    x = x[None].clone().requires_grad_()
    loss = rpp.policy_loss(
        x,
        torch.zeros_like(x),
        torch.full_like(x, -1.0),
        epsilon_low=1.0,
        epsilon_high=math.inf,
        log_ratio_clamp=clamp,
        reduction="none",
    ).loss
    return torch.autograd.grad(loss.sum(), x)[0][0] if slope else loss.detach()[0]


def ulps(got, x):
    """The distance from exp(x) in units in the last place of exp(x)."""
    exact = x.double().exp()
    if x.dtype == torch.float64:  # PyTorch's own is half a unit off at most, or nearly
        unit = exact - exact.nextafter(torch.zeros_like(exact))
        return ((got - exact) / unit).abs()
    rounded = exact.float()
    unit = (rounded - rounded.nextafter(torch.zeros_like(rounded))).double()
    return ((got.double() - exact) / unit).abs()


@pytest.mark.kernels
@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ulp_densely_where_log_ratios_live(dtype, slope, run):
    x = spread(-20, 20, 2_000_003, run, dtype)
    assert ulps(exponential(x, slope=slope), x).max() <= 2


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ulp_as_far_as_results_are_normal(dtype, run):
    x = spread(LOWEST[dtype], HIGHEST[dtype], 1_000_003, run, dtype)
    assert ulps(exponential(x), x).max() <= 2


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ulp_at_the_edges_of_the_reduction_and_around_0(dtype, device):
    # x / ln 2 rounds up or down at half integers; the numbers on both sides of each, and the smallest of both signs.
    halves = (torch.arange(-120, 125, dtype=torch.float64) + 0.5) * math.log(2)
    edges = halves.to(dtype)
    edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    tiny = 2.0 ** -torch.arange(1, 126, dtype=dtype)
    x = torch.cat([edges, tiny, -tiny]).to(device)
    x = x[(x > LOWEST[dtype]) & (x < HIGHEST[dtype])]
    assert ulps(exponential(x), x).max() <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_1_at_0_and_at_numbers_too_small_to_matter(dtype, backend, device):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5e-324], dtype=dtype, device=device)
    assert (exponential(x) == 1).all()


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_never_falls_where_its_argument_rises(dtype, run):
    # Neighbouring arguments may swap by an ulp; arguments that are 4 ulp of the result apart may not.
    x = spread(-20, 20, 1_000_003, run, dtype)
    assert (exponential(x).diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_range_it_is_almost_0_and_infinite_and_nan_stays_nan(dtype, backend, device):
    inf = math.inf
    x = torch.tensor([-1e5, -inf, LOWEST[dtype] - 2, 1e5, inf, math.nan], dtype=dtype, device=device)
    low = exponential(x, clamp=inf)
    smallest = torch.finfo(dtype).tiny
    assert (low[:3] <= 4 * smallest).all()
    assert (low[:3] >= 0).all()
    assert (low[3:5] == inf).all()
    assert low[5].isnan()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 33])
def test_the_last_tokens_of_a_row_are_exponentials_as_well(n, backend, device):
    x = torch.linspace(-20, 20, n, device=device)
    torch.testing.assert_close(exponential(x), x.double().exp().float(), rtol=2.4e-7, atol=0)
