"""The row kernels of logits whose tokens are contiguous (csrc/cpu/chunks.h), which linear_logps and linear_loss call.

Without a softcap they must agree with the kernels of contiguous rows, which test_logps.py holds to the specification;
with one, they are compared with PyTorch.
"""

import math

import pytest
import torch

from rpp_kernels.backends import native
from rpp_kernels.testing import largest_of, within

pytestmark = pytest.mark.skipif(native.PROBLEM is not None, reason=str(native.PROBLEM))
C = torch.ops.rpp_kernels_C

DTYPES = [torch.float32, torch.float64]
# Around a vector, a pair of them and a tile of 512 tokens; around a block of 64, a part of 512 and many parts.
TOKENS = [1, 2, 15, 16, 17, 33, 130, 515]
WIDTHS = [1, 2, 63, 64, 65, 1000, 2049, 5000]
SHAPES = [(n, V) for n in TOKENS for V in WIDTHS if n * V < 300_000]
INF, NAN = math.inf, math.nan


def by_token(logits, ld=None):
    """The same logits with strides (1, ld), surrounded by NaN, which must not be read."""
    n, V = logits.shape
    memory = logits.new_full((V, ld or n), NAN)
    memory[:, :n] = logits.T
    return memory.T[:n]


def make(n, V, *, scale=2.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(V, (n,), generator=generator)
    temperature = (0.3 * normal(n)).exp()
    return scale * normal(n, V), ids, temperature, [normal(n), normal(n), normal(n)]


def backward(dlogits, logits, ids, grads, results, *, rows=None, temperature=None, softcap=0.0):
    C.chunk_logps_bwd_out(dlogits, logits, rows, ids, 1.0, temperature, softcap, *results[1:], *grads)
    return dlogits


def by_row(logits, ids, grads, temperature=None):
    results = C.logps_fwd(logits, ids, None, 1.0, temperature, False)[:4]
    dlogits = torch.empty_like(logits)
    C.logps_bwd_out(dlogits, logits, ids, None, 1.0, temperature, *results[1:], *grads)
    return results, dlogits


def by_torch(logits, ids, grads, temperature, softcap):
    x = logits.clone().requires_grad_()
    z = softcap * torch.tanh(x / softcap) if softcap else x
    log_p = (z / temperature[:, None]).log_softmax(-1)
    results = (
        log_p.gather(-1, ids[:, None]).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        (z / temperature[:, None]).logsumexp(-1),
    )
    dlogits = torch.autograd.grad(sum((r * g).sum() for r, g in zip(results, grads, strict=True)), x)[0]
    return *(r.detach() for r in results), dlogits


def assert_agree(actual, expected, dtype):
    ulps = 16 * torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=ulps, atol=ulps * max(1.0, largest_of(e)), equal_nan=True)


