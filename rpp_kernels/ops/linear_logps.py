"""Per-token log-probs, entropy and log-sum-exp from hidden states, without storing the logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import check_integer, result_dtype
from rpp_kernels.ops.chunks import INVARIANT_TOKENS, Chunks, Slopes, Statistics
from rpp_kernels.ops.head import Execution, Head, Needs, Options, Plan, checked_head, head_op
from rpp_kernels.reference import TokenLogps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _forward_shapes(head: Head, keep_tokens: int, keep_jacobian: bool) -> tuple[Tensor, ...]:
    x, dtype = head.hidden_states, result_dtype(head.hidden_states)
    return (
        *(x.new_empty(x.shape[0], dtype=dtype) for _ in range(4)),
        x.new_empty(keep_tokens * head.weight.shape[0], dtype=dtype),
        x.new_empty(x.shape if keep_jacobian else 0, dtype=dtype),
    )


@head_op(_forward_shapes)
def linear_logps_fwd(
    head: Head, keep_tokens: int, keep_jacobian: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, lse, lse_rest), each (T,); the logits of the first chunks, at most `keep_tokens` tokens, flat;
    with `keep_jacobian` d(logps) / d(hidden_states), (T, H)."""
    *results, kept, jacobian = _forward_shapes(head, keep_tokens, False)
    chunks = Chunks(head, Needs(keep_jacobian), wide_dhidden=True)
    for result in results:
        result.zero_()  # of tokens that are skipped
    for part in chunks.split(chunks.rows):
        rows = chunks.rows[part]
        logits = chunks.project(rows, chunks.kept(kept, part))
        statistics = chunks.statistics(rows, logits)
        for result, x in zip(results, statistics, strict=True):
            result[rows] = x
        if keep_jacobian:
            chunks.add_gradient(rows, logits, statistics, Slopes(torch.ones_like(statistics.logps)))
    if keep_jacobian:
        jacobian = chunks.sums()[0]
    logps, entropy, lse, lse_rest = results
    return logps, entropy, lse, lse_rest, kept, jacobian


def gradient_shapes(head: Head, needs: Sequence[bool]) -> list[Tensor]:
    """Like each of hidden states, weight, bias, lora_A and lora_B; empty where there is no gradient."""
    hidden_states, weight, bias, lora = needs
    return [
        head.weight.new_empty(0) if p is None else p.new_empty(p.shape if needed else 0)
        for p, needed in zip(head.learned, (hidden_states, weight, bias, lora, lora), strict=True)
    ]


