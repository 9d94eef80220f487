"""The policy loss from hidden states."""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rpp_kernels.reference.logps import linear_logps
from rpp_kernels.reference.policy_loss import PolicyStats, policy_loss

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class LinearPolicyLoss(NamedTuple):
    """`loss` and `stats` of `policy_loss`, and each token's `logps` and `entropy`, through which no gradient flows."""

    loss: Tensor
    stats: PolicyStats
    logps: Tensor
    entropy: Tensor


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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> LinearPolicyLoss:
    """`policy_loss` of `linear_logps`."""
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
    loss, stats = policy_loss(
        logps,
        old_logps,
        advantages,
        completion_mask,
        surrogate=surrogate,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        tau_positive=tau_positive,
        tau_negative=tau_negative,
        importance_sampling_level=importance_sampling_level,
        weights=weights,
        ref_logps=ref_logps,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_gradient=kl_gradient,
        kl_clamp=kl_clamp,
        kl_bias_correction=kl_bias_correction,
        entropy=entropy if entropy_coef else None,
        entropy_coef=entropy_coef,
        log_ratio_clamp=log_ratio_clamp,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length,
        cu_seqlens=cu_seqlens,
    )
    return LinearPolicyLoss(loss, stats, logps.detach(), entropy.detach())
