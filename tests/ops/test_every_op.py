"""What every op owes on every backend, whatever it computes: one row for each function and mode (calls.py)."""

import math
from functools import cache, partial

import pytest
import torch
from calls import CALLS, DIFFERENTIABLE, LENGTHS, MASK, ONE_OF_EACH, is_per_token, is_straight_through, to_device
from hypothesis import HealthCheck, given, settings
from strategies import Batch, packed, poisoned, ragged_batches, random_batch

import rpp_kernels
from rpp_kernels import reference
from rpp_kernels.testing import assert_close_to_reference, evaluate

assert_close = torch.testing.assert_close
assert_identical = partial(assert_close, rtol=0, atol=0)

every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
every_gradient = pytest.mark.parametrize("call", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
one_of_each = pytest.mark.parametrize("call", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())
both_layouts = pytest.mark.parametrize("layout", [lambda batch: batch, packed], ids=["padded", "packed"])
few_examples = settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def weights_of_the_same_place(results):
    """Weights for the gradient that a token takes along, however the batch is laid out."""
    return [(x + 1).cos() for x in results]


def run_call(call, batch: Batch, f=rpp_kernels):
    return evaluate(lambda x: call.on(batch)(f, x), batch.tensors, call.differentiable, weights_of_the_same_place)


def assert_same(backend: str, got, want) -> None:
    """To the bit where the kernels are ours; PyTorch's sums may take another order."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend == "reference" else {"rtol": 0, "atol": 0}
    assert_close(got, want, **tolerance)


@cache
def long_batch(*lengths: int, device: str) -> Batch:
    lengths = torch.tensor(lengths)
    mask = torch.rand(len(lengths), int(lengths.max()), generator=torch.Generator().manual_seed(1)) < 0.9
    return to_device(packed(random_batch(mask, lengths, vocab=4, dtype=torch.float32)), device)


# ---------------------------------------------------------------- value and gradient


@every_call
@both_layouts
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_the_spec(call, layout, dtype, backend, device):
    batch = to_device(layout(random_batch(MASK, LENGTHS, vocab=17, dtype=dtype)), device)
    assert_close_to_reference(call.on(batch), batch.tensors, call.differentiable)


# The spec walks time in Python: only ops that do not get sequences beyond the 4096 tokens that kernels sum at once.
WALKING = ("returns", "gae", "reinforce_pp")


@pytest.mark.kernels
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradient_of_long_sequences_are_those_of_the_spec(name, run, device):
    lengths = (1030, 1, 0, 33) if name.startswith(WALKING) else (4500, 1, 0, 1025, 4099, 33)
    if run == ("triton", "cpu"):  # an interpreter is slow; of several blocks all the same
        lengths = (1, 0, 33) if "logps_from" in name else (600, 1, 0, 33)
    batch, call = long_batch(*lengths, device=device), CALLS[name]
    assert_close_to_reference(call.on(batch), batch.tensors, call.differentiable)


@pytest.mark.kernels
@both_layouts
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, layout, device):
    if is_straight_through(name):
        pytest.skip("a straight-through gradient is not the derivative of the value, by design")
    call, mask = CALLS[name], torch.tensor([[1, 0, 1], [1, 1, 0]], device=device).bool()
    batch = to_device(layout(random_batch(mask.cpu(), torch.tensor([3, 2]), vocab=3, seed=3)), device)

    def function(*inputs):
        x = {**batch.tensors, **dict(zip(call.differentiable, inputs, strict=True))}
        result = call.on(batch)(rpp_kernels, x)
        fields = [result] if isinstance(result, torch.Tensor) else result
        return tuple(y for y in fields if isinstance(y, torch.Tensor) and y.requires_grad)

    inputs = tuple(batch.tensors[name].clone().requires_grad_() for name in call.differentiable)
    assert torch.autograd.gradcheck(function, inputs)


# ---------------------------------------------------------------- layouts and masks


def assert_padded_equals_packed(call, batch: Batch, device: str) -> None:
    padded, flat = (run_call(call, to_device(b, device)) for b in (batch, packed(batch)))
    inside = batch.inside.to(device)
    per_token = {name for name, x in padded.items() if is_per_token(name) and x.shape[:2] == inside.shape}
    # Sums over tokens are taken in another order.
    assert_close(flat, {k: x[inside] if k in per_token else x for k, x in padded.items()}, rtol=1e-11, atol=1e-11)


@every_call
@pytest.mark.kernels
def test_padded_equals_packed(call, device):
    assert_padded_equals_packed(call, random_batch(MASK, LENGTHS), device)


@every_call
@pytest.mark.kernels
@few_examples
@given(batch=ragged_batches())
def test_property_padded_equals_packed(call, batch, device):
    assert_padded_equals_packed(call, batch, device)


@pytest.fixture
def nan_in_fresh_memory(monkeypatch):
    """torch.empty, and what kernels allocate, is full of NaN rather than of whatever was there."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@every_call
@pytest.mark.kernels
@both_layouts
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_poison_where_masked_changes_nothing_and_gives_exact_zeros(call, layout, fill, device):
    clean = layout(random_batch(MASK, LENGTHS))
    batch = to_device(layout(poisoned(random_batch(MASK, LENGTHS), fill)), device)  # target_ids: -100
    got = run_call(call, batch)
    assert_identical(got, run_call(call, to_device(clean, device)))
    for name, x in got.items():
        assert x.isfinite().all(), name
        if is_per_token(name) and x.shape[: clean.mask.dim()] == clean.mask.shape:
            assert (x[~batch.mask] == 0).all(), name


@every_call
@pytest.mark.kernels
@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_poison_in_float32_where_masked_changes_nothing(call, device):
    x = random_batch(MASK, LENGTHS, dtype=torch.float32)
    got = run_call(call, to_device(poisoned(x, math.nan), device))
    assert_identical(got, run_call(call, to_device(x, device)))


@every_call
@pytest.mark.kernels
@both_layouts
def test_no_mask_is_a_mask_of_ones(call, layout, device):
    batch = to_device(layout(random_batch(torch.ones(3, 4).bool(), torch.tensor([4, 4, 4]))), device)
    assert_identical(run_call(call, batch._replace(mask=None)), run_call(call, batch))


@every_call
@pytest.mark.kernels
@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 17)])
@both_layouts
def test_a_batch_without_a_valid_token_gives_zeros(call, layout, B, S, device):
    batch = random_batch(torch.zeros(B, S).bool(), torch.full((B,), S), vocab=1, dtype=torch.float32)
    got = run_call(call, to_device(layout(poisoned(batch, math.nan)), device))
    assert all((x == 0).all() for x in got.values())


