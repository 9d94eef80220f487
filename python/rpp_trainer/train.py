"""REINFORCE++ and its relatives, as one flat loop: sample, score, shape, update.

What is left out: a critic (these methods have none), a reward model (rewards are functions), an inference server
(completions come from `generate`), and more than one device. The loss layer comes from `rpp_kernels`.
"""

import dataclasses
import functools
import operator
import os
import time

import torch

import rpp_kernels as rpp
from rpp_trainer.batch import Batch
from rpp_trainer.config import Config
from rpp_trainer.display import Display
from rpp_trainer.evaluate import evaluate
from rpp_trainer.models import Policy, frozen_copy, load_policy, token_logps
from rpp_trainer.rollout import rollout
from rpp_trainer.run_folder import RunFolder, peak_memory_mb
from rpp_trainer.tasks import load_task, prompt_stream
from rpp_trainer.warm_start import warm_start

Metrics = dict[str, float]


def train(config: Config) -> RunFolder:
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads or 1)
    task, policy = load_task(config), load_policy(config)
    if not config.threads and policy.num_parameters > 20e6:
        torch.set_num_threads(os.cpu_count() or 1)
    folder = RunFolder(config)
    display = Display(config, folder.path)
    display.start(task, policy)

    # Teach the model just enough that some completions earn a reward. No answer is shown to it after this.
    if task.examples and not config.model and config.warm_start_accuracy > 0:
        display.warm_started(*warm_start(policy, task, config), time.perf_counter() - started)

    # The policy as it stands now is the reference: KL is measured from it, and held-out accuracy compared with it.
    reference = frozen_copy(policy.model)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    records = prompt_stream(task.train, seed=config.seed)
    running_mean = rpp.RunningMean.zero(policy.model.device)
    before = evaluation = evaluate(policy, task, task.held_out, config)
    history = [{"step": 0, "held_out_accuracy": before.accuracy}]
    folder.log(history[0])

    for step in display.steps():
        step_started = time.perf_counter()

        # Sample a few completions of each prompt, and score them.
        prompts = [next(records) for _ in range(config.rollout_batch_size // config.group_size)]
        prompts = [record for record in prompts for _ in range(config.group_size)]
        sampled = rollout(policy, prompts, config, seed=config.seed * 1_000_003 + step)
        raw_scores = [task.score(record, text) for record, text in zip(prompts, sampled.completions, strict=True)]
        batch = dataclasses.replace(sampled.batch, scores=torch.tensor(raw_scores, device=policy.model.device))
        rollout_seconds = time.perf_counter() - step_started

        # Log-probs of the policy that sampled, by the very op that the update uses, and of the reference.
        batch, entropy = with_old_logps(policy, reference, batch, config)

        # What each token is worth: for REINFORCE++ a reward and a KL penalty per token, summed to returns and whitened
        # over all tokens of the rollout; for the others as their recipe says.
        batch, running_mean = with_advantages(batch, running_mean, config)

        # Several clipped steps on the one rollout.
        if config.learning_rate_schedule == "linear":
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - (step - 1) / config.steps)
        update = [
            update_policy(policy, optimizer, mini_batch, config)
            for _ in range(config.epochs)
            for mini_batch in batch.split(config.train_batch_size)
        ]

        # KL and length are per sequence; KL is the sum over its tokens.
        metrics = {
            "step": step,
            "reward": sum(raw_scores) / len(raw_scores),
            "accuracy": sum(score >= config.correct_at for score in raw_scores) / len(raw_scores),
            "kl": (batch.old_logps - batch.ref_logps).sum(1).mean().item(),
            "length": sampled.batch.completion_mask.sum(1).float().mean().item(),
            "truncated": sampled.truncated.float().mean().item(),
            "entropy": entropy,
            **{name: sum(m[name] for m in update) / len(update) for name in update[0]},
        }
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            evaluation = evaluate(policy, task, task.held_out, config)
            metrics["held_out_accuracy"] = evaluation.accuracy
        metrics["rollout_seconds"] = rollout_seconds
        metrics["step_seconds"] = time.perf_counter() - step_started
        metrics["peak_memory_mb"] = peak_memory_mb()
        history.append(metrics)
        folder.log(metrics)
        display.step(metrics)

    folder.finish(policy, task, history, before, evaluation)
    display.finish(before, evaluation, time.perf_counter() - started)
    return folder


@torch.no_grad()
def with_old_logps(policy: Policy, reference: torch.nn.Module, batch: Batch, config: Config) -> tuple[Batch, float]:
    """Adds old_logps and ref_logps; and the mean entropy of a token.

    In the update's own micro-batches, so that the ratio of the first optimizer step is 1 to the last bit.
    """
    micro_batches = [m for mini in batch.split(config.train_batch_size) for m in mini.split(config.micro_batch_size)]
    old = [token_logps(policy.model, m, config) for m in micro_batches]
    ref = [token_logps(reference, m, config).logps for m in micro_batches]
    entropy = sum(o.entropy.sum() for o in old) / batch.completion_mask.sum()
    old_logps = torch.cat([o.logps for o in old])
    return dataclasses.replace(batch, old_logps=old_logps, ref_logps=torch.cat(ref)), entropy.item()


def with_advantages(batch: Batch, running_mean: rpp.RunningMean, config: Config) -> tuple[Batch, rpp.RunningMean]:
    worth = config.algorithm.advantages(
        batch.scores,
        batch.completion_mask,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        running_mean=running_mean,
        group_size=config.group_size,
        max_completion_length=config.max_completion_length,
    )
    batch = dataclasses.replace(batch, advantages=worth.advantages, completion_mask=worth.completion_mask)
    return batch, running_mean.updated(worth.scores)


def update_policy(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config) -> Metrics:
    """One optimizer step. Micro-batches divide by the count of the whole batch, so their gradients add up to its."""
    recipe = config.algorithm
    num_items = rpp.num_items_in_batch(batch.completion_mask, recipe.reduction)
    losses, stats = [], []
    for micro_batch in batch.split(config.micro_batch_size):
        logps, entropy, *_ = token_logps(policy.model, micro_batch, config)
        loss, micro_stats = recipe.loss(
            logps,
            micro_batch.old_logps,
            micro_batch.advantages,
            micro_batch.completion_mask,
            ref_logps=micro_batch.ref_logps,
            entropy=entropy,
            num_items_in_batch=num_items,
            max_completion_length=config.max_completion_length,
        )
        loss.backward()
        losses.append(loss.detach())
        stats.append(micro_stats)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()

    total = functools.reduce(operator.add, stats)  # sums over tokens: they add, and are divided once
    num_tokens = total.num_tokens.clamp(min=1)  # a recipe may leave out every sequence of a batch
    return {
        "loss": sum(losses).item(),
        "grad_norm": grad_norm.item(),
        "clip_fraction": ((total.clipped_low + total.clipped_high) / num_tokens).item(),
        "ratio": (total.ratio / num_tokens).item(),
        "approx_kl": (total.approx_kl / num_tokens).item(),
    }
