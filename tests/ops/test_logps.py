"""logps_from_logits and linear_logps beyond test_every_op.py: every width and kind of row, views, chunks, errors."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rpp_kernels as rpp
from rpp_kernels.ops import chunks
from rpp_kernels.testing import ZERO, assert_close_to_reference, evaluate

assert_close = torch.testing.assert_close
assert_identical = partial(assert_close, rtol=0, atol=0)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("logps", "entropy", "lse")


def from_logits(f, x, mask=None, temperature=1.0):
    return f.logps_from_logits(x["logits"], x["target_ids"], mask, temperature=x.get("temperature", temperature))


def linear(f, x, mask=None, temperature=1.0, **options):
    return f.linear_logps(
        x["hidden_states"],
        x["weight"],
        x["target_ids"],
        mask,
        bias=x.get("bias"),
        temperature=x.get("temperature", temperature),
        **options,
    )


def rows(T, V, *, scale=2.0, shift=0.0, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(T, V, generator=generator, dtype=torch.float64) + shift
    ids = torch.randint(V, (T,), generator=generator)
    return {"logits": logits.to(dtype).to(device), "target_ids": ids.to(device)}


def head(T, V, H=5, *, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return {
        "hidden_states": normal(T, H),
        "weight": normal(V, H),
        "bias": normal(V),
        "target_ids": torch.randint(V, (T,), generator=generator).to(device),
    }


def gradients(out, inputs):
    return torch.autograd.grad(sum(x.sum() for x in out if x is not None), inputs)


# ---------------------------------------------------------------- every width and kind of row

# Below, at and above a vector of 16 floats, a pair of vectors, a block of 2048; and a real vocabulary.
WIDTHS = [1, 2, 15, 16, 17, 31, 64, 1000, 2047, 2048, 2049, 4099, 32000]


@pytest.mark.kernels
@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_row(V, dtype, device):
    assert_close_to_reference(from_logits, rows(3, V, dtype=dtype, device=device), ["logits"])


@pytest.mark.kernels
@pytest.mark.parametrize("T", [1, 3, 17, 64])
@pytest.mark.parametrize("V", [1, 17, 1000])
def test_every_number_of_rows(T, V, device):
    assert_close_to_reference(from_logits, rows(T, V, device=device), ["logits"])


# A flat row, a usual one, a peaked one; the same far from 0, where logits have few digits left; one token above all.
KINDS = {
    "equal": {"scale": 0.0},
    "flat": {"scale": 1e-3},
    "usual": {"scale": 2.0},
    "peaked": {"scale": 30.0},
    "far above 0": {"shift": 1e4},
    "far below 0": {"shift": -1e4},
    "huge": {"scale": 1e4},
}


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [2, 33, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_row(kind, V, dtype, device):
    assert_close_to_reference(from_logits, rows(9, V, dtype=dtype, device=device, **KINDS[kind]), ["logits"])


@pytest.mark.kernels
@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.7, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_temperature(temperature, dtype, device):
    call = partial(from_logits, temperature=temperature)
    assert_close_to_reference(call, rows(17, 100, dtype=dtype, device=device), ["logits"])


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_anywhere_in_a_row_of_many_blocks(dtype, device):
    x = rows(8, 4099, dtype=dtype, device=device)
    for row, column in enumerate((0, 1, 15, 2047, 2048, 4095, 4096, 4098)):
        x["logits"][row, column] = 12.0
    assert_close_to_reference(from_logits, x, ["logits"])


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_rising_and_falling_rows_rescale_at_every_block_or_never(dtype, device):
    rising = torch.linspace(-60, 60, 6 * 2048, device=device)
    x = {"logits": torch.stack([rising, rising.flip(0)]).to(dtype), "target_ids": torch.tensor([5000, 5000]).to(device)}
    assert_close_to_reference(from_logits, x, ["logits"])


def test_logps_are_never_above_0_and_entropy_never_below(backend, device):
    for kind in KINDS.values():
        out = rpp.logps_from_logits(**rows(64, 1000, device=device, **kind))
        assert (out.logps <= 0).all()
        assert (out.entropy >= 0).all()


def test_the_only_token_is_certain(backend, device):
    x = rows(3, 1, scale=100.0, device=device)
    x["logits"].requires_grad_()
    out = rpp.logps_from_logits(**x)
    assert (out.logps == 0).all()
    assert (out.entropy.abs() <= ZERO).all()
    assert_identical(out.lse, x["logits"].squeeze(1))
    assert (torch.autograd.grad(out.logps.sum() + out.entropy.sum(), x["logits"])[0] == 0).all()


# ---------------------------------------------------------------- infinities and NaN


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [3, 33, 4099])
def test_logits_of_minus_infinity_have_probability_0(V, dtype, device):
    x = rows(5, V, dtype=dtype, device=device)
    banned = torch.rand(5, V, generator=torch.Generator().manual_seed(1)) < 0.5
    banned[3] = torch.arange(V) != V - 1  # all but the last
    banned[4] = torch.arange(V) != 0  # all but the first
    x["target_ids"] = (~banned).int().argmax(1).to(device)
    x["logits"][banned.to(device)] = -math.inf
    assert_close_to_reference(from_logits, x, ["logits"])
    dlogits = evaluate(partial(from_logits, rpp), x, ["logits"])["dlogits"]
    assert (dlogits[banned.to(device)].abs() <= ZERO).all()


@pytest.mark.kernels
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_of_minus_infinity_has_logps_minus_infinity_and_the_gradient_of_the_spec(field, dtype, device):
    x = rows(4, 33, dtype=dtype, device=device)
    x["logits"][range(4), x["target_ids"]] = -math.inf
    assert rpp.logps_from_logits(**x).logps.tolist() == [-math.inf] * 4
    assert_close_to_reference(lambda f, x: getattr(from_logits(f, x), field), x, ["logits"])


@pytest.mark.parametrize("column", [0, 16, 2047, 2048, 4098])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_among_the_logits_is_not_lost(column, dtype, backend, device):
    x = rows(3, 4099, dtype=dtype, device=device)
    x["logits"][1, column] = math.nan
    x["logits"].requires_grad_()
    out = rpp.logps_from_logits(**x)
    (dlogits,) = gradients(out, [x["logits"]])
    for y in (*out[:3], dlogits):
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


def test_a_row_that_starts_with_nan_and_minus_infinities_is_nan(backend, device):
    logits = torch.full((1, 4099), -math.inf, device=device)
    logits[0, 3], logits[0, 4098] = math.nan, 1.0
    for y in rpp.logps_from_logits(logits, torch.tensor([4098], device=device), sum_squares=True):
        assert y.isnan().all()


def test_a_row_of_minus_infinities_or_one_of_plus_infinity_is_no_distribution_and_says_so(backend, device):
    x = rows(3, 40, device=device)
    x["logits"][0] = -math.inf
    x["logits"][2, 7] = math.inf
    out = rpp.logps_from_logits(**x)
    for y in (out.logps, out.entropy):
        assert not y[[0, 2]].isfinite().any()
        assert y[1].isfinite()


def test_a_gradient_of_nan_reaches_its_row_and_no_other(backend, device):
    x = rows(3, 40, device=device)
    x["logits"].requires_grad_()
    dlogps = torch.tensor([0.0, math.nan, 1.0], device=device)
    (dlogits,) = torch.autograd.grad(rpp.logps_from_logits(**x).logps, x["logits"], dlogps)
    assert (dlogits[0] == 0).all()
    assert dlogits[1].isnan().all()
    assert dlogits[2].isfinite().all()


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_logits_are_read_where_they_lie(dtype, backend, device):
    logits = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    views = {
        "logits[:, :-1]": logits[:, :-1],
        "logits[:, 1:]": logits[:, 1:],
        "logits[::2]": logits[::2],
        "transposed": logits.transpose(0, 1),
        "some columns": logits[..., 3:20],
        "last stride 2": logits[..., ::2],
        "last stride is that of the batch": logits.permute(2, 1, 0)[..., :3],
        "one row for all": logits[:1, :1].expand(4, 5, 40),
    }
    for name, view in views.items():
        ids = torch.arange(view.shape[:-1].numel(), device=device).reshape(view.shape[:-1]) % view.shape[-1]
        got = evaluate(lambda x, ids=ids: rpp.logps_from_logits(x["x"], ids), {"x": view}, ["x"])
        want = evaluate(lambda x, ids=ids: rpp.logps_from_logits(x["x"], ids), {"x": view.contiguous()}, ["x"])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        if backend != "reference":
            assert_identical(got, want)


@pytest.mark.parametrize("function", [from_logits, linear])
def test_a_batch_in_three_dimensions_is_its_rows(function, backend, device):
    x = rows(12, 9, device=device) | head(12, 9, device=device) | {"temperature": torch.rand(12, device=device) + 0.5}
    mask = torch.arange(12, device=device) % 3 != 0
    flat = function(rpp, x, mask)
    shared = ("weight", "bias")
    boxed = function(
        rpp, {k: v if k in shared else v.reshape(3, 4, *v.shape[1:]) for k, v in x.items()}, mask.view(3, 4)
    )
    assert_close(boxed, type(flat)(*(y.view(3, 4) for y in flat[:3])))


# ---------------------------------------------------------------- parts of the gradient


@pytest.mark.parametrize("which", [("logps",), ("entropy",), ("lse",), ("logps", "lse"), ("logps", "entropy"), FIELDS])
@pytest.mark.parametrize("function", [from_logits, linear])
def test_gradcheck_of_any_of_the_results(function, which, backend, device):
    x = rows(4, 5, dtype=torch.float64, device=device) | head(4, 5, H=3, dtype=torch.float64, device=device)
    temperature = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64, device=device)
    names = ("logits",) if function is from_logits else ("hidden_states", "weight", "bias")

    def f(*inputs):
        out = function(rpp, {**x, **dict(zip(names, inputs, strict=True)), "temperature": temperature})
        return tuple(getattr(out, name) for name in which)

    assert torch.autograd.gradcheck(f, [x[name].requires_grad_() for name in names])


def test_a_result_that_is_not_used_adds_nothing_to_the_gradient(backend, device):
    x = rows(6, 40, device=device)
    x["logits"].requires_grad_()
    out = rpp.logps_from_logits(**x)
    (alone,) = torch.autograd.grad(out.logps.sum(), x["logits"], retain_graph=True)
    (beside,) = torch.autograd.grad(out.logps.sum() + 0 * out.entropy.sum() + 0 * out.lse.sum(), x["logits"])
    assert_close(alone, beside, rtol=1e-6, atol=1e-7)


def test_a_temperature_for_each_token_is_the_number_for_that_token(backend, device):
    x = rows(4, 40, device=device)
    each = torch.tensor([0.5, 1.0, 2.0, 0.5], device=device)
    together = rpp.logps_from_logits(**x, temperature=each)
    for i, temperature in enumerate(each.tolist()):
        alone = rpp.logps_from_logits(x["logits"][i : i + 1], x["target_ids"][i : i + 1], temperature=temperature)
        assert_identical(type(together)(*(y[i : i + 1] for y in together[:3])), alone)


# ---------------------------------------------------------------- sum of squares


def with_squares(f, x, mask=None, temperature=1.0):
    temperature = x.get("temperature", temperature)
    return f.logps_from_logits(x["logits"], x["target_ids"], mask, temperature=temperature, sum_squares=True)


# ---------------------------------------------------------------- a gradient in the place of the logits


def given_and_gradient(x, mask=None, inplace_backward=True):
    """The logits that an op computed, and the gradient of a leaf behind them."""
    leaf = x["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    out = rpp.logps_from_logits(logits, x["target_ids"], mask, temperature=0.7, inplace_backward=inplace_backward)
    (gradient,) = torch.autograd.grad(out.logps.sum() + 0.3 * out.entropy.sum(), logits)
    return logits, gradient


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 33, 4099])
def test_a_gradient_in_the_place_of_the_logits_is_the_same_to_the_last_bit(V, dtype, device):
    x = rows(5, V, dtype=dtype, device=device)
    mask = torch.tensor([True, False, True, True, True], device=device)
    _, wanted = given_and_gradient(x, mask, inplace_backward=False)
    logits, gradient = given_and_gradient(x, mask)
    assert gradient.data_ptr() == logits.data_ptr()
    assert_identical(gradient, wanted)


@pytest.mark.kernels
def test_logits_in_pieces_and_a_gradient_of_nothing_are_left_alone(device):
    x = rows(5, 33, device=device)
    wide = torch.cat([x["logits"], x["logits"]], 1).requires_grad_()
    logits = (wide * 1.0)[:, :33]
    before = logits.detach().clone()
    rpp.logps_from_logits(logits, x["target_ids"], inplace_backward=True).logps.sum().backward()
    assert_identical(logits.detach(), before)
    with torch.no_grad():
        rpp.logps_from_logits(x["logits"], x["target_ids"], inplace_backward=True)
    assert_identical(x["logits"], before)


@pytest.mark.kernels
def test_whoever_still_needs_the_logits_is_refused(device):
    x = rows(5, 33, device=device)
    leaf = x["logits"].clone().requires_grad_()

    def loss(logits):
        return rpp.logps_from_logits(logits, x["target_ids"], inplace_backward=True).logps.sum()

    with pytest.raises(ValueError, match="inplace_backward: want False for a leaf"):
        loss(leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(leaf.tanh()).backward()
    twice = loss(leaf * 1.0)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.backward()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss(leaf * 1.0), leaf, create_graph=True)


@pytest.mark.kernels
def test_torch_compile_takes_no_notice_of_it(device):
    x = rows(5, 33, device=device)
    _, wanted = given_and_gradient(x, inplace_backward=False)
    leaf = x["logits"].clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(leaf):
        out = rpp.logps_from_logits(leaf * 1.0, x["target_ids"], temperature=0.7, inplace_backward=True)
        return out.logps.sum() + 0.3 * out.entropy.sum()

    loss(leaf).backward()
    assert_close(leaf.grad, wanted)


@pytest.mark.kernels
@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_of_every_width_of_row(V, dtype, device):
    assert_close_to_reference(with_squares, rows(3, V, dtype=dtype, device=device), ["logits"])


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [2, 33, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_of_every_kind_of_row(kind, V, dtype, device):
    assert_close_to_reference(with_squares, rows(9, V, dtype=dtype, device=device, **KINDS[kind]))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_where_the_maximum_rises_at_every_block_or_never(dtype, device):
    rising = torch.linspace(-60, 60, 6 * 2048, device=device)
    x = {"logits": torch.stack([rising, rising.flip(0)]).to(dtype), "target_ids": torch.tensor([5000, 5000]).to(device)}
    assert_close_to_reference(partial(with_squares, temperature=7.0), x)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [3, 33, 4099])
def test_sum_of_squares_with_masked_rows_banned_tokens_and_a_temperature_for_each_row(V, dtype, device):
    x = rows(5, V, dtype=dtype, device=device)
    x["logits"][1, 1:] = -math.inf  # one token is left
    x["logits"][2, : V // 2] = -math.inf
    x["logits"][3] = math.nan
    x["target_ids"][3] = -100
    x["temperature"] = torch.tensor([0.5, 1.0, 2.0, math.nan, 0.7], device=device)
    mask = torch.tensor([True, True, True, False, True], device=device)
    assert_close_to_reference(partial(with_squares, mask=mask), x)
    squares = with_squares(rpp, x, mask).sum_squares
    assert squares[1] == 1
    assert squares[3] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_is_1_of_the_only_token_1_over_v_of_equal_ones_and_never_more_than_1(dtype, backend, device):
    only = with_squares(rpp, rows(3, 1, scale=100.0, dtype=dtype, device=device)).sum_squares
    assert (only == 1).all()
    equal = with_squares(rpp, rows(3, 64, scale=0.0, dtype=dtype, device=device)).sum_squares
    assert_close(equal, torch.full_like(equal, 1 / 64), rtol=1e-6, atol=0)
    for kind in KINDS.values():
        squares = with_squares(rpp, rows(64, 1000, dtype=dtype, device=device, **kind)).sum_squares
        assert (squares <= 1 + 1e-6 * (backend == "reference")).all()
        assert (squares * 1000 >= 1 - 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_of_a_row_that_is_no_distribution_is_nan(dtype, backend, device):
    x = rows(4, 4099, dtype=dtype, device=device)
    x["logits"][0] = -math.inf
    x["logits"][1, 4098] = math.nan
    x["logits"][3, 7] = math.inf
    assert with_squares(rpp, x).sum_squares.isnan().tolist() == [True, True, False, True]


def test_sum_of_squares_changes_nothing_else_and_has_no_gradient(backend, device):
    x = rows(6, 40, device=device)
    x["logits"].requires_grad_()
    out, without = with_squares(rpp, x), from_logits(rpp, x)
    assert without.sum_squares is None
    assert linear(rpp, head(3, 5, device=device)).sum_squares is None
    assert_identical(tuple(out[:3]), tuple(without[:3]))
    assert_identical(gradients(out[:3], [x["logits"]]), gradients(without[:3], [x["logits"]]))
    assert not out.sum_squares.requires_grad


def test_sum_of_squares_has_the_shape_and_dtype_of_logps(backend, device):
    for dtype, wanted in zip(DTYPES, (torch.float64, torch.float32, torch.float32, torch.float32), strict=True):
        for shape in ((2, 3), (0, 3)):
            logits = torch.zeros(*shape, 5, dtype=dtype, device=device)
            ids = torch.zeros(*shape, dtype=torch.int64, device=device)
            squares = rpp.logps_from_logits(logits, ids, sum_squares=True).sum_squares
            assert (squares.shape, squares.dtype) == (shape, wanted)


@pytest.mark.parametrize("wanted", [False, True])
def test_sum_of_squares_compiles_into_one_graph(wanted, backend, device):
    x = rows(6, 40, device=device)

    def call(x):
        out = rpp.logps_from_logits(x["logits"], x["target_ids"], sum_squares=wanted)
        return out._replace(sum_squares=2 * out.sum_squares) if wanted else out

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, x, ["logits"]), evaluate(call, x, ["logits"]))


# ---------------------------------------------------------------- linear_logps


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three tokens."""
    monkeypatch.setattr(chunks, "chunk_tokens", lambda *_: (3, 3))


