"""The hosts' own functions under our argument names: what is compared with is called, never written anew.

A trainer's method is called on an instance whose __init__ did not run and that has the attributes the method reads.
Masks go in as bool and reach the hosts in the dtype they multiply with.
"""

import functools
import importlib
import importlib.util
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from stubs import stubs
from torch import Tensor

REQUIRED = os.environ.get("RPP_KERNELS_REQUIRE_HOSTS") == "1"


@functools.cache
def module(name: str) -> Any:
    """A module of a host. A host that is not installed skips the test, or fails it where the hosts are required."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        (pytest.fail if REQUIRED else pytest.skip)(f"{package} is not installed: make parity")
    if package in ("trl", "liger_kernel"):
        return importlib.import_module(name)
    with stubs():
        return importlib.import_module(name)


# verl


def verl_config(policy_loss: dict[str, Any], batch_info: dict[str, Any], **options: Any) -> Any:
    actor = module("verl.workers.config.actor")
    return actor.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=actor.PolicyLossConfig(**policy_loss),
        global_batch_info=batch_info,
        **options,
    )


def verl_policy_loss(
    loss_mode: str,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    reduction: str = "token-mean",
    weights: Tensor | None = None,
    policy_loss: dict[str, Any] | None = None,
    batch_info: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    algos = module("verl.trainer.ppo.core_algos")
    function = algos.compute_policy_loss_reinforce if loss_mode == "reinforce" else algos.get_policy_loss_fn(loss_mode)
    loss, _ = function(
        old_logps,
        logps,
        advantages.expand_as(logps),
        completion_mask.to(logps.dtype),
        loss_agg_mode=reduction,
        config=verl_config(policy_loss or {}, batch_info or {}, **options),
        rollout_is_weights=weights,
    )
    return loss


def verl_agg_loss(losses: Tensor, completion_mask: Tensor, reduction: str, **batch_info: Any) -> Tensor:
    return module("verl.trainer.ppo.core_algos").agg_loss(
        losses, completion_mask.to(losses.dtype), reduction, **batch_info
    )


def verl_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, *, epsilon: float, reduction: str
) -> Tensor:
    loss, _ = module("verl.trainer.ppo.core_algos").compute_value_loss(
        values, returns, old_values, completion_mask.to(values.dtype), epsilon, reduction
    )
    return loss


def verl_kl_penalty(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    return module("verl.trainer.ppo.core_algos").kl_penalty(logps, ref_logps, kind)


def verl_advantages(
    estimator: str, rewards: Tensor, completion_mask: Tensor, *, group_ids: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`rewards` are per token; an outcome estimator sums them. Returns advantages and returns."""
    algos = module("verl.trainer.ppo.core_algos")
    if group_ids is not None:
        options["index"] = numpy.array([f"prompt {i}" for i in group_ids.tolist()])
    if estimator == "reinforce_plus_plus":
        options = {"config": SimpleNamespace(**options)}
    return algos.get_adv_estimator_fn(estimator)(
        token_level_rewards=rewards.clone(), response_mask=completion_mask.to(rewards.dtype), **options
    )


def verl_rollout_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    completion_mask: Tensor,
    *,
    level: str,
    threshold: float | str,
    **options: Any,
) -> Tensor:
    weights, _ = module("verl.trainer.ppo.rollout_corr_helper").compute_rollout_correction_weights(
        old_logps - sampling_logps, completion_mask.to(old_logps.dtype), level, threshold, **options
    )
    return weights


def verl_rejection_mask(
    old_logps: Tensor, sampling_logps: Tensor, completion_mask: Tensor, *, kind: str, threshold: float | str
) -> Tensor:
    mask, _ = module("verl.trainer.ppo.rollout_corr_helper").compute_rollout_rejection_mask(
        old_logps - sampling_logps, completion_mask.to(old_logps.dtype), kind, threshold
    )
    return mask


# OpenRLHF


def openrlhf_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    sampling_logps: Tensor | None = None,
    batch_info: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    loss, *_ = module("openrlhf.models.loss").PolicyLoss(**options)(
        logps,
        old_logps,
        advantages.expand_as(logps),
        completion_mask.to(logps.dtype),
        rollout_log_probs=sampling_logps,
        **(batch_info or {}),
    )
    return loss


def openrlhf_aggregate(losses: Tensor, completion_mask: Tensor, **options: Any) -> Tensor:
    return module("openrlhf.models.loss").aggregate_loss(losses, completion_mask.to(losses.dtype), **options)


def openrlhf_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    completion_mask: Tensor,
    *,
    epsilon: float | None,
    token_level_loss: bool,
) -> Tensor:
    function = module("openrlhf.models.loss").ValueLoss(epsilon, token_level_loss)
    return function(values, old_values, returns, completion_mask.to(values.dtype))


