"""How a kernel is declared and launched."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton import tuning


def kernel(function: Callable[..., Any]) -> Any:
    """triton.jit of a function whose `tl.int64` and `tl.float64` parameters are numbers known at run time: nothing is
    compiled anew because one of them changes, is 1, or is a multiple of 16, nor because a tensor begins elsewhere than
    at a multiple of 16 bytes. A pointer may be None, where there is no such tensor; that and every `tl.constexpr` is a
    variant."""
    hints = inspect.signature(function).parameters
    numbers = [name for name, hint in hints.items() if hint.annotation in (tl.int64, tl.float64)]
    # Loads under a mask are no vectors: for a pointer known to be aligned Triton would but spread a warp's addresses.
    pointers = [name for name, hint in hints.items() if hint.annotation is inspect.Parameter.empty]
    return triton.jit(do_not_specialize=numbers, do_not_specialize_on_alignment=pointers)(function)


def launch(kernel: Any, programs: int, *arguments: Any, like: Tensor, **constants: Any) -> None:
    """Runs `programs` programs, a 1-D grid, on the device of `like`; block and warps are those of the kernel's name and
    the dtype of `like` in tuning.py. Nothing is launched for no programs."""
    if programs == 0:
        return
    config = tuning.config_of(kernel.__name__, like)
    options = {**constants, "BLOCK": config.block, "num_warps": config.warps}
    if config.registers and tuning.architecture(like.device).startswith("sm_"):
        options["maxnreg"] = config.registers
    with on_device(like):
        run(kernel, programs, arguments, options)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Every launch passes here, and benchmarks/aot.py puts a compiler that launches nothing in this place."""
    kernel[(programs,)](*arguments, **options)


def on_device(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its stream, which need not be those of the tensors."""
    if like.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(like.device.index)


def block_of(kernel: Any, like: Tensor) -> int:
    """How many elements a program of this kernel takes at a time."""
    return tuning.config_of(kernel.__name__, like).block


def blocks(kernel: Any, like: Tensor) -> int:
    """How many programs cover the elements of `like`."""
    return -(-like.numel() // block_of(kernel, like))


def counter(like: Tensor) -> Tensor:
    """Of the programs that are done, by which the last of them knows that it is (`is_last` in math.py)."""
    return torch.zeros(1, dtype=torch.int32, device=like.device)
