"""The steps of a recipe from the scores of a rollout to what each token is worth, each by the public functions."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels.distributed import gathered
from rpp_kernels.ops.advantages import gae, returns, whiten
from rpp_kernels.ops.checks import check_integer, check_like, describe, fail
from rpp_kernels.ops.groups import best_of_group, group_advantages, informative_groups
from rpp_kernels.ops.kl import kl_penalty
from rpp_kernels.ops.reinforce_pp import reinforce_pp_advantages
from rpp_kernels.ops.rewards import normalize_rewards, overlong_penalty, token_rewards
from rpp_kernels.ops.running_mean import RunningMean

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rpp_kernels.recipes.recipe import Recipe

OF_GROUPS = ("mean", "leave-one-out", "length-weighted")  # baselines


def needed(recipe: str, name: str, x: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor):
        fail(name, f"a tensor: the recipe {recipe!r} needs it", describe(x))
    return x


@dataclass(frozen=True)
class Rollout:
    """The arguments of `Recipe.advantages`, and what its steps have made of them."""

    scores: Tensor
    mask: Tensor
    starts: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    values: Tensor | None
    greedy_scores: Tensor | None
    running_mean: RunningMean | None
    groups: dict[str, Any]
    max_completion_length: int | None
    cu_seqlens: Tensor | None
    process_group: "ProcessGroup | None"
    lengths: Tensor  # of the completions, all of them
    worth: Tensor
    kl: Tensor | None = None
    targets: Tensor | None = None

    def but(self, **changes: Any) -> "Rollout":
        return dataclasses.replace(self, **changes)


def kept(recipe: "Recipe", r: Rollout) -> Rollout:
    """The tokens that are trained on."""
    if recipe.sequences == "all":
        return r
    if recipe.sequences == "informative":
        chosen = informative_groups(r.scores, **r.groups)
    else:
        chosen = best_of_group(r.scores, **r.groups) > 0
    return r.but(mask=r.mask & _each_token(chosen, r.starts, r.mask))


def scored(recipe: "Recipe", r: Rollout) -> Rollout:
    """Penalty, z-score, clip and scale."""
    scores = r.scores
    if recipe.overlong_buffer:
        longest = r.max_completion_length
        if longest is None:
            fail("max_completion_length", f"a number of tokens, which {recipe.name!r} penalises from", None)
        check_integer("max_completion_length", longest, "a positive integer", 1)
        buffer = max(round(recipe.overlong_buffer * longest), 1)
        scores = scores + overlong_penalty(r.lengths, max_completion_length=longest, buffer_length=buffer)
    clip = None if recipe.reward_clip_after_baseline else recipe.reward_clip
    if recipe.reward_zscore or clip is not None or recipe.reward_scale != 1:
        scores = normalize_rewards(
            scores, zscore=recipe.reward_zscore, clip=clip, scale=recipe.reward_scale, process_group=r.process_group
        )
    return r.but(scores=scores, worth=scores)


def paid(recipe: "Recipe", r: Rollout) -> Rollout:
    """The KL that is no part of the loss: off the score here, or for later."""
    if not recipe.beta or recipe.kl_place in ("none", "loss"):
        return r
    old, ref = _policies(recipe, r)
    kl = kl_penalty(old, ref, r.mask, estimator=recipe.kl_estimator, kl_clamp=recipe.kl_clamp)
    if recipe.kl_place != "score":
        return r.but(kl=kl)
    return r.but(scores=r.scores - recipe.beta * sequence_sums(kl, r.starts))


def compared(recipe: "Recipe", r: Rollout) -> Rollout:
    """Less the baseline, over the standard deviation."""
    worth = r.scores
    if recipe.baseline in OF_GROUPS:
        worth = group_advantages(
            worth,
            baseline=recipe.baseline,
            lengths=r.lengths if recipe.baseline == "length-weighted" else None,
            std=recipe.std,
            unbiased=recipe.std_unbiased,
            eps=recipe.std_eps,
            singleton=recipe.singleton,
            **r.groups,
        )
    elif recipe.baseline == "greedy":
        greedy = needed(recipe.name, "greedy_scores", r.greedy_scores)
        check_like("greedy_scores", greedy, "scores", r.scores)
        worth = worth - greedy.detach()
    elif recipe.baseline == "running-mean":
        if not isinstance(r.running_mean, RunningMean):
            fail("running_mean", f"a RunningMean, for the baseline of {recipe.name!r}", describe(r.running_mean))
        worth = worth - r.running_mean.mean.to(worth.dtype)
    elif recipe.baseline == "unit":
        worth = torch.ones_like(worth)
    if recipe.reward_clip is not None and recipe.reward_clip_after_baseline:
        worth = worth.clamp(*recipe.reward_clip)
    if recipe.group_scale != "none":
        counted = informative_groups(r.scores, **r.groups) if recipe.group_scale == "informative" else r.scores != 0
        worth = worth * _inverse_share(counted, r.process_group)
    return r.but(worth=worth)


def over_time(recipe: "Recipe", r: Rollout) -> Rollout:
    """From one number for each sequence to one for each token."""
    if recipe.time == "sequence":
        if r.kl is not None and recipe.kl_place == "token":
            return r.but(worth=_each_token(r.worth, r.starts, r.mask) - recipe.beta * r.kl)
        return r.but(worth=r.worth[:, None])
    kl = torch.zeros_like(r.mask, dtype=r.worth.dtype) if r.kl is None else r.kl
    rewards = token_rewards(r.worth, kl, r.mask, beta=recipe.beta, cu_seqlens=r.cu_seqlens)
    if recipe.time == "returns":
        worth = returns(rewards, r.mask, gamma=recipe.gamma, gap=recipe.gap, cu_seqlens=r.cu_seqlens)
        return r.but(worth=worth)
    values = needed(recipe.name, "values", r.values).detach()
    worth, targets = gae(
        rewards,
        values,
        r.mask,
        gamma=recipe.gamma,
        gae_lambda=recipe.gae_lambda,
        gap=recipe.gap,
        cu_seqlens=r.cu_seqlens,
    )
    return r.but(worth=worth, targets=targets)


def fused(recipe: "Recipe", r: Rollout) -> Rollout:
    """`paid`, `over_time` and `whitened` in one, for the REINFORCE++ of the paper."""
    beta = recipe.beta if recipe.kl_place == "reward" else 0.0
    old, ref = _policies(recipe, r) if beta else (torch.zeros_like(r.mask, dtype=r.worth.dtype), None)
    worth = reinforce_pp_advantages(
        r.worth,
        old,
        ref,
        r.mask,
        beta=beta,
        gamma=recipe.gamma,
        kl_estimator=recipe.kl_estimator,
        kl_clamp=recipe.kl_clamp,
        eps=recipe.whiten_eps,
        cu_seqlens=r.cu_seqlens,
        process_group=r.process_group,
    )
    return r.but(worth=worth)


def _policies(recipe: "Recipe", r: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs of the policy that sampled and of the reference."""
    old, ref = needed(recipe.name, "old_logps", r.old_logps), needed(recipe.name, "ref_logps", r.ref_logps)
    return old.detach(), ref.detach()


