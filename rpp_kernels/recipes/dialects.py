"""What other trainers compute under the same names: for each, the algorithms it has and where it differs from ours.

Read in openrlhf 0.11.2, verl 0.9.1 and trl 1.16.0, whose functions are oracles in tests/parity, and in NeMo-RL 0.6.0,
which does not install without a GPU and is pinned from reading alone.
"""

from typing import Any

Row = dict[str, Any]
INFINITY = float("inf")


def _with(common: Row, rows: dict[str, Row]) -> dict[str, Row]:
    return {name: common | row for name, row in rows.items()}


# OpenRLHF pays the KL token by token in the reward, clips scores after their baseline, and steps through holes in the
# mask as through tokens.
_OPENRLHF: Row = {
    "reward_clip": (-10.0, 10.0),
    "reward_clip_after_baseline": True,
    "time": "returns",
    "gap": "step",
    "kl_place": "reward",
    "kl_estimator": "k1",
    "kl_clamp": 10.0,
    "beta": 0.01,
    "surrogate": "clip",
    "reduction": "token-mean",
}
_OPENRLHF_WHITEN: Row = {"whiten": "tokens", "whiten_eps_mode": "floor"}

# verl bounds the loss of negative advantages (dual clip) in every "vanilla" loss. A KL is off unless asked for, in the
# reward or in the loss; GRPO's row has the one that its examples ask for.
_VERL: Row = {"beta": 0.0, "surrogate": "clip", "dual_clip": 3.0, "reduction": "token-mean"}
_VERL_OTHER: Row = {"beta": 0.0, "reduction": "token-mean"}
_VERL_WHITEN: Row = {"whiten": "tokens", "whiten_unbiased": True, "whiten_eps_mode": "add_var"}
_VERL_GROUP: Row = {"baseline": "mean", "std": "group", "singleton": "keep"}

# TRL clamps no log-ratio, and adds 1e-4 to every standard deviation.
_TRL: Row = {"log_ratio_clamp": INFINITY, "std_eps": 1e-4, "beta": 0.0}

# NeMo-RL leaves each sample out of its own group's mean and deviation, and gives the value k3 the gradient of k2.
_NEMO: Row = {
    "log_ratio_clamp": INFINITY,
    "baseline": "leave-one-out",
    "std": "leave-one-out",
    "kl_clamp": 10.0,
    "kl_gradient": "k2",
}

DIALECTS: dict[str, dict[str, Row]] = {
    "openrlhf": _with(
        _OPENRLHF,
        {
            "ppo": {"time": "gae", "gae_lambda": 1.0, **_OPENRLHF_WHITEN},
            "reinforce_pp": _OPENRLHF_WHITEN,
            "reinforce_pp_baseline": {**_OPENRLHF_WHITEN, "kl_place": "loss", "kl_estimator": "k2", "beta": 1e-5},
            "rloo": {},
            "grpo": {"std_eps": 1e-9},
            "dr_grpo": {},
            "gspo": {
                "std_eps": 1e-9,
                "reduction": "seq-mean-token-mean",
                "epsilon_low": 0.2,
                "epsilon_high": 0.2,
                "log_ratio_clamp": INFINITY,
            },
        },
    )
    | {"dpo": {}, "ipo": {}},
    "verl": {
        "ppo": {**_VERL, **_VERL_WHITEN, "gae_lambda": 1.0},
        "reinforce_pp": {**_VERL, **_VERL_WHITEN, "reward_clip": None},
        "reinforce_pp_baseline": {
            **_VERL,
            **_VERL_WHITEN,
            "kl_place": "score",
            "kl_estimator": "k1",
            "singleton": "keep",
        },
        "rloo": {**_VERL, "singleton": "keep"},
        "remax": _VERL,
        "grpo": {**_VERL, "singleton": "keep", "beta": 0.001, "kl_clamp": 10.0},
        "dr_grpo": {**_VERL, "singleton": "keep", "reduction": "seq-mean-token-sum-norm"},
        "dapo": {**_VERL, "singleton": "keep"},
        "opo": {**_VERL, "singleton": "keep"},
        "gpg": {**_VERL_OTHER, "group_scale": "nonzero-scores", "singleton": "keep"},
        "gspo": {**_VERL_GROUP, "log_ratio_clamp": 10.0},
        "cispo": {**_VERL_OTHER, "epsilon_low": 0.2, "epsilon_high": 0.2, "singleton": "keep"},
        "sapo": {"singleton": "keep"},
        "gmpo": {"epsilon_low": 0.2, "epsilon_high": 0.2, "singleton": "keep", "log_ratio_clamp": INFINITY},
        "clip_cov": {"singleton": "keep", "log_ratio_clamp": INFINITY},
        "kl_cov": {"singleton": "keep", "log_ratio_clamp": INFINITY, "beta": 0.1},
    },
    "trl": _with(
        _TRL,
        {
            "grpo": {"kl_bias_correction": True},
            "dr_grpo": {},
            "dapo": {"sequences": "all", "overlong_buffer": 0.0, "epsilon_high": 0.2},
            "gspo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
            "cispo": {},
            "sapo": {},
            "rloo": {
                "kl_place": "score",
                "beta": 0.05,
                "surrogate": "clip",
                "importance_sampling_level": "sequence-sum",
                "reduction": "seq-mean-token-mean",
            },
            "ppo": {"whiten_unbiased": True, "whiten_eps_mode": "add_var", "beta": 0.05},
        },
    )
    | {"dpo": {}, "ipo": {"length_normalized": True}},
    "nemo": _with(
        _NEMO,
        {
            "grpo": {"kl_estimator": "k3", "reduction": "token-mean", "beta": 0.01},
            "gspo": {},
            "cispo": {"epsilon_low": 0.2, "epsilon_high": 0.2},
            "reinforce_pp": {
                "reward_clip": None,
                "baseline": "mean",
                "std": "none",
                "time": "sequence",
                "kl_place": "token",
                "kl_gradient": None,
            },
        },
    ),
}