def openrlhf_kl(logps: Tensor, ref_logps: Tensor, kind: str, **options: Any) -> Tensor:
    return module("openrlhf.models.utils").compute_approx_kl(logps, ref_logps, kl_estimator=kind, **options)


def openrlhf_token_rewards(
    scores: Tensor, kl: Tensor, completion_mask: Tensor, *, beta: float, clip: tuple[float, float] | None
) -> Tensor:
    return module("openrlhf.models.utils").compute_reward(scores, beta, kl, completion_mask, clip)


def openrlhf_maker(
    estimator: str,
    *,
    group_size: int = 1,
    beta: float = 0.0,
    clip: tuple[float, float] | None = (-10.0, 10.0),
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    no_std_norm: bool = False,
) -> Any:
    Maker = module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    maker = Maker.__new__(Maker)
    advantage = SimpleNamespace(estimator=estimator, gamma=gamma, lambd=gae_lambda, no_std_norm=no_std_norm)
    maker.strategy = SimpleNamespace(
        args=SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage),
            rollout=SimpleNamespace(n_samples_per_prompt=group_size),
            reward=SimpleNamespace(clip_range=clip),
        )
    )
    maker.advantage_estimator, maker.kl_ctl = estimator, SimpleNamespace(value=beta)
    return maker


