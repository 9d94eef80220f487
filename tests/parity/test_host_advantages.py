"""Advantages of the hosts: baselines over groups, returns, normalisation. Compared where the mask has a token."""

import hosts
import torch
from batches import GROUP_SIZE, make
from compare import cases, distance, row

import rpp_kernels as rpp

# verl: rsqrt(var + 1e-8) with Bessel's correction, and means over n + 1e-8 tokens.
VERL_WHITEN = {"unbiased": True, "eps": 1e-8, "eps_mode": "add_var"}
EPS = 1e-7


def columns(outcomes, batch):
    """One number for each sequence, at each of its tokens."""
    return outcomes[:, None].expand_as(batch.logps)


def verl(estimator, **options):
    return lambda b: hosts.verl_advantages(
        estimator, b.score_rewards, b.completion_mask, group_ids=b.group_ids, **options
    )[0]


def group(**options):
    """`group_advantages` of the batch's own groups, of one to four sequences."""
    return lambda b, **changes: columns(rpp.group_advantages(b.scores, group_ids=b.group_ids, **options | changes), b)


def whitened_returns(batch, **changes):
    returns = rpp.returns(batch.rewards, batch.completion_mask, gamma=0.9)
    return rpp.whiten(returns, batch.completion_mask, **VERL_WHITEN | changes), returns


def whitened_gae(batch, **changes):
    advantages, returns = rpp.gae(batch.rewards, batch.old_values, batch.completion_mask, gamma=0.97, gae_lambda=0.9)
    return rpp.whiten(advantages, batch.completion_mask, **VERL_WHITEN | changes), returns


def whitened_group(batch, **changes):
    centered = columns(rpp.group_advantages(batch.scores, group_ids=batch.group_ids, singleton="keep"), batch)
    return rpp.whiten(centered, batch.completion_mask, **VERL_WHITEN | changes)


def some_scores(batch):
    """Scores of which some are 0: GPG counts the others."""
    return torch.where(batch.outcomes > 0, batch.scores, 0.0)


def gpg(batch):
    scores = some_scores(batch)
    alpha = len(scores) / scores.count_nonzero()
    return columns(alpha * rpp.group_advantages(scores, group_ids=batch.group_ids, singleton="keep"), batch)


VERL = [
    row(
        "verl gae",
        lambda b: hosts.verl_advantages("gae", b.rewards, b.completion_mask, values=b.old_values, gamma=0.97, lam=0.9),
        whitened_gae,
        exact=EPS,
        options=VERL_WHITEN,
    ),
    row(
        "verl reinforce_plus_plus",  # since 0.9 the return is carried over holes in the mask, as ours
        lambda b: hosts.verl_advantages("reinforce_plus_plus", b.rewards, b.completion_mask, gamma=0.9),
        whitened_returns,
        exact=EPS,
        options=VERL_WHITEN,
    ),
    row(
        "verl reinforce_plus_plus_baseline",
        verl("reinforce_plus_plus_baseline"),
        whitened_group,
        exact=EPS,
        options=VERL_WHITEN,
    ),
    row(
        "verl grpo",
        verl("grpo"),
        group(std="group", singleton="keep"),
        exact=2e-6,  # a group of one keeps its score, but over 1 + 1e-6
        options={"unbiased": True},
    ),
    row("verl grpo without std", verl("grpo", norm_adv_by_std_in_grpo=False), group(singleton="keep")),
    row(
        "verl grpo_vectorized",
        verl("grpo_vectorized"),
        group(std="group", singleton="keep"),
        exact=None,
        options={"unbiased": True},
    ),
    row("verl rloo", verl("rloo"), group(baseline="leave-one-out", singleton="keep")),
    row("verl rloo_vectorized", verl("rloo_vectorized"), group(baseline="leave-one-out")),
    row(
        "verl opo",
        verl("opo"),
        lambda b: columns(
            rpp.group_advantages(
                b.scores,
                group_ids=b.group_ids,
                baseline="length-weighted",
                lengths=b.completion_mask.sum(1),
                singleton="keep",
            ),
            b,
        ),
    ),
    row(
        "verl gpg",
        lambda b: hosts.verl_advantages(
            "gpg", columns(some_scores(b) / b.logps.shape[1], b), b.completion_mask, group_ids=b.group_ids
        )[0],
        gpg,
    ),
    row(
        "verl remax",
        lambda b: hosts.verl_advantages(
            "remax", b.score_rewards - 0.1 * b.kl, b.completion_mask, reward_baselines=b.baselines
        )[0],
        lambda b: rpp.returns(
            rpp.token_rewards(b.scores - b.baselines, b.kl, b.completion_mask, beta=0.1), b.completion_mask
        ),
    ),
]


def openrlhf(estimator, **options):
    """Clipped at +-1.5, so that it shows that the clip acts on the scores without their baseline."""
    options = {"group_size": GROUP_SIZE, "beta": 0.1, "clip": (-1.5, 1.5)} | options
    return lambda b: hosts.openrlhf_advantages(estimator, b.scores, b.kl, b.completion_mask, **options)


def clipped_returns(batch, advantages, **options):
    rewards = rpp.token_rewards(advantages.clamp(-1.5, 1.5), batch.kl, batch.completion_mask, beta=0.1)
    return rpp.returns(rewards, batch.completion_mask, **options)


def grouped(**group_options):
    def ours(batch):
        returns = clipped_returns(batch, rpp.group_advantages(batch.scores, group_size=GROUP_SIZE, **group_options))
        return returns, returns

    return ours


