"""The whole way from scores to loss and gradient, as a host goes it and as `rpp.recipe(name, dialect=host)` does."""

import dataclasses
import functools

import hosts
import pytest
import torch
from batches import GROUP_SIZE, make
from compare import Row, distance

import rpp_kernels as rpp

LENGTH = 11  # of the rows of a batch


def ours(host, name, groups, **loss_options):
    def call(b, **changes):
        recipe = rpp.recipe(name, dialect=host, **CHANGES.get((host, name), {}) | changes)
        worth = recipe.advantages(
            b.scores,
            b.completion_mask,
            old_logps=b.old_logps,
            ref_logps=b.ref_logps,
            values=b.old_values,
            greedy_scores=b.baselines,
            max_completion_length=LENGTH,
            **({"group_ids": b.group_ids} if groups == "ids" else {"group_size": GROUP_SIZE}),
        )
        loss = recipe.loss(
            b.logps,
            b.old_logps,
            worth.advantages,
            worth.completion_mask,
            ref_logps=b.ref_logps,
            max_completion_length=LENGTH,
            generator=torch.Generator().manual_seed(0),
            **loss_options,
        ).loss
        return worth.advantages.expand_as(b.logps), loss

    return call


# What a recipe cannot be held to here: a filter that keeps groups of one, a random choice, a price on length; and a KL
# that is off, or a clip range too narrow to be seen.
CHANGES = {
    ("verl", "dapo"): {"sequences": "all", "overlong_buffer": 0.0},
    ("verl", "clip_cov"): {"token_fraction": 1.0},
    ("verl", "kl_cov"): {"token_fraction": 0.1},
    ("verl", "gspo"): {"epsilon_low": 0.03, "epsilon_high": 0.04},
    ("trl", "grpo"): {"beta": 0.04},
}


def verl(estimator, mode="vanilla", *, kl=0.0, options=(), **loss):
    def host(b):
        given = {name: value(b) if callable(value) else value for name, value in dict(options).items()}
        if estimator not in ("gae", "reinforce_plus_plus", "remax"):
            given["group_ids"] = b.group_ids
        advantages, _ = hosts.verl_advantages(estimator, b.score_rewards, b.completion_mask, **given)
        total = hosts.verl_policy_loss(mode, b.logps, b.old_logps, advantages, b.completion_mask, **loss)
        if kl:
            penalty = hosts.verl_kl_penalty(b.logps, b.ref_logps, "low_var_kl")
            total = total + kl * hosts.verl_agg_loss(penalty, b.completion_mask, "token-mean")
        return advantages, total

    return host


MEAN = {"reduction": "seq-mean-token-mean"}
VERL = {
    "ppo": verl("gae", options={"values": lambda b: b.old_values, "gamma": 1.0, "lam": 1.0}),
    "reinforce_pp": verl("reinforce_plus_plus", options={"gamma": 1.0}),
    "reinforce_pp_baseline": verl("reinforce_plus_plus_baseline"),
    "rloo": verl("rloo"),
    "remax": verl("remax", options={"reward_baselines": lambda b: b.baselines}),
    "grpo": verl("grpo", kl=0.001),
    "dr_grpo": verl("grpo", options={"norm_adv_by_std_in_grpo": False}, reduction="seq-mean-token-sum-norm"),
    "dapo": verl("grpo", clip_ratio_high=0.28),
    "opo": verl("opo"),
    "gpg": verl("gpg", "gpg"),
    "gspo": verl("grpo", "gspo", **MEAN, clip_ratio_low=0.03, clip_ratio_high=0.04),
    "cispo": verl("grpo", "cispo"),
    "sapo": verl("grpo", "sapo"),
    "gmpo": verl("grpo", "geo_mean"),
    "clip_cov": verl("grpo", "clip_cov", policy_loss={"clip_cov_ratio": 1.0}),
    "kl_cov": verl("grpo", "kl_cov", policy_loss={"kl_cov_ratio": 0.1}),
}


