"""Losses of whole completions that are compared: the DPO family on pairs, Contrastive Policy Gradient on groups."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rpp_kernels.reference.shared import padded, result_dtype, select

DISCOPOP_TAU = 0.05


class PreferenceStats(NamedTuple):
    """Sums over the pairs of one call, as 0-dim float64 tensors that add as those of `PolicyStats` do.

    The implicit reward of a completion is beta * h (`dpo_loss`). `margins`: chosen_rewards - rejected_rewards;
    `correct`: how many pairs have the greater reward on the chosen side.
    """

    num_pairs: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    correct: Tensor

    def __add__(self, other: "PreferenceStats") -> "PreferenceStats":  # type: ignore[override]
        return PreferenceStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "PreferenceStats":  # sum() starts from 0
        return self


class PreferenceLoss(NamedTuple):
    loss: Tensor
    stats: PreferenceStats


class CoPGStats(NamedTuple):
    """Sums over the sequences with a valid token of one call, which add as `PreferenceStats` do.

    `log_ratio`: log pi(y) / pi_ref(y), an estimate of the KL divergence where the sequences were sampled from pi. The
    mean regularised reward is (scores - beta * log_ratio) / num_sequences.
    """

    num_sequences: Tensor
    scores: Tensor
    log_ratio: Tensor

    def __add__(self, other: "CoPGStats") -> "CoPGStats":  # type: ignore[override]
        return CoPGStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "CoPGStats":
        return self


class CoPGLoss(NamedTuple):
    loss: Tensor
    stats: CoPGStats


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
    """The loss of each pair from h = sum over valid tokens of logps - ref_logps (the mean with `length_normalized`),
    0 for a sequence without one; `pair_loss` of h_w and h_l.

    "mean": the sum over pairs / num_pairs, which by default counts the pairs with a valid token; "none": (P,), and 0
    for the others.
    """
    h, lengths = log_ratios(logps, ref_logps, completion_mask, cu_seqlens)
    if length_normalized:
        h = h / lengths.clamp(min=1)
    chosen, rejected = h.view(-1, 2).unbind(1)
    counted = (lengths > 0).view(-1, 2).any(1)
    loss = select(pair_loss(loss_type, chosen, rejected, beta, label_smoothing, margin), counted)
    chosen, rejected = chosen.detach().double(), rejected.detach().double()
    stats = PreferenceStats(
        num_pairs=counted.sum().double(),
        chosen_rewards=beta * chosen.sum(),
        rejected_rewards=beta * rejected.sum(),
        margins=beta * (chosen - rejected).sum(),
        correct=(chosen > rejected).sum().double(),
    )
    return PreferenceLoss(mean_over(loss, stats.num_pairs, num_pairs, reduction), stats)


def pair_loss(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float, margin: float
) -> Tensor:
    """With z = beta (h_w - h_l), s the logistic function and e = label_smoothing:

    "sigmoid"    -(1 - e) log s(z - margin) - e log s(margin - z)   [DPO 2305.18290 eq. 7; SimPO 2405.14734 eq. 6]
    "ipo"        (h_w - h_l - 1 / (2 beta))^2                        [IPO 2310.12036 eq. 17]
    "hinge"      max(0, 1 - z)                                       [SLiC 2305.10425; RSO 2309.06657]
    "robust"     (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e)       [rDPO 2403.00409]
    "exo_pair"   KL((s(z), s(-z)) || (1 - e, e))                     [EXO 2402.00856 eq. 16]
    "nca_pair"   -log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2       [NCA 2402.05369], r = beta h
    "sppo_hard"  (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2     [SPPO 2405.00675 eq. 4.7]
    "apo_zero"   s(-r_w) + s(r_l)                                    [APO 2408.06266 eq. 7]
    "apo_down"   s(r_w) + s(-z)                                      [APO eq. 8]
    "discopop"   -s(-z / tau) log s(z) + s(z / tau) exp(-z), tau = 0.05   [DiscoPOP 2406.08414 eq. 5]
    """
    z, e = beta * (chosen - rejected) - margin, label_smoothing
    if loss_type == "sigmoid":
        return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)
    if loss_type == "ipo":
        return (chosen - rejected - 0.5 / beta).square()
    if loss_type == "hinge":
        return (1 - z).relu()
    if loss_type == "robust":
        return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)
    if loss_type == "exo_pair":
        won = z.sigmoid() * (logsigmoid(z) - math.log1p(-e))
        return won + (-z).sigmoid() * (logsigmoid(-z) - math.log(e))
    if loss_type == "nca_pair":
        return -logsigmoid(beta * chosen) - 0.5 * (logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected))
    if loss_type == "sppo_hard":
        return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    if loss_type == "apo_zero":
        return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()
    if loss_type == "apo_down":
        return (beta * chosen).sigmoid() + (-z).sigmoid()
    assert loss_type == "discopop"
    # Where exp(-z) overflows, its factor s(z / tau) is far smaller still: multiplied as exponents.
    return -(-z / DISCOPOP_TAU).sigmoid() * logsigmoid(z) + (logsigmoid(z / DISCOPOP_TAU) - z).exp()


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
    """Minus the objective of Contrastive Policy Gradient [2406.19185 eq. 7 to 9, of pairs for group_size 2].

        objective = sum_i h_i (R_i - mean_{j != i} R_j) - (beta / 2) sum_i h_i (h_i - mean_{j != i} h_j)

    of a group, h = sum over valid tokens of logps - ref_logps. "mean": summed over groups / num_items_in_batch, by
    default the number of sequences with a valid token; "none": (groups,). The score of a sequence without one counts in
    the means of the others.
    """
    h, lengths = log_ratios(logps, ref_logps, completion_mask, cu_seqlens)
    h, r = h.view(-1, group_size), scores.detach().to(h.dtype).view(-1, group_size)

    def above_the_others(x: Tensor) -> Tensor:
        return x - (x.sum(1, keepdim=True) - x) / (group_size - 1)

    valid = (lengths > 0).view(-1, group_size)
    objective = select(h * (above_the_others(r) - 0.5 * beta * above_the_others(h)), valid)
    stats = CoPGStats(
        num_sequences=valid.sum().double(),
        scores=select(r, valid).double().sum(),
        log_ratio=h.detach().double().sum(),
    )
    return CoPGLoss(mean_over(-objective.sum(1), stats.num_sequences, num_items_in_batch, reduction), stats)


def log_ratios(
    logps: Tensor, ref_logps: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The log-ratio of each sequence, and how many valid tokens it has."""
    d = logps.to(result_dtype(logps))
    if ref_logps is not None:
        d = d - ref_logps.detach().to(d.dtype)
    d, mask, _ = padded(d, mask, cu_seqlens)
    return select(d, mask).sum(1), mask.sum(1)


def mean_over(loss: Tensor, counted: Tensor, count: float | Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    divisor = torch.as_tensor(counted.clamp(min=1) if count is None else count, dtype=torch.float64, device=loss.device)
    return (loss.sum() / divisor).to(loss.dtype)