def whitened(recipe: "Recipe", r: Rollout) -> Rollout:
    if recipe.whiten == "none":
        return r
    worth, mask = r.worth, None
    if recipe.whiten == "tokens":
        mask = r.mask
        if worth.shape != mask.shape:
            worth = _each_token(worth[:, 0], r.starts, mask)
    worth = whiten(
        worth,
        mask,
        unbiased=recipe.whiten_unbiased,
        eps=recipe.whiten_eps,
        eps_mode=recipe.whiten_eps_mode,
        process_group=r.process_group,
    )
    return r.but(worth=worth)


def sequence_sums(x: Tensor, starts: Tensor) -> Tensor:
    """(B,): the sum over each sequence of what is 0 where masked."""
    lengths = starts.diff()  # not differences of one cumulative sum, which an infinity would outlive
    rows = torch.arange(lengths.shape[0], device=x.device).repeat_interleave(lengths, output_size=x.numel())
    return lengths.new_zeros(lengths.shape, dtype=torch.float64).index_add(0, rows, x.reshape(-1).double()).to(x.dtype)


def _each_token(x: Tensor, starts: Tensor, like: Tensor) -> Tensor:
    """One for each sequence as one for each token, in the shape of `like`."""
    return x.repeat_interleave(starts.diff(), output_size=like.numel()).view(like.shape)


def _inverse_share(counted: Tensor, process_group: "ProcessGroup | None") -> Tensor:
    """How many sequences there are for each that is counted."""
    sums = torch.stack([torch.ones_like(counted).sum(), counted.sum()])
    if process_group is not None:
        sums = gathered(sums, process_group).sum(0)
    return sums[0] / sums[1].clamp(min=1)
