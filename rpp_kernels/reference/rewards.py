"""Rewards, before and after shaping."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpp_kernels.reference.advantages import whiten
from rpp_kernels.reference.shared import clamp, padded, result_dtype, select, unpadded

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def token_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, S) or (T,)
    completion_mask: Tensor | None = None,  # same, bool
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """r_t = 1[t is the last valid token] * score - beta * kl_t [R++ eq. 4-5]. An empty sequence has no token to pay."""
    dtype = result_dtype(kl)
    kl, mask, packed_at = padded(kl.to(dtype), completion_mask, cu_seqlens)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    rewards = -beta * kl + torch.where(last, scores.to(dtype)[:, None], 0.0)
    return unpadded(select(rewards, mask), packed_at)


def normalize_rewards(
    scores: Tensor,  # (B,)
    *,
    zscore: bool = True,
    clip: tuple[float, float] | None = (-10.0, 10.0),
    scale: float = 1.0,
    eps: float = 1e-8,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """scale * clip((scores - mean) / std, low, high) [R++ 3.4]; population std with variance floored at eps."""
    scores = whiten(scores, eps=eps, process_group=process_group) if zscore else scores.to(result_dtype(scores))
    if clip is not None:
        scores = clamp(scores, *clip)
    return scale * scores


def overlong_penalty(
    lengths: Tensor,  # (B,) int32 or int64
    *,
    max_completion_length: int,
    buffer_length: int,
    scale: float = 1.0,
) -> Tensor:
    """scale * clamp((max_completion_length - buffer_length - length) / buffer_length, -1, 0) [DAPO eq. 13]."""
    beyond = max_completion_length - buffer_length - lengths
    return scale * (beyond.float() / buffer_length).clamp(-1, 0)