def gae_of_scores(batch, **options):
    rewards = rpp.token_rewards(batch.scores.clamp(-1.5, 1.5), batch.kl, batch.completion_mask, beta=0.1)
    return rpp.gae(rewards, batch.old_values, batch.completion_mask, gamma=0.97, gae_lambda=0.9, **options)


def whitened(batch, advantages, returns=None, **changes):
    """Population variance, floored at 1e-8: the defaults of `whiten`."""
    whitened = rpp.whiten(advantages, batch.completion_mask, **changes)
    return whitened, advantages if returns is None else returns


OPENRLHF = [
    row(
        "openrlhf reinforce",
        openrlhf("reinforce", group_size=1),
        lambda b, **changes: whitened(b, clipped_returns(b, b.scores), **changes),
        exact=None,  # its statistics are float32 always
        options={"unbiased": False},
    ),
    row(
        "openrlhf reinforce discounted",  # a hole in the mask is a step of time
        openrlhf("reinforce", group_size=1, gamma=0.9),
        lambda b, **changes: whitened(b, clipped_returns(b, b.scores, gamma=0.9, gap="step"), **changes),
        exact=None,
        options={"unbiased": False},
    ),
    row(
        "openrlhf reinforce discounted, no holes",
        openrlhf("reinforce", group_size=1, gamma=0.9),
        lambda b, **changes: whitened(b, clipped_returns(b, b.scores, gamma=0.9), **changes),
        exact=None,
        options={"unbiased": False},
        holes=False,
    ),
    row(
        "openrlhf reinforce as reinforce_pp_advantages",
        lambda b: hosts.openrlhf_advantages(
            "reinforce",
            b.scores,
            torch.where(b.completion_mask, hosts.openrlhf_kl(b.old_logps, b.ref_logps, "k1"), 0.0),
            b.completion_mask,
            beta=0.1,
        )[0],
        lambda b: rpp.reinforce_pp_advantages(
            b.scores.clamp(-10, 10), b.old_logps, b.ref_logps, b.completion_mask, beta=0.1, kl_clamp=10.0
        ),
        exact=None,
    ),
    row(
        "openrlhf reinforce_baseline",
        openrlhf("reinforce_baseline"),
        lambda b, **changes: whitened(
            b, clipped_returns(b, rpp.group_advantages(b.scores, group_size=GROUP_SIZE)), **changes
        ),
        exact=None,
        options={"unbiased": False},
    ),
    row("openrlhf rloo", openrlhf("rloo"), grouped(baseline="leave-one-out")),
    row("openrlhf dr_grpo", openrlhf("dr_grpo"), grouped()),
    row("openrlhf group_norm", openrlhf("group_norm"), grouped(std="group", eps=1e-9)),
    row(
        "openrlhf flash_reinforce",  # one group: the whole batch
        openrlhf("flash_reinforce"),
        lambda b: (clipped_returns(b, rpp.group_advantages(b.scores, group_size=len(b.scores))),) * 2,
    ),
    row(
        "openrlhf gae",  # a hole in the mask is a step of time with a value of 0
        lambda b: openrlhf("gae", group_size=1, gamma=0.97, gae_lambda=0.9, values=b.old_values)(b),
        lambda b, **changes: whitened(b, *gae_of_scores(b, gap="step"), **changes),
        exact=None,
        options={"unbiased": False},
    ),
    row(
        "openrlhf gae, no holes",
        lambda b: openrlhf("gae", group_size=1, gamma=0.97, gae_lambda=0.9, values=b.old_values)(b),
        lambda b, **changes: whitened(b, *gae_of_scores(b), **changes),
        exact=None,
        options={"unbiased": False},
        holes=False,
    ),
]


def trl(trainer, **options):
    return lambda b: hosts.trl_rollout(
        trainer,
        b.scores,
        b.old_logps,
        b.completion_mask,
        group_size=GROUP_SIZE,
        **{name: option(b) if callable(option) else option for name, option in options.items()},
    )["advantages"]


def rloo(batch):
    kl = rpp.kl_penalty(batch.old_logps, batch.ref_logps, batch.completion_mask).sum(1)
    rewards = batch.scores.clamp(-1.5, 1.5) - 0.1 * kl
    return rpp.group_advantages(rewards, group_size=GROUP_SIZE, baseline="leave-one-out")


RLOO = {"ref_logps": lambda b: b.ref_logps, "beta": 0.1, "reward_clip_range": (-1.5, 1.5)}
TRL = [
    *[
        row(
            f"trl grpo scaled by {std}",
            trl("GRPOTrainer", scale_rewards=std),
            lambda b, std=std, **changes: rpp.group_advantages(
                b.scores, group_size=GROUP_SIZE, std=std, eps=1e-4, **changes
            ),
            exact=EPS,  # Bessel's correction is float32 always
            options=None if std == "none" else {"unbiased": True},
        )
        for std in ("group", "batch", "none")
    ],
    row("trl rloo", trl("RLOOTrainer", normalize_advantages=False, **RLOO), rloo, holes=False),
    row(
        "trl rloo normalised",  # over sequences, where the others are over tokens
        trl("RLOOTrainer", normalize_advantages=True, **RLOO),
        lambda b, **changes: rpp.whiten(rloo(b), **{"unbiased": True, "eps": 1e-4, "eps_mode": "add_std"} | changes),
        exact=EPS,
        options={"unbiased": True},
        holes=False,
    ),
]

ADVANTAGES = [*VERL, *OPENRLHF, *TRL]


@cases(ADVANTAGES)
def test_the_host_has_the_same(row, dtype, seed):
    assert distance(row, make(seed, dtype, holes=row.holes)) <= 1
