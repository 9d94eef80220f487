"""Per-token log-probs, entropy and log-sum-exp: from logits, or from hidden states without storing the logits."""

import math
from typing import Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import (
    check_floats,
    check_mask,
    check_shape,
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


# ---------------------------------------------------------------- from logits


def _logps_shapes(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(logits.shape[:-1])  # not .numel(), which torch.compile takes for a constant
    return _rows_like(logits, rows), _rows_like(logits, rows), _rows_like(logits, rows), _rows_like(logits, rows)


@kernel_op(_logps_shapes)
def logps_fwd(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, lse, lse_rest), each (T,); lse + lse_rest is the log-sum-exp in twice the precision."""
    logps, entropy, lse, lse_rest = kernels(backend).logps_fwd(logits, target_ids, mask, temperature, token_temperature)
    return logps, entropy, lse, lse_rest


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
    kernels(backend).logps_bwd_out(
        dlogits,
        logits,
        target_ids,
        mask,
        temperature,
        token_temperature,
        entropy,
        lse,
        lse_rest,
        *(None if d is None else d.contiguous() for d in (dlogps, dentropy, dlse)),
    )
    return dlogits


def _logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target_ids, mask, ctx.temperature, token_temperature, ctx.backend = inputs
    _, *rows = output
    ctx.save_for_backward(logits, target_ids, mask, token_temperature, *rows)
    ctx.set_materialize_grads(False)  # an entropy that is not used costs nothing backward


def _logps_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, target_ids, mask, token_temperature, *rows = ctx.saved_tensors
    dlogits = logps_bwd(logits, target_ids, mask, ctx.temperature, token_temperature, *rows, *grads[:3], ctx.backend)
    return dlogits, None, None, None, None, None


register_gradient(logps_fwd, _logps_backward, _logps_setup)


def _split_temperature(temperature: float | Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    return (1.0, flat(temperature, dtype)) if isinstance(temperature, Tensor) else (temperature, None)


def logps_from_logits(
    logits: Tensor,  # (T, V) or (B, S, V)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    temperature: float | Tensor = 1.0,  # or (T,) or (B, S)
) -> TokenLogps:
    """`(logits.float() / temperature).log_softmax(-1).gather(-1, target_ids[..., None]).squeeze(-1)`, and the entropy.

        z = logits / temperature     lse = log sum_j exp z_j     logps = z_y - lse     entropy = -sum_j p_j log p_j

    All three in one read of the logits; the gradient in one more and a write. Natural logarithms (nats).

    Args:
        logits: float32, float64, bfloat16 or float16, of any outer strides: `logits[:, :-1]` is read where it lies.
            A logit of -inf is a token of probability 0.
        target_ids: already shifted: the token whose log-prob each position predicts. May be anything where masked.
        completion_mask: bool; elsewhere the logits are not read, results are 0 and gradients exactly 0.
        temperature: that of sampling; positive, a constant, one number or one for each token.

    Returns:
        TokenLogps(logps, entropy, lse), each of the shape of `target_ids`: float64 for float64 logits, else float32,
        never a half type. Differentiable in `logits` through all three, alone or together; the gradient has the dtype
        of the logits. A row whose gradients are all 0 is not read again.

    Raises:
        ValueError: a shape, dtype, device, id or temperature that is not as above.
    """
    check_floats("logits", logits, (2, 3))
    shape = logits.shape[:-1]
    if logits.shape[-1] < 1:
        fail("logits", "a vocabulary of at least one token", describe(logits))
    check_mask(completion_mask, "the tokens of logits", shape, logits)
    check_target_ids(target_ids, completion_mask, shape, logits.shape[-1], logits)
    check_temperature(temperature, completion_mask, shape, logits)
    backend = backend_of(logits)
    if backend == "reference":
        return reference.logps_from_logits(logits, target_ids, completion_mask, temperature=temperature)
    scalar, for_each_token = _split_temperature(temperature, result_dtype(logits))
    logps, entropy, lse, _ = logps_fwd(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        target_ids.reshape(-1).contiguous(),
        flat_mask(completion_mask),
        scalar,
        for_each_token,
        backend,
    )
    return TokenLogps(logps.view(shape), entropy.view(shape), lse.view(shape))


# ---------------------------------------------------------------- from hidden states

# The logits of one chunk of tokens are all that is ever stored: large enough for the matrix products, small enough to
# stay near the caches on their way to the row kernel.
_CHUNK_BYTES = 32 << 20


def _chunks(tokens: int, weight: Tensor, dtype: torch.dtype) -> list[slice]:
    rows = max(1, _CHUNK_BYTES // (weight.shape[0] * dtype.itemsize))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _valid_rows(hidden_states: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In the dtype of the logits, and 0 where masked: a NaN there must not reach the weight's gradient."""
    x = hidden_states.to(dtype)
    return x if mask is None else torch.where(mask[:, None], x, 0.0)


def _project(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    logits = out[: hidden_states.shape[0]]
    if bias is None:
        return torch.mm(hidden_states, weight.T, out=logits)
    return torch.addmm(bias, hidden_states, weight.T, out=logits)


@kernel_op(lambda hidden_states, *_: _logps_shapes(hidden_states))
def linear_logps_fwd(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As logps_fwd, chunk by chunk: a library GEMM into a buffer that is used again, then the row kernel."""
    dtype, tokens = result_dtype(hidden_states), hidden_states.shape[0]
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    logps, entropy, lse, lse_rest = results = _logps_shapes(hidden_states)
    chunks = _chunks(tokens, weight, dtype)
    buffer = weight.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])
    for rows in chunks:
        part_mask = _part(mask, rows)
        logits = _project(_valid_rows(hidden_states[rows], part_mask, dtype), weight, bias, buffer)
        parts = kernels(backend).logps_fwd(
            logits, target_ids[rows], part_mask, temperature, _part(token_temperature, rows)
        )
        for result, part in zip(results, parts, strict=True):
            result[rows] = part
    return logps, entropy, lse, lse_rest


def _gradient_shapes(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_weight, needs_bias = arguments[-3:-1]
    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(0) if bias is None or not needs_bias else torch.empty_like(bias),
    )


@kernel_op(_gradient_shapes)
def linear_logps_bwd(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recomputes each chunk's logits, turns them into their gradient in place, and multiplies. A gradient that is not
    needed is empty. dweight is summed in float32 (float64) whatever the dtype of the weight."""
    dtype, tokens = result_dtype(hidden_states), hidden_states.shape[0]
    wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    dhidden = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    dweight = wide.new_zeros(wide.shape if needs_weight else 0)
    dbias = wide.new_zeros(wide.shape[0] if needs_bias and bias is not None else 0)
    grads = [None if d is None else d.contiguous() for d in (dlogps, dentropy, dlse)]
    chunks = _chunks(tokens, wide, dtype)
    buffer = wide.new_empty(chunks[0].stop if chunks else 0, wide.shape[0])
    for rows in chunks:
        part_mask = _part(mask, rows)
        hidden = _valid_rows(hidden_states[rows], part_mask, dtype)
        dlogits = _project(hidden, wide, wide_bias, buffer)
        kernels(backend).logps_bwd_out(
            dlogits,
            dlogits,
            target_ids[rows],
            part_mask,
            temperature,
            _part(token_temperature, rows),
            entropy[rows],
            lse[rows],
            lse_rest[rows],
            *(_part(d, rows) for d in grads),
        )
        dhidden[rows] = torch.mm(dlogits, wide)
        if needs_weight:
            dweight.addmm_(dlogits.T, hidden)
        if dbias.numel():
            dbias += dlogits.sum(0)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, token_temperature, ctx.backend = inputs
    _, *rows = output
    ctx.save_for_backward(*tensors, token_temperature, *rows)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, token_temperature, entropy, lse, lse_rest = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dhidden, dweight, dbias = linear_logps_bwd(
        *tensors,
        ctx.temperature,
        token_temperature,
        entropy,
        lse,
        lse_rest,
        *grads[:3],
        needs_weight,
        needs_bias,
        ctx.backend,
    )
    needed = (dhidden if needs_hidden else None, dweight if needs_weight else None, dbias if needs_bias else None)
    return *needed, None, None, None, None, None


register_gradient(linear_logps_fwd, _linear_backward, _linear_setup)


def linear_logps(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,) or (B, S)
) -> TokenLogps:
    """`logps_from_logits(hidden_states @ weight.T + bias, target_ids)` without the (T, V) logits.

    The logits exist for one chunk of tokens at a time (32 MiB) and are recomputed backward: 8 T V H flops for value and
    gradient where stored logits take 6, and no memory that grows with T * V. They are never rounded to a half type:
    half operands are multiplied in float32, for which the CPU backend holds a float32 copy of the weight.

    Args:
        hidden_states: of the backbone, at the positions that predict `target_ids`.
        weight: of the head (`lm_head.weight`), whole: an empty or sharded one is refused.
        target_ids, completion_mask, temperature: as in `logps_from_logits`.
        bias: of the head.

    Returns:
        TokenLogps(logps, entropy, lse), as `logps_from_logits`. Differentiable in `hidden_states`, `weight` and `bias`
        through all three, alone or together; each gradient has its input's dtype, and that of the weight is summed in
        float32.

    Raises:
        ValueError: a shape, dtype, device, id or temperature that is not as above.
    """
    check_floats("hidden_states", hidden_states, (2, 3))
    shape = hidden_states.shape[:-1]
    if type(weight) is not Tensor and not isinstance(weight, torch.nn.Parameter):
        fail("weight", "a plain tensor (gather a sharded head first: weight.full_tensor())", type(weight).__name__)
    check_floats("weight", weight, (1, 2), like=hidden_states)
    if weight.numel() == 0:
        fail("weight", "the whole head (a sharded one is empty outside its module's forward)", describe(weight))
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
        fail("weight", f"(V, {hidden_states.shape[-1]}), the last dimension of hidden_states", describe(weight))
    if weight.dtype != hidden_states.dtype:
        fail("weight", f"the dtype of hidden_states, {hidden_states.dtype}", describe(weight))
    if bias is not None:
        check_floats("bias", bias, (1,), like=hidden_states)
        check_shape("bias", bias, weight.shape[:1], "of one for each row of weight")
    check_mask(completion_mask, "the tokens of hidden_states", shape, hidden_states)
    check_target_ids(target_ids, completion_mask, shape, weight.shape[0], hidden_states)
    check_temperature(temperature, completion_mask, shape, hidden_states)
    backend = backend_of(hidden_states)
    if backend == "reference":
        return reference.linear_logps(
            hidden_states, weight, target_ids, completion_mask, bias=bias, temperature=temperature
        )
    scalar, for_each_token = _split_temperature(temperature, result_dtype(hidden_states))
    logps, entropy, lse, _ = linear_logps_fwd(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight,
        bias,
        target_ids.reshape(-1).contiguous(),
        flat_mask(completion_mask),
        scalar,
        for_each_token,
        backend,
    )
    return TokenLogps(logps.view(shape), entropy.view(shape), lse.view(shape))
