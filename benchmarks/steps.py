"""Whole training steps, ours beside naive ones: `python benchmarks/steps.py [--size NAME ...] [--json FILE]`.

GRPO, PPO and REINFORCE++ as naive.py writes them and as ours.py does, on the same weights, the same rollout and the
same seed: the seconds of each phase, tokens a second, peak memory, and whether loss and gradient agree. Updates take
turns, and the weights are put back after each. benchmarks/report.py turns the JSON into docs/steps.md.

A step is a rollout, its scores, and an update: log-probs of the policy and of the reference, advantages, then forward,
backward and AdamW for each mini-batch. Within log-probs and loss the time of the model's body is told apart from that
of its head; log-probs, advantages and loss without the body are the policy part, all that this package is about.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from actor import Actor, Algorithm, Batch

ALGORITHMS = ("grpo", "ppo", "reinforce_pp")
SECONDS = 10  # of the rounds of one algorithm, about
POLICY_PART = ("log-probs", "advantages", "loss")
NAIVE, OURS = "naive", "rpp-kernels"
SEED = 0


@dataclass(frozen=True)
class Size:
    """A model and a rollout of it."""

    name: str
    why: str
    prompts: int
    prompt_length: int
    completion_length: int
    train_batch_size: int  # completions in an optimizer step
    model: dict[str, int] = field(default_factory=dict)  # of a Qwen2 with random weights; none: that of `make demo`
    group_size: int = 4
    shortest: float = 0.25  # completion, as a share of the longest; of a model with random weights
    algorithms: tuple[str, ...] = ALGORITHMS
    threads: int | None = None  # where not those of the command
    only_by_name: bool = False


_QWEN_05B = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
_QWEN_05B |= {"num_key_value_heads": 2}
_MIDDLE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
_MIDDLE |= {"num_attention_heads": 8, "num_key_value_heads": 4}

SIZES = {
    size.name: size
    for size in (
        Size(
            "demo",
            "what `make demo` trains: the vocabulary is 29 letters, so there is nothing for a head's kernel to save",
            prompts=64,
            prompt_length=15,
            completion_length=16,
            train_batch_size=128,
            threads=1,
        ),
        Size(
            "middle",
            "a small model of the usual shape, 4 layers of width 512 under 32000 words",
            prompts=4,
            prompt_length=16,
            completion_length=96,
            train_batch_size=16,
            model=_MIDDLE,
        ),
        Size(
            "middle_unpadded",
            "the same with completions of one length, so that nothing is saved by leaving out padding",
            prompts=4,
            prompt_length=16,
            completion_length=96,
            train_batch_size=16,
            model=_MIDDLE,
            shortest=1.0,
            algorithms=("grpo",),
        ),
        Size(
            "large_vocabulary",
            "embedding and head of Qwen2.5-0.5B, 151936 words, with 2 of its 24 layers",
            prompts=3,
            prompt_length=16,
            completion_length=128,
            train_batch_size=12,
            model={**_QWEN_05B, "num_hidden_layers": 2},
            algorithms=("grpo", "ppo"),  # the head of REINFORCE++ does what that of PPO does
        ),
        Size(
            "qwen2.5-0.5b",
            "all of its 24 layers",
            prompts=2,
            prompt_length=16,
            completion_length=128,
            train_batch_size=8,
            model={**_QWEN_05B, "num_hidden_layers": 24},
            algorithms=("grpo",),
            only_by_name=True,
        ),
    )
}


def main() -> None:
    args = _parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from run import machine

    described = machine(args.threads, " ".join(["python", "benchmarks/steps.py", *sys.argv[1:]]))
    names = args.size or [size.name for size in SIZES.values() if not size.only_by_name]
    measured = [measure(SIZES[name], args.threads) for name in names]
    result = {
        "machine": described,
        "sizes": [size for size, _ in measured],
        "rows": [row for _, rows in measured for row in rows],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    import report

    print(report.steps(result))


def contestants(algorithm: str, group_size: int) -> "dict[str, Algorithm]":
    import naive
    from ours import Ours

    import rpp_kernels as rpp

    plain = {"grpo": naive.GRPO(group_size), "ppo": naive.PPO(), "reinforce_pp": naive.ReinforcePP()}
    return {NAIVE: plain[algorithm], OURS: Ours(rpp.recipe(algorithm), group_size)}


def measure(size: Size, threads: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The size as it was, and a row for each algorithm and contestant."""
    import torch
    from actor import Actor

    threads = size.threads or threads
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    print(f"{size.name}: rollout", file=sys.stderr, flush=True)
    model, rollout, score = _demo(size) if not size.model else _random(size)
    batch, rollout_seconds, score_seconds = _timed_rollout(rollout, score)
    actor = Actor(model).eval()
    reference = Actor(copy.deepcopy(model)).requires_grad_(False).eval()
    _move(actor)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-6, weight_decay=0.0)
    _make_state(optimizer, actor)

    rows = []
    for algorithm in size.algorithms:
        print(f"{size.name}: {algorithm}", file=sys.stderr, flush=True)
        rows += _compared(size, algorithm, actor, reference, optimizer, batch)
    parameters, head = sum(p.numel() for p in model.parameters()), actor.head.weight.numel()
    described = {
        "name": size.name,
        "why": size.why,
        "threads": threads,
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "vocab": model.config.vocab_size,
        "parameters": parameters,
        "head_share": head / parameters,
        "sequences": len(batch["scores"]),
        "prompt": batch["input_ids"].shape[1] - batch["completion_mask"].shape[1],
        "completion": batch["completion_mask"].shape[1],
        "tokens": int(batch["completion_mask"].sum()),
        "train_batch_size": size.train_batch_size,
        "rollout": rollout_seconds,
        "reward": score_seconds,
    }
    return described, rows


