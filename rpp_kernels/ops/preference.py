"""Losses of whole completions that are compared: the DPO family on pairs, Contrastive Policy Gradient on groups."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import (
    check_choice,
    check_constant,
    check_count,
    check_floats,
    check_integer,
    check_like,
    check_mask,
    check_number,
    check_shape,
    describe,
    fail,
    flat,
    flat_mask,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.ops.policy_loss import divided
from rpp_kernels.reference import CoPGLoss, CoPGStats, PreferenceLoss, PreferenceStats

LOSS_TYPES = {  # csrc/formulas.h, enum Pair
    "sigmoid": 0,
    "ipo": 1,
    "hinge": 2,
    "robust": 3,
    "exo_pair": 4,
    "nca_pair": 5,
    "sppo_hard": 6,
    "apo_zero": 7,
    "apo_down": 8,
    "discopop": 9,
}
_SMOOTHED = ("sigmoid", "robust", "exo_pair")
_BELOW_HALF = math.nextafter(0.5, 0)
_LARGEST = 1e30
REDUCTIONS = ("mean", "none")


def _shapes(logps: Tensor, cu_seqlens: Tensor, group_size: int, per_group: bool, stats: int) -> tuple[Tensor, ...]:
    loss = logps.new_empty((cu_seqlens.shape[0] - 1) // group_size if per_group else ())
    return loss, logps.new_empty(cu_seqlens.shape[0] - 1), logps.new_empty(stats, dtype=torch.float64)


def _dpo_shapes(logps: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _shapes(logps, arguments[2], 2, arguments[-2], len(PreferenceStats._fields))


@kernel_op(_dpo_shapes)
def dpo_loss_fwd(
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    margin: float,
    length_normalized: bool,
    per_pair: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, stats): each pair's loss or their sum; d(loss) / d(logps), one number for all tokens of a sequence;
    sums as in PreferenceStats."""
    options = loss_type, beta, label_smoothing, margin, length_normalized, per_pair
    loss, slope, stats = kernels(backend).dpo_loss_fwd(logps, ref_logps, mask, cu_seqlens, *options)
    return loss, slope, stats


