"""Policy and value losses of the hosts, in value and in gradient."""

import math

import hosts
import pytest
import torch
from batches import GROUP_IDS, make
from compare import cases, distance, row

import rpp_kernels as rpp

LOGPS = ("logps",)
HEAD = ("hidden_states", "weight", "bias")
# A mean over tokens that a host divides by n + 1e-8.
EPS = 1e-7


def filled(options, batch):
    return {name: option(batch) if callable(option) else option for name, option in options.items()}


def tensors(batch, old="old_logps", advantages="advantages"):
    """The arguments that all policy losses share; `old=None` for an exactly on-policy step."""
    return batch.logps, old and batch[old], batch[advantages], batch.completion_mask


def policy(name, host, *, exact=1e-12, old="old_logps", advantages="advantages", wrt=LOGPS, **options):
    """A host's loss and our `policy_loss` with `options`; an option that is a function is given the batch."""

    def ours(batch, **changes):
        return rpp.policy_loss(*tensors(batch, old, advantages), **(filled(options, batch) | changes)).loss

    return row(name, host, ours, wrt=wrt, exact=exact, options=options)


def liger(name, host, *, old="old_logps", **options):
    """Liger's loss and our `linear_policy_loss`, both from hidden states; Liger's log-probs are float32 always."""

    def ours(batch, **changes):
        return rpp.linear_policy_loss(
            batch.hidden_states,
            batch.weight,
            batch.target_ids,
            old and batch[old],
            batch.outcomes,
            batch.completion_mask,
            bias=batch.bias,
            temperature=batch.temperature,
            **(filled(options, batch) | changes),
        ).loss

    return row(f"liger {name}", host, ours, wrt=HEAD, exact=None, options=options)


def verl(mode, *, old="old_logps", advantages="advantages", **options):
    return lambda b: hosts.verl_policy_loss(mode, *tensors(b, old, advantages), **filled(options, b))


def openrlhf(*, old="old_logps", advantages="advantages", **options):
    return lambda b: hosts.openrlhf_policy_loss(*tensors(b, old, advantages), **filled(options, b))


def trl(loss_type, *, old="old_logps", advantages="advantages", **options):
    return lambda b: hosts.trl_grpo_loss(loss_type, *tensors(b, old, advantages), **filled(options, b))


def liger_grpo(loss_type, *, old="old_logps", **options):
    return lambda b: hosts.liger_grpo_loss(
        loss_type,
        b.hidden_states,
        b.weight,
        b.target_ids,
        old and b[old],
        b.outcomes,
        b.completion_mask,
        bias=b.bias,
        **filled(options, b),
    )


def sequences(batch):
    """All sequences, the empty one among them, which our own divisor does not count."""
    return len(batch.logps)


def seen(name):
    return lambda batch: batch[name]


