"""The policy loss from hidden states, as one op with its gradient."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.ops.checks import fail, flat, result_dtype
from rpp_kernels.ops.chunks import Chunks, Slopes, Statistics, unscaled_dtype
from rpp_kernels.ops.head import Execution, Head, Needs, Options, checked_head, head_op
from rpp_kernels.ops.linear_logps import gradient_shapes, token_logps
from rpp_kernels.ops.linear_loss import detached, over_units, whole_sequences, with_gradients
from rpp_kernels.ops.policy_loss import (
    PolicyModes,
    PolicyNumbers,
    PolicyOptions,
    check_advantages,
    check_loss,
    check_options,
    check_weights,
    policy_loss,
)
from rpp_kernels.reference import LinearPolicyLoss, PolicyStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    weights: Tensor | None,
    ref_logps: Tensor | None,
    divisor: Tensor | None,
    divisor_factor: float,
    token_mean: bool,
    policy_numbers: Sequence[float],
    policy_modes: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The divided loss, stats as in policy_loss_fwd, (logps, entropy), and the gradients of the loss."""
    chunks, modes, hidden = Chunks(head, Needs(*needs)), PolicyModes(*policy_modes), head.hidden_states
    with_entropy = PolicyNumbers(*policy_numbers).entropy_coef != 0
    valid_lengths = lengths = cu_seqlens.diff()
    if head.mask is not None:
        valid_lengths = torch.nn.functional.pad(head.mask.cumsum(0), (1, 0))[cu_seqlens].diff()
    if chunks.mask is None:  # the rows of the chunks are the valid tokens
        lengths = valid_lengths
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # of sequences among those rows
    if divisor is None:
        divisor = (valid_lengths if token_mean else valid_lengths > 0).sum().clamp(min=1).double()
    divisor = divisor * divisor_factor
    row_weights = None
    if modes.sequence_mean and not modes.of_sequences:  # a chunk may end within a sequence
        each = valid_lengths.clamp(min=1).double().reciprocal()
        row_weights = each.repeat_interleave(lengths, output_size=chunks.rows.shape[0])

    def inputs_at(rows: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x[rows] for x in (old_logps, advantages, weights, ref_logps))

    def in_one_read() -> tuple[Tensor, Tensor]:
        logps, entropy = (hidden.new_zeros(hidden.shape[0], dtype=chunks.dtype) for _ in range(2))
        for unit in chunks.split(chunks.rows):
            rows = chunks.rows[unit]
            scale = divisor.reciprocal().view(1) if row_weights is None else row_weights[unit] / divisor
            constants = modes.surrogate, modes.kl_estimator, modes.kl_gradient, modes.kl_bias_correction
            policy = *inputs_at(rows), scale, *policy_numbers, *constants
            logps[rows], entropy[rows], *_ = chunks.add_policy_gradient(rows, chunks.project(rows), *policy)
        return logps, entropy

    def slopes_of(unit: slice, statistics: Statistics) -> Slopes | None:
        if not any(needs):
            return None
        rows, logps = chunks.rows[unit], statistics.logps
        if modes.of_sequences:
            inside = (starts >= unit.start) & (starts <= unit.stop)
            local = starts[inside] - unit.start
        else:
            local = torch.tensor([0, rows.shape[0]], device=logps.device)
        old, each, weight, ref = inputs_at(rows)
        valid = None if chunks.mask is None else chunks.mask[rows]
        _, slope, entropy_slope, _ = chunks.kernels.policy_loss_fwd(
            logps,
            logps if old is None else old,
            each,
            valid,
            local,
            weight,
            ref,
            statistics.entropy if with_entropy else None,
            None,
            *policy_numbers,
            *modes._replace(sequence_mean=modes.sequence_mean and modes.of_sequences),
        )

        def divided(x: Tensor) -> Tensor:
            return (x / divisor if row_weights is None else x * (row_weights[unit] / divisor)).to(x.dtype)

        return Slopes(divided(slope), divided(entropy_slope) if with_entropy else None)

    if chunks.reads_once and any(needs) and not modes.of_sequences:
        logps, entropy = in_one_read()
    else:
        whole = modes.of_sequences and any(needs)
        units = whole_sequences(starts, chunks.tokens) if whole else chunks.split(chunks.rows)
        logps, entropy = over_units(chunks, units, slopes_of)
    loss, _, _, stats = chunks.kernels.policy_loss_fwd(
        logps,
        logps if old_logps is None else old_logps,
        advantages,
        head.mask,
        cu_seqlens,
        weights,
        ref_logps,
        entropy if with_entropy else None,
        None,
        *policy_numbers,
        *modes,
    )
    return (loss / divisor).to(loss.dtype), stats, logps, entropy, *chunks.gradients(scaled=False)


