"""What is relative to a group, the samples of one prompt: advantages, the best one, whether there is a difference."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpp_kernels.reference.shared import all_shards, result_dtype, safe_sqrt

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def group_advantages(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    baseline: str = "mean",
    lengths: Tensor | None = None,  # (B,)
    std: str = "none",
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: str = "zero",
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Advantage of each sequence over its group, the samples of one prompt: (s_i - b_i) / (std + eps).

        baseline "mean": b = mean of the group, i included [GRPO; R++ v9 eq. 6]
        baseline "leave-one-out": b = mean of the others, (n s_i - sum) / (n - 1) [B2B, RLOO]
        baseline "length-weighted": b = sum_j l_j s_j / sum_j l_j [OPO]; one of length 0 weighs nothing, whatever
            its score, and a group of nothing but those has the baseline 0
        std "none": no division; "group": of the group's scores [GRPO]; "batch": of all scores
        std "leave-one-out": of the others in the group, and no division where they are all equal [NeMo-RL]

    A group of one has no baseline to speak of: its advantage is 0 (`singleton="zero"`) or its score ("keep"). The
    batch, and groups by id, are those of all ranks of a `process_group`.
    """
    scores, same, own = _together(scores, group_size, group_ids, process_group)
    dtype, scores = scores.dtype, scores.double()  # (B, B): quadratic, and plain
    count = same.sum(1)
    mean = torch.where(same, scores, 0.0).sum(1) / count
    if lengths is None:
        advantages = scores - mean
    else:
        weights = torch.where(same, all_shards(lengths.double(), process_group), 0.0)
        total = weights.sum(1)
        weighted = torch.where(weights > 0, weights * scores, 0.0).sum(1)
        advantages = scores - weighted / torch.where(total > 0, total, 1.0)
    if baseline == "leave-one-out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    advantages = torch.where(count == 1, scores if singleton == "keep" else 0.0, advantages)
    if std == "none":
        return advantages[own].to(dtype)
    if std == "batch":
        variance = (scores - scores.mean()).square().sum() / max(scores.shape[0] - int(unbiased), 1)
        return (advantages / (safe_sqrt(variance) + eps))[own].to(dtype)
    if std == "leave-one-out":
        same = same & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        mean = torch.where(same, scores, 0.0).sum(1) / (count - 1).clamp(min=1)
        count = count - 1
    squares = torch.where(same, (scores - mean[:, None]).square(), 0.0).sum(1)
    deviation = safe_sqrt(squares / (count - int(unbiased)).clamp(min=1))
    undivided = _all_equal(scores, same) if std == "leave-one-out" else count == 1
    return torch.where(undivided, advantages, advantages / (deviation + eps))[own].to(dtype)


def best_of_group(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """1 for the best of each group, the first where several are, else 0 [RAFT]. A NaN counts as the largest."""
    dtype = result_dtype(scores)
    scores, same, own = _together(scores, group_size, group_ids, process_group)
    nan, place = scores.isnan(), torch.arange(len(scores), device=scores.device)
    beaten = (scores > scores[:, None]) | (nan & ~nan[:, None])  # [i, j]: i by j
    tied = ~beaten & ~beaten.T
    return (~(same & (beaten | (tied & (place < place[:, None])))).any(1))[own].to(dtype)


def informative_groups(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Whether the scores of the sequence's group are not all equal [DAPO eq. 11]; a NaN differs from everything."""
    scores, same, own = _together(scores, group_size, group_ids, process_group)
    return (same & (scores != scores[:, None])).any(1)[own]


def _together(
    scores: Tensor, group_size: int | None, group_ids: Tensor | None, process_group: "ProcessGroup | None"
) -> tuple[Tensor, Tensor, slice | Tensor]:
    """The scores of all ranks, (B, B) who is in one group with whom, and which rows are this rank's."""
    scores = scores.to(result_dtype(scores))
    rank = 0 if process_group is None else process_group.rank()
    if group_ids is None:
        assert group_size is not None
        places = torch.arange(scores.shape[0], device=scores.device)
        group_ids = places // group_size + (rank << 32)  # groups of one size do not span ranks
    ids = all_shards(group_ids, process_group)
    own: slice | Tensor = slice(None)
    if process_group is not None:
        own = all_shards(torch.full_like(group_ids, rank), process_group) == rank
    return all_shards(scores, process_group), ids == ids[:, None], own


def _all_equal(scores: Tensor, among: Tensor) -> Tensor:
    """(B,) whether the scores that a row of (B, B) names are all equal. A sum of squares need not be exactly 0 then."""
    low, high = (
        torch.nn.functional.pad(torch.where(among, scores, end), (0, 1), value=end) for end in (torch.inf, -torch.inf)
    )
    return low.amin(1) >= high.amax(1)