VERL_REDUCTIONS = [
    ("token-mean", {}, 1e-12),
    ("seq-mean-token-sum", {}, 1e-12),
    ("seq-mean-token-mean", {}, EPS),
    ("seq-mean-token-sum-norm", {"max_completion_length": 11}, 1e-12),
]
VERL = [
    *[
        policy(
            f"verl vanilla {reduction}",
            verl("vanilla", reduction=reduction, clip_ratio_high=0.28),
            exact=exact,
            epsilon_high=0.28,
            epsilon_low=0.2,
            dual_clip=3.0,
            reduction=reduction,
            **ours,
        )
        for reduction, ours, exact in VERL_REDUCTIONS
    ],
    policy("verl vanilla token-sum", verl("vanilla", reduction="token-sum"), dual_clip=3.0, num_items_in_batch=1.0),
    policy(
        "verl vanilla over ranks",
        verl("vanilla", batch_info={"dp_size": 2, "batch_num_tokens": 150}),
        dual_clip=3.0,
        num_items_in_batch=75,
    ),
    policy(
        "verl vanilla norm over ranks",
        verl(
            "vanilla",
            reduction="seq-mean-token-sum-norm",
            batch_info={"dp_size": 2, "global_batch_size": 20, "loss_scale_factor": 16},
        ),
        dual_clip=3.0,
        reduction="seq-mean-token-sum-norm",
        num_items_in_batch=10,
        max_completion_length=16,
    ),
    policy(
        "verl vanilla weights",
        verl("vanilla", weights=lambda b: b.entropy),
        dual_clip=3.0,
        weights=lambda b: b.entropy,
    ),
    policy(
        "verl gspo",
        verl("gspo", reduction="seq-mean-token-mean", clip_ratio_low=3e-2, clip_ratio_high=4e-2),
        epsilon_low=3e-2,
        epsilon_high=4e-2,
        importance_sampling_level="sequence-token",
        reduction="seq-mean-token-mean",
        exact=EPS,
    ),
    policy(
        "verl gspo outcomes",
        verl("gspo", advantages="outcome_columns", reduction="seq-mean-token-mean"),
        advantages="outcomes",
        importance_sampling_level="sequence",
        reduction="seq-mean-token-mean",
        exact=EPS,
    ),
    policy(
        "verl cispo",
        verl("cispo", clip_ratio_low=0.3, clip_ratio_high=0.2),
        surrogate="cispo",
        epsilon_low=0.3,
        epsilon_high=0.2,
    ),
    policy(
        "verl sapo",
        verl("sapo"),
        surrogate="sapo",
        tau_positive=1.0,
        tau_negative=1.05,
        reduction="seq-mean-token-mean",
        exact=EPS,
    ),
    policy(
        "verl geo_mean",
        verl("geo_mean", clip_ratio_low=0.3, clip_ratio_high=0.4),
        surrogate="gmpo",
        importance_sampling_level="sequence",
        epsilon_low=0.3,
        epsilon_high=0.4,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
        exact=EPS,
    ),
    policy("verl gpg", verl("gpg"), surrogate="reinforce"),
    policy(
        "verl reinforce",
        verl("reinforce", weights=lambda b: b.entropy, reduction="seq-mean-token-sum"),
        surrogate="reinforce",
        weights=lambda b: b.entropy,
        reduction="seq-mean-token-sum",
    ),
    policy(
        "verl bypass_mode",
        verl(
            "bypass_mode",
            old="sampling_logps",
            policy_loss={
                "rollout_correction": {
                    "loss_type": "ppo_clip",
                    "rollout_rs": "token_k1",
                    "rollout_rs_threshold": "0.7_1.5",
                }
            },
        ),
        old="sampling_logps",  # its dual clip at 3 is beyond what is rejected
        weights=lambda b: kept(b.logps, b.sampling_logps, b.completion_mask, "token", 1 / 1.5, 1 / 0.7),
        num_items_in_batch=lambda b: kept(
            b.logps, b.sampling_logps, b.completion_mask, "token", 1 / 1.5, 1 / 0.7
        ).sum(),
    ),
    policy(
        "verl clip_cov, every candidate",  # the choice among candidates is random in both, so all of them are taken
        verl("clip_cov", policy_loss={"clip_cov_ratio": 1.0}),
        weights=lambda b: rpp.clip_cov_weights(*tensors(b), fraction=1.0),
    ),
    row(
        "verl kl_cov",
        verl("kl_cov", policy_loss={"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.5}),
        lambda b: (
            rpp.policy_loss(*tensors(b), epsilon_low=1.0, epsilon_high=math.inf).loss
            + 0.5
            * rpp.kl_penalty(
                b.logps,
                b.old_logps,
                rpp.kl_cov_mask(b.logps, b.advantages, b.completion_mask, fraction=0.1),
                estimator="abs",
            ).sum()
            / b.completion_mask.sum()
        ),
        wrt=LOGPS,
    ),
    policy(
        "verl vanilla, KL and entropy in the loss",
        lambda b: (
            hosts.verl_policy_loss("vanilla", *tensors(b))
            + 0.1
            * hosts.verl_agg_loss(
                hosts.verl_kl_penalty(b.logps, b.ref_logps, "low_var_kl"), b.completion_mask, "token-mean"
            )
            - 0.05 * hosts.verl_agg_loss(b.entropy, b.completion_mask, "token-mean")
        ),
        dual_clip=3.0,
        ref_logps=lambda b: b.ref_logps,
        beta=0.1,
        kl_estimator="k3",
        kl_clamp=10.0,
        entropy=lambda b: b.entropy,
        entropy_coef=0.05,
        wrt=("logps", "entropy"),
    ),
    policy(
        "verl vanilla, k3+ in the loss",
        lambda b: (
            hosts.verl_policy_loss("vanilla", *tensors(b), reduction="seq-mean-token-mean")
            + 0.1
            * hosts.verl_agg_loss(
                hosts.verl_kl_penalty(b.logps, b.ref_logps, "k3+"), b.completion_mask, "seq-mean-token-mean"
            )
        ),
        dual_clip=3.0,
        ref_logps=lambda b: b.ref_logps,
        beta=0.1,
        kl_estimator="k3",
        kl_clamp=10.0,
        kl_gradient="k2",
        reduction="seq-mean-token-mean",
        exact=EPS,
    ),
]


def kept(old_logps, sampling_logps, mask, level, low, high):
    """1 where `rollout_weights` keeps the token's weight, which is then above 0."""
    weights, _ = rpp.rollout_weights(
        old_logps.detach(), sampling_logps, mask, level=level, outside="mask", low=low, high=high
    )
    return weights.ne(0).to(weights)


def correction(level, mode, low, high):
    return {
        "sampling_logps": lambda b: b.sampling_logps,
        "is_correction_level": level,
        "is_correction_mode": mode,
        "is_correction_threshold": (low, high),
    }


def rollout(level, outside, low, high):
    return lambda b: (
        rpp.rollout_weights(
            b.old_logps, b.sampling_logps, b.completion_mask, level=level, outside=outside, low=low, high=high
        ).weights
    )


def sequence_masked(low, high):
    """Each token's own weight where the geometric mean of its sequence is within bounds."""
    return lambda b: (
        rollout("token", "truncate", 0.0, math.inf)(b)
        * kept(b.old_logps, b.sampling_logps, b.completion_mask, "geometric", low, high)
    )


OPENRLHF = [
    policy("openrlhf ppo", openrlhf(clip_eps_high=0.28), epsilon_low=0.2, epsilon_high=0.28),
    policy(
        "openrlhf ppo for each sequence", openrlhf(token_level_loss=False), reduction="seq-mean-token-mean", exact=EPS
    ),
    policy(
        "openrlhf ppo over ranks",
        openrlhf(batch_info={"dp_size": 2, "batch_num_tokens": 150.0}),
        num_items_in_batch=75,
    ),
    policy(
        "openrlhf ppo for each sequence over ranks",
        openrlhf(token_level_loss=False, batch_info={"dp_size": 2, "global_batch_size": 30.0}),
        reduction="seq-mean-token-mean",
        num_items_in_batch=15,
        exact=EPS,
    ),
    policy("openrlhf dual clip", openrlhf(dual_clip=2.0), dual_clip=2.0),
    policy(
        "openrlhf gspo",
        openrlhf(policy_loss_type="gspo", clip_eps_low=0.03, clip_eps_high=0.04),
        importance_sampling_level="sequence",
        epsilon_low=0.03,
        epsilon_high=0.04,
        reduction="seq-mean-token-mean",
        exact=EPS,
    ),
    policy(
        "openrlhf gspo corrected",
        openrlhf(policy_loss_type="gspo", **correction("token", "mask", 0.5, 5.0)),
        old="sampling_logps",
        importance_sampling_level="sequence",
        reduction="seq-mean-token-mean",
        exact=EPS,
    ),
    *[
        policy(
            f"openrlhf {name}",
            openrlhf(**correction(level, mode, 0.7, 1.5)),
            weights=rollout(ours_level, outside, 0.7, 1.5),
        )
        for name, level, mode, ours_level, outside in [
            ("tis", "token", "clip", "token", "truncate"),
            ("icepop", "token", "mask", "token", "mask"),
        ]
    ],
    policy(
        "openrlhf seq-mask-tis",
        openrlhf(**correction("seq", "mask", 0.9, 1.1)),
        weights=sequence_masked(0.9, 1.1),
    ),
    *[
        policy(
            f"openrlhf ppo, {kind} in the loss",
            lambda b, kind=kind: (
                hosts.openrlhf_policy_loss(*tensors(b))
                + 0.1 * hosts.openrlhf_aggregate(hosts.openrlhf_kl(b.logps, b.ref_logps, kind), b.completion_mask)
            ),
            ref_logps=lambda b: b.ref_logps,
            beta=0.1,
            kl_estimator=kind,
            kl_clamp=10.0,
            exact=None,  # its KL is float32 always
        )
        for kind in ("k2", "k3")
    ],
]

RLOO = {"epsilon_low": 0.2, "epsilon_high": 0.28, "num_items_in_batch": len(GROUP_IDS)}
TRL = [
    policy(
        "trl grpo",
        trl("grpo", epsilon_high=0.28),
        epsilon_low=0.2,
        epsilon_high=0.28,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
    ),
    policy(
        "trl grpo, one advantage a sequence, accumulated",
        trl("grpo", advantages="outcomes", gradient_accumulation_steps=3),
        advantages="outcomes",
        reduction="seq-mean-token-mean",
        num_items_in_batch=lambda b: 3 * sequences(b),
    ),
    policy(
        "trl grpo on policy",
        trl("grpo", old=None, advantages="outcomes"),
        old=None,
        advantages="outcomes",
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
    ),
    policy("trl bnpo", trl("bnpo")),
    policy(
        "trl dr_grpo",
        trl("dr_grpo", max_completion_length=20),
        reduction="seq-mean-token-sum-norm",
        num_items_in_batch=sequences,
        max_completion_length=20,
    ),
    policy(
        "trl dapo",
        trl("dapo", num_items_in_batch=300.0, gradient_accumulation_steps=2, steps_per_generation=8),
        num_items_in_batch=75,
    ),
    policy(
        "trl luspo",
        trl("luspo"),
        reduction="seq-mean-token-sum",
        num_items_in_batch=sequences,
    ),
    policy(
        "trl luspo sequence",
        trl("luspo", advantages="outcomes", importance_sampling_level="sequence"),
        advantages="outcomes",
        importance_sampling_level="sequence",
        reduction="seq-mean-token-sum",
        num_items_in_batch=sequences,
    ),
    policy(
        "trl cispo",  # its epsilon_high is the bound itself, and there is no lower one
        trl("cispo", epsilon_high=1.3, num_items_in_batch=75.0),
        surrogate="cispo",
        epsilon_low=1.0,
        epsilon_high=0.3,
        num_items_in_batch=75,
    ),
    policy(
        "trl sapo",
        trl("sapo"),
        surrogate="sapo",
        tau_positive=1.0,
        tau_negative=1.05,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
        exact=1e-6,  # its temperatures are float32 always
    ),
    policy("trl delta", trl("bnpo", delta=1.5), dual_clip=1.5),
    policy(
        "trl grpo sequence",
        trl("grpo", importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04),
        importance_sampling_level="sequence",
        epsilon_low=0.03,
        epsilon_high=0.04,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
    ),
    policy(
        "trl dapo sequence",
        trl("dapo", advantages="outcomes", importance_sampling_level="sequence", num_items_in_batch=75.0),
        advantages="outcomes",
        importance_sampling_level="sequence",
        num_items_in_batch=75,
    ),
    *[
        policy(
            f"trl bnpo KL {level}{' corrected' * corrected}",
            trl(
                "bnpo",
                importance_sampling_level=level,
                ref_logps=lambda b: b.ref_logps,
                beta=0.1,
                use_bias_correction_kl=corrected,
            ),
            importance_sampling_level=level,
            ref_logps=lambda b: b.ref_logps,
            beta=0.1,
            kl_estimator="k3",
            kl_bias_correction=corrected,
        )
        for level in ("token", "sequence")
        for corrected in (False, True)
    ],
    policy(
        "trl bnpo weights and KL",
        trl("bnpo", weights=lambda b: b.entropy, ref_logps=lambda b: b.ref_logps, beta=0.1),
        weights=lambda b: b.entropy,
        ref_logps=lambda b: b.ref_logps,
        beta=0.1,
    ),
    policy(
        "trl bnpo entropy bonus",
        trl("bnpo", entropy=lambda b: b.entropy, entropy_coef=0.05),
        entropy=lambda b: b.entropy,
        entropy_coef=0.05,
        wrt=("logps", "entropy"),
    ),
    policy(
        "trl bnpo top entropy and KL",
        trl("bnpo", entropy=lambda b: b.entropy, top_entropy_quantile=0.2, ref_logps=lambda b: b.ref_logps, beta=0.1),
        weights=lambda b: rpp.top_entropy_mask(b.entropy, b.completion_mask, fraction=0.2).to(b.logps),
        ref_logps=lambda b: b.ref_logps,
        beta=0.1,
    ),
    row(
        "trl rloo",  # one ratio for each sequence, of the sums: a batch of single tokens
        lambda b: hosts.trl_rloo_loss(*tensors(b, advantages="outcomes"), epsilon_high=0.28),
        lambda b, **changes: (
            rpp.policy_loss(
                torch.where(b.completion_mask, b.logps, 0.0).sum(1, keepdim=True),
                torch.where(b.completion_mask, b.old_logps, 0.0).sum(1, keepdim=True),
                b.outcomes[:, None],
                **RLOO | changes,
            ).loss
        ),
        wrt=LOGPS,
        options=RLOO,
    ),
]

LIGER = [
    liger(
        "grpo",
        liger_grpo("grpo", epsilon_high=0.28),
        epsilon_low=0.2,
        epsilon_high=0.28,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
    ),
    liger("dapo", liger_grpo("dapo")),
    liger("dapo on policy", liger_grpo("dapo", old=None), old=None),
    liger("dapo over ranks", liger_grpo("dapo", num_items_in_batch=75), num_items_in_batch=75),
    liger("bnpo delta", liger_grpo("bnpo", delta=1.5), dual_clip=1.5),
    liger(
        "dr_grpo",
        liger_grpo("dr_grpo", max_completion_length=20),
        reduction="seq-mean-token-sum-norm",
        num_items_in_batch=sequences,
        max_completion_length=20,
    ),
    liger(
        "cispo",
        liger_grpo("cispo", epsilon_high=1.3),
        surrogate="cispo",
        epsilon_low=1.0,
        epsilon_high=0.3,
    ),
    liger(
        "sapo",
        liger_grpo("sapo"),
        surrogate="sapo",
        tau_positive=1.0,
        tau_negative=1.05,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
    ),
    liger(
        "grpo sequence",
        liger_grpo("grpo", importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04),
        importance_sampling_level="sequence",
        epsilon_low=0.03,
        epsilon_high=0.04,
        reduction="seq-mean-token-mean",
        num_items_in_batch=sequences,
    ),
    *[
        liger(
            f"dapo KL {level}{' corrected' * corrected}",
            liger_grpo(
                "dapo",
                importance_sampling_level=level,
                ref_logps=lambda b: b.ref_logps,
                beta=0.1,
                use_bias_correction_kl=corrected,
            ),
            importance_sampling_level=level,
            ref_logps=lambda b: b.ref_logps,
            beta=0.1,
            kl_bias_correction=corrected,
        )
        for level in ("token", "sequence")
        for corrected in (False, True)
    ],
    liger("dapo weights", liger_grpo("dapo", weights=lambda b: b.entropy), weights=lambda b: b.entropy),
]


def value(name, host, *, exact=EPS, **options):
    def ours(batch, **changes):
        arguments = batch.critic, batch.old_values, batch.returns, batch.completion_mask
        return rpp.value_loss(*arguments, **options | changes).loss

    return row(name, host, ours, wrt=("critic",), exact=exact, options=options)


VALUE = [
    *[
        value(
            f"verl value {reduction}",
            lambda b, reduction=reduction: hosts.verl_value_loss(
                b.critic, b.old_values, b.returns, b.completion_mask, epsilon=0.2, reduction=reduction
            ),
            epsilon=0.2,
            reduction=reduction,
            exact=exact,
            **ours,
        )
        for reduction, ours, exact in VERL_REDUCTIONS
    ],
    *[
        value(
            f"openrlhf value {epsilon} {reduction}",
            lambda b, epsilon=epsilon, reduction=reduction: hosts.openrlhf_value_loss(
                b.critic,
                b.old_values,
                b.returns,
                b.completion_mask,
                epsilon=epsilon,
                token_level_loss=reduction == "token-mean",
            ),
            epsilon=epsilon,
            reduction=reduction,
        )
        for epsilon in (0.2, None)
        for reduction in ("token-mean", "seq-mean-token-mean")
    ],
]

POLICY = [*VERL, *OPENRLHF, *TRL]


@cases([*POLICY, *LIGER, *VALUE])
def test_the_host_says_the_same(row, dtype, seed):
    assert distance(row, make(seed, dtype)) <= 1


BOUNDED = ("verl vanilla token-mean", "verl cispo", "verl sapo", "openrlhf dual clip")


@pytest.mark.parametrize("row", [row for row in POLICY if row.id in BOUNDED])
def test_ratios_beyond_what_is_exponentiated(row):
    """verl and OpenRLHF clamp log-ratios to +-20 as we do; TRL and Liger do not."""
    batch = make(dtype=torch.float64)  # in float32 sapo's s (1 - s) cancels
    batch["old_logps"] = batch.logps + 40 * torch.randn(batch.logps.shape, generator=torch.Generator().manual_seed(3))
    assert distance(row, batch) <= 1