def assert_identical(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- against the kernels of contiguous rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "V"), SHAPES)
def test_every_number_of_tokens_and_width_of_row(n, V, dtype):
    logits, ids, temperature, grads = make(n, V, dtype=dtype)
    results, dlogits = by_row(logits, ids, grads, temperature)
    x = by_token(logits, ld=n + 3)
    actual = C.chunk_logps_fwd(x, ids, 1.0, temperature, 0.0)
    assert_agree(actual[:3], results[:3], dtype)
    apart = backward(by_token(logits), x, ids, grads, results, temperature=temperature)
    assert_agree([apart], [dlogits], dtype)
    assert_identical(x, logits)
    assert_identical(backward(x, x, ids, grads, results, temperature=temperature), apart)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_and_peaked_rows(scale, dtype):
    logits, ids, temperature, grads = make(33, 700, scale=scale, dtype=dtype)
    ids[:20] = logits[:20].argmax(-1)
    results, dlogits = by_row(logits, ids, grads, temperature)
    actual = C.chunk_logps_fwd(by_token(logits), ids, 1.0, temperature, 0.0)
    assert (actual[0] <= 0).all()
    assert (actual[1] >= -1e-30).all()
    assert_agree(actual[:3], results[:3], dtype)
    assert_agree(
        [backward(by_token(logits), by_token(logits), ids, grads, results, temperature=temperature)], [dlogits], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_temperature_for_all_is_that_temperature_for_each(dtype):
    logits, ids, _, grads = make(17, 100, dtype=dtype)
    x, temperature = by_token(logits), torch.full((17,), 0.5, dtype=dtype)
    one, each = C.chunk_logps_fwd(x, ids, 0.5, None, 0.0), C.chunk_logps_fwd(x, ids, 1.0, temperature, 0.0)
    for a, b in zip(one, each, strict=True):
        assert_identical(a, b)
    dlogits = by_token(logits)
    C.chunk_logps_bwd_out(dlogits, x, None, ids, 0.5, None, 0.0, *one[1:], *grads)
    assert_identical(dlogits, backward(by_token(logits), x, ids, grads, one, temperature=temperature))


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (1, 2), ()])
def test_gradients_of_some_of_the_results(given):
    logits, ids, temperature, grads = make(33, 300)
    grads = [g if i in given else None for i, g in enumerate(grads)]
    results, dlogits = by_row(logits, ids, grads, temperature)
    actual = backward(by_token(logits), by_token(logits), ids, grads, results, temperature=temperature)
    assert_agree([actual], [dlogits], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_sum_exp_is_kept_in_twice_the_precision(dtype):
    logits, ids, _, _ = make(40, 3000, scale=5.0, dtype=dtype)
    _, _, lse, rest = C.chunk_logps_fwd(by_token(logits), ids, 1.0, None, 0.0)
    assert (rest.abs() <= torch.finfo(dtype).eps * lse.abs()).all()
    # Terms carry the rounding of their logits' distance to the largest, which is less than that of the lse.
    if dtype == torch.float32:
        exact = logits.double().logsumexp(-1)
        torch.testing.assert_close(lse.double() + rest, exact, rtol=0.25 * torch.finfo(dtype).eps, atol=0)


# ---------------------------------------------------------------- tokens left out

CHOICES = {
    "none": lambda n: torch.arange(0),
    "all": torch.arange,
    "the first": lambda n: torch.arange(1),
    "the last": lambda n: torch.arange(n - 1, n),
    "every other": lambda n: torch.arange(0, n, 2),
    "runs": lambda n: torch.arange(n)[torch.arange(n) // 7 % 3 != 1],
    "the second half": lambda n: torch.arange(n // 2, n),
    "some": lambda n: torch.arange(n)[torch.rand(n) < 0.6],
    "few": lambda n: torch.arange(n)[torch.rand(n) < 0.1],
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("n", [1, 16, 33, 130, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_tokens_that_are_left_out_have_no_column(choice, n, dtype, softcap):
    logits, ids, temperature, grads = make(n, 130, dtype=dtype)
    rows = CHOICES[choice](n)
    given = {"temperature": temperature, "softcap": softcap}
    x = by_token(logits, n + 5)
    results = C.chunk_logps_fwd(x, ids, 1.0, temperature, softcap)
    expected = backward(by_token(logits), x, ids, grads, results, **given)[rows]
    memory = torch.full((130, n + 9), NAN, dtype=dtype)
    apart = backward(memory.T[: len(rows)], x, ids, grads, results, rows=rows, **given)
    assert_identical(apart, expected)
    assert memory[:, len(rows) :].isnan().all()  # nothing beside them is written
    ids[torch.ones(n).bool().index_fill(0, rows, False)] = -1  # nor are their targets read
    assert_identical(backward(x[: len(rows)], x, ids, grads, results, rows=rows, **given), expected)


def test_a_token_whose_gradients_are_0_gets_exactly_0_whatever_its_logits():
    logits, ids, _, grads = make(20, 200)
    logits[3, 7], logits[4, 150], logits[5] = NAN, INF, -INF
    for g in grads:
        g[3:7] = 0
    x = by_token(logits)
    dlogits = backward(by_token(logits), x, ids, grads, C.chunk_logps_fwd(x, ids, 1.0, None, 0.0))
    assert (dlogits[3:7] == 0).all()
    assert (dlogits[[0, 1, 2, 7, 8, 19]] != 0).any(-1).all()


# ---------------------------------------------------------------- infinities and NaN


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [3, 64, 1500])
def test_infinities_and_nan_are_as_by_row_and_stay_with_their_token(V, dtype):
    logits, ids, _, grads = make(35, V, dtype=dtype)
    logits[1, 1:] = -INF  # one token is left, and only the first block and part have any
    logits[2, :-1] = -INF
    logits[4] = -INF
    logits[6, V // 2] = NAN
    logits[8] = NAN
    logits[10, V - 1] = INF
    logits[12] = INF
    logits[14, 0], logits[14, 1:] = NAN, -INF
    logits[16, ::2] = -INF
    ids[:3] = torch.tensor([1, 0, 0])  # the last of them of probability 0
    results, dlogits = by_row(logits, ids, grads)
    actual = C.chunk_logps_fwd(by_token(logits), ids, 1.0, None, 0.0)
    assert_agree(actual[:3], results[:3], dtype)
    assert_identical(actual[3].isnan(), results[3].isnan())
    x = by_token(logits)
    assert_agree([backward(x, x, ids, grads, results)], [dlogits], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_of_almost_0_have_gradients_of_0(dtype):
    # And not subnormal ones, each of which takes the processor a hundred times as long.
    logits, ids, _, grads = make(16, 50, dtype=dtype)
    logits[:, 25:], ids = -1e3, ids.clamp(max=24)
    x = by_token(logits)
    dlogits = backward(x, x, ids, [1e-3 * g for g in grads], C.chunk_logps_fwd(x, ids, 1.0, None, 0.0))
    assert (dlogits[:, 25:] == 0).all()
    assert (dlogits[:, :25] != 0).all()


# ---------------------------------------------------------------- softcap


@pytest.mark.parametrize("softcap", [1.0, 5.0, 30.0, 1e4])
@pytest.mark.parametrize("scale", [1e-2, 2.0, 50.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_is_as_exact_as_pytorch(softcap, scale, dtype):
    logits, ids, temperature, grads = make(33, 700, scale=scale, dtype=dtype)
    x = by_token(logits)
    actual = C.chunk_logps_fwd(x, ids, 1.0, temperature, softcap)
    dlogits = backward(x, x, ids, grads, actual, temperature=temperature, softcap=softcap)
    same = by_torch(logits, ids, grads, temperature, softcap)
    exact = by_torch(logits.double(), ids, [g.double() for g in grads], temperature.double(), softcap)
    assert (actual[0] <= 0).all()
    for name, a, s, e in zip(("logps", "entropy", "lse", "dlogits"), (*actual[:3], dlogits), same, exact, strict=True):
        within(name, a, s, e, 2.0, (1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps) * largest_of(e))


def capped(x, softcap):
    """Each number of x capped, and the slope: of a vocabulary of one token the lse is the only logit."""
    ids, ones = torch.zeros(x.shape[0], dtype=torch.int64), torch.ones_like(x)
    results = C.chunk_logps_fwd(x[:, None], ids, 1.0, None, softcap)
    return results[2], backward(
        torch.empty_like(x[:, None]), x[:, None], ids, (None, None, ones), results, softcap=softcap
    )[:, 0]


@pytest.mark.parametrize("softcap", [1.0, 15.0, 30.0, 50.0])
def test_softcap_is_within_5_ulp_and_its_slope_nearly(softcap):
    tiny = 2.0 ** -torch.arange(0, 100)
    x = torch.cat([torch.linspace(-6, 6, 300_001), tiny, -tiny]) * softcap
    z, slope = capped(x, softcap)
    exact = softcap * torch.tanh(x.double() / softcap)
    unit = (exact.float().abs().nextafter(torch.tensor(INF)) - exact.float().abs()).double()
    assert ((z - exact).abs() <= 5 * unit).all()
    torch.testing.assert_close(slope.double(), torch.cosh(x.double() / softcap) ** -2, rtol=2e-6, atol=0)


@pytest.mark.parametrize("softcap", [1.0, 15.0, 32.0, 30.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_of_infinities_and_nan(softcap, dtype):
    x = torch.tensor([INF, -INF, NAN, torch.finfo(dtype).max, 0.0], dtype=dtype)
    z, slope = capped(x, softcap)
    c = torch.tensor(softcap, dtype=dtype)
    torch.testing.assert_close(z, torch.stack([c, -c, x[2], c, 0 * c]), equal_nan=True)
    torch.testing.assert_close(slope, torch.tensor([0, 0, NAN, 0, 1], dtype=dtype), rtol=0, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_what_stands_in_the_other_rows_changes_nothing(softcap):
    logits, ids, temperature, grads = make(70, 600)
    logits[20] = NAN
    part = slice(21, 45)
    all_of_them, some = by_token(logits), by_token(logits[part])
    whole = C.chunk_logps_fwd(all_of_them, ids, 1.0, temperature, softcap)
    alone = C.chunk_logps_fwd(some, ids[part], 1.0, temperature[part], softcap)
    for a, b in zip(whole, alone, strict=True):
        assert_identical(a[part], b)
    given = {"softcap": softcap}
    a = backward(all_of_them, all_of_them, ids, grads, whole, temperature=temperature, **given)
    b = backward(some, some, ids[part], [g[part] for g in grads], alone, temperature=temperature[part], **given)
    assert_identical(a[part], b)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_number_of_threads_changes_nothing(softcap):
    logits, ids, temperature, grads = make(600, 1700)
    rows, before, seen = torch.arange(0, 600, 3), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x = by_token(logits)
            results = C.chunk_logps_fwd(x, ids, 1.0, temperature, softcap)
            given = {"rows": rows, "temperature": temperature, "softcap": softcap}
            seen.append([*results, backward(x[: len(rows)], x, ids, grads, results, **given).clone()])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*seen, strict=True):
        assert_identical(one, two)


# ---------------------------------------------------------------- no tokens, and what is refused


def test_no_tokens():
    logits, ids, _, grads = make(0, 5)
    results = C.chunk_logps_fwd(logits, ids, 1.0, None, 0.0)
    assert [x.shape for x in results] == [(0,)] * 4
    backward(logits, logits, ids, grads, results)


N, V = 6, 40
FORWARD = {
    "contiguous tokens": {"logits": torch.zeros(N, V)},
    "ld >= 6": {"logits": torch.zeros(500).as_strided((N, V), (1, N - 1))},
    "want float32 or float64": {"logits": by_token(torch.zeros(N, V).half())},
    "want \\(tokens, vocabulary\\)": {"logits": torch.zeros(V)},
    "at least one token": {"logits": torch.zeros(N, 0)},
    "-1 at token 0 is outside": {"ids": torch.full((N,), -1)},
    "40 at token 5 is outside": {"ids": torch.tensor([0, 0, 0, 0, 0, V])},
    "target_ids: wrong dtype": {"ids": torch.zeros(N, dtype=torch.int32)},
    "target_ids: want 6": {"ids": torch.zeros(N - 1, dtype=torch.int64)},
    "temperature: wrong dtype": {"temperature": torch.ones(N).double()},
    "temperature: want 6": {"temperature": torch.ones(N - 1)},
    "softcap: want": {"softcap": -1.0},
    "want 0 for none": {"softcap": NAN},
}
BACKWARD = {
    "rising tokens below 6, got 1 at 1": {"rows": torch.tensor([1, 1])},
    "got 0 at 1": {"rows": torch.tensor([1, 0])},
    "got 6 at 0": {"rows": torch.tensor([6])},
    "got -1 at 0": {"rows": torch.tensor([-1])},
    "rows: wrong dtype": {"rows": torch.tensor([0], dtype=torch.int32)},
    "want 2 tokens of 40, got 6": {"rows": torch.tensor([0, 1])},
    "dlogits: want contiguous tokens": {"dlogits": torch.zeros(N, V)},
    "dlogits: .* floating type": {"dlogits": by_token(torch.zeros(N, V).double())},
    "got 6 of 41": {"dlogits": by_token(torch.zeros(N, V + 1))},
    "entropy: want 6": {"entropy": torch.zeros(1)},
    "dlogps: wrong dtype": {"dlogps": torch.zeros(N).double()},
    "at token 2 is outside": {"ids": torch.tensor([0, 0, V, 0, 0, 0])},
}


@pytest.mark.parametrize("message", FORWARD)
def test_what_the_forward_refuses(message):
    x = {
        "logits": by_token(torch.zeros(N, V)),
        "ids": torch.zeros(N, dtype=torch.int64),
        "temperature": None,
        "softcap": 0.0,
    }
    x |= FORWARD[message]
    with pytest.raises(RuntimeError, match=message):
        C.chunk_logps_fwd(x["logits"], x["ids"], 1.0, x["temperature"], x["softcap"])


@pytest.mark.parametrize("message", BACKWARD)
def test_what_the_backward_refuses(message):
    x = {"rows": None, "ids": torch.zeros(N, dtype=torch.int64), "entropy": torch.zeros(N), "dlogps": None}
    x |= {"dlogits": by_token(torch.zeros(N, V))} | BACKWARD[message]
    logits, lse = by_token(torch.zeros(N, V)), torch.zeros(N)
    with pytest.raises(RuntimeError, match=message):
        backward(
            x["dlogits"], logits, x["ids"], (x["dlogps"], None, None), (lse, x["entropy"], lse, lse), rows=x["rows"]
        )


def test_memory_that_overlaps_in_another_way_is_refused():
    memory, ids, lse = torch.zeros(1000), torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    logits, results = memory.as_strided((N, V), (1, 8)), [lse] * 4
    for other in (memory.as_strided((N, V), (1, 7)), memory.as_strided((N, V), (1, 8), 1)):
        with pytest.raises(RuntimeError, match="memory of its own"):
            backward(other, logits, ids, (lse, None, None), results)
