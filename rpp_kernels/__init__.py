"""The RL-loss layer for language models: per-token log-probs, KL, advantages and the clipped loss, as fused kernels.

Every function is pure, takes padded (B, S) or packed (T,) tensors, and has its definition in `rpp_kernels.reference`.
`python -m rpp_kernels` tells what runs on this machine.
"""

from rpp_kernels.backends import use_backend
from rpp_kernels.ops.advantages import gae, returns, whiten
from rpp_kernels.ops.groups import group_advantages
from rpp_kernels.ops.kl import kl_penalty
from rpp_kernels.ops.linear_logps import linear_logps
from rpp_kernels.ops.linear_loss import linear_loss
from rpp_kernels.ops.linear_policy_loss import linear_policy_loss
from rpp_kernels.ops.logps import logps_from_logits
from rpp_kernels.ops.policy_loss import policy_loss, value_loss
from rpp_kernels.ops.preference import copg_loss, dpo_loss
from rpp_kernels.ops.reinforce_pp import reinforce_pp_advantages
from rpp_kernels.ops.rewards import normalize_rewards, token_rewards
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
    TokenLogps,
    ValueLoss,
    ValueStats,
)

__version__ = "0.1.0"

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
    "TokenLogps",
    "ValueLoss",
    "ValueStats",
    "copg_loss",
    "dpo_loss",
    "gae",
    "group_advantages",
    "kl_penalty",
    "linear_logps",
    "linear_loss",
    "linear_policy_loss",
    "logps_from_logits",
    "normalize_rewards",
    "policy_loss",
    "reinforce_pp_advantages",
    "returns",
    "token_rewards",
    "use_backend",
    "value_loss",
    "whiten",
]
