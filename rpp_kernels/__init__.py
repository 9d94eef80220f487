"""The RL-loss layer for language models: per-token log-probs, KL, advantages and the clipped loss, as fused kernels.

Every function is pure, takes padded (B, S) or packed (T,) tensors, and has its definition in `rpp_kernels.reference`.
`python -m rpp_kernels` tells what runs on this machine.
"""

from rpp_kernels.backends import use_backend
from rpp_kernels.ops.advantages import gae, returns, whiten
from rpp_kernels.ops.groups import best_of_group, group_advantages, informative_groups
from rpp_kernels.ops.kl import kl_penalty
from rpp_kernels.ops.linear_logps import linear_logps
from rpp_kernels.ops.linear_loss import linear_loss
from rpp_kernels.ops.linear_policy_loss import linear_policy_loss
from rpp_kernels.ops.logps import logps_from_logits
from rpp_kernels.ops.policy_loss import policy_loss, value_loss
from rpp_kernels.ops.preference import copg_loss, dpo_loss
from rpp_kernels.ops.reinforce_pp import reinforce_pp_advantages
from rpp_kernels.ops.rewards import normalize_rewards, overlong_penalty, token_rewards
from rpp_kernels.ops.rollout import rollout_weights
from rpp_kernels.ops.running_mean import RunningMean
from rpp_kernels.ops.selection import clip_cov_weights, kl_cov_mask, top_entropy_mask
from rpp_kernels.ops.totals import num_items_in_batch, sum_over_ranks
from rpp_kernels.recipes import ALGORITHMS, DIALECTS, EXTRAS, Recipe, Worth, recipe
from rpp_kernels.reference import (
    GAE,
    CoPGLoss,
    CoPGStats,
    LinearLoss,
    LinearPolicyLoss,
    PolicyLoss,
    PolicyStats,
    PreferenceLoss,
    PreferenceStats,
    RolloutStats,
    RolloutWeights,
    TokenLogps,
    ValueLoss,
    ValueStats,
)

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "DIALECTS",
    "EXTRAS",
    "GAE",
    "CoPGLoss",
    "CoPGStats",
    "LinearLoss",
    "LinearPolicyLoss",
    "PolicyLoss",
    "PolicyStats",
    "PreferenceLoss",
    "PreferenceStats",
    "Recipe",
    "RolloutStats",
    "RolloutWeights",
    "RunningMean",
    "TokenLogps",
    "ValueLoss",
    "ValueStats",
    "Worth",
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
    "recipe",
    "reinforce_pp_advantages",
    "returns",
    "rollout_weights",
    "sum_over_ranks",
    "token_rewards",
    "top_entropy_mask",
    "use_backend",
    "value_loss",
    "whiten",
]