@head_op(lambda head, *arguments: tuple(gradient_shapes(head, arguments[-1])))
def linear_logps_bwd(
    head: Head,
    entropy: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    kept: Tensor,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the logits that were kept, and those of the other tokens made again; empty where not needed."""
    slopes = Slopes(dlogps, dentropy, dlse)
    statistics = Statistics(torch.empty_like(lse), entropy, lse, lse_rest)  # a gradient asks for no log-probs
    chunks = Chunks(head, Needs(*needs))
    first = 0
    for part in chunks.split(chunks.rows):
        logits = chunks.kept(kept, part)
        if logits is None:
            break
        rows, first = chunks.rows[part], part.stop
        chunks.add_gradient(rows, logits[: rows.shape[0]], statistics.at(rows), slopes.at(rows))
    rest = chunks.rows[first:]
    chunks.recompute_gradient(rest, statistics.at(rest), slopes.at(rest))
    return chunks.gradients()


@kernel_op(lambda jacobian, dlogps, hidden_states: torch.empty_like(hidden_states))
def linear_logps_frozen_bwd(jacobian: Tensor, dlogps: Tensor, hidden_states: Tensor) -> Tensor:
    """The gradient of hidden states from that of log-probs: nothing of the head is needed again."""
    slope = dlogps[:, None]
    return torch.where(slope == 0, 0.0, slope * jacobian).to(hidden_states.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head = Head(*inputs[: len(Head._fields)])
    ctx.save_for_backward(*head.tensors, *output[1:])
    ctx.options = head[len(head.tensors) :]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, entropy, lse, lse_rest, kept, jacobian = ctx.saved_tensors
    head = Head(*tensors, *ctx.options)
    dlogps, dentropy, dlse = grads[:3]
    hidden_states, weight, bias, lora_A, lora_B, *_ = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None] * len(head.learned)
    if jacobian.numel() and dlogps is not None:
        gradients[0] = linear_logps_frozen_bwd(jacobian, dlogps, head.hidden_states)
        dlogps = None
    if dlogps is not None or dentropy is not None or dlse is not None:
        needs = Needs(hidden_states, weight, bias, lora_A or lora_B)
        more = linear_logps_bwd(*head, entropy, lse, lse_rest, kept, dlogps, dentropy, dlse, needs)
        gradients = [b if a is None else a + b for a, b in zip(gradients, more, strict=True)]
    needed = ctx.needs_input_grad
    gradients += [None] * (len(needed) - len(gradients))
    return tuple(d if n else None for d, n in zip(gradients, needed, strict=True))


register_gradient(linear_logps_fwd, _backward, _setup)


def token_logps(head: Head, shape: Sequence[int], keep_bytes: int) -> TokenLogps:
    """`linear_logps` of arguments that are checked, but for the reference."""
    keep = 0
    if any(head.needs) and not head.needs.frozen:
        # No more memory than there are tokens; products of one shape fill a chunk up.
        tokens = head.target_ids.numel() + (INVARIANT_TOKENS if Plan(*head.plan).batch_invariant else 0)
        keep = min(tokens, keep_bytes // (head.weight.shape[0] * result_dtype(head.hidden_states).itemsize))
    logps, entropy, lse, *_ = linear_logps_fwd(*head, keep, head.needs.frozen)
    return TokenLogps(logps.view(shape), entropy.view(shape), lse.view(shape))


def linear_logps(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (T,) or (B, S)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    chunk_bytes: int | None = None,
    keep_bytes: int = 0,
    skip_rows: bool = True,
    batch_invariant: bool = False,
) -> TokenLogps:
    """`logps_from_logits(hidden_states @ weight.T + bias, target_ids)` without the (T, V) logits.

        s = logit_scale * (h W^T + bias + lora_scaling * (h A^T) B^T)     logits = softcap * tanh(s / softcap), or s

    The logits of one chunk of tokens exist at a time, in float32 (float64) whatever the dtype of the operands. Memory
    beside inputs, results and gradients is one chunk, however many tokens there are; of half parameters also float32
    sums of their gradients, and on CPU a float32 copy. The cost in matrix products, of which one is 2 T V H flops, with
    m the share of tokens under the mask and a the share that has a gradient at all (every token that is neither is left
    out, which changes no result):

        no gradient wanted                                      m
        weight, or hidden states through entropy as well        m + 3 a, the logits being made again
        the same with a share f of the logits in keep_bytes     m + 3 a - f a
        frozen head, hidden states through logps alone          2 m, backward is pointwise

    With a frozen head (neither weight, bias nor LoRA requires grad) d(logps)/d(hidden_states) is kept from the forward,
    T * H numbers; a gradient through entropy or lse then costs 2 a more than that. `linear_loss` and
    `linear_policy_loss` need m + 2 a: where the loss is known, prefer them.

    Args:
        hidden_states: of the backbone, at the positions that predict `target_ids`.
        weight: of the head (`lm_head.weight`), whole: an empty or sharded one is refused. Under autocast, operands are
            cast to its dtype, as those of a linear layer are.
        target_ids, completion_mask, temperature: as in `logps_from_logits`.
        bias: of the head. It and the LoRA have the dtype of hidden_states or are float32.
        lora_A, lora_B, lora_scaling: a low-rank addition to the head: the two weights of a LoRA on it and its scaling,
            without dropout. Both are differentiable.
        softcap: bounds logits, before the temperature (`final_logit_softcapping` of Gemma 2); from 1e-30 to 1e30.
        logit_scale: multiplies logits, before softcap and temperature (`logit_scale` of Cohere, 1 / `logits_scaling`
            of Granite).
        process_group: over which the vocabulary is sharded. Each rank passes its rows of weight, bias and lora_B, and
            the same of everything else. Every rank gets the results of the whole vocabulary, and must differentiate
            the same loss. The gradients of hidden_states and lora_A are all-reduced: every rank gets the whole ones,
            which nobody must sum again.
        vocab_start: with process_group, the id of the first row of this rank's weight.
        chunk_bytes: how much memory chunks of logits and of their gradients may take. By default on CPU 384 tokens'
            worth, at most 256 MiB, or more tokens where logits and two copies of their hidden states stay in 16 MiB.
        keep_bytes: how much memory may hold logits from forward to backward, for those not to be made again. None is
            used with a frozen head.
        skip_rows: False projects every token and multiplies every gradient. On an accelerator, skipping waits for the
            device: the number of rows decides the shape of a product.
        batch_invariant: True gives a token the same bits in whatever batch it comes: products have one shape, for which
            the last chunk is filled up with zeros. Without it that depends on the matrix library; see docs/numerics.md.

    Returns:
        TokenLogps(logps, entropy, lse), as `logps_from_logits`, which alone has `sum_squares`. Differentiable in
        `hidden_states`, `weight`, `bias`, `lora_A` and `lora_B` through all three, alone or together; each gradient has
        its input's dtype, and those of parameters are summed in float32.

    Raises:
        ValueError: a shape, dtype, device, id or option that is not as above.
    """
    head, arguments = checked_head(
        hidden_states,
        weight,
        target_ids,
        completion_mask,
        Options(bias, lora_A, lora_B, lora_scaling, temperature, softcap, logit_scale, process_group, vocab_start),
        Execution(chunk_bytes, skip_rows, batch_invariant),
    )
    check_integer("keep_bytes", keep_bytes, "an integer from 0", 0)
    if head.backend == "reference":
        with torch.autocast(hidden_states.device.type, enabled=False):
            return reference.linear_logps(**arguments)
    return token_logps(head, target_ids.shape, keep_bytes)
