"""Losses from hidden states whose gradient is made in the forward, while the logits of each chunk are there."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.ops import no_second_derivative
from rpp_kernels.ops.checks import check_floats, check_integer, check_shape, describe, fail, sequence_starts
from rpp_kernels.ops.chunks import Chunks, Slopes, Statistics
from rpp_kernels.ops.head import Execution, Head, Options, checked_head
from rpp_kernels.reference import LinearLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TokenLoss = Callable[..., Tensor]


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


def whole_sequences(starts: Tensor, most: int) -> list[slice]:
    """Units of whole sequences, of as many as fit into a chunk, or of one that does not; none of them is empty."""
    units, begin, end = [], 0, 0
    for stop in starts.tolist()[1:]:
        if end > begin and stop - begin > most:
            units.append(slice(begin, end))
            begin = end
        end = stop
    return [*units, slice(begin, end)] if end > begin else units


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


def _group_starts(target_ids: Tensor, cu_seqlens: Tensor | None, group_size: int | None) -> Tensor | None:
    """Where the sequences start that a loss may couple."""
    if group_size is None:
        if cu_seqlens is not None:
            fail("cu_seqlens", "None without group_size, which a loss of sequences has", describe(cu_seqlens))
        return None
    check_integer("group_size", group_size, "an integer from 1, or None", 1)
    starts = sequence_starts(target_ids, "target_ids", cu_seqlens)
    if (starts.shape[0] - 1) % group_size:
        fail("target_ids", f"whole groups of {group_size} sequences", f"{starts.shape[0] - 1} sequences")
    return starts


class _Groups:
    """The groups of sequences that a loss may couple, among the rows of a loop over chunks."""

    def __init__(self, chunks: Chunks, cu_seqlens: Tensor, group_size: int) -> None:
        mask = chunks.head.mask
        self.starts = cu_seqlens if mask is None else torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens]
        among_rows = self.starts if chunks.mask is None else cu_seqlens
        self.group_size, self.ends = group_size, among_rows[group_size::group_size].tolist()
        chunks.widen(among_rows[::group_size].diff().tolist())
        self.units = whole_sequences(among_rows[::group_size], chunks.tokens)

    def at(self, unit: slice) -> tuple[Tensor, slice]:
        """Where sequences start among the valid tokens of a unit, and which these sequences are. A group without a row
        is in the unit before it, or in the first one."""
        first = bisect_right(self.ends, unit.start) if unit.start else 0
        last = bisect_right(self.ends, unit.stop)
        sequences = slice(first * self.group_size, last * self.group_size)
        starts = self.starts[sequences.start : sequences.stop + 1]
        return starts - starts[0], sequences


@torch.compiler.disable(reason="token_loss is called for each chunk")  # type: ignore[no-untyped-call,untyped-decorator]
def linear_loss(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    token_loss: TokenLoss,
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,), with group_size only
    group_size: int | None = None,
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

    A loss of whole sequences, or of groups of them, takes `group_size`:

        def pair_loss(logps, entropy, rows, cu_seqlens, sequences):
            return dpo_loss(logps, ref_logps[rows], cu_seqlens=cu_seqlens, num_pairs=num_pairs).loss

        linear_loss(hidden_states, weight, target_ids, pair_loss, completion_mask, group_size=2)

    Args:
        token_loss: a PyTorch function of the log-probs (n,) and entropies (n,) of some tokens that returns the loss of
            each, (n,). It is called once for each chunk and differentiated in both. `rows` indexes any tensor of the
            shape of `target_ids`: `advantages[rows]`; in a padded batch `rows[0]` says of which sequence a token is.
            The loss of a token must depend on no other token, which is not checked, and on no other tensor that
            requires grad, which is. It divides by what a mean is over: losses are summed.
        group_size: None, or how many consecutive sequences the loss may couple: 1 for the tokens of each sequence, 2
            for pairs. `token_loss` is then called for whole groups, with their valid tokens only, and gets two
            arguments more: `cu_seqlens` of these tokens, which are packed, and a slice that indexes what belongs to
            sequences, `scores[sequences]`. It returns (n,) or the 0-dim sum. On CPU the default chunk is as large as
            the longest group that takes at most 256 MiB; a group that is longer than a chunk has its logits made again,
            for one product more.
        cu_seqlens: with `group_size`, int32 or int64, where sequences start among packed tokens; without it they are
            the rows of a padded batch.
        the others: as in `linear_logps`.

    Returns:
        LinearLoss(loss, logps, entropy): a 0-dim loss, differentiable in `hidden_states`, `weight`, `bias`, `lora_A`
        and `lora_B`, once; the results of `linear_logps`, detached.

    Raises:
        ValueError: an argument that is not as above; a number of sequences that is no multiple of `group_size`; a
            `token_loss` of another shape, or that depends on another tensor that requires grad.

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
    shape, starts = target_ids.shape, _group_starts(target_ids, cu_seqlens, group_size)

    def checked_loss(logps: Tensor, entropy: Tensor, rows: tuple[Tensor, ...], *group: Any) -> Tensor:
        loss = token_loss(logps, entropy, rows, *group)
        check_floats("token_loss(...)", loss, (0, 1), like=logps)
        if not group or loss.dim():
            check_shape("token_loss(...)", loss, logps.shape, "of one loss for each token")
        for other in _captured(loss, (logps, entropy)):
            fail("token_loss", "logps and entropy as all that requires grad", f"{describe(other)} beside them")
        return loss

    if head.backend == "reference":
        with torch.autocast(hidden_states.device.type, enabled=False):
            return reference.linear_loss(
                token_loss=checked_loss, cu_seqlens=cu_seqlens, group_size=group_size, **arguments
            )
    needs, total = head.needs, torch.zeros((), dtype=torch.float64, device=hidden_states.device)
    grad_mode = torch.is_grad_enabled()

    def slopes_of(unit: slice, statistics: Statistics) -> Slopes | None:
        rows, n = chunks.rows[unit], unit.stop - unit.start
        valid = None if chunks.mask is None else chunks.mask[rows]
        if valid is not None and groups is not None:  # which are shown no other tokens
            rows, statistics = rows[valid], statistics.at(valid)
        own = [x.clone().requires_grad_(any(needs)) for x in (statistics.logps, statistics.entropy)]
        index = (rows,) if len(shape) == 1 else (rows // shape[1], rows % shape[1])
        with torch.set_grad_enabled(grad_mode):
            loss = checked_loss(own[0], own[1], index, *(() if groups is None else groups.at(unit)))
            if valid is not None and groups is None:
                loss = torch.where(valid, loss, 0.0)
        total.add_(loss.detach().sum(dtype=torch.float64))
        if not loss.requires_grad:
            return None
        slopes = Slopes(*torch.autograd.grad(loss, own, torch.ones_like(loss), allow_unused=True))
        if valid is None or groups is None:
            return slopes
        return Slopes(*(None if x is None else x.new_zeros(n).masked_scatter(valid, x) for x in slopes))

    with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        chunks = Chunks(detached(head), needs)
        groups = None if starts is None or group_size is None else _Groups(chunks, starts, group_size)
        units = chunks.split(chunks.rows) if groups is None else groups.units
        logps, entropy = over_units(chunks, units, slopes_of)
        gradients = chunks.gradients(scaled=False)
    loss = with_gradients(total.to(chunks.dtype), head, gradients)
    return LinearLoss(loss, logps.view(shape), entropy.view(shape))