def linear_policy_loss(
    hidden_states: Tensor,  # (B, S, H) or (T, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (B, S) or (T,) int64
    old_logps: Tensor | None,  # same, constant; None: the log-probs of this very call
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    surrogate: str = "clip",
    epsilon_low: float | None = None,  # None: the surrogate's own
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    tau_positive: float | None = None,
    tau_negative: float | None = None,
    importance_sampling_level: str = "token",
    weights: Tensor | None = None,  # shape of target_ids, constant
    ref_logps: Tensor | None = None,  # shape of target_ids, constant
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_clamp: float | None = None,
    kl_bias_correction: bool = False,
    entropy_coef: float = 0.0,
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
    options = PolicyOptions(
        surrogate,
        epsilon_low,
        epsilon_high,
        dual_clip,
        tau_positive,
        tau_negative,
        importance_sampling_level,
        beta,
        kl_estimator,
        kl_gradient,
        kl_clamp,
        kl_bias_correction,
        entropy_coef,
        log_ratio_clamp,
    )
    shape, dtype = target_ids.shape, result_dtype(hidden_states)
    like = hidden_states[..., 0].detach()  # what policy_loss would be given as logps
    constants = {"old_logps": old_logps, "weights": weights, "ref_logps": ref_logps}
    mean = reduction, num_items_in_batch, max_completion_length
    starts = check_loss("target_ids", like, constants, completion_mask, *mean, cu_seqlens)
    check_advantages(advantages, like, starts.shape[0] - 1, cu_seqlens)
    check_weights(weights, completion_mask)
    numbers, modes = check_options(options, ref_logps is not None)
    policy: dict[str, Any] = options.by_name() | {
        "weights": weights,
        "ref_logps": ref_logps,
        "reduction": reduction,
        "num_items_in_batch": num_items_in_batch,
        "max_completion_length": max_completion_length,
        "cu_seqlens": cu_seqlens,
    }
    if head.backend == "reference":
        with torch.autocast(hidden_states.device.type, enabled=False):
            return reference.linear_policy_loss(old_logps=old_logps, advantages=advantages, **arguments, **policy)
    if modes.of_sequences and head.needs.frozen and entropy_coef == 0:
        logps, entropy, *_ = token_logps(head, shape, keep_bytes=0)
        loss, named = policy_loss(logps, old_logps, advantages, completion_mask, **policy)
        return LinearPolicyLoss(loss, named, logps.detach(), entropy.detach())
    each = flat(advantages, dtype)
    if advantages.shape != shape:
        each = each.repeat_interleave(starts.diff(), output_size=like.numel())
    count = None
    if num_items_in_batch is not None:
        count = torch.as_tensor(num_items_in_batch, dtype=torch.float64, device=like.device)
    old, weights, ref_logps = (None if x is None else flat(x, dtype) for x in (old_logps, weights, ref_logps))
    loss, stats, logps, entropy, *gradients = linear_policy_loss_with_gradients(
        *detached(head),
        old,
        each,
        starts,
        weights,
        ref_logps,
        count,
        float(max_completion_length or 1),
        reduction == "token-mean",
        numbers,
        modes._replace(sequence_mean=reduction == "seq-mean-token-mean"),
        head.needs,
    )
    named = PolicyStats(*stats.unbind())
    loss = with_gradients(loss, head, gradients)
    return LinearPolicyLoss(loss, named, logps.view(shape), entropy.view(shape))
