"""Log-probs and entropy, from logits and from hidden states."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rpp_kernels.reference.shared import all_shards, result_dtype, select

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class TokenLogps(NamedTuple):
    """Per-token results of the head: `logps` of the target, `entropy` of the distribution, `lse` its log-sum-exp, and
    `sum_squares` of its probabilities, where they were asked for."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    sum_squares: Tensor | None = None


def logps_from_logits(
    logits: Tensor,  # (T, V) or (B, S, V)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    temperature: float | Tensor = 1.0,  # scalar, or one for each token
    sum_squares: bool = False,
) -> TokenLogps:
    """z = logits / temperature, lse = log sum_j exp z_j, logps = z_y - lse, entropy = -sum_j p_j log p_j.

    A logit of -inf has probability 0 and adds nothing to the entropy. With `sum_squares` also sum_j p_j^2, a constant.
    """
    z = logits.to(result_dtype(logits))
    if isinstance(temperature, Tensor):
        if completion_mask is not None:
            temperature = torch.where(completion_mask, temperature, 1.0)
        temperature = temperature.to(z.dtype)[..., None]
    if completion_mask is not None:
        z = torch.where(completion_mask[..., None], z, 0.0)
        target_ids = torch.where(completion_mask, target_ids, 0)
    z = z / temperature
    lse = torch.logsumexp(z, dim=-1)
    logps = z.gather(-1, target_ids[..., None]).squeeze(-1) - lse
    all_logps = z - lse[..., None]
    entropy = -(all_logps.exp() * torch.where(all_logps == -torch.inf, 0.0, all_logps)).sum(-1)
    squares = (all_logps.exp().square().sum(-1).detach(),) if sum_squares else ()
    return TokenLogps(*(select(x, completion_mask) for x in (logps, entropy, lse, *squares)))


def linear_logps(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,  # scalar, or one for each token
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> TokenLogps:
    """`logps_from_logits` of the logits of a head, which are never rounded to a half type:

        s = logit_scale * (h W^T + bias + lora_scaling * (h A^T) B^T)     logits = softcap * tanh(s / softcap), or s

    With `process_group` each rank has the rows of W, bias and B from `vocab_start` on, in the order of ranks, and the
    same of all else.
    """
    dtype = result_dtype(hidden_states)
    hidden_states = hidden_states.to(dtype)
    if completion_mask is not None:
        hidden_states = torch.where(completion_mask[..., None], hidden_states, 0.0)
    logits = hidden_states @ all_shards(weight.to(dtype), process_group).T
    if bias is not None:
        logits = logits + all_shards(bias.to(dtype), process_group)
    if lora_A is not None and lora_B is not None:
        adapted = hidden_states @ lora_A.to(dtype).T
        logits = logits + lora_scaling * (adapted @ all_shards(lora_B.to(dtype), process_group).T)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logps_from_logits(logits, target_ids, completion_mask, temperature=temperature)