# ---------------------------------------------------------------- rollouts, the same code for everyone


def _demo(size: Size) -> "tuple[Any, Callable[[], Any], Callable[[Any], list[float]]]":
    """The letters that `make demo` trains on, after its warm start."""
    from rpp_trainer.config import Config
    from rpp_trainer.models import load_policy
    from rpp_trainer.rollout import rollout
    from rpp_trainer.tasks import load_task, prompt_stream
    from rpp_trainer.warm_start import warm_start

    config = Config(seed=SEED, group_size=size.group_size, max_completion_length=size.completion_length)
    task, policy = load_task(config), load_policy(config)
    warm_start(policy, task, config)
    stream = prompt_stream(task.train, seed=SEED)
    records = [record for _ in range(size.prompts) for record in [next(stream)] * size.group_size]

    def sampled() -> "tuple[Batch, list[str]]":
        result = rollout(policy, records, config, seed=SEED)
        names = ("input_ids", "attention_mask", "completion_mask")
        return {name: getattr(result.batch, name) for name in names}, result.completions

    def score(completions: list[str]) -> list[float]:
        return [task.score(record, text) for record, text in zip(records, completions, strict=True)]

    return policy.model, sampled, score


def _random(size: Size) -> "tuple[Any, Callable[[], Any], Callable[[Any], list[float]]]":
    """Random weights and prompts. Such a model ends nowhere: lengths are given, `shortest` to all that it wrote."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**size.model, tie_word_embeddings=True)).eval()
    B, S = size.prompts * size.group_size, size.completion_length
    prompts = torch.randint(model.config.vocab_size, (size.prompts, size.prompt_length))
    prompts = prompts.repeat_interleave(size.group_size, 0)
    lengths = torch.linspace(size.shortest * S, S, B).round()[torch.randperm(B), None]
    completion_mask = torch.arange(S) < lengths
    attention_mask = torch.cat([torch.ones_like(prompts, dtype=torch.bool), completion_mask], 1)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=S, pad_token_id=0)

    @torch.no_grad()
    def sampled() -> "tuple[Batch, list[list[int]]]":
        ids = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts))
        batch = {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
        completions = [row[mask].tolist() for row, mask in zip(ids[:, -S:], completion_mask, strict=True)]
        return batch, completions

    def score(completions: list[list[int]]) -> list[float]:
        """The share of even words: a rule that every completion fulfils to another degree."""
        return [sum(word % 2 == 0 for word in words) / len(words) for words in completions]

    return model, sampled, score


def _timed_rollout(rollout: "Callable[[], Any]", score: "Callable[[Any], list[float]]") -> "tuple[Batch, float, float]":
    """With the seconds of sampling and of scoring. It is not repeated: the comparison is of what comes after."""
    import torch

    start = time.perf_counter()
    batch, completions = rollout()
    middle = time.perf_counter()
    scores = torch.tensor(score(completions))
    return batch | {"scores": scores}, middle - start, time.perf_counter() - middle


def _move(actor: "Actor") -> None:
    """Away from the reference, by a percent of each weight matrix, so that there is a KL."""
    import torch

    with torch.no_grad():
        for p in actor.parameters():
            p.add_(torch.randn_like(p), alpha=0.01 * float(p.std()) if p.numel() > 1 else 0.0)


# ---------------------------------------------------------------- updates, in turns


def _make_state(optimizer: "torch.optim.Optimizer", actor: "Actor") -> None:
    """AdamW makes its moments in the first step, which is not to be anyone's."""
    import torch

    for p in actor.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def _compared(
    size: Size,
    algorithm: str,
    actor: "Actor",
    reference: "Actor",
    optimizer: "torch.optim.Optimizer",
    batch: "Batch",
) -> list[dict[str, Any]]:
    import torch
    from actor import split, update
    from timing import Work, peak_extra_mib

    everyone = contestants(algorithm, size.group_size)
    mini_batch = next(split(batch, size.train_batch_size))
    headed = _Headed(actor, mini_batch), _Headed(reference, mini_batch)
    losses: dict[str, list[torch.Tensor]] = {}

    def head(who: str) -> None:
        losses[who] = _loss_and_gradient(everyone[who], *headed, mini_batch)

    head_peaks = {who: peak_extra_mib(Work(lambda who=who: head(who))) for who in everyone}
    difference = _difference(losses.pop(OURS), losses.pop(NAIVE))
    before = [p.detach().clone() for p in actor.parameters()]
    samples: dict[str, list[dict[str, float]]] = {who: [] for who in everyone}

    def step(who: str) -> None:
        start = time.perf_counter()
        phases = update(everyone[who], actor, reference, optimizer, batch, size.train_batch_size)
        seconds = time.perf_counter() - start
        samples[who].append({**phases, "update": seconds, "policy part": sum(phases[p] for p in POLICY_PART)})
        with torch.no_grad():  # everyone begins at the same weights
            for p, first in zip(actor.parameters(), before, strict=True):
                p.copy_(first)

    start = time.perf_counter()
    peaks = {who: peak_extra_mib(Work(lambda who=who: step(who))) for who in everyone}  # in the first round
    rounds = min(15, max(3, int(SECONDS / (time.perf_counter() - start))))
    for i in range(1, rounds):
        for who in list(everyone)[:: -1 if i % 2 else 1]:
            step(who)
    tokens = int(batch["completion_mask"].sum())
    return [
        {
            "size": size.name,
            "algorithm": algorithm,
            "contestant": who,
            **_summary(samples[who], samples[NAIVE], tokens),
            "update_peak_mib": peaks[who],
            "head_peak_mib": head_peaks[who],
            "difference": difference,
        }
        for who in everyone
    ]