def _copg_shapes(logps: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    cu_seqlens, group_size, _, per_group, _ = arguments[3:]
    return _shapes(logps, cu_seqlens, group_size, per_group, len(CoPGStats._fields))


@kernel_op(_copg_shapes)
def copg_loss_fwd(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    group_size: int,
    beta: float,
    per_group: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, stats) as in dpo_loss_fwd, of groups, sums as in CoPGStats."""
    loss, slope, stats = kernels(backend).copg_loss_fwd(
        logps, ref_logps, scores, mask, cu_seqlens, group_size, beta, per_group
    )
    return loss, slope, stats


@kernel_op(lambda dloss, slope, mask, cu_seqlens, num_tokens, backend: slope.new_empty(num_tokens))
def preference_loss_bwd(
    dloss: Tensor, slope: Tensor, mask: Tensor | None, cu_seqlens: Tensor, num_tokens: int, backend: str
) -> Tensor:
    """dlogps from the gradient of the sum of all losses, or of the loss of each group."""
    if dloss.dim():
        dloss = dloss.repeat_interleave(slope.shape[0] // max(dloss.shape[0], 1))
    result: Tensor = kernels(backend).preference_loss_bwd(slope * dloss, mask, cu_seqlens, num_tokens)
    return result


def _register(op: Callable[..., Any], mask_at: int) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mask, cu_seqlens = inputs[mask_at : mask_at + 2]
        ctx.save_for_backward(output[1], mask, cu_seqlens)
        ctx.num_tokens, ctx.backend, ctx.count = inputs[0].shape[0], inputs[-1], len(inputs)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        others: tuple[None, ...] = (None,) * (ctx.count - 1)
        if dloss is None:
            return None, *others
        dlogps: Tensor = preference_loss_bwd(dloss, *ctx.saved_tensors, ctx.num_tokens, ctx.backend)
        return dlogps, *others

    register_gradient(op, backward, setup)


_register(dpo_loss_fwd, 2)
_register(copg_loss_fwd, 3)


def dpo_loss(
    logps: Tensor,  # (B, S) or (T,); sequences 2i and 2i + 1 are the chosen and the rejected one of pair i
    ref_logps: Tensor | None,  # same, constant; None: a loss without a reference
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    length_normalized: bool = False,
    num_pairs: float | Tensor | None = None,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> PreferenceLoss:
    """`-logsigmoid(beta * (h[0::2] - h[1::2])).mean()` with h = (logps - ref_logps).sum(1), and nine losses like it.

    DPO and its relatives, as TRL's trainer defines them. h_w and h_l are the log-ratios of the chosen and the rejected
    completion, r = beta h their implicit rewards, z = r_w - r_l, s the logistic function, e = `label_smoothing`:

        "sigmoid"    -(1 - e) log s(z - margin) - e log s(margin - z)     DPO, 2305.18290 eq. 7
        "ipo"        (h_w - h_l - 1 / (2 beta))^2                         IPO, 2310.12036 eq. 17
        "hinge"      max(0, 1 - z)                                        SLiC-HF, 2305.10425; RSO, 2309.06657
        "robust"     (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e)        rDPO, 2403.00409
        "exo_pair"   KL((s(z), s(-z)) || (1 - e, e))                      EXO, 2402.00856 eq. 16
        "nca_pair"   -log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2        NCA, 2402.05369
        "sppo_hard"  (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2      SPPO, 2405.00675 eq. 4.7
        "apo_zero"   s(-r_w) + s(r_l)                                     APO, 2408.06266 eq. 7
        "apo_down"   s(r_w) + s(-z)                                       APO, eq. 8
        "discopop"   -s(-20 z) log s(z) + s(20 z) exp(-z)                 DiscoPOP, 2406.08414 eq. 5

    Args:
        logps: of the policy that learns, in pairs of sequences. The loss is differentiable in them and in nothing else.
        ref_logps: of the reference policy; None for a loss of log-probs alone. SimPO (2405.14734 eq. 6) is None with
            `length_normalized` and a `margin`.
        completion_mask: bool; elsewhere nothing counts, and the gradient is exactly 0. A sequence without a valid token
            has h = 0; a pair of two of them is none: its loss is 0 and it is not counted.
        beta: in "ipo" and "sppo_hard" the strength of the regularisation, tau and 1 / eta of the papers.
        label_smoothing: the probability that a label is wrong, from 0 to below 0.5: for "sigmoid" (which makes it
            conservative DPO) and "robust"; for "exo_pair" above 0.
        margin: by which r_w has to exceed r_l; for "sigmoid" only.
        length_normalized: h is the mean over valid tokens rather than their sum. TRL does so in "ipo" always, and calls
            "sigmoid" with it "sigmoid_norm".
        num_pairs: what the mean is over; a number, or a 0-dim tensor on the device. None counts the pairs of this call.
            Pass the count of the whole batch when a batch is split over calls or processes, and add the losses.
        reduction: "mean", or "none": each pair's loss, (P,).
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it log-probs are padded (B, S).

    Returns:
        PreferenceLoss(loss, stats): float64 for float64 `logps`, else float32; `PreferenceStats`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; an odd number of sequences; an option
            that the `loss_type` does not know; `ref_logps` that require grad.
    """
    starts = _check_groups(logps, ref_logps, completion_mask, cu_seqlens, 2)
    check_number("beta", beta, "a positive finite number", 0, _LARGEST, open_low=True)
    check_choice("loss_type", loss_type, list(LOSS_TYPES))
    if loss_type in _SMOOTHED:
        positive = loss_type == "exo_pair"
        wanted = f"a number {'above' if positive else 'from'} 0 to below 0.5"
        check_number("label_smoothing", label_smoothing, wanted, 0, _BELOW_HALF, open_low=positive)
    elif label_smoothing != 0:
        fail("label_smoothing", f"0 with loss_type {loss_type!r}, which has none", label_smoothing)
    check_number("margin", margin, "a finite number", -_LARGEST, _LARGEST)
    if margin != 0 and loss_type != "sigmoid":
        fail("margin", f"0 with loss_type {loss_type!r}, which has none", margin)
    if not isinstance(length_normalized, bool):
        fail("length_normalized", "True or False", repr(length_normalized))
    check_choice("reduction", reduction, REDUCTIONS)
    check_count("num_pairs", num_pairs, reduction, logps)
    backend = backend_of(logps, "dpo_loss")
    if backend == "reference":
        return reference.dpo_loss(
            logps,
            ref_logps,
            completion_mask,
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            margin=margin,
            length_normalized=length_normalized,
            num_pairs=num_pairs,
            reduction=reduction,
            cu_seqlens=cu_seqlens,
        )
    dtype = result_dtype(logps)
    loss, _, stats = dpo_loss_fwd(
        flat(logps, dtype),
        None if ref_logps is None else flat(ref_logps, dtype),
        flat_mask(completion_mask),
        starts,
        LOSS_TYPES[loss_type],
        beta,
        label_smoothing,
        margin,
        length_normalized,
        reduction == "none",
        backend,
    )
    named = PreferenceStats(*stats.detach().unbind())
    return PreferenceLoss(loss if reduction == "none" else divided(loss, named.num_pairs, num_pairs), named)


def copg_loss(
    logps: Tensor,  # (B, S) or (T,); group i has the sequences group_size * i and those behind it
    ref_logps: Tensor,  # same, constant
    scores: Tensor,  # (B,), constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    beta: float = 0.1,
    group_size: int = 2,
    num_items_in_batch: float | Tensor | None = None,
    reduction: str = "mean",
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> CoPGLoss:
    """`-(h * above(scores - beta / 2 * h)).mean()`, h = (logps - ref_logps).sum(1), above(x) = x - mean of the others.

    Contrastive Policy Gradient (2406.19185). The gradient is that of RLOO with the regularised rewards R - beta h,
    h detached, and the mean over sequences; but it is the gradient of a function, so that sequences may come from any
    policy, for instance from a data set: nothing is weighted by a ratio. For groups of two the loss of a group is
    minus l(y, y') of the paper's eq. 9, and as the mean is over sequences, it is half of a mean over pairs. For more
    it is minus the sum of l over all pairs of the group, divided by group_size - 1.

    Args:
        logps: of the policy that learns. The loss is differentiable in them and in nothing else.
        ref_logps: of the reference policy.
        scores: rewards R of whole completions.
        completion_mask: bool; elsewhere nothing counts, and the gradient is exactly 0. Of a sequence without a valid
            token only the score counts, in the means of the others.
        beta: of the KL penalty: the maximiser is ref_pi * exp(R / beta), normalised.
        group_size: how many consecutive sequences answer one prompt, at least 2.
        num_items_in_batch: how many sequences the mean is over; a number, or a 0-dim tensor on the device. None counts
            those with a valid token of this call.
        reduction: "mean", or "none": each group's loss, the sum over its sequences, (B // group_size,).
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it log-probs are padded (B, S).

    Returns:
        CoPGLoss(loss, stats): float64 for float64 `logps`, else float32; `CoPGStats`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; a number of sequences that is no
            multiple of `group_size`; constants that require grad.
    """
    check_integer("group_size", group_size, "an integer from 2", 2)
    starts = _check_groups(logps, ref_logps, completion_mask, cu_seqlens, group_size)
    check_floats("ref_logps", ref_logps, (logps.dim(),), like=logps)
    check_floats("scores", scores, (1,), like=logps)
    check_shape("scores", scores, (starts.shape[0] - 1,), "of one for each sequence")
    check_constant("scores", scores)
    check_number("beta", beta, "a finite number from 0", 0, _LARGEST)
    check_choice("reduction", reduction, REDUCTIONS)
    check_count("num_items_in_batch", num_items_in_batch, reduction, logps)
    backend = backend_of(logps, "copg_loss")
    if backend == "reference":
        return reference.copg_loss(
            logps,
            ref_logps,
            scores,
            completion_mask,
            beta=beta,
            group_size=group_size,
            num_items_in_batch=num_items_in_batch,
            reduction=reduction,
            cu_seqlens=cu_seqlens,
        )
    dtype = result_dtype(logps)
    loss, _, stats = copg_loss_fwd(
        flat(logps, dtype),
        flat(ref_logps, dtype),
        flat(scores, dtype),
        flat_mask(completion_mask),
        starts,
        group_size,
        beta,
        reduction == "none",
        backend,
    )
    named = CoPGStats(*stats.detach().unbind())
    mean = loss if reduction == "none" else divided(loss, named.num_sequences, num_items_in_batch)
    return CoPGLoss(mean, named)


# ---------------------------------------------------------------- shared


def _check_groups(
    logps: Tensor, ref_logps: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, group_size: int
) -> Tensor:
    """Where sequences start."""
    check_floats("logps", logps, (1, 2))
    if ref_logps is not None:
        check_like("ref_logps", ref_logps, "logps", logps)
        check_constant("ref_logps", ref_logps)
    starts = sequence_starts(logps, "logps", cu_seqlens)
    check_mask(mask, "logps", logps.shape, logps)
    if (starts.shape[0] - 1) % group_size:
        fail("logps", f"whole groups of {group_size} sequences", f"{starts.shape[0] - 1}: {describe(logps)}")
    return starts
