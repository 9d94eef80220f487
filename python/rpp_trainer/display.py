"""What the terminal shows: a progress bar with the latest figures, or plain lines where nobody watches."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rpp_trainer.config import Config
from rpp_trainer.evaluate import Evaluation
from rpp_trainer.models import Policy
from rpp_trainer.tasks import Task


class Display:
    def __init__(self, config: Config, path: Path) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.config, self.path = config, path
        self.every = max(1, config.steps // 24)  # plain lines only
        self.progress = Progress(BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = self.progress.add_task("RL", total=config.steps)
        self.latest = Text()
        self.accuracy = ""

    def start(self, task: Task, policy: Policy) -> None:
        name = type(policy.model).__name__
        self.console.print(f"{name}, {policy.num_parameters / 1e6:.2f}M parameters, on {policy.model.device}")
        self.console.print(f"task {task.name}: {len(task.train)} prompts to train on, {len(task.held_out)} held out")

    def warm_started(self, steps: int, accuracy: float, seconds: float) -> None:
        self.console.print(
            f"warm start: {steps} supervised steps, {seconds:.1f} s, accuracy of samples {accuracy:.3f}; now RL"
        )

    def steps(self) -> Iterator[int]:
        """1, 2, ... config.steps, with the bar on the screen for as long as they are being taken."""
        live = Live(Group(self.progress, self.latest), console=self.console)
        with live if self.console.is_terminal else nullcontext():
            yield from range(1, self.config.steps + 1)

    def step(self, metrics: dict[str, float]) -> None:
        if "held_out_accuracy" in metrics:
            self.accuracy = f"  held-out {metrics['held_out_accuracy']:.3f}"
        latest = (
            f"reward {metrics['reward']:+.3f}  KL {metrics['kl']:.2f}  length {metrics['length']:.1f}  "
            f"entropy {metrics['entropy']:.3f}  clipped {metrics['clip_fraction']:.3f}{self.accuracy}"
        )
        self.progress.advance(self.bar)
        self.latest.plain = latest
        step = int(metrics["step"])
        if not self.console.is_terminal and (step % self.every == 0 or step == self.config.steps):
            cost = f"{metrics['step_seconds']:.2f} s  {metrics['peak_memory_mb']:.0f} MB"
            self.console.print(f"step {step}/{self.config.steps}  {latest}  {cost}")

    def finish(self, before: Evaluation, after: Evaluation, seconds: float) -> None:
        table = Table("held-out prompts, greedy", "before RL", "after RL", title_justify="left")
        table.add_row("accuracy", f"{before.accuracy:.3f}", f"{after.accuracy:.3f}")
        table.add_row("mean score", f"{before.score:+.3f}", f"{after.score:+.3f}")
        table.add_row("mean length, tokens", f"{before.length:.2f}", f"{after.length:.2f}")
        table.add_row("truncated", f"{before.truncated:.3f}", f"{after.truncated:.3f}")
        self.console.print(table)
        self.console.print(
            f"{seconds:.0f} s in all; {self.path}/ holds config, metrics, curves, samples and checkpoint"
        )
