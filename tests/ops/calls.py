"""Every public function in every mode, as one call on the tensors of a batch: the rows of the tests of the ops."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from strategies import PER_SEQUENCE, SHARED, Batch
from torch import Tensor

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none")
ESTIMATORS = ("k1", "k2", "k3", "abs")
LOSS_TYPES = {  # and a label_smoothing that each takes
    "sigmoid": 0.1,
    "ipo": 0.0,
    "hinge": 0.0,
    "robust": 0.1,
    "exo_pair": 0.1,
    "nca_pair": 0.0,
    "sppo_hard": 0.0,
    "apo_zero": 0.0,
    "apo_down": 0.0,
    "discopop": 0.0,
}


class Call(NamedTuple):
    """`function(f, x, mask, cu_seqlens)` calls one function of f, which is rpp_kernels or its reference."""

    function: Callable[..., Any]
    differentiable: tuple[str, ...]

    def on(self, batch: Batch) -> Callable[[Any, dict[str, Tensor]], Any]:
        """The call with the layout of a batch, as rpp_kernels.testing takes it."""
        return lambda f, x: self.function(f, x, batch.mask, batch.cu_seqlens)


def _logps(f, x, mask, _, temperature="temperature", field=None, sum_squares=False):
    temperature = x.get(temperature, temperature)
    out = f.logps_from_logits(x["logits"], x["target_ids"], mask, temperature=temperature, sum_squares=sum_squares)
    return getattr(out, field) if field else out


def _linear(f, x, mask, _, bias=True, temperature="temperature"):
    return f.linear_logps(
        x["hidden_states"],
        x["weight"],
        x["target_ids"],
        mask,
        bias=x["bias"] if bias else None,
        temperature=x.get(temperature, temperature),
    )


def _linear_loss(f, x, mask, _, entropy=0.1):
    def token_loss(logps, entropies, rows):
        return -((logps - x["old_logps"][rows].to(logps)).exp() * x["advantages"][rows] + entropy * entropies) / 7

    return f.linear_loss(x["hidden_states"], x["weight"], x["target_ids"], token_loss, mask, bias=x["bias"])


def _linear_policy(f, x, mask, cu_seqlens, reduction="token-mean", extras=(), **options):
    options |= {name: x[EXTRAS[name]] for name in extras}
    return f.linear_policy_loss(
        x["hidden_states"],
        x["weight"],
        x["target_ids"],
        x["old_logps"],
        x["advantages"],
        mask,
        bias=x["bias"],
        reduction=reduction,
        cu_seqlens=cu_seqlens,
        **options,
    )


def _kl(f, x, mask, _, **options):
    return f.kl_penalty(x["logps"], x["ref_logps"], mask, **options)


def _rewards(f, x, mask, cu_seqlens):
    return f.token_rewards(x["scores"], x["kl"], mask, beta=0.3, cu_seqlens=cu_seqlens)


def _returns(f, x, mask, cu_seqlens, **options):
    return f.returns(x["rewards"], mask, gamma=0.9, cu_seqlens=cu_seqlens, **options)


def _gae(f, x, mask, cu_seqlens, **options):
    return f.gae(x["rewards"], x["values"], mask, gamma=0.9, gae_lambda=0.8, cu_seqlens=cu_seqlens, **options)


def _whiten(f, x, mask, _, **options):
    return f.whiten(x["advantages"], mask, **options)


def _reinforce_pp(f, x, mask, cu_seqlens, ref="ref_logps", **options):
    options = {"beta": 0.3, "gamma": 0.9, **options}
    ref_logps = None if ref is None else x[ref]
    return f.reinforce_pp_advantages(x["scores"], x["old_logps"], ref_logps, mask, cu_seqlens=cu_seqlens, **options)


def _policy(f, x, mask, cu_seqlens, advantages="advantages", reduction="token-mean", extras=(), **options):
    worth = x[advantages][:, None] if advantages in PER_SEQUENCE else x[advantages]
    options |= {name: x[EXTRAS[name]] for name in extras}
    if reduction == "seq-mean-token-sum-norm":
        options["max_completion_length"] = 9
    return f.policy_loss(x["logps"], x["old_logps"], worth, mask, reduction=reduction, cu_seqlens=cu_seqlens, **options)


def _on_policy(f, x, mask, cu_seqlens):
    return f.policy_loss(x["logps"], None, x["advantages"], mask, cu_seqlens=cu_seqlens)


def _value(f, x, mask, cu_seqlens, reduction="token-mean", **options):
    if reduction == "seq-mean-token-sum-norm":
        options["max_completion_length"] = 9
    return f.value_loss(
        x["values"], x["old_values"], x["returns"], mask, reduction=reduction, cu_seqlens=cu_seqlens, **options
    )


def _rollout(f, x, mask, cu_seqlens, **options):
    return f.rollout_weights(x["old_logps"], x["ref_logps"], mask, cu_seqlens=cu_seqlens, **options)


def _top_entropy(f, x, mask, _, **options):
    return f.top_entropy_mask(x["kl"], mask, **options).float()


def _clip_cov(f, x, mask, cu_seqlens, advantages="advantages"):
    worth = x[advantages][:, None] if advantages in PER_SEQUENCE else x[advantages]
    seed = torch.Generator().manual_seed(0)
    options = {"fraction": 0.2, "low": 0.0, "high": 2.0, "cu_seqlens": cu_seqlens, "generator": seed}
    return f.clip_cov_weights(x["logps"], x["old_logps"], worth, mask, **options)


def _kl_cov(f, x, mask, cu_seqlens, advantages="advantages"):
    worth = x[advantages][:, None] if advantages in PER_SEQUENCE else x[advantages]
    return f.kl_cov_mask(x["logps"], worth, mask, fraction=0.2, cu_seqlens=cu_seqlens).float()


def _whole_groups(x, mask, cu_seqlens, size):
    """Without the sequences at the end that make no whole group: tensors of tokens, the mask, cu_seqlens."""
    batch = (x["target_ids"].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1) // size * size
    tokens = batch if cu_seqlens is None else int(cu_seqlens[batch])
    names = "logps", "ref_logps", "hidden_states", "target_ids"
    some = {k: x[k][:tokens] for k in names}
    # Not those of the batch: a score counts for others, even that of a sequence without a token.
    some["scores"] = torch.arange(batch, device=some["logps"].device).cos().to(some["logps"].dtype)
    return some, None if mask is None else mask[:tokens], None if cu_seqlens is None else cu_seqlens[: batch + 1]


def _dpo(f, x, mask, cu_seqlens, ref=True, **options):
    x, mask, cu_seqlens = _whole_groups(x, mask, cu_seqlens, 2)
    return f.dpo_loss(x["logps"], x["ref_logps"] if ref else None, mask, cu_seqlens=cu_seqlens, **options)


def _copg(f, x, mask, cu_seqlens, group_size=2, **options):
    x, mask, cu_seqlens = _whole_groups(x, mask, cu_seqlens, group_size)
    options = {"beta": 0.3, "group_size": group_size, "cu_seqlens": cu_seqlens, **options}
    return f.copg_loss(x["logps"], x["ref_logps"], x["scores"], mask, **options)


def _linear_pairs(f, x, mask, cu_seqlens):
    some, mask, cu_seqlens = _whole_groups(x, mask, cu_seqlens, 2)

    def pair_loss(logps, entropy, rows, cu_seqlens, _):
        loss = f.dpo_loss(logps, some["ref_logps"][rows], cu_seqlens=cu_seqlens, num_pairs=3).loss
        return loss + 0.1 * (logps * entropy).sum()

    return f.linear_loss(
        some["hidden_states"],
        x["weight"],
        some["target_ids"],
        pair_loss,
        mask,
        bias=x["bias"],
        cu_seqlens=cu_seqlens,
        group_size=2,
    ).loss


LEVEL = {"importance_sampling_level": "sequence"}
LEVELS = ("token", "sequence", "sequence-token", "sequence-sum")
# Tensors that policy_loss takes by keyword, and what a batch has for them.
EXTRAS = {"weights": "temperature", "ref_logps": "ref_logps", "entropy": "kl"}
SURROGATES = {
    "clip": LEVELS,
    "reinforce": LEVELS,
    "cispo": LEVELS,
    "sapo": LEVELS,
    "gmpo": ("sequence",),
}
# Options that every surrogate but the default one is tried with: some tokens on either side of each bound.
BOUNDS = {
    "cispo": {"epsilon_low": 0.1, "epsilon_high": 0.2},
    "sapo": {"tau_positive": 0.8, "tau_negative": 2.0},
    "gmpo": {"epsilon_low": 0.1, "epsilon_high": 0.2},
}
GRPO = {"extras": ("ref_logps",), "beta": 0.3}
EVERYTHING = {
    "extras": ("weights", "ref_logps", "entropy"),
    "beta": 0.3,
    "kl_bias_correction": True,
    "entropy_coef": 0.1,
}
CALLS = {
    "logps_from_logits": Call(_logps, ("logits",)),
    "logps_from_logits logps": Call(partial(_logps, field="logps"), ("logits",)),
    "logps_from_logits entropy": Call(partial(_logps, field="entropy", temperature=0.7), ("logits",)),
    "logps_from_logits lse": Call(partial(_logps, field="lse", temperature=1.0), ("logits",)),
    "logps_from_logits sum_squares": Call(partial(_logps, sum_squares=True), ("logits",)),
    "linear_logps": Call(_linear, ("hidden_states", "weight", "bias")),
    "linear_logps without bias": Call(partial(_linear, bias=False, temperature=0.7), ("hidden_states", "weight")),
    "linear_loss": Call(_linear_loss, ("hidden_states", "weight", "bias")),
    "linear_loss of pairs": Call(_linear_pairs, ("hidden_states", "weight", "bias")),
    **{
        f"linear_policy_loss {r}": Call(partial(_linear_policy, reduction=r), ("hidden_states", "weight", "bias"))
        for r in ("token-mean", "seq-mean-token-mean")
    },
    "linear_policy_loss sequence": Call(
        partial(_linear_policy, reduction="seq-mean-token-sum", **LEVEL), ("hidden_states", "weight", "bias")
    ),
    **{
        f"linear_policy_loss with everything, {name} {level}": Call(
            partial(
                _linear_policy,
                surrogate=name,
                importance_sampling_level=level,
                **EVERYTHING | {"extras": ("weights", "ref_logps"), "log_ratio_clamp": 2.0},
            ),
            ("hidden_states", "weight", "bias"),
        )
        for name, level in (("cispo", "token"), ("gmpo", "sequence"), ("clip", "sequence-token"))
    },
    **{f"kl_penalty {k}": Call(partial(_kl, estimator=k), ("logps", "ref_logps")) for k in ESTIMATORS},
    "kl_penalty clamped": Call(partial(_kl, estimator="k2", kl_clamp=0.02), ("logps", "ref_logps")),
    "kl_penalty k3 with the gradient of k2": Call(
        partial(_kl, estimator="k3", gradient="k2", kl_clamp=0.02), ("logps", "ref_logps")
    ),
    "token_rewards": Call(_rewards, ("scores", "kl")),
    "returns": Call(_returns, ("rewards",)),
    "returns reset": Call(partial(_returns, gap="reset"), ("rewards",)),
    "returns step": Call(partial(_returns, gap="step"), ("rewards",)),
    "gae": Call(_gae, ("rewards", "values")),
    "gae step": Call(partial(_gae, gap="step"), ("rewards", "values")),
    "whiten": Call(_whiten, ("advantages",)),
    "whiten add_var": Call(partial(_whiten, unbiased=True, eps_mode="add_var", shift_mean=False), ("advantages",)),
    "whiten add_std": Call(partial(_whiten, eps=1e-4, eps_mode="add_std"), ("advantages",)),
    **{
        f"reinforce_pp_advantages {k}": Call(
            partial(_reinforce_pp, kl_estimator=k), ("scores", "old_logps", "ref_logps")
        )
        for k in ESTIMATORS
    },
    "reinforce_pp_advantages clamped": Call(partial(_reinforce_pp, kl_clamp=0.2), ("scores", "old_logps", "ref_logps")),
    "reinforce_pp_advantages without KL": Call(partial(_reinforce_pp, ref=None, beta=0.0), ("scores",)),
    **{f"policy_loss {r}": Call(partial(_policy, reduction=r), ("logps",)) for r in REDUCTIONS},
    **{f"policy_loss sequence {r}": Call(partial(_policy, reduction=r, **LEVEL), ("logps",)) for r in REDUCTIONS},
    "policy_loss dual clip": Call(partial(_policy, dual_clip=1.3, epsilon_high=0.1), ("logps",)),
    "policy_loss of an advantage for each sequence": Call(
        partial(_policy, advantages="scores", num_items_in_batch=7), ("logps",)
    ),
    **{
        f"policy_loss {name} {level}": Call(
            partial(_policy, surrogate=name, importance_sampling_level=level, **BOUNDS.get(name, {})), ("logps",)
        )
        for name, levels in SURROGATES.items()
        for level in levels
        if (name, level) not in (("clip", "token"), ("clip", "sequence"))  # above, in every reduction
    },
    **{f"policy_loss with {k}": Call(partial(_policy, kl_estimator=k, **GRPO), ("logps",)) for k in ESTIMATORS},
    "policy_loss with k3 and the gradient of k2": Call(
        partial(_policy, kl_gradient="k2", kl_clamp=0.02, **GRPO), ("logps",)
    ),
    "policy_loss with a constant KL": Call(partial(_policy, kl_gradient="none", **GRPO), ("logps",)),
    "policy_loss with a clamped KL": Call(partial(_policy, kl_clamp=0.02, **GRPO), ("logps",)),
    "policy_loss with weights": Call(partial(_policy, extras=("weights",)), ("logps",)),
    "policy_loss with entropy": Call(
        partial(_policy, extras=("entropy",), entropy_coef=0.1, reduction="seq-mean-token-mean"), ("logps", "kl")
    ),
    **{
        f"policy_loss with everything, {name} {level} {r}": Call(
            partial(_policy, surrogate=name, importance_sampling_level=level, reduction=r, **EVERYTHING),
            ("logps", "kl"),
        )
        for name, level in (("clip", "token"), ("gmpo", "sequence"), ("sapo", "sequence"), ("clip", "sequence-token"))
        for r in ("seq-mean-token-mean", "none")
    },
    "policy_loss on policy": Call(_on_policy, ("logps",)),
    **{f"value_loss {r}": Call(partial(_value, reduction=r), ("values",)) for r in REDUCTIONS},
    "value_loss unclipped": Call(partial(_value, epsilon=None), ("values",)),
    **{
        f"rollout_weights {level} {outside}": Call(
            partial(_rollout, level=level, outside=outside, low=0.8, high=1.3), ()
        )
        for level in ("token", "sequence", "geometric")
        for outside in ("truncate", "mask")
    },
    "rollout_weights clamped": Call(partial(_rollout, level="sequence", high=math.inf, log_ratio_clamp=0.2), ()),
    "top_entropy_mask": Call(_top_entropy, ()),
    "clip_cov_weights": Call(_clip_cov, ()),
    "clip_cov_weights of an advantage for each sequence": Call(partial(_clip_cov, advantages="scores"), ()),
    "kl_cov_mask": Call(_kl_cov, ()),
    "kl_cov_mask of an advantage for each sequence": Call(partial(_kl_cov, advantages="scores"), ()),
    **{
        f"dpo_loss {t}": Call(partial(_dpo, loss_type=t, beta=0.3, label_smoothing=e), ("logps",))
        for t, e in LOSS_TYPES.items()
    },
    **{
        f"dpo_loss {t} none": Call(partial(_dpo, loss_type=t, reduction="none"), ("logps",)) for t in ("sigmoid", "ipo")
    },
    "dpo_loss of mean log-probs without a reference": Call(
        partial(_dpo, ref=False, length_normalized=True, beta=2.0, margin=0.5), ("logps",)
    ),
    "copg_loss": Call(_copg, ("logps",)),
    "copg_loss of groups of three": Call(partial(_copg, group_size=3, num_items_in_batch=7), ("logps",)),
    "copg_loss none": Call(partial(_copg, reduction="none"), ("logps",)),
}

# Those that have a gradient: the others choose or weigh, and their results are constants.
DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.differentiable}
# Their value is not what their gradient differentiates, by design: what they stop the gradient of moves the value.
STRAIGHT_THROUGH = (
    "kl_penalty k3 with the gradient of k2",
    "policy_loss cispo",
    "policy_loss with k3 and the gradient of k2",
    "policy_loss with a constant KL",
    "policy_loss on policy",
    "linear_policy_loss with everything, cispo",
)


def is_straight_through(name: str) -> bool:
    # A loss that does not read the ratio has the same gradient at every level.
    return name.startswith(STRAIGHT_THROUGH) or ("sequence-token" in name and "reinforce" not in name)


# One row for each public function with a mask: for checks that cost seconds.
ONE_OF_EACH = {
    name: CALLS[name]
    for name in (
        "logps_from_logits",
        "linear_logps",
        "linear_policy_loss token-mean",
        "kl_penalty k3",
        "token_rewards",
        "returns",
        "gae",
        "whiten",
        "reinforce_pp_advantages k3",
        "policy_loss token-mean",
        "policy_loss sequence none",
        "policy_loss with everything, gmpo sequence none",
        "value_loss token-mean",
        "rollout_weights token mask",
        "rollout_weights sequence truncate",
        "top_entropy_mask",
        "kl_cov_mask",
        "dpo_loss sigmoid",
        "dpo_loss ipo none",
        "copg_loss",
    )
}


def to_device(batch: Batch, device: str) -> Batch:
    tensors = {k: x.to(device) for k, x in batch.tensors.items()}
    cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    return Batch(tensors, batch.mask.to(device), batch.lengths.to(device), cu_seqlens)


def is_per_token(name: str) -> bool:
    """Whether a tensor of `evaluate`, by its name, belongs to tokens (provided that its shape does)."""
    return name.removeprefix("d") not in PER_SEQUENCE | SHARED


# A full sequence; one with a hole (a tool call); an empty one; one padded on the left, with a hole; nothing valid.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]
).bool()
LENGTHS = torch.tensor([7, 4, 0, 7, 3])
