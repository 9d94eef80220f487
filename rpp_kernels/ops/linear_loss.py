"""Losses from hidden states whose gradient is made in the forward, while the logits of each chunk are there."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.ops import no_second_derivative
from rpp_kernels.ops.checks import check_floats, check_shape, describe, fail, flat, result_dtype
from rpp_kernels.ops.chunks import Chunks, Slopes, Statistics, unscaled_dtype
from rpp_kernels.ops.head import Execution, Head, Needs, Options, checked_head, head_op
from rpp_kernels.ops.linear_logps import gradient_shapes, token_logps
from rpp_kernels.ops.policy_loss import check_advantages, check_clips, check_loss, policy_loss
from rpp_kernels.reference import LinearLoss, LinearPolicyLoss, PolicyStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TokenLoss = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]


def _over_units(
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


def _with_gradients(loss: Tensor, head: Head, gradients: Sequence[Tensor]) -> Tensor:
    if not any(head.needs):
        return loss
    result: Tensor = _WithGradients.apply(loss.detach(), *head.learned, *gradients)  # type: ignore[no-untyped-call]
    return result


def _detached(head: Head) -> Head:
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
        chunks = Chunks(_detached(head), needs)
        logps, entropy = _over_units(chunks, chunks.split(chunks.rows), slopes_of)
        gradients = chunks.gradients(scaled=False)
    loss = _with_gradients(total.to(chunks.dtype), head, gradients)
    return LinearLoss(loss, logps.view(shape), entropy.view(shape))


# ---------------------------------------------------------------- the policy loss


def _policy_shapes(head: Head, *arguments: Any) -> tuple[Tensor, ...]:
    x, dtype = head.hidden_states, result_dtype(head.hidden_states)
    per_token = (x.new_empty(x.shape[0], dtype=dtype) for _ in range(2))
    stats = x.new_empty(len(PolicyStats._fields), dtype=torch.float64)
    gradients = (d.to(unscaled_dtype(d)) for d in gradient_shapes(head, arguments[-1]))
    return x.new_empty((), dtype=dtype), stats, *per_token, *gradients


@head_op(_policy_shapes)
def linear_policy_loss_with_gradients(
    head: Head,
    old_logps: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    divisor: Tensor | None,
    divisor_factor: float,
    token_mean: bool,
    clips: Sequence[float],
    sequence_ratio: bool,
    sequence_mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The divided loss, stats as in policy_loss_fwd, (logps, entropy), and the gradients of the loss."""
    chunks = Chunks(head, Needs(*needs))
    valid_lengths = lengths = cu_seqlens.diff()
    if head.mask is not None:
        valid_lengths = torch.nn.functional.pad(head.mask.cumsum(0), (1, 0))[cu_seqlens].diff()
    if chunks.mask is None:  # the rows of the chunks are the valid tokens
        lengths = valid_lengths
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # of sequences among those rows
    if divisor is None:
        divisor = (valid_lengths if token_mean else valid_lengths > 0).sum().clamp(min=1).double()
    divisor = divisor * divisor_factor
    weights = None
    if sequence_mean and not sequence_ratio:  # a chunk may end within a sequence
        each = valid_lengths.clamp(min=1).double().reciprocal()
        weights = each.repeat_interleave(lengths, output_size=chunks.rows.shape[0])

    def slopes_of(unit: slice, statistics: Statistics) -> Slopes | None:
        if not any(needs):
            return None
        rows, logps = chunks.rows[unit], statistics.logps
        if sequence_ratio:
            inside = (starts >= unit.start) & (starts <= unit.stop)
            local = starts[inside] - unit.start
        else:
            local = torch.tensor([0, rows.shape[0]], device=logps.device)
        old = logps if old_logps is None else old_logps[rows]
        valid = None if chunks.mask is None else chunks.mask[rows]
        per_sequence = sequence_ratio, sequence_ratio and sequence_mean
        _, slope, _ = chunks.kernels.policy_loss_fwd(
            logps, old, advantages[rows], False, valid, local, *clips, *per_sequence, False
        )
        scaled = slope / divisor if weights is None else slope * (weights[unit] / divisor)
        return Slopes(scaled.to(slope.dtype))

    units = _whole_sequences(starts, chunks.tokens) if sequence_ratio and any(needs) else chunks.split(chunks.rows)
    logps, entropy = _over_units(chunks, units, slopes_of)
    old = logps if old_logps is None else old_logps
    loss, _, stats = chunks.kernels.policy_loss_fwd(
        logps, old, advantages, False, head.mask, cu_seqlens, *clips, sequence_ratio, sequence_mean, False
    )
    return (loss / divisor).to(loss.dtype), stats, logps, entropy, *chunks.gradients(scaled=False)


