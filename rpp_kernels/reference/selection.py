"""Which tokens count: chosen by their place in the order of the whole batch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpp_kernels.distributed import concatenated
from rpp_kernels.reference.shared import per_token, result_dtype, select

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def _mask_of(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask


def _covariance(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(A - mean A) (logp - mean logp) of inputs that are 0 where masked."""
    count = mask.sum().clamp(min=1)
    return (advantages - advantages.sum() / count) * (logps - logps.sum() / count)


def _tokens(
    logps: Tensor, advantages: Tensor, completion_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and advantages of each token, constant and 0 where masked, and the mask."""
    mask, dtype = _mask_of(logps, completion_mask), result_dtype(logps)
    if advantages.shape != logps.shape:
        advantages = per_token(advantages, logps, cu_seqlens)
    return select(logps.detach().to(dtype), mask), select(advantages.detach().to(dtype), mask), mask


def top_entropy_mask(
    entropy: Tensor,  # any shape
    completion_mask: Tensor | None = None,  # same, bool
    *,
    fraction: float = 0.2,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """entropy >= quantile(valid entropies of all ranks, 1 - fraction), linear between neighbours [2506.01939].

    A NaN sorts as the greatest and is always chosen.
    """
    mask = _mask_of(entropy, completion_mask)
    entropy = entropy.detach().to(result_dtype(entropy))
    everywhere = torch.where(mask, entropy, -torch.inf).flatten()
    if process_group is not None:
        everywhere, _ = concatenated(everywhere, process_group)
    total = everywhere.shape[0]
    if total == 0:
        return mask
    count = (everywhere != -torch.inf).sum()  # the masked ones sort first
    place = ((1 - fraction) * (count - 1).double()).clamp(min=0)
    first = total - count + place.long()
    neighbours = torch.stack([first, first + 1]).clamp(max=total - 1)
    lower, upper = everywhere.sort().values[neighbours].unbind()
    threshold = lower.lerp(upper, place.frac().to(lower.dtype))
    return mask & ~(entropy < threshold)


def clip_cov_weights(
    logps: Tensor,  # (B, S) or (T,)
    old_logps: Tensor,  # same
    advantages: Tensor,  # same, or one for each sequence as in policy_loss
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    generator: torch.Generator | None = None,
) -> Tensor:
    """1, but 0 at max(floor(fraction * N), 1) random tokens of low < cov < high that are not clipped [2505.22617].

    cov_t = (A_t - mean A) (logp_t - mean logp) with means over the N valid tokens; clipped are those of A < 0 and
    ratio < 1 - epsilon_low, or A > 0 and ratio > 1 + epsilon_high.
    """
    logps, advantages, mask = _tokens(logps, advantages, completion_mask, cu_seqlens)
    ratio = (logps - select(old_logps.detach().to(logps.dtype), mask)).exp()
    clipped = ((advantages < 0) & (ratio < 1 - epsilon_low)) | ((advantages > 0) & (ratio > 1 + epsilon_high))
    cov = _covariance(logps, advantages, mask)
    candidates = (mask & ~clipped & (cov > low) & (cov < high)).flatten().nonzero().squeeze(1)
    count = max(int(fraction * int(mask.sum())), 1)
    device = "cpu" if generator is None else generator.device  # the choice is then the same on every device
    order = torch.randperm(candidates.shape[0], generator=generator, device=device)
    chosen = candidates[order[:count].to(candidates.device)]
    return mask.to(logps.dtype).flatten().index_fill(0, chosen, 0.0).view(logps.shape)


def kl_cov_mask(
    logps: Tensor,  # (B, S) or (T,)
    advantages: Tensor,  # same, or one for each sequence as in policy_loss
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    fraction: float = 2e-4,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """The max(floor(fraction * N), 1) valid tokens of greatest cov, as in `clip_cov_weights` [2505.22617]."""
    logps, advantages, mask = _tokens(logps, advantages, completion_mask, cu_seqlens)
    cov = torch.where(mask, _covariance(logps, advantages, mask), -torch.inf).flatten()
    order = cov.argsort(descending=True, stable=True)
    place = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    count = (fraction * mask.sum().double()).floor().clamp(min=1)
    return mask & (place < count).view(mask.shape)
