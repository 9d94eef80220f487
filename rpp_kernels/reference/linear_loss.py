"""Losses from hidden states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rpp_kernels.reference.logps import linear_logps

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class LinearLoss(NamedTuple):
    """The `loss`, summed over tokens, and each token's `logps` and `entropy`, through which no gradient flows."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor


def linear_loss(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    token_loss: Callable[..., Tensor],
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    cu_seqlens: Tensor | None = None,  # (B+1,), with group_size only
    group_size: int | None = None,
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> LinearLoss:
    """`token_loss(logps[rows], entropy[rows], rows).sum()`, `rows` the indices of the valid tokens.

    With `group_size` the loss may couple the tokens of that many consecutive sequences. It gets two arguments more: the
    `cu_seqlens` of the valid tokens, packed, and which sequences of the batch these are, a slice.
    """
    logps, entropy, *_ = linear_logps(
        hidden_states,
        weight,
        target_ids,
        completion_mask,
        bias=bias,
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scaling=lora_scaling,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    valid = torch.ones_like(target_ids, dtype=torch.bool) if completion_mask is None else completion_mask
    rows = valid.nonzero(as_tuple=True)
    groups: tuple[Tensor, slice] | tuple[()] = ()
    if group_size is not None:
        starts = valid_starts(valid, cu_seqlens)
        groups = starts, slice(0, starts.shape[0] - 1)
    loss = token_loss(logps[rows], entropy[rows], rows, *groups).sum()
    return LinearLoss(loss, logps.detach(), entropy.detach())


def valid_starts(valid: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where sequences start among the valid tokens alone."""
    if cu_seqlens is None:
        cu_seqlens = torch.arange(valid.shape[0] + 1, device=valid.device) * valid.shape[1]
    return torch.nn.functional.pad(valid.flatten().cumsum(0), (1, 0))[cu_seqlens.long()]