def _summary(samples: list[dict[str, float]], naive: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    from timing import median_ratio, spread

    of, theirs = ({what: [sample[what] for sample in each] for what in each[0]} for each in (samples, naive))
    return {
        "rounds": len(samples),
        "seconds": {what: spread(seconds)._asdict() for what, seconds in of.items()},
        "tokens_per_second": tokens / spread(of["update"]).median,
        "naive_over_this": {what: median_ratio(theirs[what], of[what]) for what in ("update", "policy part")},
    }


class _Headed:
    """An actor whose body has run: what stands on its hidden states, for the memory of that alone."""

    def __init__(self, actor: "Actor", batch: "Batch") -> None:
        import torch

        self.head, self.values = actor.head, actor.values
        with torch.no_grad():
            hidden = actor.hidden_states(batch).clone()
        self.hidden = hidden.requires_grad_(actor.head.weight.requires_grad)

    def hidden_states(self, batch: "Batch") -> "torch.Tensor":
        return self.hidden


def _loss_and_gradient(algorithm: "Algorithm", actor: Any, reference: Any, batch: "Batch") -> "list[torch.Tensor]":
    """The policy part of one mini-batch: the loss, and its gradient in hidden states and in the head."""
    import torch

    whole = batch | algorithm.log_probs(actor, reference, batch)
    whole = whole | algorithm.advantages(whole)
    loss = algorithm.loss(actor, whole)
    return [loss.detach(), *torch.autograd.grad(loss, [actor.hidden, actor.head.weight])]


def _difference(ours: "list[torch.Tensor]", naive: "list[torch.Tensor]") -> dict[str, float]:
    """Between losses, and between gradients relative to the largest element: the body's follows from these."""
    from timing import relative_error

    return {"loss": abs(float(ours[0] - naive[0])), "gradient": relative_error(ours[1:], naive[1:])}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = ", ".join(size.name for size in SIZES.values() if size.only_by_name)
    parser.add_argument("--size", nargs="+", default=[], choices=SIZES, metavar="NAME", help=f"all but {by_name}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "steps.json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
