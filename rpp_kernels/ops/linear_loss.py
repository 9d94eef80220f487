"""Losses from hidden states whose gradient is made in the forward, while the logits of each chunk are there."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.ops import no_second_derivative
from rpp_kernels.ops.checks import check_floats, check_shape, describe, fail
from rpp_kernels.ops.chunks import Chunks, Slopes, Statistics
from rpp_kernels.ops.head import Execution, Head, Options, checked_head
from rpp_kernels.reference import LinearLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TokenLoss = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]


def over_units(
    chunks: Chunks, units: Sequence[slice], slopes_of: Callable[[slice, Statistics], Slopes | None]
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of all tokens. The slopes of a unit of rows are asked for when its statistics are known: its
    gradient follows from the logits that are still there, or are made again where the unit is more than one chunk."""
    tokens = chunks.head.hidden_states.shape[0]
    logps, entropy = (chunks.head.hidden_states.new_zeros(tokens, dtype=chunks.dtype) for _ in range(2))
    for unit in units:
        rows = chunks.rows[unit]
        parts = chunks.split(rows)
        found = []
        for part in parts:
            logits = chunks.project(rows[part])
            found.append(chunks.statistics(rows[part], logits))
        statistics = Statistics(*(torch.cat(x) for x in zip(*found, strict=True)))
        logps[rows], entropy[rows] = statistics.logps, statistics.entropy
        slopes = slopes_of(unit, statistics)
        if slopes is None:
            continue
        if len(parts) == 1:
            chunks.add_gradient(rows, logits, statistics, slopes)
        else:
            chunks.recompute_gradient(rows, statistics, slopes)
    return logps, entropy


class _WithGradients(torch.autograd.Function):
    """A loss of which the gradients are known: backward only scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *learned_and_gradients: Tensor | None) -> Tensor:
        count = len(learned_and_gradients) // 2
        ctx.dtypes = [None if x is None else x.dtype for x in learned_and_gradients[:count]]
        ctx.save_for_backward(*learned_and_gradients[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the loss knows its gradient as a constant
            no_second_derivative()
        needed = ctx.needs_input_grad[1 : 1 + len(ctx.dtypes)]
        gradients = zip(ctx.saved_tensors, ctx.dtypes, needed, strict=True)
        scaled = (_scaled(x, dloss).to(dtype) if need else None for x, dtype, need in gradients)
        return None, *scaled, *(None,) * len(ctx.dtypes)


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """A copy of the weight's gradient is as large as the weight: none is made that nobody else needs."""
    batched = torch._C._functorch.is_batchedtensor(dloss)
    if batched or torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * dloss
    if dloss.device.type == "cpu" and bool(dloss == 1):
        return gradient
    return gradient.mul_(dloss)


def with_gradients(loss: Tensor, head: Head, gradients: Sequence[Tensor]) -> Tensor:
    if not any(head.needs):
        return loss
    result: Tensor = _WithGradients.apply(loss.detach(), *head.learned, *gradients)  # type: ignore[no-untyped-call]
    return result


def detached(head: Head) -> Head:
    return Head._make(x.detach() if isinstance(x, Tensor) else x for x in head)


# ---------------------------------------------------------------- any loss


