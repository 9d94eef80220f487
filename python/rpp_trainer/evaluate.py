"""Accuracy on prompts that are not trained on."""

from typing import NamedTuple

from rpp_trainer.config import Config
from rpp_trainer.models import Policy
from rpp_trainer.rollout import rollout
from rpp_trainer.tasks import Record, Task


class Evaluation(NamedTuple):
    accuracy: float  # share of completions whose score reaches config.correct_at
    score: float  # mean
    length: float  # mean, tokens
    truncated: float  # share
    completions: list[str]
    scores: list[float]


def evaluate(policy: Policy, task: Task, records: list[Record], config: Config, *, greedy: bool = True) -> Evaluation:
    result = rollout(policy, records, config, seed=config.seed, greedy=greedy)
    scores = [task.score(record, text) for record, text in zip(records, result.completions, strict=True)]
    return Evaluation(
        accuracy=sum(score >= config.correct_at for score in scores) / len(scores),
        score=sum(scores) / len(scores),
        length=result.batch.completion_mask.sum(1).float().mean().item(),
        truncated=result.truncated.float().mean().item(),
        completions=result.completions,
        scores=scores,
    )
