"""curves.png: how a run went, at a glance."""

from pathlib import Path

from matplotlib.figure import Figure

PANELS = {
    "reward": "mean score",
    "held_out_accuracy": "held-out accuracy, greedy",
    "kl": "KL to the initial policy, nats per completion",
    "length": "completion length, tokens",
    "entropy": "entropy, nats per token",
    "clip_fraction": "clipped tokens, share",
}


def save_curves(history: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        points = [(row["step"], row[name]) for row in history if name in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("rollout", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
