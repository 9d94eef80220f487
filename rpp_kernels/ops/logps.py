"""Per-token log-probs, entropy and log-sum-exp from logits."""

import math
from typing import Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, no_second_derivative, register_gradient
from rpp_kernels.ops.checks import (
    check_floats,
    check_mask,
    check_target_ids,
    check_temperature,
    describe,
    fail,
    flat,
    flat_mask,
    result_dtype,
)
from rpp_kernels.reference import TokenLogps


def _rows_like(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, dtype=result_dtype(x))


def _logps_shapes(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, sum_squares, _, _ = others
    rows = math.prod(logits.shape[:-1])  # not .numel(), which torch.compile takes for a constant
    return tuple(_rows_like(logits, n) for n in (rows, rows, rows, rows, rows if sum_squares else 0))


@kernel_op(_logps_shapes)
def logps_fwd(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    sum_squares: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, lse, lse_rest, squares), each (T,); lse + lse_rest is the log-sum-exp in twice the precision,
    squares are empty where not asked for. `inplace_backward` is for the backward alone."""
    rows = logits, target_ids, mask, temperature, token_temperature
    logps, entropy, lse, lse_rest, squares = kernels(backend).logps_fwd(*rows, sum_squares)
    return logps, entropy, lse, lse_rest, squares


def _write_gradient(dlogits: Tensor, logits: Tensor, *arguments: Any) -> None:
    """`dlogits` is memory of its own, or `logits`. Arguments as of `logps_bwd`."""
    *others, dlogps, dentropy, dlse, backend = arguments
    grads = (None if d is None else d.contiguous() for d in (dlogps, dentropy, dlse))
    kernels(backend).logps_bwd_out(dlogits, logits, *others, *grads)


@kernel_op(lambda logits, *_: logits.new_empty(logits.shape))
def logps_bwd(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    backend: str,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    rows = target_ids, mask, temperature, token_temperature, entropy, lse, lse_rest
    _write_gradient(dlogits, logits, *rows, dlogps, dentropy, dlse, backend)
    return dlogits


def _logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target_ids, mask, ctx.temperature, token_temperature, _, ctx.in_place, ctx.backend = inputs
    _, *rows, squares = output
    ctx.mark_non_differentiable(squares)
    ctx.save_for_backward(logits, target_ids, mask, token_temperature, *rows)
    ctx.set_materialize_grads(False)  # an entropy that is not used costs nothing backward


def _logps_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, target_ids, mask, token_temperature, *rows = ctx.saved_tensors
    arguments = target_ids, mask, ctx.temperature, token_temperature, *rows, *grads[:3], ctx.backend
    if not ctx.in_place:
        return logps_bwd(logits, *arguments), *(None,) * 7
    if torch.is_grad_enabled():
        no_second_derivative()
    dlogits = logits.detach()
    _write_gradient(dlogits, dlogits, *arguments)
    torch.autograd.graph.increment_version(logits)  # autograd then refuses whoever still needs the logits
    return dlogits, *(None,) * 7


register_gradient(logps_fwd, _logps_backward, _logps_setup)


def _split_temperature(temperature: float | Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    return (1.0, flat(temperature, dtype)) if isinstance(temperature, Tensor) else (temperature, None)


def logps_from_logits(
    logits: Tensor,  # (T, V) or (B, S, V)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    temperature: float | Tensor = 1.0,  # or (T,) or (B, S)
    sum_squares: bool = False,
    inplace_backward: bool = False,
) -> TokenLogps:
    """`(logits.float() / temperature).log_softmax(-1).gather(-1, target_ids[..., None]).squeeze(-1)`, and the entropy.

        z = logits / temperature     lse = log sum_j exp z_j     logps = z_y - lse     entropy = -sum_j p_j log p_j

    All of them in one read of the logits; the gradient in one more and a write. Natural logarithms (nats).

    Args:
        logits: float32, float64, bfloat16 or float16, of any outer strides: `logits[:, :-1]` is read where it lies.
            A logit of -inf is a token of probability 0.
        target_ids: already shifted: the token whose log-prob each position predicts. May be anything where masked.
        completion_mask: bool; elsewhere the logits are not read, results are 0 and gradients exactly 0.
        temperature: that of sampling; positive, a constant, one number or one for each token.
        sum_squares: also sum_j p_j^2, in the same read: verl's `sum_pi_squared`, of which its optimal token baseline
            makes the weight of a token, 1 - 2 p_y + sum_j p_j^2. Here alone: of `linear_logps` it would be one more
            output for each chunk and shard, which no loss asks for.
        inplace_backward: the gradient may take the place of the logits, in their memory, as in flash-attn and verl: new
            memory for it costs as much as its arithmetic. Contiguous logits are then lost in the backward. Whoever
            needs them after it, as a tanh that made them does, is refused by autograd, and so is a second backward.
            torch.compile, which decides about memory itself, takes no notice.

    Returns:
        TokenLogps(logps, entropy, lse, sum_squares), each of the shape of `target_ids`: float64 for float64 logits,
        else float32, never a half type. Differentiable in `logits` through the first three, alone or together; the
        gradient has the dtype of the logits. A row whose gradients are all 0 is not read again. `sum_squares` is a
        constant, without a gradient, or None where not asked for.

    Raises:
        ValueError: a shape, dtype, device, id or temperature that is not as above; `inplace_backward` for logits that
            nothing computed, a leaf of the graph.
    """
    check_floats("logits", logits, (2, 3))
    shape = logits.shape[:-1]
    if logits.shape[-1] < 1:
        fail("logits", "a vocabulary of at least one token", describe(logits))
    check_mask(completion_mask, "the tokens of logits", shape, logits)
    check_target_ids(target_ids, completion_mask, shape, logits.shape[-1], logits)
    check_temperature(temperature, completion_mask, shape, logits)
    in_place = inplace_backward and not torch.compiler.is_compiling()
    if in_place and logits.is_leaf and logits.requires_grad:
        fail("inplace_backward", "False for a leaf of the graph, which would be overwritten", inplace_backward)
    backend = backend_of(logits, "logps_from_logits")
    if backend == "reference":
        return reference.logps_from_logits(
            logits, target_ids, completion_mask, temperature=temperature, sum_squares=sum_squares
        )
    scalar, for_each_token = _split_temperature(temperature, result_dtype(logits))
    logps, entropy, lse, _, squares = logps_fwd(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        target_ids.reshape(-1).contiguous(),
        flat_mask(completion_mask),
        scalar,
        for_each_token,
        sum_squares,
        in_place and logits.is_contiguous(),
        backend,
    )
    results = (logps, entropy, lse, squares) if sum_squares else (logps, entropy, lse)
    return TokenLogps(*(x.view(shape) for x in results))
