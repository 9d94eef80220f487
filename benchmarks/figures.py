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
