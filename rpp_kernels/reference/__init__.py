"""The specification: every public function in plain PyTorch, same name, same arguments.

A kernel is right when it agrees with this package in value and in gradient (whose autograd is the gradient).
Nothing here checks its input or tries to be fast; `rpp_kernels.ops` does the first, `rpp_kernels.backends` the second.

Dims: T packed tokens, B sequences, S padded length, H hidden, V vocabulary, R rank of a LoRA, G group size.
Layout: with `cu_seqlens` (B+1,) token tensors are packed `(T,)`, without it they are padded `(B, S)`.
Masked positions may hold anything, NaN included: masking selects (`torch.where`), it never multiplies. Their results
are 0 and so are their gradients. Arithmetic and results are float32, or float64 where the input is float64.

Papers: [R++] REINFORCE++ 2501.03262; [B2B] Back to Basics 2402.14740; [PPO] 1707.06347; [GAE] 1506.02438;
[GRPO] 2402.03300; [GSPO] 2507.18071; [dual] dual clip 1912.09729; [KL] joschu.net/blog/kl-approx.html;
[OPO] 2505.23585; [RAFT] 2304.06767; [DAPO] 2503.14476; [NeMo-RL] github.com/NVIDIA-NeMo/RL.
[DAPO] 2503.14476; [TIS] Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy training".
"""

from rpp_kernels.reference.advantages import GAE, gae, returns, whiten
from rpp_kernels.reference.groups import best_of_group, group_advantages, informative_groups
from rpp_kernels.reference.kl import kl_penalty
from rpp_kernels.reference.linear_loss import LinearLoss, linear_loss
from rpp_kernels.reference.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from rpp_kernels.reference.logps import TokenLogps, linear_logps, logps_from_logits
from rpp_kernels.reference.policy_loss import PolicyLoss, PolicyStats, ValueLoss, ValueStats, policy_loss, value_loss
from rpp_kernels.reference.preference import CoPGLoss, CoPGStats, PreferenceLoss, PreferenceStats, copg_loss, dpo_loss
from rpp_kernels.reference.reinforce_pp import reinforce_pp_advantages
from rpp_kernels.reference.rewards import normalize_rewards, overlong_penalty, token_rewards
from rpp_kernels.reference.rollout import RolloutStats, RolloutWeights, rollout_weights
from rpp_kernels.reference.selection import clip_cov_weights, kl_cov_mask, top_entropy_mask
from rpp_kernels.reference.totals import num_items_in_batch, sum_over_ranks

__all__ = [
    "GAE",
    "CoPGLoss",
    "CoPGStats",
    "LinearLoss",
    "LinearPolicyLoss",
    "PolicyLoss",
    "PolicyStats",
    "PreferenceLoss",
    "PreferenceStats",
    "RolloutStats",
    "RolloutWeights",
    "TokenLogps",
    "ValueLoss",
    "ValueStats",
    "best_of_group",
    "clip_cov_weights",
    "copg_loss",
    "dpo_loss",
    "gae",
    "group_advantages",
    "informative_groups",
    "kl_cov_mask",
    "kl_penalty",
    "linear_logps",
    "linear_loss",
    "linear_policy_loss",
    "logps_from_logits",
    "normalize_rewards",
    "num_items_in_batch",
    "overlong_penalty",
    "policy_loss",
    "reinforce_pp_advantages",
    "returns",
    "rollout_weights",
    "sum_over_ranks",
    "token_rewards",
    "top_entropy_mask",
    "value_loss",
    "whiten",
]
