"""Advantages over a group: the samples of one prompt."""

import torch
from torch import Tensor

from rpp_kernels.reference.shared import result_dtype, safe_sqrt


def group_advantages(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    baseline: str = "mean",
    std: str = "none",
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """Advantage of each sequence over its group, the samples of one prompt: (s_i - b_i) / (std + eps).

        baseline "mean": b = mean of the group, i included [GRPO; R++ v9 eq. 6]
        baseline "leave-one-out": b = mean of the others, (n s_i - sum) / (n - 1) [B2B, RLOO]
        std "none": no division; "group": of the group's scores [GRPO]; "batch": of all scores

    A group of one has no baseline to speak of: its advantage is 0 (`singleton="zero"`) or its score ("keep").
    """
    scores = scores.to(result_dtype(scores))
    if group_ids is None:
        assert group_size is not None
        group_ids = torch.arange(scores.shape[0], device=scores.device) // group_size
    dtype, scores = scores.dtype, scores.double()
    same = group_ids[:, None] == group_ids[None, :]  # (B, B): quadratic, and plain
    count = same.sum(1)
    mean = torch.where(same, scores[None, :], 0.0).sum(1) / count
    advantages = scores - mean
    if baseline == "leave-one-out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    advantages = torch.where(count == 1, scores if singleton == "keep" else 0.0, advantages)
    if std == "none":
        return advantages.to(dtype)
    if std == "batch":
        variance = (scores - scores.mean()).square().sum() / max(scores.shape[0] - int(unbiased), 1)
        return (advantages / (safe_sqrt(variance) + eps)).to(dtype)
    squares = torch.where(same, (scores[None, :] - mean[:, None]).square(), 0.0).sum(1)
    variance = squares / (count - int(unbiased)).clamp(min=1)
    return torch.where(count == 1, advantages, advantages / (safe_sqrt(variance) + eps)).to(dtype)
