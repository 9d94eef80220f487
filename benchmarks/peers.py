"""The hosts as competitors: functions of TRL, verl, OpenRLHF and Liger that run on a CPU, called as they call them.

A table for each kind of case, name -> loader (case.py). A host that is not installed is listed as that. tests/parity
holds what it takes to call a method of a trainer without its cluster, and compares all of these with ours in detail.
What a host does to its arguments before it comes to the function is not in its time, but for masks, which the cases
have as bool and the hosts multiply with.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from case import Function, Loader
from timing import Outputs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "parity"))

import hosts

# How the name of a competitor begins: the package that it comes from.
PACKAGES = {"TRL": "trl", "verl": "verl", "OpenRLHF": "openrlhf", "Liger": "liger_kernel"}


def peer(
    name: str,
    build: Callable[..., Function],
    *,
    packages: dict[str, str] = PACKAGES,
    cuda: bool = False,
    **options: Any,
) -> dict[str, Loader]:
    """One entry of a table; `build` imports what it needs from the package that `name` begins with."""
    package = packages[name.partition(",")[0]]

    def load() -> Function:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"there is no package {package}")
        if cuda and not torch.cuda.is_available():
            raise ImportError("there is no CUDA device")
        try:
            return build(**options)
        except Exception as error:  # what a package finds wrong with its surroundings has many names
            raise ImportError(f"{package} cannot be imported, {type(error).__name__}: {error}"[:200]) from error

    return {name: load}


def versions(packages: dict[str, str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    distributions = packages_distributions()
    return {name: version(distributions[package][0]) for name, package in packages.items() if package in distributions}


# ---------------------------------------------------------------- log-probs from logits

SEQUENCES = 8  # the hosts take (B, S, V), and walk over B


def _sequences(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    return logits.unflatten(0, (SEQUENCES, -1)), target_ids.unflatten(0, (SEQUENCES, -1))


def _trl_logps(entropy: bool = False) -> Function:
    utils = hosts.module("trl.trainer.utils")

    def logps(logits: Tensor, target_ids: Tensor) -> Outputs:
        logits, target_ids = _sequences(logits, target_ids)
        logps = utils.selective_log_softmax(logits, target_ids).flatten()
        return (logps, utils.entropy_from_logits(logits).flatten()) if entropy else (logps,)

    return logps


def _verl_logps(entropy: bool = False) -> Function:
    functional = hosts.module("verl.utils.torch_functional")

    def logps(logits: Tensor, target_ids: Tensor) -> Outputs:
        logits, target_ids = _sequences(logits, target_ids)
        logps = functional.logprobs_from_logits(logits, target_ids).flatten()
        return (logps, functional.entropy_from_logits(logits).flatten()) if entropy else (logps,)

    return logps


def _openrlhf_logps(entropy: bool = False) -> Function:
    utils = hosts.module("openrlhf.models.utils")

    def logps(logits: Tensor, target_ids: Tensor) -> Outputs:
        logits, target_ids = _sequences(logits.float(), target_ids)  # as its Actor does
        logps = utils.log_probs_from_logits(logits, target_ids).flatten()
        return (logps, utils.compute_entropy(logits).flatten()) if entropy else (logps,)

    return logps


LOGPS = {
    **peer("TRL, selective_log_softmax", _trl_logps),
    **peer("verl, logprobs_from_logits", _verl_logps),
    **peer("OpenRLHF, log_probs_from_logits", _openrlhf_logps),
}
LOGPS_ENTROPY = {
    **peer("TRL, selective_log_softmax and entropy_from_logits", _trl_logps, entropy=True),
    **peer("verl, logprobs_from_logits and entropy_from_logits", _verl_logps, entropy=True),
    **peer("OpenRLHF, log_probs_from_logits and compute_entropy", _openrlhf_logps, entropy=True),
}


# ---------------------------------------------------------------- advantages


def _openrlhf_returns() -> Function:
    maker = hosts.openrlhf_maker("reinforce")
    return lambda rewards, completion_mask: (maker.get_cumulative_returns(rewards, completion_mask, 1.0),)


def _openrlhf_gae(gae_lambda: float) -> Function:
    maker = hosts.openrlhf_maker("gae")
    return lambda rewards, values, completion_mask: maker.get_advantages_and_returns(
        values, rewards, completion_mask, 1.0, gae_lambda
    )


def _verl_reinforce_pp(beta: float) -> Function:
    algos = hosts.module("verl.trainer.ppo.core_algos")
    config = SimpleNamespace(gamma=1.0)

    def advantages(scores: Tensor, old_logps: Tensor, ref_logps: Tensor, completion_mask: Tensor) -> Outputs:
        mask = completion_mask.float()
        last = completion_mask.sum(1, keepdim=True) - 1
        token_scores = torch.zeros_like(old_logps).scatter_(1, last, scores[:, None])  # as its reward managers
        rewards = token_scores - beta * (algos.kl_penalty(old_logps, ref_logps, "kl") * mask)
        return algos.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config)[:1]

    return advantages


def _openrlhf_reinforce_pp(beta: float) -> Function:
    utils = hosts.module("openrlhf.models.utils")
    maker = hosts.openrlhf_maker("reinforce", beta=beta)

    def advantages(scores: Tensor, old_logps: Tensor, ref_logps: Tensor, completion_mask: Tensor) -> Outputs:
        experience = SimpleNamespace(
            index=list(range(len(scores))),
            rewards=scores,
            kl=utils.compute_approx_kl(old_logps, ref_logps) * completion_mask,
            action_mask=completion_mask,
            values=None,
            info={},
        )
        (experience,) = maker.compute_advantages_and_returns([experience])
        return (experience.advantages * completion_mask,)  # as its loss does

    return advantages


RETURNS = peer("OpenRLHF, get_cumulative_returns", _openrlhf_returns)


def gae(gae_lambda: float) -> dict[str, Loader]:
    return peer("OpenRLHF, get_advantages_and_returns", _openrlhf_gae, gae_lambda=gae_lambda)


def reinforce_pp(beta: float) -> dict[str, Loader]:
    return {
        **peer("verl, kl_penalty and reinforce_plus_plus", _verl_reinforce_pp, beta=beta),
        **peer("OpenRLHF, compute_approx_kl and reinforce", _openrlhf_reinforce_pp, beta=beta),
    }


# ---------------------------------------------------------------- losses


def _verl_policy_loss() -> Function:
    algos = hosts.module("verl.trainer.ppo.core_algos")
    config = hosts.verl_config({}, {}, clip_ratio_c=1e9)  # no dual clip, as the others

    def loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor) -> Outputs:
        loss, metrics = algos.compute_policy_loss_vanilla(
            old_logps, logps, advantages, completion_mask.float(), config=config
        )
        return loss, torch.tensor(metrics["actor/pg_clipfrac"]), torch.tensor(metrics["actor/ppo_kl"])

    return loss


def _openrlhf_policy_loss() -> Function:
    policy_loss = hosts.module("openrlhf.models.loss").PolicyLoss()

    def loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor) -> Outputs:
        return policy_loss(logps, old_logps, advantages, completion_mask.float())[:3]

    return loss


def _trl_grpo_loss(beta: float) -> Function:
    hosts.module("trl")

    def loss(completion_mask: Tensor, **inputs: Tensor) -> Outputs:
        return (hosts.trl_grpo_loss("grpo", completion_mask=completion_mask, beta=beta, **inputs),)

    return loss


def _verl_rollout_weights() -> Function:
    weights = hosts.module("verl.trainer.ppo.rollout_corr_helper").compute_rollout_correction_weights

    def truncated(old_logps: Tensor, sampling_logps: Tensor, completion_mask: Tensor) -> Outputs:
        return weights(old_logps - sampling_logps, completion_mask.float(), "sequence", 2.0)[:1]

    return truncated


def _openrlhf_dpo_loss() -> Function:
    dpo_loss = hosts.module("openrlhf.models.loss").DPOLoss(beta=0.1)

    def loss(logps: Tensor, ref_logps: Tensor, completion_mask: Tensor) -> Outputs:
        sums, ref_sums = ((x * completion_mask).sum(1) for x in (logps, ref_logps))
        loss, chosen, rejected = dpo_loss(sums[0::2], sums[1::2], ref_sums[0::2], ref_sums[1::2])
        return loss, (chosen - rejected).mean(), (chosen > rejected).float().mean()

    return loss


POLICY_LOSS = {
    **peer("verl, compute_policy_loss_vanilla", _verl_policy_loss),
    **peer("OpenRLHF, PolicyLoss", _openrlhf_policy_loss),
}
ROLLOUT_WEIGHTS = peer("verl, compute_rollout_correction_weights", _verl_rollout_weights)
DPO_LOSS = peer("OpenRLHF, DPOLoss", _openrlhf_dpo_loss)


def policy_loss_kl(beta: float) -> dict[str, Loader]:
    return peer("TRL, GRPOTrainer._compute_loss", _trl_grpo_loss, beta=beta)


# ---------------------------------------------------------------- from hidden states


def _trl_head() -> Callable[..., Tensor]:
    function = hosts.module("trl.kernels").ChunkedLogProbFunction

    def logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, 1), weight, None, target_ids.flatten()
        # As add_fused_lm_head calls it.
        return function.apply(*flat, 1.0, 32768, None, 1.0, ())[0].view(target_ids.shape)

    return logps


def _verl_head() -> Callable[..., Tensor]:
    head = hosts.module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    return lambda hidden_states, weight, target_ids: head(hidden_states, weight, target_ids)[0]


def logps(head: Callable[..., Any], **options: Any) -> Function:
    run = head(**options)
    return lambda **inputs: (run(**inputs),)


def then_clipped_loss(head: Callable[..., Any], **options: Any) -> Function:
    run = head(**options)

    def loss(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor
    ) -> Outputs:
        ratio = (run(hidden_states, weight, target_ids) - old_logps).exp()
        return (torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean(),)

    return loss


def _liger_loss() -> Function:
    function = hosts.module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dapo", compiled=False
    )

    def loss(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor
    ) -> Outputs:
        everywhere = torch.ones_like(old_logps)
        of_sequence = advantages[:, 0]  # it knows one for each sequence
        return function(hidden_states, weight, target_ids, everywhere, of_sequence, old_per_token_logps=old_logps)[:1]

    return loss


LINEAR_LOGPS = {
    **peer("TRL, ChunkedLogProbFunction", logps, head=_trl_head),
    **peer("verl, FusedLinearForPPO", logps, head=_verl_head),
}
LINEAR_POLICY_LOSS = {
    **peer("TRL, ChunkedLogProbFunction, then the loss", then_clipped_loss, head=_trl_head),
    **peer("verl, FusedLinearForPPO, then the loss", then_clipped_loss, head=_verl_head),
    **peer("Liger, LigerFusedLinearGRPOLoss", _liger_loss),
}
