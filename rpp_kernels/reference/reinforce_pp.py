"""The advantages of REINFORCE++."""

from typing import TYPE_CHECKING

from torch import Tensor

from rpp_kernels.reference.advantages import returns, whiten
from rpp_kernels.reference.kl import kl_penalty
from rpp_kernels.reference.rewards import token_rewards

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


def reinforce_pp_advantages(
    scores: Tensor,  # (B,)
    old_logps: Tensor,  # (B, S) or (T,)
    ref_logps: Tensor | None,  # same; None where beta is 0
    completion_mask: Tensor | None = None,  # same, bool
    *,
    beta: float = 0.01,
    gamma: float = 1.0,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """REINFORCE++ [R++ eq. 4-8]: A = whiten(returns(token_rewards(scores, kl_penalty(old_logps, ref_logps)))).

    With gamma = 1 and k1: A_t = normalise(score - beta * sum_{i >= t} (old_logps_i - ref_logps_i)) over valid tokens.
    """
    if ref_logps is None or beta == 0:
        ref_logps = old_logps.detach()
    kl = kl_penalty(old_logps, ref_logps, completion_mask, estimator=kl_estimator, kl_clamp=kl_clamp)
    rewards = token_rewards(scores, kl, completion_mask, beta=beta, cu_seqlens=cu_seqlens)
    advantages = returns(rewards, completion_mask, gamma=gamma, cu_seqlens=cu_seqlens)
    return whiten(advantages, completion_mask, eps=eps, process_group=process_group)