def openrlhf(estimator, *, k2=False, **loss):
    def host(b):
        kl = torch.where(b.completion_mask, hosts.openrlhf_kl(b.old_logps, b.ref_logps, "k1"), 0.0)
        options = {"values": b.old_values} if estimator == "gae" else {}
        options["group_size"] = 1 if estimator in ("gae", "reinforce") else GROUP_SIZE
        options["beta"] = 0.0 if k2 else 0.01
        advantages, _ = hosts.openrlhf_advantages(estimator, b.scores, kl, b.completion_mask, **options)
        total = hosts.openrlhf_policy_loss(b.logps, b.old_logps, advantages, b.completion_mask, **loss)
        if k2:
            penalty = hosts.openrlhf_kl(b.logps, b.ref_logps, "k2")
            total = total + 1e-5 * hosts.openrlhf_aggregate(penalty, b.completion_mask)
        return advantages, total

    return host


OPENRLHF = {
    "ppo": openrlhf("gae"),
    "reinforce_pp": openrlhf("reinforce"),
    "reinforce_pp_baseline": openrlhf("reinforce_baseline", k2=True),
    "rloo": openrlhf("rloo"),
    "grpo": openrlhf("group_norm"),
    "dr_grpo": openrlhf("dr_grpo"),
    "gspo": openrlhf("group_norm", policy_loss_type="gspo"),
}


def trl(loss_type, *, scale="group", **loss):
    def host(b):
        rollout = hosts.trl_rollout(
            "GRPOTrainer", b.scores, b.old_logps, b.completion_mask, group_size=GROUP_SIZE, scale_rewards=scale
        )
        advantages = rollout["advantages"]
        given = {name: value(b) if callable(value) else value for name, value in loss.items()}
        total = hosts.trl_grpo_loss(loss_type, b.logps, b.old_logps, advantages, b.completion_mask, **given)
        return advantages[:, None].expand_as(b.logps), total

    return host


def trl_rloo(b):
    rollout = hosts.trl_rollout(
        "RLOOTrainer",
        b.scores,
        b.old_logps,
        b.completion_mask,
        group_size=GROUP_SIZE,
        ref_logps=b.ref_logps,
        beta=0.05,
        normalize_advantages=False,
        reward_clip_range=None,
    )
    advantages = rollout["advantages"]
    loss = hosts.trl_rloo_loss(b.logps, b.old_logps, advantages, b.completion_mask)
    empty = ~b.completion_mask.any(1)
    loss = loss + advantages[empty].sum() / len(advantages)  # it counts -A for a sequence without a token
    return advantages[:, None].expand_as(b.logps), loss


def tokens(b):
    return float(b.completion_mask.sum())


TRL = {
    "grpo": trl("grpo", beta=0.04, ref_logps=lambda b: b.ref_logps, use_bias_correction_kl=True),
    "dr_grpo": trl("dr_grpo", scale="none", max_completion_length=LENGTH),
    "dapo": trl("dapo", num_items_in_batch=tokens),
    "gspo": trl("grpo", importance_sampling_level="sequence"),
    "cispo": trl("cispo", epsilon_high=5.0, num_items_in_batch=tokens),
    "sapo": trl("sapo"),
    "rloo": trl_rloo,
}

HOSTS = {"verl": (VERL, "ids"), "openrlhf": (OPENRLHF, "size"), "trl": (TRL, "size")}
# Those whose mean over sequences is one over all, the empty one among them.
OVER_ALL = {("verl", "gmpo"), *(("trl", name) for name in ("grpo", "dr_grpo", "gspo", "sapo", "rloo"))}
NO_HOLES = {("trl", "rloo")}  # RLOO's mask is that of its first tokens
ROWS = [(host, name) for host, (algorithms, _) in HOSTS.items() for name in algorithms]
ROW_NAMES = [f"{host} {name}" for host, name in ROWS]


