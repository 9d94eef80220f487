"""The figures of the documentation, from the results that report.py turns into tables."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tokens(result: dict[str, Any], file: Path, title: str) -> None:
    """Time and peak memory against the number of tokens, an x where it runs out and the floor in grey."""
    from report import by_contestant

    figure, (times, peaks) = blank(2, 11, 4)
    everyone = by_contestant(result)
    for i, (name, of) in enumerate(everyone.items()):
        grey = name in FLOORS
        style: dict[str, Any] = {"color": "gray", "linestyle": ":"} if grey else {"color": f"C{i}"}
        style |= {} if grey else {"marker": "o", "markersize": 3, "linewidth": 2.2 if _is_ours(name) else 1}
        for axes, field in ((times, "ms"), (peaks, "peak_extra_mib")):
            run = {n: row[field] for n, row in of.items() if row.get(field) is not None}
            if not run:
                continue
            (line,) = axes.plot(list(run), list(run.values()), label=name, **style)
            out = [n for n, row in of.items() if row.get("note", "").startswith("out of memory")]
            if out:
                axes.plot(out[0], run[max(run)] * out[0] / max(run), "x", color=line.get_color(), markersize=8)
    for axes, what in ((times, "ms, forward and backward"), (peaks, "peak MiB, results and gradients included")):
        ticks = sorted({n for of in everyone.values() for n in of})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        axes.set_xlabel("tokens")
        axes.set_title(what, size=9)
    figure.suptitle(title, size=10)
    figure.legend(*times.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    save(figure, file)


FLOORS = ("three bare products", "floor")


def _is_ours(name: str) -> bool:
    return name.startswith(("linear_", "rpp-kernels"))


def logp_errors(result: dict[str, Any], file: Path, spread: float = 4) -> None:
    """Left how often a log-prob is how far from float64, right where ratios of an unchanged policy lie."""
    figure, (left, right) = blank(2, 10, 3.4)
    edges = [10**x for x in result["exponents"]]
    for row in (row for row in result["errors"] if row["spread"] == spread):
        left.stairs(row["counts"], edges, label=row["path"], linewidth=1.5)
    left.set_xscale("log")
    left.set_xlabel("error of a log-prob, nats")
    left.set_ylabel("tokens")
    left.set_title(f"Log-probs of {result['size']['tokens']} tokens, logits of deviation {spread}", size=10)
    left.set_ylim(top=1.4 * left.get_ylim()[1])
    left.legend(frameon=False, fontsize=7, loc="upper left")
    rows = [row for row in result["ratios"] if row["spread"] == spread]
    for i, row in enumerate(reversed(rows)):
        color = "C0" if row["exactly_1"] == 1 else "C1"
        right.plot([row["p1"], row["p99"]], [i, i], "|-", color=color, linewidth=3)
        right.plot(row["farthest"], i, "o", color=color, markersize=4)
    right.set_yticks(range(len(rows)), [row["old"] for row in reversed(rows)], size=7)
    right.set_xlabel("ratio, 1% to 99% and the farthest")
    right.set_title("An unchanged policy, old log-probs by", size=10)
    save(figure, file)


def scaling(result: dict[str, Any], file: Path) -> None:
    """Time against each size in log-log, the fitted lines behind the points."""
    lines = result["lines"]
    figure, axes = blank(3, width=9.5, height=2.7 * -(-len(lines) // 3), rows=-(-len(lines) // 3))
    colors = {"rpp-kernels": "C0", "eager": "C1", "floor": "gray"}
    colors |= {"rpp-kernels, linear_logps then policy_loss": "C2", "rpp-kernels, inplace_backward": "C3"}
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
