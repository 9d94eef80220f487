"""The figures of the documentation, from the results that report.py turns into tables."""

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
    right.set_title("Unchanged policy: new log-probs ours, old ones by", size=10)
    save(figure, file)


def blank(columns: int = 1, width: float = 6, height: float = 3.6) -> "tuple[Figure, Any]":
    """A figure without a frame and its axes, an array of them where there are several columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    every: list[Axes] = figure.axes
    for one in every:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: "Figure", file: Path) -> None:
    """The same bytes for the same figure."""
    from matplotlib import pyplot

    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