def far_out(seed, **options):
    """A batch beyond every clamp: log-ratios and KLs of 25, scores of 30, and a group whose scores hardly differ."""
    batch = make(seed, **options)
    batch["scores"] = 10 * batch["scores"]
    batch["scores"][:GROUP_SIZE] = 1 + 1e-2 * batch["outcomes"][:GROUP_SIZE]
    last = torch.where(batch["completion_mask"], torch.arange(LENGTH), -1).amax(1)
    batch["score_rewards"] = torch.zeros_like(batch["logps"])
    batch["score_rewards"][torch.arange(len(last)), last] = batch["scores"]
    for name, at in (("old_logps", 1), ("ref_logps", 2)):
        batch[name][at::4] = batch["logps"][at::4] + 25 * batch["outcomes"][at::4, None].sign()
    return batch


def more(host, name, batch):
    return {"num_items_in_batch": len(batch.logps)} if (host, name) in OVER_ALL else {}


def batches_of(host, name):
    """Numbers within every clamp, and beyond. TRL's RLOO, which clamps nothing, is not finite there."""
    holes = (host, name) not in NO_HOLES
    near = [make(seed, holes=holes) for seed in (0, 1, 2)]
    return near if (host, name) == ("trl", "rloo") else [*near, *(far_out(seed, holes=holes) for seed in (0, 1, 2))]


@pytest.mark.parametrize(("host", "name"), ROWS, ids=ROW_NAMES)
def test_a_dialect_is_what_its_host_computes(host, name):
    algorithms, groups = HOSTS[host]
    for batch in batches_of(host, name):
        call = ours(host, name, groups, **more(host, name, batch))
        assert distance(Row(algorithms[name], call, ("logps",)), batch) <= 1


def test_every_algorithm_of_a_dialect_is_compared():
    for host, (algorithms, _) in HOSTS.items():
        assert set(algorithms) == {n for n in rpp.DIALECTS[host] if rpp.recipe(n).loss_function == "policy"} - {
            "ppo" if host == "trl" else ""  # TRL's PPO is one method of 300 lines, which nothing less than a run calls
        }


# Fields whose change these batches cannot show: an epsilon beside a variance of about 1, and gaps where gamma is 1.
TOO_SMALL = {"whiten_eps_mode", "gap", "dialect"}
# And what another field makes idle: a KL whose beta is 0 and its way through time; a clip after no baseline, or after a
# division by the standard deviation; a clamp beyond the surrogate's own bounds; groups whose scores differ anyway.
IDLE = {
    ("verl", "reinforce_pp_baseline"): {"kl_place", "kl_estimator"},
    ("openrlhf", "ppo"): {"reward_clip_after_baseline"},
    ("openrlhf", "reinforce_pp"): {"reward_clip_after_baseline"},
    ("openrlhf", "reinforce_pp_baseline"): {"time"},
    ("openrlhf", "grpo"): {"reward_clip"},
    ("openrlhf", "gspo"): {"reward_clip"},
    ("trl", "dapo"): {"sequences"},
    ("trl", "cispo"): {"log_ratio_clamp"},
    ("trl", "sapo"): {"log_ratio_clamp"},
    ("trl", "rloo"): {"log_ratio_clamp"},
}


@pytest.mark.parametrize(("host", "name"), ROWS, ids=ROW_NAMES)
def test_a_dialect_without_one_of_its_fields_is_caught(host, name):
    algorithms, groups = HOSTS[host]
    theirs, plain = rpp.recipe(name, dialect=host), rpp.recipe(name)
    batches = batches_of(host, name)
    unseen = TOO_SMALL | IDLE.get((host, name), set()) | CHANGES.get((host, name), {}).keys()
    for field in dataclasses.fields(theirs):
        value = getattr(plain, field.name)
        if field.name not in unseen and value != getattr(theirs, field.name):
            planted = functools.partial(ours(host, name, groups, **more(host, name, batches[0])), **{field.name: value})
            assert caught(Row(algorithms[name], planted, ("logps",)), batches), field.name


def caught(row, batches):
    """A combination that makes no sense is refused, any other has to be seen."""
    try:
        return max(distance(row, batch) for batch in batches) > 1
    except ValueError:
        return True