def _whole_sequences(starts: Tensor, most: int) -> list[slice]:
    """Units of whole sequences, of as many as fit into a chunk, or of one that does not."""
    units, begin, end = [], 0, 0
    for stop in starts.tolist()[1:]:
        if end > begin and stop - begin > most:
            units.append(slice(begin, end))
            begin = end
        end = stop
    return [*units, slice(begin, end)] if end > begin else units


def linear_policy_loss(
    hidden_states: Tensor,  # (B, S, H) or (T, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (B, S) or (T,) int64
    old_logps: Tensor | None,  # same, constant; None: the log-probs of this very call
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    importance_sampling_level: str = "token",
    log_ratio_clamp: float = 20.0,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,  # or (B, S) or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    chunk_bytes: int | None = None,
    skip_rows: bool = True,
    batch_invariant: bool = False,
) -> LinearPolicyLoss:
    """`policy_loss(linear_logps(hidden_states, weight, target_ids).logps, old_logps, advantages)`, gradient and all.

    Equal to these two in value and gradient, at the cost of `linear_loss`: m + 2 a products of 2 T V H flops rather
    than m + 3 a, where a also leaves out the tokens that are clipped or have an advantage of 0. A ratio of sequences
    (`importance_sampling_level="sequence"`) is known when a sequence ends, so chunks hold whole sequences; one that is
    longer than a chunk has its logits made again, for m + 3 a. With a frozen head that ratio costs 2 m.

    Args:
        old_logps: of the policy that sampled; None for an exactly on-policy step, whose ratio is 1: this saves the
            pass that would compute them.
        reduction: as in `policy_loss`, "none" aside: the gradient of a sum is all that is made.
        the others: as in `policy_loss` and `linear_logps`.

    Returns:
        LinearPolicyLoss(loss, stats, logps, entropy): a 0-dim loss, differentiable in `hidden_states`, `weight`,
        `bias`, `lora_A` and `lora_B`, once; `PolicyStats`; the results of `linear_logps`, detached.

    Raises:
        ValueError: an argument that is not as above.
    """
    head, arguments = checked_head(
        hidden_states,
        weight,
        target_ids,
        completion_mask,
        Options(bias, lora_A, lora_B, lora_scaling, temperature, softcap, logit_scale, process_group, vocab_start),
        Execution(chunk_bytes, skip_rows, batch_invariant),
    )
    if reduction == "none":
        fail("reduction", "a sum or a mean (for each token's loss: linear_logps, then policy_loss)", repr(reduction))
    shape, dtype = target_ids.shape, result_dtype(hidden_states)
    like = hidden_states[..., 0].detach()  # what policy_loss would be given as logps
    constants = {} if old_logps is None else {"old_logps": old_logps}
    mean = reduction, num_items_in_batch, max_completion_length
    starts = check_loss("target_ids", like, constants, completion_mask, *mean, cu_seqlens)
    check_advantages(advantages, like, starts.shape[0] - 1, cu_seqlens)
    clips = check_clips(epsilon_low, epsilon_high, dual_clip, importance_sampling_level, log_ratio_clamp)
    policy: dict[str, Any] = {
        "epsilon_low": epsilon_low,
        "epsilon_high": epsilon_high,
        "dual_clip": dual_clip,
        "importance_sampling_level": importance_sampling_level,
        "log_ratio_clamp": log_ratio_clamp,
        "reduction": reduction,
        "num_items_in_batch": num_items_in_batch,
        "max_completion_length": max_completion_length,
        "cu_seqlens": cu_seqlens,
    }
    if head.backend == "reference":
        with torch.autocast(hidden_states.device.type, enabled=False):
            return reference.linear_policy_loss(old_logps=old_logps, advantages=advantages, **arguments, **policy)
    sequence_ratio = importance_sampling_level == "sequence"
    if sequence_ratio and head.needs.frozen:
        logps, entropy, _ = token_logps(head, shape, keep_bytes=0)
        old = logps.detach() if old_logps is None else old_logps
        loss, named = policy_loss(logps, old, advantages, completion_mask, **policy)
        return LinearPolicyLoss(loss, named, logps.detach(), entropy.detach())
    each = flat(advantages, dtype)
    if advantages.shape != shape:
        each = each.repeat_interleave(starts.diff(), output_size=like.numel())
    count = None
    if num_items_in_batch is not None:
        count = torch.as_tensor(num_items_in_batch, dtype=torch.float64, device=like.device)
    loss, stats, logps, entropy, *gradients = linear_policy_loss_with_gradients(
        *_detached(head),
        None if old_logps is None else flat(old_logps, dtype),
        each,
        starts,
        count,
        float(max_completion_length or 1),
        reduction == "token-mean",
        clips,
        sequence_ratio,
        reduction == "seq-mean-token-mean",
        head.needs,
    )
    named = PolicyStats(*stats.unbind())
    loss = _with_gradients(loss, head, gradients)
    return LinearPolicyLoss(loss, named, logps.view(shape), entropy.view(shape))