def openrlhf_advantages(
    estimator: str,
    scores: Tensor,
    kl: Tensor,
    completion_mask: Tensor,
    *,
    values: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards, group baseline, KL, returns and normalisation of a rollout batch that arrives in two shuffled parts."""
    maker = openrlhf_maker(estimator, **options)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    parts = [
        SimpleNamespace(
            index=index.tolist(),
            rewards=scores[index],
            kl=kl[index],
            action_mask=completion_mask[index],
            values=None if values is None else values[index],
            info={},
        )
        for index in order.tensor_split(2)
    ]
    parts = maker.compute_advantages_and_returns(parts)
    advantages, returns = torch.empty_like(kl), torch.empty_like(kl)
    advantages[order] = torch.cat([part.advantages for part in parts])
    returns[order] = torch.cat([part.returns for part in parts])
    return advantages, returns


def openrlhf_overlong_penalty(
    lengths: Tensor, *, max_completion_length: int, buffer_length: int, scale: float
) -> Tensor:
    experience = SimpleNamespace(response_length=lengths, rewards=torch.zeros(len(lengths)))
    module("openrlhf.trainer.ppo_utils.length_penalty").apply_overlong_penalty(
        [experience], max_completion_length, buffer_length, scale
    )
    return experience.rewards


def openrlhf_dpo_loss(logps: Tensor, ref_logps: Tensor, completion_mask: Tensor, **options: Any) -> Tensor:
    """Sequences 2i and 2i + 1 are the chosen and the rejected one of pair i."""
    sums, ref_sums = ((x * completion_mask).sum(1) for x in (logps, ref_logps))
    function = module("openrlhf.models.loss").DPOLoss(**options)
    return function(sums[0::2], sums[1::2], ref_sums[0::2], ref_sums[1::2])[0]


# TRL


def one_process() -> SimpleNamespace:
    def same(x: Tensor, **_: Any) -> Tensor:
        return x

    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        sync_gradients=False,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        pad_across_processes=same,
    )


def trl_trainer(name: str, **attributes: Any) -> Any:
    Trainer = getattr(module("trl"), name)
    trainer = Trainer.__new__(Trainer)
    trainer.__dict__.update(
        accelerator=one_process(),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **attributes,
    )
    return trainer


def trl_inputs(completion_mask: Tensor) -> dict[str, Tensor]:
    """Token ids nobody reads: the log-probs are given."""
    ids = torch.zeros_like(completion_mask, dtype=torch.long)
    prompt = ids.new_zeros(len(ids), 1)
    return {"prompt_ids": prompt, "prompt_mask": prompt + 1, "completion_ids": ids}


def trl_grpo_loss(
    loss_type: str,
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
    weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    num_items_in_batch: float = 1.0,
    max_completion_length: int | None = None,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int = 1,
) -> Tensor:
    trainer = trl_trainer(
        "GRPOTrainer",
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=None,
        max_completion_length=max_completion_length,
        current_gradient_accumulation_steps=gradient_accumulation_steps,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            sapo_temperature_pos=sapo_temperatures[0],
            sapo_temperature_neg=sapo_temperatures[1],
            steps_per_generation=steps_per_generation,
        ),
    )
    entropy = torch.ones_like(logps) if entropy is None else entropy
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropy, None)
    inputs = trl_inputs(completion_mask) | {
        "completion_mask": completion_mask.to(logps.dtype),
        "advantages": advantages,
        "num_items_in_batch": torch.as_tensor(num_items_in_batch, dtype=logps.dtype),
    }
    given = {"old_per_token_logps": old_logps, "ref_per_token_logps": ref_logps, "importance_sampling_ratio": weights}
    return trainer._compute_loss(None, inputs | {name: x for name, x in given.items() if x is not None})


def trl_rloo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    trainer = trl_trainer(
        "RLOOTrainer", model=SimpleNamespace(training=True), epsilon_low=epsilon_low, epsilon_high=epsilon_high
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.ones_like(logps), None)
    return trainer._compute_loss(
        None,
        trl_inputs(completion_mask)
        | {
            "completion_mask": completion_mask.to(logps.dtype),
            "old_logps": (old_logps * completion_mask).sum(1),
            "advantages": advantages,
        },
    )


def trl_rollout(
    trainer_name: str,
    scores: Tensor,
    old_logps: Tensor,
    completion_mask: Tensor,
    *,
    group_size: int,
    sampling_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    **attributes: Any,
) -> dict[str, Tensor]:
    """A generation batch as the trainer scores it: `advantages`, and with `sampling_logps` `importance_sampling_ratio`.

    Completions are as long as the padded row, holes and padding are its tool mask (RLOO knows none: its mask is that
    of its first tokens).
    """
    lengths = [completion_mask.shape[1]] * len(scores) if trainer_name == "GRPOTrainer" else completion_mask.sum(1)
    completions = [[0] * int(n) for n in lengths]
    prompts = [[0]] * len(scores)
    logps = iter([old_logps] if ref_logps is None else [old_logps, ref_logps])
    trainer = trl_trainer(
        trainer_name,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=SimpleNamespace(),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        environment_factories=None,
        environments=None,
        tools=None,
        log_multimodal=False,
        num_generations=group_size,
        num_iterations=1,
        use_vllm=sampling_logps is not None,
        vllm_importance_sampling_correction=sampling_logps is not None,
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["score"],
        _pending_extra_logs={},
        _pending_metrics={},
        _logs=defaultdict(lambda: defaultdict(list), prompt=[], completion=[], advantages=[]),
        args=SimpleNamespace(
            per_device_train_batch_size=len(scores),
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        **{"beta": 0.0, "scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"} | attributes,
    )
    if trainer_name == "GRPOTrainer":
        sampled = None if sampling_logps is None else sampling_logps.tolist()
        tool_mask = completion_mask.long().tolist()
        trainer._generate = lambda _: (prompts, completions, tool_mask, completions, sampled, {}, None, None)
    else:
        trainer._generate = lambda _: (prompts, completions, completions)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (next(logps), None, None)
    trainer._calculate_rewards = lambda *_: scores[:, None]
    return trainer._generate_and_score_completions([{"prompt": ""}] * len(scores))


def trl_dpo_loss(
    loss_type: str,
    logps: Tensor,
    ref_logps: Tensor,
    completion_mask: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sequences 2i and 2i + 1 are a pair; TRL has all chosen ones before all rejected ones."""
    logps, ref_logps, completion_mask = (torch.cat([x[0::2], x[1::2]]) for x in (logps, ref_logps, completion_mask))
    trainer = trl_trainer(
        "DPOTrainer",
        model=SimpleNamespace(training=True),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = torch.cat([completion_mask.new_zeros(len(completion_mask), 1), completion_mask], 1).long()
    ref_chosen, ref_rejected = (ref_logps * completion_mask).sum(1).chunk(2)
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=torch.where(completion_mask, logps, 0.0), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trainer._compute_loss(lambda **_: outputs, inputs, False)


def trl_overlong_penalty(lengths: Tensor, *, max_completion_length: int, buffer_length: int) -> Tensor:
    reward = module("trl.rewards").get_soft_overlong_punishment(max_completion_length, buffer_length)
    return torch.tensor(reward([[0] * int(n) for n in lengths]))


# Liger


def liger_grpo_loss(
    loss_type: str,
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    weights: Tensor | None = None,
    num_items_in_batch: float | None = None,
    **options: Any,
) -> Tensor:
    function = module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=ref_logps is not None, loss_type=loss_type, **{"beta": 0.0} | options
    )
    loss, _ = function(
        hidden_states,
        weight,
        target_ids,
        completion_mask.to(hidden_states.dtype),
        advantages,
        bias=bias,
        ref_per_token_logps=ref_logps,
        old_per_token_logps=old_logps,
        vllm_is_ratio=weights,
        num_items_in_batch=num_items_in_batch,
    )
    return loss


def liger_dpo_loss(
    loss_type: str,
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    completion_mask: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sequences 2i and 2i + 1 are a pair; Liger has all chosen ones before all rejected ones."""
    targets = torch.where(completion_mask, target_ids, -100)
    hidden_states, ref_hidden_states, targets = (
        torch.cat([x[0::2], x[1::2]]) for x in (hidden_states, ref_hidden_states, targets)
    )
    function = module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        beta=beta, label_smoothing=label_smoothing, loss_type=loss_type, compiled=False
    )
    loss, *_ = function(weight, hidden_states, targets, ref_input=ref_hidden_states, ref_weight=ref_weight)
    return loss