@every_call
@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0), (0, 0)])
def test_an_empty_padded_batch_gives_empty_results(call, B, S, backend, device):
    batch = to_device(random_batch(torch.zeros(B, S).bool(), torch.full((B,), S)), device)
    got = run_call(call, batch)
    assert all((x == 0).all() for x in got.values())
    assert {x.shape for k, x in got.items() if is_per_token(k) and x.dim() == 2} <= {(B, S)}


@every_call
@pytest.mark.kernels
@pytest.mark.parametrize("B", [0, 2])
def test_an_empty_packed_batch_gives_empty_results(call, B, device):
    batch = packed(random_batch(torch.zeros(B, 3).bool(), torch.zeros(B, dtype=torch.long)))
    got = run_call(call, to_device(batch, device))
    assert all((x == 0).all() for x in got.values())


# ---------------------------------------------------------------- inputs


def transposed(x):  # the same numbers with the strides of (S, B)
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def every_second(x):  # the same numbers, every second element of twice as many
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


def sliced(x):  # the same numbers, all but the last of each row's
    return torch.cat([x, x[:, :1]], dim=1)[:, :-1]


@every_call
@pytest.mark.parametrize("view", [transposed, every_second, sliced])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_inputs_give_what_contiguous_ones_give(call, view, dtype, backend, device):
    batch = to_device(random_batch(MASK, LENGTHS, vocab=5, dtype=dtype), device)
    strided = batch.map_tokens(view)._replace(mask=view(batch.mask))
    assert not strided.mask.is_contiguous()
    got, want = run_call(call, strided), run_call(call, batch)
    linear = "weight" in call.differentiable
    if not linear or backend != "reference":
        assert_same(backend, got, want)
    if linear:  # of a strided operand a library's product takes another path to the same sums
        strided.tensors["weight"] = batch.tensors["weight"].T.contiguous().T
        eps = torch.finfo(dtype).eps
        for other in got, run_call(call, strided):
            assert_close(other, want, rtol=32 * eps, atol=32 * eps)


@every_gradient
def test_a_gradient_that_is_not_contiguous_is_as_good(call, backend, device):
    batch = to_device(random_batch(MASK, LENGTHS), device)
    inputs = {k: x.clone().requires_grad_(k in call.differentiable) for k, x in batch.tensors.items()}
    result = call.on(batch)(rpp_kernels, inputs)
    y = result if isinstance(result, torch.Tensor) else result[0]
    weights = torch.randn(y.shape, dtype=y.dtype).to(device)
    strided = (lambda w: w.expand(2)[0], every_second, transposed)[min(y.dim(), 2)](weights)
    x = [inputs[name] for name in call.differentiable]
    got, want = (torch.autograd.grad(y, x, w, retain_graph=True) for w in (strided, weights))
    assert_same(backend, got, want)


