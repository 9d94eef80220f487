"""The figures of the documentation, from the results that report.py turns into tables."""

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
