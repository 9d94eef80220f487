"""An algorithm as a point on independent axes, and how it turns a rollout into advantages and a loss."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rpp_kernels.ops.advantages import EPS_MODES, GAPS
from rpp_kernels.ops.checks import (
    check_choice,
    check_floats,
    check_number,
    check_shape,
    describe,
    fail,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.ops.groups import STDS
from rpp_kernels.ops.kl import ESTIMATORS
from rpp_kernels.ops.linear_policy_loss import linear_policy_loss
from rpp_kernels.ops.policy_loss import (
    LEVELS,
    OPTIONS,
    REDUCTIONS,
    SURROGATES,
    WITHOUT_KL,
    PolicyOptions,
    check_options,
    policy_loss,
)
from rpp_kernels.ops.preference import LOSS_TYPES, copg_loss, dpo_loss
from rpp_kernels.ops.rollout import rollout_weights
from rpp_kernels.ops.running_mean import RunningMean
from rpp_kernels.ops.selection import clip_cov_weights, kl_cov_mask, top_entropy_mask
from rpp_kernels.recipes import steps
from rpp_kernels.recipes.steps import OF_GROUPS, needed
from rpp_kernels.reference import CoPGLoss, LinearPolicyLoss, PolicyLoss, PreferenceLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Worth(NamedTuple):
    """What `Recipe.advantages` makes of a rollout: constants for its loss.

    `advantages`: one for each token, or (B, 1). `completion_mask`: the tokens that are trained on, which are not those
    of sequences that the recipe leaves out. `scores`: (B,) after penalties, clip and KL, before the baseline: what a
    `RunningMean` is of. `returns`: the critic's targets, where there is a critic.
    """

    advantages: Tensor
    completion_mask: Tensor
    scores: Tensor
    returns: Tensor | None


_CHOICES: dict[str, Sequence[Any]] = {
    "sequences": ("all", "informative", "best"),
    "baseline": ("none", *OF_GROUPS, "greedy", "running-mean", "critic", "unit"),
    "group_scale": ("none", "informative", "nonzero-scores"),
    "time": ("sequence", "returns", "gae"),
    "whiten": ("none", "tokens", "sequences"),
    "kl_place": ("none", "score", "reward", "token", "loss"),
    "loss_function": ("policy", "dpo", "copg"),
    "std": tuple(STDS),
    "singleton": ("zero", "keep"),
    "gap": tuple(GAPS),
    "whiten_eps_mode": tuple(EPS_MODES),
    "kl_estimator": tuple(ESTIMATORS)[1:],
    "kl_gradient": (None, *ESTIMATORS),
    "surrogate": tuple(SURROGATES),
    "importance_sampling_level": LEVELS,
    "reduction": REDUCTIONS,
    "preference": tuple(LOSS_TYPES),
    "token_selection": ("none", "top-entropy", "clip-cov", "kl-cov"),
    "rollout_level": ("none", "token", "sequence", "geometric"),
    "rollout_mask": ("none", "token", "sequence", "geometric"),
}


_OF_KL = tuple(WITHOUT_KL)
# What a recipe is called: no axis.
NAMING = ("name", "paper", "equation", "dialect")
INFINITY = float("inf")
_POSITIVE, _FROM_0 = ("a positive number", 0, INFINITY, True), ("a number from 0", 0, INFINITY, False)
_RANGES = {
    "reward_scale": ("a positive finite number", 0, 1e30, True),
    "overlong_buffer": ("a share of max_completion_length, from 0 to 1", 0, 1, False),
    "std_eps": _POSITIVE,
    "gamma": ("a number from 0 to 1", 0, 1, False),
    "gae_lambda": ("a number from 0 to 1", 0, 1, False),
    "whiten_eps": _POSITIVE,
    "kl_clamp": _POSITIVE,
    "beta": ("a finite number from 0", 0, 1e30, False),
    "token_fraction": ("a share of the tokens, above 0 and up to 1", 0, 1, True),
    "rollout_low": _FROM_0,
    "rollout_high": _POSITIVE,
    "rollout_mask_low": _FROM_0,
    "rollout_mask_high": _POSITIVE,
}


@dataclass(frozen=True)
class Recipe:
    """An algorithm as a point on independent axes. Every field may be overridden: `recipe("rloo", beta=0.1)`."""

    name: str = ""
    paper: str = ""
    equation: str = ""
    dialect: str = ""

    # ---- rewards
    reward_zscore: bool = False
    """Scores are whitened over the batch first."""
    reward_clip: tuple[float, float] | None = None
    """Scores are clipped to this."""
    reward_clip_after_baseline: bool = False
    reward_scale: float = 1.0
    overlong_buffer: float = 0.0
    """Share of max_completion_length at whose end a completion is penalised for its length (`overlong_penalty`)."""

    # ---- advantage
    sequences: str = "all"
    """Which sequences are trained on: "all", "informative" (of groups whose scores differ), "best" (of its group)."""
    baseline: str = "none"
    """What is taken off a score: "none", "mean", "leave-one-out" or "length-weighted" of its group, the score of the
    "greedy" completion, the "running-mean" of training, the "critic"'s values; or "unit": every advantage is 1."""
    std: str = "none"
    """What it is divided by: "none", or that of the "group", of the "batch", "leave-one-out"."""
    std_unbiased: bool = True
    std_eps: float = 1e-6
    singleton: str = "zero"
    """Advantage of a group of one: "zero", or "keep" its score."""
    group_scale: str = "none"
    """Advantages times B / n, n the sequences of "informative" groups, or those with "nonzero-scores"; or "none"."""
    time: str = "sequence"
    """How tokens get theirs: all that of their "sequence"; the "returns" of token rewards; "gae"."""
    gamma: float = 1.0
    gae_lambda: float = 1.0
    gap: str = "carry"
    """What a hole in the mask does to a return (`returns`)."""
    whiten: str = "none"
    """Normalisation over all valid "tokens" of the batch, or over its "sequences"."""
    whiten_unbiased: bool = False
    whiten_eps: float = 1e-8
    whiten_eps_mode: str = "floor"

    # ---- KL to the reference policy
    kl_place: str = "none"
    """Where it is paid. "score": its sum over the sequence, off the score and so part of the baseline; "reward": each
    token's, part of the return; "token": each token's, off its own advantage alone; "loss"; or "none"."""
    kl_estimator: str = "k1"
    kl_gradient: str | None = None
    kl_clamp: float | None = None
    kl_bias_correction: bool = False
    beta: float = 0.0

    # ---- loss
    loss_function: str = "policy"
    """`policy_loss` for "policy"; and for preferences `dpo_loss` for "dpo", `copg_loss` for "copg"."""
    surrogate: str = "clip"
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    dual_clip: float | None = None
    tau_positive: float | None = None
    tau_negative: float | None = None
    importance_sampling_level: str = "token"
    log_ratio_clamp: float = 20.0
    reduction: str = "token-mean"
    preference: str = "sigmoid"
    """loss_type of `dpo_loss`."""
    length_normalized: bool = False
    """Log-ratios of a preference are means over tokens, not sums."""

    # ---- extras
    entropy_coef: float = 0.0
    token_selection: str = "none"
    """Tokens chosen by "top-entropy", whose surrogate alone counts; by "clip-cov", whose surrogate does not count; by
    "kl-cov", which alone pay KL, to the old policy; or "none"."""
    token_fraction: float = 1.0
    """The share of tokens chosen."""
    rollout_level: str = "none"
    """Importance weights against the rollout engine (`rollout_weights`): of the "token", the "sequence", its
    "geometric" mean; or "none"."""
    rollout_low: float = 0.0
    rollout_high: float = 2.0
    """Weights are truncated to [rollout_low, rollout_high]."""
    rollout_mask: str = "none"
    """Level of the weight whose tokens do not count outside of [rollout_mask_low, rollout_mask_high]."""
    rollout_mask_low: float = 0.5
    rollout_mask_high: float = 5.0

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        for field, (wanted, low, high, open_low) in _RANGES.items():
            if getattr(self, field) is not None:
                check_number(field, getattr(self, field), wanted, low, high, open_low=open_low)
        for reason, wrong in {
            'kl_place: "reward" needs returns or gae': self.kl_place == "reward" and self.time == "sequence",
            'kl_place: "token" needs time "sequence"': self.kl_place == "token" and self.time != "sequence",
            'baseline: "critic" and time "gae" go together': (self.baseline == "critic") != (self.time == "gae"),
            'kl_bias_correction: needs kl_place "loss"': self.kl_bias_correction and self.kl_place != "loss",
            "std: needs the baseline of a group": self.std != "none" and self.baseline not in OF_GROUPS,
            'whiten: "sequences" needs time "sequence"': self.whiten == "sequences" and self.time != "sequence",
            "beta: a loss of preferences needs a positive one": self.loss_function != "policy" and not self.beta,
        }.items():
            if wrong:
                raise ValueError(f"{reason}, in the recipe {self.name!r}")
        in_loss = self._pays_in_loss
        if self.loss_function == "policy":
            options: dict[str, Any] = {name: getattr(self, name) for name in PolicyOptions._fields}
            check_options(PolicyOptions(**(options if in_loss else options | WITHOUT_KL)), in_loss)

    @property
    def idle(self) -> dict[str, str]:
        """Fields that have no effect where the others stand, and why."""
        off = {
            "no KL is paid: kl_place is 'none'": ("kl_place", "none", _OF_KL),
            "the KL is not in the loss": ("kl_place", "score reward token", ("kl_gradient", "kl_bias_correction")),
            "time is 'sequence'": ("time", "sequence", ("gamma", "gap")),
            "time is not 'gae'": ("time", "sequence returns", ("gae_lambda",)),
            "std is 'none'": ("std", "none", ("std_unbiased", "std_eps")),
            "the baseline is not one of groups": (
                "baseline",
                "none greedy running-mean critic unit",
                ("singleton",),
            ),
            "every advantage is 1": (
                "baseline",
                "unit",
                ("reward_zscore", "reward_clip", "reward_scale", "overlong_buffer"),
            ),
            "whiten is 'none'": ("whiten", "none", ("whiten_unbiased", "whiten_eps", "whiten_eps_mode")),
            "token_selection is 'none'": ("token_selection", "none", ("token_fraction",)),
            "rollout_level is 'none'": ("rollout_level", "none", ("rollout_low", "rollout_high")),
            "rollout_mask is 'none'": ("rollout_mask", "none", ("rollout_mask_low", "rollout_mask_high")),
        }
        idle = {
            name: reason
            for reason, (field, values, names) in off.items()
            if getattr(self, field) in values.split()
            for name in names
        }
        preferences = {"dpo": ("preference", "length_normalized"), "copg": (), "policy": ()}[self.loss_function]
        if self.loss_function == "policy":
            return idle | dict.fromkeys(("preference", "length_normalized"), "it is not a loss of preferences")
        used = (*NAMING, "beta", "loss_function", *preferences)
        others = [field.name for field in dataclasses.fields(self) if field.name not in used]
        return dict.fromkeys(
            others, f"it is a loss of preferences, whose options are {', '.join(('beta', *preferences))}"
        )

    @property
    def _pays_in_loss(self) -> bool:
        return self.kl_place == "loss" and self.beta > 0

    @property
    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of `policy_loss` and `linear_policy_loss` that are constants of this recipe.

        The tensors that belong to it, `loss` and `linear_loss` add: `ref_logps`, `entropy` and token weights.
        """
        self._want_loss("policy")
        options: dict[str, Any] = {
            "surrogate": self.surrogate,
            "importance_sampling_level": self.importance_sampling_level,
            "log_ratio_clamp": self.log_ratio_clamp,
            "reduction": self.reduction,
        }
        options |= {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        if self._pays_in_loss:
            options |= {name: getattr(self, name) for name in _OF_KL}
        if self.entropy_coef:
            options["entropy_coef"] = self.entropy_coef
        return options

    # ------------------------------------------------------------ from scores to advantages

    def advantages(
        self,
        scores: Tensor,  # (B,)
        completion_mask: Tensor,  # (B, S) or (T,) bool
        *,
        old_logps: Tensor | None = None,  # (B, S) or (T,)
        ref_logps: Tensor | None = None,  # same
        values: Tensor | None = None,  # same
        greedy_scores: Tensor | None = None,  # (B,)
        running_mean: RunningMean | None = None,
        group_size: int | None = None,
        group_ids: Tensor | None = None,  # (B,) int64
        max_completion_length: int | None = None,
        cu_seqlens: Tensor | None = None,  # (B+1,)
        process_group: "ProcessGroup | None" = None,
    ) -> Worth:
        """What each token of a rollout is worth, by the public functions in this order:

        1. `overlong_penalty`, and z-score, clip and scale of the scores (`normalize_rewards`);
        2. for kl_place "score": beta times the KL of the sequence is taken off;
        3. the baseline, and the division by a standard deviation (`group_advantages`);
        4. `token_rewards` with the tokens' KL, then `returns` or `gae`;
        5. `whiten`.

        Args:
            scores: one for each sequence.
            completion_mask: bool: which tokens there are.
            old_logps, ref_logps: for a KL that is not in the loss.
            values: the critic's.
            greedy_scores: of the greedy completion of each sequence's prompt.
            running_mean: of all scores before this batch.
            group_size, group_ids: which sequences are samples of one prompt, as in `group_advantages`.
            max_completion_length: for the length penalty.
            cu_seqlens: int32 or int64, where sequences start among packed tokens; without it tokens are padded (B, S).
            process_group: statistics are those of the batches of all its ranks.

        All are constants. Tensors that the recipe has no use for are left alone, so one call serves all recipes.

        Raises:
            ValueError: something that the recipe needs is missing, or an argument is not as above.
        """
        self._want_loss("policy")
        if not isinstance(completion_mask, Tensor) or completion_mask.dtype != torch.bool:
            fail("completion_mask", "a bool tensor", describe(completion_mask))
        starts = sequence_starts(completion_mask, "completion_mask", cu_seqlens)
        check_floats("scores", scores, (1,), like=completion_mask)
        check_shape("scores", scores, (starts.shape[0] - 1,), "of one for each sequence")
        rollout = steps.Rollout(
            scores=scores.detach().to(result_dtype(scores)),
            mask=completion_mask,
            starts=starts,
            old_logps=old_logps,
            ref_logps=ref_logps,
            values=values,
            greedy_scores=greedy_scores,
            running_mean=running_mean,
            groups={"group_size": group_size, "group_ids": group_ids, "process_group": process_group},
            max_completion_length=max_completion_length,
            cu_seqlens=cu_seqlens,
            process_group=process_group,
            lengths=steps.sequence_sums(completion_mask.long(), starts),
            worth=scores,
        )
        chain = (
            (steps.compared, steps.fused)
            if self._is_fused
            else (steps.paid, steps.compared, steps.over_time, steps.whitened)
        )
        for step in (steps.kept, steps.scored, *chain):
            rollout = step(self, rollout)
        return Worth(rollout.worth, rollout.mask, rollout.scores, rollout.targets)

    # ------------------------------------------------------------ from advantages to the loss

    def loss(
        self,
        logps: Tensor,  # (B, S) or (T,)
        old_logps: Tensor | None,  # same
        advantages: Tensor,  # as `advantages` gives them
        completion_mask: Tensor | None = None,  # same, bool
        *,
        ref_logps: Tensor | None = None,  # same
        entropy: Tensor | None = None,  # same
        sampling_logps: Tensor | None = None,  # same
        num_items_in_batch: float | Tensor | None = None,
        max_completion_length: int | None = None,
        cu_seqlens: Tensor | None = None,  # (B+1,)
        generator: torch.Generator | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> PolicyLoss:
        """`policy_loss(logps, old_logps, advantages, completion_mask, **recipe.loss_options)`, with the extras.

        Args:
            ref_logps: for a KL in the loss.
            entropy: for an entropy bonus, which is differentiated, and for "top-entropy".
            sampling_logps: of the engine that generated the rollout, for its correction.
            max_completion_length: for the reduction "seq-mean-token-sum-norm".
            generator: for the choice of "clip-cov", which like that of "kl-cov" is among the tokens of this call.
            process_group: for "top-entropy", whose quantile is that of all its ranks.
            the others: as in `policy_loss`. Tensors that the recipe has no use for are left alone.

        Raises:
            ValueError: something that the recipe needs is missing, or an argument is not as above.
        """
        check_floats("logps", logps, (1, 2))
        options = self._with_tensors(
            old_logps, completion_mask, ref_logps, sampling_logps, max_completion_length, cu_seqlens
        )
        if "entropy_coef" in options:
            options["entropy"] = needed(self.name, "entropy", entropy)
        weights = [options["weights"]] if "weights" in options else []
        if self.token_selection == "top-entropy":
            uncertain = needed(self.name, "entropy", entropy).detach()
            chosen = top_entropy_mask(
                uncertain, completion_mask, fraction=self.token_fraction, process_group=process_group
            )
            weights.append(chosen.to(logps.dtype))
        elif self.token_selection == "kl-cov":
            old, constant = needed(self.name, "old_logps", old_logps), logps.detach()
            chosen = kl_cov_mask(
                constant, advantages, completion_mask, fraction=self.token_fraction, cu_seqlens=cu_seqlens
            )
            options["ref_logps"] = torch.where(chosen, old.to(logps.dtype), constant)
        elif self.token_selection == "clip-cov":
            clip = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
            kept = clip_cov_weights(
                logps.detach(),
                needed(self.name, "old_logps", old_logps),
                advantages,
                completion_mask,
                fraction=self.token_fraction,
                cu_seqlens=cu_seqlens,
                generator=generator,
                **{name: epsilon for name, epsilon in clip.items() if epsilon is not None},
            )
            weights.append(kept)
        if weights:
            options["weights"] = math.prod(weights[1:], start=weights[0])
        return policy_loss(
            logps,
            old_logps,
            advantages,
            completion_mask,
            num_items_in_batch=num_items_in_batch,
            cu_seqlens=cu_seqlens,
            **options,
        )

    def linear_loss(
        self,
        hidden_states: Tensor,  # (B, S, H) or (T, H)
        weight: Tensor,  # (V, H)
        target_ids: Tensor,  # (B, S) or (T,) int64
        old_logps: Tensor | None,  # same
        advantages: Tensor,  # as `advantages` gives them
        completion_mask: Tensor | None = None,  # same, bool
        *,
        ref_logps: Tensor | None = None,  # same
        sampling_logps: Tensor | None = None,  # same
        num_items_in_batch: float | Tensor | None = None,
        max_completion_length: int | None = None,
        cu_seqlens: Tensor | None = None,  # (B+1,)
        **head: Any,
    ) -> LinearPolicyLoss:
        """`linear_policy_loss(hidden_states, weight, ..., **recipe.loss_options)`, with the extras.

        Args:
            head: the options of `linear_policy_loss` that say how logits are made: `bias`, `temperature` and others.
            the others: as in `loss`.

        Raises:
            ValueError: as in `loss`; and for a recipe that chooses tokens by their log-probs or entropies, which are
                not known before: `linear_logps`, then `loss`.
        """
        if self.token_selection != "none":
            wanted = f"'none', for {self.token_selection!r} needs log-probs first: linear_logps, then loss"
            fail("token_selection", wanted, repr(self.token_selection))
        options = self._with_tensors(
            old_logps, completion_mask, ref_logps, sampling_logps, max_completion_length, cu_seqlens
        )
        return linear_policy_loss(
            hidden_states,
            weight,
            target_ids,
            old_logps,
            advantages,
            completion_mask,
            num_items_in_batch=num_items_in_batch,
            cu_seqlens=cu_seqlens,
            **options,
            **head,
        )

    def preference_loss(
        self,
        logps: Tensor,  # (B, S) or (T,)
        ref_logps: Tensor | None,  # same
        completion_mask: Tensor | None = None,  # same, bool
        *,
        scores: Tensor | None = None,  # (B,)
        group_size: int = 2,
        num_items_in_batch: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,  # (B+1,)
    ) -> PreferenceLoss | CoPGLoss:
        """`dpo_loss` or `copg_loss` with the constants of the recipe.

        Args:
            scores, group_size: for `copg_loss`; pairs of `dpo_loss` are the chosen and the rejected sequence.
            num_items_in_batch: what the mean is over: pairs for `dpo_loss`, sequences for `copg_loss`.
            the others: as in those two.
        """
        if self.loss_function == "copg":
            return copg_loss(
                logps,
                needed(self.name, "ref_logps", ref_logps),
                needed(self.name, "scores", scores),
                completion_mask,
                beta=self.beta,
                group_size=group_size,
                num_items_in_batch=num_items_in_batch,
                cu_seqlens=cu_seqlens,
            )
        self._want_loss("dpo")
        return dpo_loss(
            logps,
            needed(self.name, "ref_logps", ref_logps),
            completion_mask,
            beta=self.beta,
            loss_type=self.preference,
            length_normalized=self.length_normalized,
            num_pairs=num_items_in_batch,
            cu_seqlens=cu_seqlens,
        )

    def _with_tensors(
        self,
        old_logps: Tensor | None,
        mask: Tensor | None,
        ref_logps: Tensor | None,
        sampling_logps: Tensor | None,
        max_completion_length: int | None,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Any]:
        """`loss_options` with the reference, the longest length and the weights against the rollout engine."""
        options = self.loss_options
        if "beta" in options and self.token_selection != "kl-cov":
            options["ref_logps"] = needed(self.name, "ref_logps", ref_logps)
        if self.reduction == "seq-mean-token-sum-norm":
            options["max_completion_length"] = max_completion_length
        if self.rollout_level == self.rollout_mask == "none":
            return options
        old, sampled = needed(self.name, "old_logps", old_logps), needed(self.name, "sampling_logps", sampling_logps)
        weigh = functools.partial(rollout_weights, old.detach(), sampled.detach(), mask, cu_seqlens=cu_seqlens)
        weights = []
        if self.rollout_level != "none":
            weights.append(weigh(level=self.rollout_level, low=self.rollout_low, high=self.rollout_high).weights)
        if self.rollout_mask != "none":
            inside = weigh(
                level=self.rollout_mask, outside="mask", low=self.rollout_mask_low, high=self.rollout_mask_high
            ).weights
            weights.append((inside > 0).to(inside.dtype))
        return options | {"weights": math.prod(weights[1:], start=weights[0])}

    @property
    def _is_fused(self) -> bool:
        """Whether `reinforce_pp_advantages` does all that follows the baseline."""
        how = self.time, self.gap, self.whiten, self.whiten_unbiased, self.whiten_eps_mode
        paid = self.kl_place in ("none", "reward", "loss")
        return paid and how == ("returns", "carry", "tokens", False, "floor")

    def _want_loss(self, function: str) -> None:
        if self.loss_function != function:
            method = "advantages and loss" if self.loss_function == "policy" else "preference_loss"
            raise ValueError(f"the recipe {self.name!r} has another kind of loss: use its {method}")