@every_gradient
def test_one_number_expanded_is_a_gradient_too(call, backend, device):
    # What y.sum().backward() passes: strides of 0.
    batch = to_device(random_batch(MASK, LENGTHS), device)
    grads = []
    for f in (rpp_kernels, reference):
        inputs = {k: x.clone().requires_grad_(k in call.differentiable) for k, x in batch.tensors.items()}
        result = call.on(batch)(f, inputs)
        y = result if isinstance(result, torch.Tensor) else result[0]
        grads.append(torch.autograd.grad(y.sum(), [inputs[name] for name in call.differentiable]))
    assert_close(*grads)


def second_derivative(f, call, batch):
    """Of a function of the inputs that is far from linear in what the call gives."""
    inputs = {k: x.clone().requires_grad_(k in call.differentiable) for k, x in batch.tensors.items()}
    result = call.on(batch)(f, inputs)
    y = result if isinstance(result, torch.Tensor) else result[0]
    x = [inputs[name] for name in call.differentiable]
    first = torch.autograd.grad((y * y).sum() + sum((z * z).sum() for z in x), x, create_graph=True)
    return torch.autograd.grad(sum((g * g).sum() for g in first), x)


@every_gradient
@pytest.mark.kernels
def test_a_second_derivative_is_refused_rather_than_wrong(call, device):
    batch = to_device(random_batch(MASK, LENGTHS), device)
    second_derivative(reference, call, batch)
    with pytest.raises(RuntimeError, match="rpp_kernels has no second derivatives"):
        second_derivative(rpp_kernels, call, batch)


@every_gradient
@pytest.mark.kernels
def test_a_forward_mode_derivative_is_refused_rather_than_zero(call, device):
    batch = to_device(random_batch(MASK, LENGTHS), device)
    name = call.differentiable[0]

    def function(x):
        result = call.on(batch)(rpp_kernels, batch.tensors | {name: x})
        return result if isinstance(result, torch.Tensor) else result[0]

    x = batch.tensors[name]
    with pytest.raises(RuntimeError, match="rpp_kernels has no forward-mode derivatives"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))


@every_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_input_is_changed(call, dtype, backend, device):
    batch = to_device(random_batch(MASK, LENGTHS, dtype=dtype), device)
    tensors = {**batch.tensors, "completion_mask": batch.mask}
    before = {k: (x.clone(), x._version) for k, x in tensors.items()}
    run_call(call, batch)
    for name, x in tensors.items():
        value, version = before[name]
        assert x._version == version, name
        assert_identical(x, value)


@pytest.mark.parametrize("call", [call for call in ONE_OF_EACH.values() if call.differentiable])
def test_backward_twice_is_the_same_twice(call, backend, device):
    batch = to_device(random_batch(MASK, LENGTHS, dtype=torch.float32), device)
    inputs = {k: x.clone().requires_grad_(k in call.differentiable) for k, x in batch.tensors.items()}
    result = call.on(batch)(rpp_kernels, inputs)
    y = (result if isinstance(result, torch.Tensor) else result[0]).sum()
    x = [inputs[name] for name in call.differentiable]
    assert_identical(torch.autograd.grad(y, x, retain_graph=True), torch.autograd.grad(y, x))


@one_of_each
def test_nothing_is_recorded_where_nothing_requires_grad(call, backend, device):
    batch = to_device(random_batch(MASK, LENGTHS), device)
    result = call.on(batch)(rpp_kernels, batch.tensors)
    assert not any(x.requires_grad for x in ([result] if isinstance(result, torch.Tensor) else result[:1]))


# ---------------------------------------------------------------- threads


@every_call
@pytest.mark.kernels
def test_two_threads_give_the_bits_of_one(call, run, device):
    lengths = 4500, 1, 0, 1025, 30000, 33, 20000  # parts of 32768 tokens go to a thread
    if run in (("triton", "cpu"), ("emulated", "cpu")):  # what stands in for a GPU has but one, and is slow
        lengths = 1, 0, 33
    batch = long_batch(*lengths, device=device)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run_call(call, batch))
    torch.set_num_threads(before)
    one, two = results
    if "dweight" in one:  # a sum over tokens within a library's matrix product, which splits it among its threads
        dweight = one.pop("dweight")
        assert_close(two.pop("dweight"), dweight, rtol=0, atol=1e-6 * dweight.abs().max().item())
    assert_identical(two, one)


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@one_of_each
@pytest.mark.kernels
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_without_graph_breaks_gives_what_eager_gives(call, device):
    batch = to_device(random_batch(MASK, LENGTHS, dtype=torch.float32), device)
    compiled = torch.compile(lambda x: call.on(batch)(rpp_kernels, x), fullgraph=True, backend="aot_eager")
    got = evaluate(compiled, batch.tensors, call.differentiable, weights_of_the_same_place)
    assert_close(got, run_call(call, batch))