def _captured(loss: Tensor, own: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves that a loss depends on, beside `own` and what those depend on."""
    if loss.is_leaf and loss.requires_grad and not any(loss is x for x in own):
        yield loss
    waiting, seen = [loss.grad_fn], {x.grad_fn for x in own}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is x for x in own):
            yield variable
        waiting += [following for following, _ in node.next_functions]


@torch.compiler.disable(reason="token_loss is called for each chunk")  # type: ignore[no-untyped-call,untyped-decorator]
def linear_loss(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    token_loss: TokenLoss,
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
    skip_rows: bool = True,
    batch_invariant: bool = False,
) -> LinearLoss:
    """`token_loss(logps[rows], entropy[rows], rows).sum()` of `linear_logps`, and its gradient at once.

    The gradient of each chunk is made in the forward, while its logits are there: none is made again and backward only
    scales, so that the whole costs m + 2 a products of 2 T V H flops (`linear_logps` has the other costs; m is the
    share of tokens under the mask, a that of tokens with a gradient that is not zero). Where no gradient is wanted none
    is made, for m.

        def token_loss(logps, entropy, rows):
            ratio = (logps - old_logps[rows]).exp()
            return -(ratio * advantages[rows] + 0.01 * entropy) / num_tokens

    Args:
        token_loss: a PyTorch function of the log-probs (n,) and entropies (n,) of some tokens that returns the loss of
            each, (n,). It is called once for each chunk and differentiated in both. `rows` indexes any tensor of the
            shape of `target_ids`: `advantages[rows]`; in a padded batch `rows[0]` says of which sequence a token is.
            The loss of a token must depend on no other token, which is not checked, and on no other tensor that
            requires grad, which is. It divides by what a mean is over: losses are summed.
        the others: as in `linear_logps`.

    Returns:
        LinearLoss(loss, logps, entropy): a 0-dim loss, differentiable in `hidden_states`, `weight`, `bias`, `lora_A`
        and `lora_B`, once; the results of `linear_logps`, detached.

    Raises:
        ValueError: an argument that is not as above; a `token_loss` of another shape, or that depends on another tensor
            that requires grad.

    Under torch.compile it is a graph break, because `token_loss` is Python; `linear_policy_loss` is not.
    """
    head, arguments = checked_head(
        hidden_states,
        weight,
        target_ids,
        completion_mask,
        Options(bias, lora_A, lora_B, lora_scaling, temperature, softcap, logit_scale, process_group, vocab_start),
        Execution(chunk_bytes, skip_rows, batch_invariant),
    )
    if not callable(token_loss):
        fail("token_loss", "a function of (logps, entropy, rows)", describe(token_loss))
    shape = target_ids.shape

    def checked_loss(logps: Tensor, entropy: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        loss = token_loss(logps, entropy, rows)
        check_floats("token_loss(...)", loss, (0, 1), like=logps)
        check_shape("token_loss(...)", loss, logps.shape, "of one loss for each token")
        for other in _captured(loss, (logps, entropy)):
            fail("token_loss", "logps and entropy as all that requires grad", f"{describe(other)} beside them")
        return loss

    if head.backend == "reference":
        with torch.autocast(hidden_states.device.type, enabled=False):
            return reference.linear_loss(token_loss=checked_loss, **arguments)
    needs, total = head.needs, torch.zeros((), dtype=torch.float64, device=hidden_states.device)
    grad_mode = torch.is_grad_enabled()

    def slopes_of(unit: slice, statistics: Statistics) -> Slopes | None:
        rows = chunks.rows[unit]
        own = [x.clone().requires_grad_(any(needs)) for x in (statistics.logps, statistics.entropy)]
        index = (rows,) if len(shape) == 1 else (rows // shape[1], rows % shape[1])
        with torch.set_grad_enabled(grad_mode):
            loss = checked_loss(own[0], own[1], index)
            if chunks.mask is not None:
                loss = torch.where(chunks.mask[rows], loss, 0.0)
        total.add_(loss.detach().sum(dtype=torch.float64))
        if not loss.requires_grad:
            return None
        dlogps, dentropy = torch.autograd.grad(loss, own, torch.ones_like(loss), allow_unused=True)
        return Slopes(dlogps, dentropy)

    with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        chunks = Chunks(detached(head), needs)
        logps, entropy = over_units(chunks, chunks.split(chunks.rows), slopes_of)
        gradients = chunks.gradients(scaled=False)
    loss = with_gradients(total.to(chunks.dtype), head, gradients)
    return LinearLoss(loss, logps.view(shape), entropy.view(shape))
