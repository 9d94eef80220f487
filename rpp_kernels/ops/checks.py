"""What public functions require of their arguments, and the one packed layout that kernels see.

Every complaint is a ValueError that names the argument, what was wanted and what it was. Checks that must read a
tensor's values run on CPU tensors only, and never under torch.compile: on an accelerator they would wait for it.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(name: str, wanted: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: want {wanted}, got {got}")


def describe(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} {x!r}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def check_floats(name: str, x: Tensor, dims: Sequence[int], like: Tensor | None = None) -> None:
    """A floating tensor of one of `dims` dimensions; with `like`, on its device."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() not in dims:
        shape = " or ".join(str(d) for d in dims)
        fail(name, f"a float32, float64, bfloat16 or float16 tensor of {shape} dimension(s)", describe(x))
    if like is not None and x.device != like.device:
        fail(name, f"a tensor on {like.device}", describe(x))


def check_shape(name: str, x: Tensor, shape: Sequence[int], why: str) -> None:
    if not isinstance(x, Tensor) or tuple(x.shape) != tuple(shape):
        fail(name, f"the shape {tuple(shape)} {why}", describe(x))


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """A floating tensor of the shape and on the device of another argument."""
    check_floats(name, x, (other.dim(),), like=other)
    check_shape(name, x, other.shape, f"of {other_name}")


def check_constant(name: str, x: Tensor) -> None:
    """A tensor that the gradient is not taken of: one that asks for it would lose it silently."""
    if x.requires_grad:
        fail(name, "a constant (pass .detach())", "a tensor that requires grad")


def check_mask(mask: Tensor | None, other_name: str, shape: Sequence[int], like: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        fail("completion_mask", "a bool tensor (completion_mask != 0)", describe(mask))
    check_shape("completion_mask", mask, shape, f"of {other_name}")
    if mask.device != like.device:
        fail("completion_mask", f"a tensor on {like.device}", describe(mask))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        fail(name, "one of " + ", ".join(repr(c) for c in choices), repr(value))


def check_number(
    name: str,
    value: float,
    wanted: str,
    low: float = -float("inf"),
    high: float = float("inf"),
    *,
    open_low: bool = False,
) -> None:
    """A plain number of low <= value <= high (low < value with `open_low`); a NaN is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high) or (open_low and value == low):
        fail(name, wanted, repr(value))


def check_integer(name: str, value: Any, wanted: str, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        fail(name, wanted, repr(value))


def check_count(name: str, count: float | Tensor | None, reduction: str, like: Tensor) -> None:
    """What the mean of a loss divides by: a number, a 0-dim tensor beside `like`, or None for what the call counts."""
    if count is None:
        return
    if reduction == "none":
        fail(name, 'None with reduction "none", which divides by nothing', count)
    if isinstance(count, Tensor):
        check_shape(name, count, (), "of a number")
        check_constant(name, count)
        if count.device != like.device:
            fail(name, f"a tensor on {like.device}", describe(count))
        if may_read(count) and not count > 0:
            fail(name, "a positive number", count)
    else:
        check_number(name, count, "a positive number", 0, open_low=True)


def check_process_group(process_group: Any) -> None:
    if not hasattr(process_group, "group_name"):
        fail("process_group", "a torch.distributed.ProcessGroup that this process is in", repr(process_group))


def check_ranks(process_group: Any, **constants: Tensor | None) -> None:
    """Where statistics are those of all ranks: what they are taken of is a constant."""
    if process_group is None:
        return
    check_process_group(process_group)
    for name, x in constants.items():
        if x is not None and x.requires_grad:
            wanted = "a constant (pass .detach()) with process_group: other ranks' statistics have no gradient here"
            fail(name, wanted, "a tensor that requires grad")


def check_target_ids(target_ids: Tensor, mask: Tensor | None, shape: Sequence[int], vocab: int, like: Tensor) -> None:
    if not isinstance(target_ids, Tensor) or target_ids.dtype != torch.int64:
        fail("target_ids", "an int64 tensor", describe(target_ids))
    check_shape("target_ids", target_ids, shape, "of the tokens")
    if target_ids.device != like.device:
        fail("target_ids", f"a tensor on {like.device}", describe(target_ids))
    if may_read(target_ids) and target_ids.numel():
        used = target_ids if mask is None else torch.where(mask, target_ids, 0)
        low, high = used.aminmax()
        if low < 0 or high >= vocab:
            fail(
                "target_ids",
                f"ids in [0, {vocab}) wherever completion_mask is true",
                f"ids from {int(low)} to {int(high)}",
            )


def check_temperature(temperature: float | Tensor, mask: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        check_number(
            "temperature", temperature, "a positive number or a tensor with one for each token", 0, open_low=True
        )
        if temperature == float("inf"):
            fail("temperature", "a finite number", temperature)
        return
    check_floats("temperature", temperature, (len(shape),), like=like)
    check_shape("temperature", temperature, shape, "of the tokens")
    check_constant("temperature", temperature)
    if may_read(temperature) and temperature.numel():
        used = temperature if mask is None else torch.where(mask, temperature, 1.0)
        low, high = used.aminmax()
        if not (low > 0 and high < float("inf")):
            wanted = "positive finite numbers wherever completion_mask is true"
            fail("temperature", wanted, f"numbers from {float(low)} to {float(high)}")


def may_read(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


# ---------------------------------------------------------------- the packed layout


def sequence_starts(x: Tensor, name: str, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens as int64 (B+1,): the argument, checked, or that of a padded (B, S) batch seen as packed."""
    if cu_seqlens is None:
        if x.dim() != 2:
            fail(name, "(B, S), or (T,) together with cu_seqlens", describe(x))
        batch, length = x.shape
        return torch.arange(batch + 1, device=x.device) * length
    if x.dim() != 1:
        fail(name, "(T,) when cu_seqlens is given", describe(x))
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
    ):
        fail("cu_seqlens", "an int32 or int64 tensor of shape (B+1,)", describe(cu_seqlens))
    if cu_seqlens.device != x.device or cu_seqlens.shape[0] < 1:
        fail("cu_seqlens", f"at least one element on {x.device}", describe(cu_seqlens))
    if may_read(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != x.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            fail("cu_seqlens", f"0, never falling, up to the {x.shape[0]} tokens of {name}", cu_seqlens.tolist())
    return cu_seqlens.to(torch.int64)


def result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T,) contiguous, in the dtype that kernels compute in."""
    return x.to(dtype).reshape(-1).contiguous()


def flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous()
