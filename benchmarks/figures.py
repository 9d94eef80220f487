"""The figures of the documentation, from the results that report.py turns into tables."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def memory(result: dict[str, Any], file: Path) -> None:
    """Peak memory against the number of tokens, an x where it runs out."""
    from report import logits_mib, peaks

    figure, axes = blank()
    for (name, of), marker in zip(peaks(result).items(), "osD", strict=True):
        run = {n: peak for n, peak in of.items() if peak is not None}
        (line,) = axes.plot(list(run), list(run.values()), marker=marker, markersize=4, label=name)
        for n in of.keys() - run.keys():
            axes.plot(n, max(run.values()) * n / max(run), "x", color=line.get_color(), markersize=8)
    tokens = sorted({row["tokens"] for row in result["rows"]})
    logits = [logits_mib(result, n) for n in tokens]
    axes.plot(tokens, logits, ":", color="gray", label="one copy of the logits")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    axes.set_yticks([100, 1024, 10240], ["100 MiB", "1 GiB", "10 GiB"])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_title(f"Peak extra memory, forward and backward (H = {result['hidden']}, V = {result['vocab']})", size=10)
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def scaling(result: dict[str, Any], file: Path) -> None:
    """Time against each size in log-log, the fitted lines behind the points."""
    lines = result["lines"]
    figure, axes = blank(3, width=9.5, height=2.7 * -(-len(lines) // 3), rows=-(-len(lines) // 3))
    colors = {"rpp-kernels": "C0", "rpp-kernels, linear_logps then policy_loss": "C2", "eager": "C1", "floor": "gray"}
    for one, line in zip(axes.flat, lines, strict=False):
        for name, fit in line["fits"].items():
            points = {p["size"]: p["ms"][name][0] for p in line["points"]}
            label = f"{name.removeprefix('rpp-kernels, ')}: {fit['exponent']:.2f}"
            one.plot(list(points), list(points.values()), "o", color=colors[name], markersize=3, label=label)
            ends = [fit["from"], fit["to"]]
            fitted = [fit["at_1"] * size ** fit["exponent"] for size in ends]
            one.plot(ends, fitted, color=colors[name], linewidth=1)
        one.set_xscale("log", base=2)
        one.set_yscale("log")
        one.set_title(f"{line['name']}, ms against {line['axis']}", size=8)
        one.tick_params(labelsize=7)
        one.legend(frameon=False, fontsize=6)
    for one in axes.flat[len(lines) :]:
        one.set_visible(False)
    save(figure, file)


PHASES = {  # of a step, in order: those of the model's body in grey, the policy part in colour
    "rollout": "0.9",
    "reward": "0.3",
    "log-probs, body": "0.8",
    "loss, body": "0.7",
    "optimizer": "0.6",
    "log-probs": "tab:blue",
    "advantages": "tab:red",
    "loss": "tab:orange",
}


def steps(result: dict[str, Any], file: Path) -> None:
    """Where the time of a step goes, naive beside ours, a panel for each size."""
    sizes = result["sizes"]
    figure, _ = blank(len(sizes), width=2 + 3.2 * len(sizes), height=4)
    for axes, size in zip(figure.axes, sizes, strict=True):
        rows = [row for row in result["rows"] if row["size"] == size["name"]]
        names = [f"{row['algorithm']}\n{row['contestant']}".replace("_", "\n").replace("-", "\n") for row in rows]
        bottom = [0.0] * len(rows)
        for phase, color in PHASES.items():
            heights = [size[phase] if phase in size else row["seconds"][phase]["median"] for row in rows]
            axes.bar(names, heights, bottom=bottom, color=color, label=phase, width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{size['name']}: H = {size['hidden']}, V = {size['vocab']}", size=9)
    figure.axes[0].set_ylabel("seconds of a step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    save(figure, file)


def curves(result: dict[str, Any], file: Path) -> None:
    """Mean score against the step and against the clock: the mean over seeds, and a band from the least to the most."""
    figure, (by_step, by_clock) = blank(2, width=9)
    for who, style in (("naive", "-"), ("rpp-kernels", "--")):
        rows = [row for row in result["rows"] if row["contestant"] == who]
        scores = list(zip(*(row["rewards"] for row in rows), strict=True))
        mean = [sum(of) / len(of) for of in scores]
        clock = list(itertools.accumulate(sum(of) / len(of) for of in zip(*(r["seconds"] for r in rows), strict=True)))
        for axes, x in ((by_step, range(1, len(mean) + 1)), (by_clock, clock)):
            (line,) = axes.plot(x, mean, style, label=who, linewidth=1.5)
            axes.fill_between(x, list(map(min, scores)), list(map(max, scores)), color=line.get_color(), alpha=0.15)
    by_step.set_xlabel("step")
    by_clock.set_xlabel("seconds, rollouts included")
    by_step.set_ylabel(f"mean score, {len(rows)} seeds")
    by_step.legend(frameon=False, fontsize=8)
    save(figure, file)


def blank(columns: int = 1, width: float = 6, height: float = 3.6, rows: int = 1) -> "tuple[Figure, Any]":
    """A figure without a frame and its axes, an array of them where there are several columns or rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
    every: list[Axes] = figure.axes
    for one in every:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: "Figure", file: Path) -> None:
    """The same bytes for the same figure."""
    from matplotlib import pyplot

    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