@pytest.mark.kernels
@pytest.mark.parametrize("T", [1, 2, 3, 4, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_linear_logps_in_many_chunks_is_the_spec(T, dtype, device):
    x = head(T, 40, dtype=dtype, device=device) | {"temperature": (torch.rand(T) + 0.5).to(dtype).to(device)}
    assert_close_to_reference(linear, x, ["hidden_states", "weight", "bias"])


@pytest.mark.kernels
@pytest.mark.parametrize("V", [1, 17, 2049, 32000])
def test_linear_logps_of_every_width(V, device):
    assert_close_to_reference(linear, head(5, V, H=16, device=device), ["hidden_states", "weight", "bias"])


@pytest.mark.parametrize("chunk_bytes", [1, 40 * 4, 3 * 40 * 4 + 1, 1 << 20])
def test_results_do_not_depend_on_the_size_of_chunks(chunk_bytes, backend, device):
    x = head(11, 40, device=device)
    mask = torch.arange(11, device=device) % 4 != 1

    def run(**options):
        return evaluate(lambda x: linear(rpp, x, mask, **options), x, ["hidden_states", "weight", "bias"])

    assert_close(run(chunk_bytes=chunk_bytes), run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_logps_is_logps_from_logits_of_the_product(dtype, backend, device):
    x = head(17, 40, dtype=dtype, device=device)

    def through_logits(x):
        logits = torch.nn.functional.linear(x["hidden_states"], x["weight"], x["bias"])
        return rpp.logps_from_logits(logits, x["target_ids"], temperature=0.7)

    names = ["hidden_states", "weight", "bias"]
    fused = evaluate(partial(linear, rpp, temperature=0.7), x, names)
    assert_close(fused, evaluate(through_logits, x, names), rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_masked_hidden_states_reach_no_gradient(fill, backend, device):
    x = head(11, 40, device=device)
    mask = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0], device=device).bool()  # one chunk wholly masked
    poisoned = {**x, "hidden_states": torch.where(mask[:, None], x["hidden_states"], fill)}
    poisoned["target_ids"] = torch.where(mask, x["target_ids"], -100)
    names = ["hidden_states", "weight", "bias"]
    got, want = (evaluate(lambda x: linear(rpp, x, mask), y, names) for y in (poisoned, x))
    assert_identical(got, want)
    assert (got["dhidden_states"][~mask] == 0).all()


@pytest.mark.parametrize("needed", [["hidden_states"], ["weight"], ["bias"], ["hidden_states", "bias"]])
def test_only_some_inputs_require_grad(needed, backend, device):
    x = head(7, 40, device=device)
    every = evaluate(partial(linear, rpp), x, ["hidden_states", "weight", "bias"])
    some = evaluate(partial(linear, rpp), x, needed)
    assert_close({k: every[k] for k in some}, some, rtol=1e-6, atol=1e-6)


def test_a_frozen_head_gets_no_gradient(backend, device):
    x = head(7, 40, device=device)
    x["hidden_states"].requires_grad_()
    linear(rpp, x).logps.sum().backward()
    assert x["hidden_states"].grad is not None
    assert x["weight"].grad is None
    assert x["bias"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_never_rounded_to_half(dtype, backend, device):
    x = head(64, 40, H=64, dtype=dtype, device=device)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    assert_close(linear(rpp, x), linear(rpp, wide), rtol=1e-6, atol=1e-5)


def test_the_weight_may_be_a_parameter_and_a_transposed_view(backend, device):
    x = head(7, 40, device=device)
    want = linear(rpp, x)
    assert_close(linear(rpp, x | {"weight": torch.nn.Parameter(x["weight"])}), want)
    assert_close(linear(rpp, x | {"weight": x["weight"].T.contiguous().T}), want)


def test_results_outlive_the_buffer_of_logits(backend, device):
    # The logits of a chunk are overwritten by the next: gradients must not be views of them.
    x = head(7, 40, device=device)
    first = evaluate(partial(linear, rpp), x, ["hidden_states", "weight", "bias"])
    kept = {k: y.clone() for k, y in first.items()}
    evaluate(partial(linear, rpp), head(7, 40, seed=1, device=device), ["hidden_states", "weight", "bias"])
    assert_identical(first, kept)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation within, ours included, gives back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_never_stored(dtype, device):
    T, V, H = 64, 1000, 8
    x = head(T, V, H, dtype=dtype, device=device)
    with LargestTensor() as largest:
        evaluate(partial(linear, rpp, chunk_bytes=4 * V * 4), x, ["hidden_states", "weight", "bias"])
    assert largest.numel == V * H  # the gradient of the weight; four rows of logits are half of that
    with LargestTensor() as largest:
        evaluate(partial(from_logits, rpp), rows(T, V, device=device), ["logits"])
    assert largest.numel == T * V  # what the mode would have seen


@pytest.mark.kernels
@pytest.mark.usefixtures("small_chunks")
def test_one_chunk_of_logits_is_there_at_a_time(device, monkeypatch):
    seen = []
    project = chunks.Chunks.project

    def spy(self, rows, logits=None):
        logits = project(self, rows, logits)
        seen.append((rows.shape[0], logits.data_ptr()))
        return logits

    monkeypatch.setattr(chunks.Chunks, "project", spy)
    evaluate(partial(linear, rpp), head(8, 40, device=device), ["hidden_states", "weight"])
    assert [n for n, _ in seen] == [3, 3, 2] * 2  # forward, and again backward
    assert len({buffer for _, buffer in seen[:3]}) == 1


# ---------------------------------------------------------------- refusals

LOGITS = torch.zeros(3, 4)
IDS = torch.tensor([0, 1, 3])
HIDDEN, WEIGHT = torch.zeros(3, 2), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": LOGITS.int()}, "logits: want a float32"),
        ({"logits": [[0.0]]}, "logits: want a float32.* got list"),
        ({"logits": LOGITS[0]}, "logits: want .* of 2 or 3 dimension"),
        ({"logits": LOGITS.view(1, 1, 3, 4)}, "logits: want .* of 2 or 3 dimension"),
        ({"logits": LOGITS[:, :0]}, "logits: want a vocabulary of at least one token"),
        ({"target_ids": IDS.int()}, "target_ids: want an int64"),
        ({"target_ids": IDS[:2]}, r"target_ids: want the shape \(3,\) of the tokens"),
        ({"target_ids": torch.tensor([0, 1, 4])}, r"target_ids: want ids in \[0, 4\).* got ids from 0 to 4"),
        ({"target_ids": torch.tensor([0, -1, 3])}, r"target_ids: want ids in \[0, 4\).* got ids from -1 to 3"),
        ({"target_ids": torch.tensor([0, -100, 3])}, "target_ids: want ids in .* wherever completion_mask is true"),
        ({"completion_mask": torch.ones(3)}, "completion_mask: want a bool tensor"),
        ({"completion_mask": torch.ones(2).bool()}, r"completion_mask: want the shape \(3,\)"),
        ({"completion_mask": [True] * 3}, "completion_mask: want a bool tensor"),
        ({"temperature": 0.0}, "temperature: want a positive number"),
        ({"temperature": -1.0}, "temperature: want a positive number"),
        ({"temperature": math.nan}, "temperature: want a positive number"),
        ({"temperature": math.inf}, "temperature: want a finite number"),
        ({"temperature": torch.ones(2)}, r"temperature: want the shape \(3,\) of the tokens"),
        ({"temperature": torch.ones(())}, "temperature: want .* dimension"),
        ({"temperature": torch.ones(3).int()}, "temperature: want a float32"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature: want positive finite numbers"),
        ({"temperature": torch.tensor([1.0, math.nan, 1.0])}, "temperature: want positive finite numbers"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature: want a constant"),
    ],
)
def test_logps_from_logits_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.logps_from_logits(**{"logits": LOGITS, "target_ids": IDS, **changes})


class NotPlain(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_states": HIDDEN.int()}, "hidden_states: want a float32"),
        ({"hidden_states": HIDDEN[0]}, "hidden_states: want .* of 2 or 3 dimension"),
        ({"weight": WEIGHT.T}, r"weight: want \(V, 2\), the last dimension of hidden_states"),
        ({"weight": torch.empty(0)}, "weight: want the whole parameter"),
        ({"weight": torch.empty(0, 2)}, "weight: want the whole parameter"),
        ({"weight": WEIGHT[0]}, r"weight: want \(V, 2\)"),
        ({"weight": WEIGHT.double()}, "weight: want the dtype of hidden_states, torch.float32"),
        ({"weight": WEIGHT.as_subclass(NotPlain)}, "weight: want a plain tensor, got NotPlain"),
        ({"bias": torch.zeros(3)}, r"bias: want the shape \(4,\) of one for each row of weight"),
        ({"bias": torch.zeros(4).int()}, "bias: want a float32"),
        ({"target_ids": torch.tensor([0, 1, 4])}, r"target_ids: want ids in \[0, 4\)"),
        ({"completion_mask": torch.ones(3, 1).bool()}, r"completion_mask: want the shape \(3,\)"),
        ({"temperature": -1.0}, "temperature: want a positive number"),
    ],
)
def test_linear_logps_refuses(changes, words, backend):
    with pytest.raises(ValueError, match=words):
        rpp.linear_logps(**{"hidden_states": HIDDEN, "weight": WEIGHT, "target_ids": IDS, **changes})


@pytest.mark.parametrize("name", ["target_ids", "completion_mask", "temperature"])
def test_tensors_on_two_devices_are_refused(name, backend):
    other = {
        "target_ids": IDS.to("meta"),
        "completion_mask": torch.ones(3, device="meta").bool(),
        "temperature": torch.ones(3, device="meta"),
    }
    with pytest.raises(ValueError, match=f"{name}: want a tensor on cpu"):
        rpp.logps_from_logits(**{"logits": LOGITS, "target_ids": IDS, name: other[name]})


def test_what_lies_under_the_mask_is_not_checked(backend):
    mask = torch.tensor([True, False, True])
    temperature = torch.tensor([1.0, math.nan, 1.0])
    out = rpp.logps_from_logits(LOGITS, torch.tensor([0, -100, 3]), mask, temperature=temperature)
    assert_close(out.logps, torch.tensor([-math.log(4), 0, -math.log(4)]))
