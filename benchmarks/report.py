"""JSON of run.py -> the tables of docs/performance.md: `python benchmarks/report.py [benchmarks/results/*.json]`.

Only what stands between the two markers is replaced.
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- begin: written by benchmarks/report.py -->", "<!-- end: written by benchmarks/report.py -->"
PHASES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def markdown(result: dict[str, Any]) -> str:
    """One section for the machine, one table for each case."""
    m = result["machine"]
    lines = [
        f"### {m['cpu']}, {m['threads']} threads",
        "",
        f"{m['cores']} cores, {m['system']}, kernels for {m['capability']}, Python {m['python']}, torch {m['torch']}, "
        f"commit {m['commit']}. Command: `{m['command']}`.",
    ]
    for name, case in result["cases"].items():
        lines += ["", *_case(name, case, [row for row in result["rows"] if row["case"] == name])]
    return "\n".join(lines)


def _case(name: str, case: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    rounds = max(row["rounds"] for row in rows)
    amounts = ", ".join(f"{PHASES[phase]} {x / 1e9:.3g} {case['unit']}" for phase, x in case["amount"].items())
    timed = [row for row in rows if not row["note"]]
    return [
        f"#### `{name}`",
        "",
        f"{case['op']}; {case['shape']}: {case['why']}. Floor: {case['floor']} ({amounts}). {rounds} rounds.",
        "",
        f"| phase | | median ms | p20 to p80 | {case['unit']}/s | of floor's speed | x our time | peak MiB | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(row) for row in timed),
        *(
            f"\nNot run: {who}, {note}."
            for who, note in {r["competitor"]: r["note"] for r in rows if r["note"]}.items()
        ),
    ]


def _row(row: dict[str, Any]) -> str:
    cells = [
        PHASES[row["phase"]],
        row["competitor"],
        _digits(row["median_ms"]),
        f"{_digits(row['p20_ms'])} to {_digits(row['p80_ms'])}",
        _digits(row["rate"]),
        f"{row['floor_share']:.0%}",
        f"{row['times_ours']:.2f}",
        "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}",
        "" if row["error"] is None else f"{row['error']:.0e}",
    ]
    return "| " + " | ".join(cells) + " |"


def _digits(x: float) -> str:
    """Three of them."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def write(results: list[dict[str, Any]], page: Path = PAGE) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no pair of markers to write between")
    page.write_text("\n\n".join([before + begin, *map(markdown, results), end + after]))


if __name__ == "__main__":
    paths = [Path(path) for path in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    write([json.loads(path.read_text()) for path in paths])
