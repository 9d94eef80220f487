"""Writes the generated tables of the documentation from benchmarks/results: `python benchmarks/report.py`.

cpu.json and linear.json (of run.py) become tables of docs/performance.md and summaries in README.md; memory.json (of
memory.py) becomes another table there and docs/linear_memory.png; demo.json (of demo.py) the table of docs/trainer.md;
aot.json (of aot.py) that of docs/triton.md.
Only what stands between a page's two markers is replaced.
"""

import json
import re
from pathlib import Path
from typing import Any

import figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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


def summary(result: dict[str, Any]) -> str:
    """One line for each case: its whole, that is forward and backward where there is one."""
    m = result["machine"]
    lines = [
        f"{m['cpu']}, {m['threads']} threads, kernels for {m['capability']}, torch {m['torch']}, commit {m['commit']}; "
        "medians of one interleaved run.",
        "",
        "| case | shape | ms | the time that others take | of floor's speed |",
        "|---|---|--:|---|--:|",
    ]
    for name, case in result["cases"].items():
        whole = list(case["amount"])[-1]
        rows = {
            r["competitor"]: r for r in result["rows"] if (r["case"], r["phase"]) == (name, whole) and not r["note"]
        }
        ours, _ = rows.pop("rpp-kernels"), rows.pop("floor")
        others = "; ".join(f"{who} {_digits(row['times_ours'])}x" for who, row in rows.items())
        shape = f"{case['shape']}, {PHASES[whole]}"
        lines.append(f"| `{name}` | {shape} | {_digits(ours['median_ms'])} | {others} | {ours['floor_share']:.0%} |")
    return "\n".join(lines)


def memory(result: dict[str, Any]) -> str:
    """One line for each number of tokens."""
    m, peak_of = result["machine"], peaks(result)
    lines = [
        f"Peak MiB of one forward and backward, results and gradients included; H = {result['hidden']}, "
        f"V = {result['vocab']}, float32. The last column is the size of one copy of the logits. "
        f"{m['system']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}. Command: `{m['command']}`.",
        "",
        f"| T | {' | '.join(peak_of)} | T x V logits |",
        f"|--:|{'--:|' * len(peak_of)}--:|",
    ]
    for tokens in sorted({row["tokens"] for row in result["rows"]}):
        cells = ["x" if of[tokens] is None else f"{of[tokens]:.0f}" for of in peak_of.values()]
        lines.append(f"| {tokens} | {' | '.join(cells)} | {logits_mib(result, tokens):.0f} |")
    if any(row["peak_extra_mib"] is None for row in result["rows"]):
        lines += ["", "x: not run, it would take more than 12 GiB."]
    return "\n".join(lines)


def peaks(result: dict[str, Any]) -> dict[str, dict[int, float | None]]:
    found: dict[str, dict[int, float | None]] = {}
    for row in result["rows"]:
        found.setdefault(row["contestant"], {})[row["tokens"]] = row["peak_extra_mib"]
    return found


def logits_mib(result: dict[str, Any], tokens: int) -> float:
    return float(4 * tokens * result["vocab"] / 2**20)


def demo(result: dict[str, Any]) -> str:
    m = result["machine"]
    lines = [
        f"{m['cpu']}, {m['threads']} thread, torch {m['torch']}, commit {m['commit']}. Command: `{m['command']}`.",
        "",
        "| seed | accuracy before RL | after RL | seconds in all | CPU seconds | peak memory MB |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result["rows"]:
        cells = [f"{r['before']:.3f}", f"{r['after']:.3f}", *(f"{r[k]:.0f}" for k in ("seconds", "cpu_seconds"))]
        lines.append(f"| {r['seed']} | {' | '.join(cells)} | {r['peak_memory_mb']:.0f} |")
    return "\n".join(lines)


def aot(result: dict[str, Any]) -> str:
    """One line for each kernel and dtype: of the variants compiled the most registers and the least occupancy."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    archs = list(dict.fromkeys(row["arch"] for row in result["rows"]))
    lines = [
        f"Compiled by Triton {result['triton']}. Each cell: registers of a thread, share of a multiprocessor's warps.",
        "",
        f"| kernel | dtype | variants | {' | '.join(archs)} |",
        f"|---|---|--:|{'--:|' * len(archs)}",
    ]
    for (kernel, dtype), rows in sorted(groups.items()):
        of = {arch: [row for row in rows if row["arch"] == arch] for arch in archs}
        cells = [
            f"{max(row['registers'] for row in some)}, {min(row['occupancy'] for row in some):.0%}" if some else ""
            for some in of.values()
        ]
        lines.append(f"| `{kernel}` | {dtype} | {max(map(len, of.values()))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors(result: dict[str, Any]) -> str:
    """Errors of log-probs by path and spread, and the ratios that follow."""
    m, size = result["machine"], result["size"]
    lines = [
        f"{size['tokens']} tokens, V = {size['vocab']}, H = {size['hidden']}, bfloat16 operands. {m['cpu']}, "
        f"torch {m['torch']}, commit {m['commit']}. Command: `{m['command']}`.",
        "",
        "| logits' deviation, largest | log-probs by | median error | 99% | largest |",
        "|---|---|--:|--:|--:|",
    ]
    for row in result["errors"]:
        cells = [f"{row['spread']}, {row['largest_logit']:.0f}", row["path"]]
        cells += [f"{row[k]:.0e}" for k in ("median", "p99", "max")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| logits' deviation | old log-probs by | exactly 1 | 1% to 99% of ratios | farthest |",
        "|--:|---|--:|--:|--:|",
    ]
    for row in result["ratios"]:
        cells = [f"{row['spread']}", row["old"], f"{row['exactly_1']:.0%}", f"{row['p1']:.3f} to {row['p99']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {row['farthest']:.3f} |")
    return "\n".join(lines)


def replaced(page: Path, name: str, text: str) -> str:
    """The page with this text between the markers."""
    begin, end = f"<!-- generated by benchmarks/report.py: {name} -->", "<!-- end -->"
    before = page.read_text()
    after, count = re.subn(f"({begin}\n).*?({end})", lambda m: f"{m[1]}{text}\n{m[2]}", before, flags=re.S)
    if count != 1:
        raise ValueError(f"{page} has {count} places for the table {name!r}, wanted one")
    return after


def write(page: Path, name: str, text: str) -> None:
    page.write_text(replaced(page, name, text))


if __name__ == "__main__":
    cpu = json.loads((RESULTS / "cpu.json").read_text())
    write(ROOT / "docs" / "performance.md", "cpu", markdown(cpu))
    write(ROOT / "README.md", "summary", summary(cpu))
    linear = json.loads((RESULTS / "linear.json").read_text())
    write(ROOT / "docs" / "performance.md", "linear", markdown(linear))
    write(ROOT / "README.md", "linear", summary(linear))
    measured = json.loads((RESULTS / "memory.json").read_text())
    figures.memory(measured, ROOT / "docs" / "linear_memory.png")
    write(ROOT / "docs" / "performance.md", "memory", memory(measured))
    write(ROOT / "docs" / "trainer.md", "demo", demo(json.loads((RESULTS / "demo.json").read_text())))
    write(ROOT / "docs" / "triton.md", "aot", aot(json.loads((RESULTS / "aot.json").read_text())))
    of_logps = json.loads((RESULTS / "errors.json").read_text())
    figures.logp_errors(of_logps, ROOT / "docs" / "logp_errors.png")
    write(ROOT / "docs" / "numerics.md", "errors", errors(of_logps))
