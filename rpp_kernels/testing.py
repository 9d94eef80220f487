"""What tests and benchmarks share: batches of plausible numbers, and the judgement whether a result is close enough.

The judgement is relative to PyTorch: a kernel may be at most twice as far from the float64 specification as the
specification itself is when it runs in the dtype of the kernel.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rpp_kernels
from rpp_kernels import reference

Tensors = dict[str, Tensor]

# Exponentials end at the smallest normal number (csrc/formulas.h): a probability of 0 is 1e-38 there.
ZERO = 1e-30


def make_batch(
    batch_size: int,
    length: int,
    *,
    vocab: int = 0,
    hidden: int = 0,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensors:
    """The tensors of one training step by the names of the public functions' arguments, padded `(B, S)` or `packed`.

    Sequences are between half of `length` and all of it long. Ratios are near 1, some of them outside the clip range.
    With `vocab` there are `target_ids` and `logits`, with `hidden` as well `hidden_states`, `weight` and `bias` instead
    of the logits.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    lengths = torch.randint((length + 1) // 2, length + 1, (batch_size,), generator=generator, device=device)
    mask = torch.arange(length, device=device) < lengths[:, None]
    tokens = (int(lengths.sum()),) if packed else (batch_size, length)
    old_logps, old_values = -normal(*tokens).exp(), normal(*tokens)
    batch = {
        "scores": normal(batch_size),
        "old_logps": old_logps,
        "logps": old_logps + 0.3 * normal(*tokens),
        "ref_logps": old_logps + 0.3 * normal(*tokens),
        "kl": normal(*tokens),
        "rewards": normal(*tokens),
        "old_values": old_values,
        "values": old_values + 0.3 * normal(*tokens),
        "returns": normal(*tokens),
        "advantages": normal(*tokens),
    }
    if vocab and hidden:
        batch["hidden_states"], batch["bias"] = normal(*tokens, hidden), normal(vocab)
        batch["weight"] = normal(vocab, hidden) * (2 / hidden**0.5)
    elif vocab:
        batch["logits"] = 2 * normal(*tokens, vocab)
    batch = {name: x.to(dtype) for name, x in batch.items()}
    if vocab:
        batch["target_ids"] = torch.randint(vocab, tokens, generator=generator, device=device)
    batch["completion_mask"] = mask[mask] if packed else mask
    if packed:
        batch["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return batch


def named(result: Any, name: str = "result") -> Tensors:
    """The tensors of a result by their dotted names: `logps`, `stats.ratio`; a lone tensor is the `result`, and what is
    None is left out."""
    if isinstance(result, Tensor):
        return {name: result}
    fields = [(field, part) for field, part in zip(result._fields, result, strict=True) if part is not None]
    prefix = "" if name == "result" else f"{name}."
    return {k: x for field, part in fields for k, x in named(part, prefix + field).items()}


def random_weights(results: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=generator).to(x) for x in results]


def evaluate(
    function: Callable[[Tensors], Any],
    tensors: Tensors,
    differentiable: Sequence[str] = (),
    weights: Callable[[list[Tensor]], list[Tensor]] = random_weights,
) -> Tensors:
    """The results of `function(tensors)` by name, and as `d<input>` the gradient of their weighted sum."""
    inputs = {k: x.detach().requires_grad_(k in differentiable) for k, x in tensors.items()}
    results = named(function(inputs))
    smooth = [x for x in results.values() if x.requires_grad]
    leaves = [inputs[k] for k in differentiable]
    gradients = torch.autograd.grad(smooth, leaves, weights([x.detach() for x in smooth])) if leaves else ()
    return {k: x.detach() for k, x in results.items()} | {
        f"d{k}": x for k, x in zip(differentiable, gradients, strict=True)
    }


def assert_close_to_reference(
    call: Callable[[Any, Tensors], Any],
    tensors: Tensors,
    differentiable: Sequence[str] = (),
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    atol: float = ZERO,
) -> None:
    """`call(rpp_kernels, tensors)` against `call(reference, tensors)`: every result and every gradient, by `within`.

    The floor is `ulps` units in the last place of the largest value, and `atol`. Float64 is its own spec: its floor is
    1e-12 of the largest of all results, lse among them, whose rounding the spec carries into the others.
    """
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    actual = evaluate(partial(call, rpp_kernels), tensors, differentiable)
    same = evaluate(partial(call, reference), tensors, differentiable)
    exact = evaluate(partial(call, reference), wide, differentiable)
    assert actual.keys() == exact.keys()
    in_double = any(x.dtype == torch.float64 for x in tensors.values())
    largest = max(largest_of(x) for x in exact.values())
    for name, x in actual.items():
        if in_double:
            floor = 1e-12 * max(1.0, largest)
        else:  # stats are float64 always, and no more exact than the float32 numbers that they are sums of
            eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, torch.float32))
            floor = ulps * eps * largest_of(exact[name]) + atol
        within(name, x, same[name], exact[name], factor, floor)


def largest_of(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x, 0.0).abs().max()) if x.numel() else 0.0


def within(name: str, actual: Tensor, same: Tensor, exact: Tensor, factor: float, floor: float) -> None:
    """Asserts that the largest error of `actual` is at most `factor` times that of the spec in the `same` dtype.

    The `floor` is for results where the spec's own rounding happens to be (nearly) nothing. What is not finite has to
    be the same.
    """
    assert actual.dtype == same.dtype, f"{name} is {actual.dtype}, want {same.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, want {tuple(exact.shape)}"
    finite = same.isfinite() & exact.isfinite()
    torch.testing.assert_close(
        actual[~finite], same[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
    if not finite.any():
        return
    exact = exact[finite]
    error, allowed = ((x[finite].double() - exact).abs().max() for x in (actual, same))
    bound = factor * allowed + floor
    assert error <= bound, f"{name}: error {error:.3e}, of the reference {allowed:.3e}, allowed {bound:.3e}"
