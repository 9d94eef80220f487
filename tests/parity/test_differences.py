"""Where a host means something else by the same name: the obvious call of ours is not what it computes.

The other files say what is. A host that changes its mind fails here, and the dialects have to follow.
"""

import hosts
import pytest
import torch
from batches import GROUP_SIZE, make
from compare import distance, row
from test_policy_losses import openrlhf, policy, trl, verl

import rpp_kernels as rpp

SHOWS = 5.0


def openrlhf_returns(**options):
    return lambda b: hosts.openrlhf_advantages("dr_grpo", b.scores, b.kl, b.completion_mask, **options)[1]


def returns(scores, batch):
    return rpp.returns(rpp.token_rewards(scores, batch.kl, batch.completion_mask, beta=0.1), batch.completion_mask)


DIFFERENT = [
    policy("verl vanilla has a dual clip at 3", verl("vanilla")),
    policy(
        "verl sapo is a mean over sequences whatever is asked for",
        verl("sapo", reduction="token-mean"),
        surrogate="sapo",
    ),
    policy(
        "verl geo_mean counts empty sequences",
        verl("geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4),
        surrogate="gmpo",
        importance_sampling_level="sequence",
        reduction="seq-mean-token-mean",
    ),
    policy(
        "trl cispo's epsilon_high is the bound itself",
        trl("cispo", epsilon_high=1.3),
        surrogate="cispo",
        epsilon_high=1.3,
    ),
    policy("trl grpo counts empty sequences", trl("grpo"), reduction="seq-mean-token-mean"),
    policy("trl delta below 1 + epsilon_high also bounds gains", trl("bnpo", delta=1.1), dual_clip=1.1),
    policy(
        "trl's entropy bonus is a mean over its own tokens",
        trl("dapo", num_items_in_batch=75.0, entropy=lambda b: b.entropy, entropy_coef=0.5),
        num_items_in_batch=75,
        entropy=lambda b: b.entropy,
        entropy_coef=0.5,
    ),
    policy(
        "openrlhf gspo corrected ignores the old policy",
        openrlhf(policy_loss_type="gspo", is_correction_level="token", sampling_logps=lambda b: b.sampling_logps),
        importance_sampling_level="sequence",
        reduction="seq-mean-token-mean",
    ),
    row(
        "verl grpo keeps the score of a group of one",
        lambda b: hosts.verl_advantages("grpo", b.score_rewards, b.completion_mask, group_ids=b.group_ids)[0],
        lambda b: rpp.group_advantages(b.scores, group_ids=b.group_ids, std="group")[:, None].expand_as(b.logps),
    ),
    row(
        "openrlhf clips the reward after its baseline",
        openrlhf_returns(group_size=GROUP_SIZE, beta=0.1, clip=(-1.0, 1.0)),
        lambda b: returns(rpp.group_advantages(b.scores.clamp(-1, 1), group_size=GROUP_SIZE), b),
    ),
    row(
        "openrlhf gae passes through holes as steps of value 0",
        lambda b: hosts.openrlhf_advantages(
            "gae", b.scores, b.kl, b.completion_mask, gamma=0.97, gae_lambda=0.9, values=b.old_values
        )[1],
        lambda b: (
            rpp.gae(
                rpp.token_rewards(b.scores, b.kl, b.completion_mask, beta=0.0),
                b.old_values,
                b.completion_mask,
                gamma=0.97,
                gae_lambda=0.9,
            ).returns
        ),
    ),
    row(
        "openrlhf's unbiased k2 has a gradient beyond its clamp",
        lambda b: hosts.openrlhf_kl(40 * b.logps, 40 * b.ref_logps, "k2", unbiased_gradient=True),
        lambda b: rpp.kl_penalty(
            40 * b.logps, 40 * b.ref_logps, b.completion_mask, estimator="k2", gradient="k2", kl_clamp=10.0
        ),
        wrt=("logps",),
    ),
    row(
        "liger luspo sums tokens under the mask",
        lambda b: hosts.liger_grpo_loss(
            "luspo", b.hidden_states, b.weight, b.target_ids, b.old_logps, b.outcomes, b.completion_mask, bias=b.bias
        ),
        lambda b: hosts.trl_grpo_loss("luspo", b.logps, b.old_logps, b.outcomes, b.completion_mask),
    ),
]


@pytest.mark.parametrize("row", DIFFERENT)
def test_the_host_differs(row):
    assert distance(row, make()) > SHOWS


def test_a_hole_is_no_step_of_time_in_verl_and_one_in_openrlhf():
    """Rewards 0, 0, 1 with a hole in the middle, discounted by a half."""
    mask = torch.tensor([[True, False, True]])
    rewards, scores = torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1)
    _, carried = hosts.verl_advantages("reinforce_plus_plus", rewards, mask, gamma=0.5)
    _, stepped = hosts.openrlhf_advantages("reinforce", scores, torch.zeros(1, 3), mask, gamma=0.5)
    assert carried[mask].tolist() == [0.5, 1.0]
    assert stepped[mask].tolist() == [0.25, 1.0]
    assert rpp.returns(rewards, mask, gamma=0.5)[mask].tolist() == [0.5, 1.0]
