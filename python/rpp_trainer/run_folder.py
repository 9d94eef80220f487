"""What a run leaves behind: config.toml, recipe.json, metrics.jsonl, curves.png, samples.jsonl and a checkpoint."""

import dataclasses
import json
import resource
import sys
from pathlib import Path

from rpp_trainer.config import Config, to_toml
from rpp_trainer.evaluate import Evaluation
from rpp_trainer.models import Policy
from rpp_trainer.plots import save_curves
from rpp_trainer.tasks import Task

NUM_SAMPLES = 32


class RunFolder:
    def __init__(self, config: Config) -> None:
        """A new folder: `name`, or the first free one of `name-2`, `name-3`, ..."""
        parent, number = Path(config.output_dir), 1
        while True:
            self.path = parent / (config.name if number == 1 else f"{config.name}-{number}")
            try:
                self.path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        (self.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
        recipe = json.dumps(dataclasses.asdict(config.algorithm), indent=1)
        (self.path / "recipe.json").write_text(recipe + "\n", encoding="utf-8")

    def log(self, metrics: dict[str, float]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def finish(
        self, policy: Policy, task: Task, history: list[dict[str, float]], before: Evaluation, after: Evaluation
    ) -> None:
        save_curves(history, self.path / "curves.png")
        with (self.path / "samples.jsonl").open("w", encoding="utf-8") as file:
            for i, record in enumerate(task.held_out[:NUM_SAMPLES]):
                sample = {"prompt": record["prompt"], "answer": record.get("answer")}
                for name, evaluation in (("before", before), ("after", after)):
                    sample[name] = {"completion": evaluation.completions[i], "score": evaluation.scores[i]}
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        policy.model.save_pretrained(self.path / "checkpoint")
        policy.tokenizer.save_pretrained(self.path / "checkpoint")


def peak_memory_mb() -> float:
    """The most memory this process has held so far (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux
