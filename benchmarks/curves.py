"""Learning curves of GRPO, ours over naive: `python benchmarks/curves.py [--seeds N ...] [--steps N] [--json FILE]`.

The task and the model of `make demo`, letters on one thread. For each seed one warm start; then ours.py and naive.py
train a copy each, step by step in turns, on the same prompts with the same sampling noise. benchmarks/report.py turns
the JSON into the figure of docs/steps.md.
"""

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpp_trainer.config import Config

ALGORITHM = "grpo"


def main() -> None:
    args = _parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    from rpp_trainer.config import Config
    from run import machine

    described = machine(1, " ".join(["python", "benchmarks/curves.py", *sys.argv[1:]]))
    rows = [row for seed in args.seeds for row in trained(Config(seed=seed, steps=args.steps, recipe=ALGORITHM))]
    args.json.write_text(json.dumps({"machine": described, "algorithm": ALGORITHM, "rows": rows}, indent=1) + "\n")


def trained(config: "Config") -> list[dict[str, Any]]:
    """A row for each contestant: mean score and seconds of every step, accuracy before and after."""
    import torch
    from actor import Actor, update
    from rpp_trainer.evaluate import evaluate
    from rpp_trainer.models import Policy, load_policy
    from rpp_trainer.rollout import rollout
    from rpp_trainer.tasks import load_task, prompt_stream
    from rpp_trainer.warm_start import warm_start
    from steps import contestants

    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    task, first = load_task(config), load_policy(config)
    warm_start(first, task, config)
    reference = Actor(copy.deepcopy(first.model)).requires_grad_(False)
    everyone = contestants(ALGORITHM, config.group_size)
    actors = {who: Actor(copy.deepcopy(first.model)) for who in everyone}
    policies = {who: Policy(actor.model, first.tokenizer, first.eos_ids) for who, actor in actors.items()}
    optimizers = {
        who: torch.optim.AdamW(actor.parameters(), lr=config.learning_rate, weight_decay=0.0)
        for who, actor in actors.items()
    }
    accuracy_before = evaluate(first, task, task.held_out, config).accuracy
    rewards: dict[str, list[float]] = {who: [] for who in everyone}
    seconds: dict[str, list[float]] = {who: [] for who in everyone}
    update_seconds: dict[str, list[float]] = {who: [] for who in everyone}
    parted_at = None
    stream = prompt_stream(task.train, seed=config.seed)
    for step in range(1, config.steps + 1):
        prompts = [next(stream) for _ in range(config.rollout_batch_size // config.group_size)]
        records = [record for record in prompts for _ in range(config.group_size)]
        completions = {}
        for who in list(everyone)[:: 1 if step % 2 else -1]:
            start = time.perf_counter()
            sampled = rollout(policies[who], records, config, seed=config.seed * 1_000_003 + step)
            completions[who] = sampled.completions
            scores = [task.score(record, text) for record, text in zip(records, sampled.completions, strict=True)]
            batch = {name: getattr(sampled.batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}
            batch["scores"] = torch.tensor(scores)
            optimizers[who].param_groups[0]["lr"] = config.learning_rate * (1 - (step - 1) / config.steps)
            middle = time.perf_counter()
            update(everyone[who], actors[who], reference, optimizers[who], batch, config.train_batch_size)
            rewards[who].append(sum(scores) / len(scores))
            seconds[who].append(time.perf_counter() - start)
            update_seconds[who].append(time.perf_counter() - middle)
        if parted_at is None and len({tuple(texts) for texts in completions.values()}) > 1:
            parted_at = step
        if step % 10 == 0:
            said = ", ".join(f"{who} {values[-1]:.3f}" for who, values in rewards.items())
            print(f"seed {config.seed}, step {step}: {said}", file=sys.stderr, flush=True)
    return [
        {
            "seed": config.seed,
            "contestant": who,
            "accuracy_before": accuracy_before,
            "accuracy_after": evaluate(policies[who], task, task.held_out, config).accuracy,
            "rewards": rewards[who],
            "seconds": seconds[who],
            "update_seconds": update_seconds[who],
            "parted_at": parted_at,  # the first step whose completions are not the same for all; None: no step
        }
        for who in everyone
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="rollouts, each with two optimizer steps")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "curves.json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
