"""The public functions, one file a concept: checks, then a custom op with its fake kernel and its autograd.

Kernels see flat (T,) tensors and `cu_seqlens`; the name of the backend travels with the op, from the forward to the
backward. `kernel_op` is how such an op is made.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("rpp_kernels", "DEF")  # type: ignore[no-untyped-call]


def kernel_op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the function as torch.ops.rpp_kernels.<its name>; `fake` gives the shapes of its results.

    This is torch.library.custom_op without its Python wrappers around each call, which cost 25 us where the call itself
    takes 12.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"rpp_kernels::{name}", fake, lib=_LIBRARY)
        op: Callable[..., Any] = getattr(torch.ops.rpp_kernels, name).default
        if name.endswith("_bwd"):  # without a formula of its own, PyTorch would take its gradient for zero
            register_gradient(op, no_second_derivative, lambda ctx, inputs, output: None)
        return op

    return register


def no_second_derivative(*_: Any) -> None:
    raise RuntimeError("rpp_kernels has no second derivatives; use_backend('reference') has")


def register_gradient(op: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """`torch.library.register_autograd` for ops whose arguments have neither defaults nor names: a sixth of a small
    call of `policy_loss` went into looking for those."""
    below = torch._C._after_autograd_keyset

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *arguments, keyset = inputs
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keyset & below, *arguments)  # type: ignore[attr-defined]
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            result = backward(ctx, *grads)
            return (*result, None) if isinstance(result, tuple) else (result, None)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Differentiable.apply(*arguments, keyset)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *arguments)  # type: ignore[attr-defined]

    _LIBRARY.impl(op.name(), kernel, "Autograd", with_keyset=True)  # type: ignore[attr-defined, no-untyped-call]
