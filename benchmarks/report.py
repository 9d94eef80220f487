"""Writes the generated tables of the documentation from benchmarks/results: `python benchmarks/report.py`.

cpu.json and linear.json (of run.py) become tables of docs/performance.md and summaries in README.md; tokens.json (of
tokens.py) becomes another table there and docs/tokens.png; gpu.json (of gpu.py), where it is, the tables of a GPU there
and docs/gpu_tokens.png; errors.json (of errors.py) the tables of docs/numerics.md and docs/logp_errors.png; demo.json
(of demo.py) the table of docs/trainer.md; aot.json (of aot.py) that of docs/triton.md.
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


def tokens(result: dict[str, Any]) -> str:
    """A column for each contestant, a line for each number of tokens."""
    m, everyone = result["machine"], by_contestant(result)
    counts = sorted({row["tokens"] for row in result["rows"] if "tokens" in row})
    where = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads"
    lines = [
        f"Milliseconds, and peak MiB, of one forward and backward; H = {result['hidden']}, V = {result['vocab']}, "
        f"{result['dtype']}. {where}, torch {m['torch']}{_versions(result.get('peers', {}))}, commit {m['commit']}. "
        f"Command: `{m['command']}`.",
        "",
        f"| | {' | '.join(map(str, counts))} |",
        f"|---|{'--:|' * len(counts)}",
    ]
    for name, of in everyone.items():
        cells = [_time_and_peak(of.get(n, {})) for n in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = {(row["contestant"], row["note"]): None for row in result["rows"] if row.get("note")}
    lines += [f"\n{STOPPED[note]}" for note in {note: None for _, note in notes if note in STOPPED}]
    lines += [f"\nNot run: {name}, {note}." for name, note in notes if note not in STOPPED]
    return "\n".join(lines)


STOPPED = {
    "out of memory": "x: it runs out of memory, or would take more than 10 GiB.",
    "too long": "-: not run, it would take more than 10 seconds.",
}


def _time_and_peak(row: dict[str, Any]) -> str:
    if row.get("ms") is None:
        return "x" if row.get("note", "").startswith("out of memory") else "-"
    peak = row.get("peak_extra_mib")
    return _digits(row["ms"]) if peak is None else f"{_digits(row['ms'])}, {peak:.0f}"


def by_contestant(result: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        if "tokens" in row:
            found.setdefault(row["contestant"], {})[row["tokens"]] = row
    return found


def _versions(packages: dict[str, str]) -> str:
    return "".join(f", {name} {version}" for name, version in packages.items())


NOT_YET = "Not measured yet: no machine with a GPU has run `python benchmarks/gpu.py`."


def gpu(result: dict[str, Any] | None) -> str:
    """As the tables of a CPU; without a result the sentence that says so."""
    if result is None:
        return NOT_YET
    m = result["machine"]
    lines = [
        f"### {m['gpu']}",
        "",
        f"Driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, Triton {m['triton']}{_versions(m['peers'])}, "
        f"commit {m['commit']}. Command: `{m['command']}`.",
    ]
    for name, case in result["cases"].items():
        rows = [row for row in result["rows"] if row["case"] == name]
        failed = ["", f"#### `{name}`", "", f"{case['op']}; {case['shape']}. It failed: {case.get('failed')}."]
        lines += ["", *_case(name, case, rows)] if rows else failed
    if "curve" in result:
        lines += ["", "#### Tokens", "", tokens(result["curve"] | {"machine": m, "peers": m["peers"]})]
    return "\n".join(lines)


HEAD = "linear_policy_loss_8192_151936_4096"


def features(result: dict[str, Any] | None) -> str:
    """Who can do what, and where a GPU was there the time, the peak and the error of TRL's own benchmark."""
    import features as matrix

    rows = [row for row in (result or {"rows": []})["rows"] if (row["case"], row["phase"]) == (HEAD, "both")]
    of = {row["competitor"]: row for row in rows}
    ours = next((name for name in of if name.startswith("rpp-kernels")), "")
    lines = [
        f"T = 8192, H = 4096, V = 151936, bfloat16, forward and backward of the policy loss. {'' if of else NOT_YET}",
        "",
        f"| | ms, peak MiB, error | {' | '.join(matrix.COLUMNS)} |",
        f"|---|---|{'---|' * len(matrix.COLUMNS)}",
    ]
    everyone = {"rpp-kernels, linear_policy_loss": (ours, matrix.ours())}
    everyone |= {f"{name} ({peer.version})": (peer.competitor, peer.facts) for name, peer in matrix.PEERS.items()}
    for name, (competitor, facts) in everyone.items():
        lines.append(f"| {name} | {_of_head(of.get(competitor))} | {' | '.join(facts)} |")
    sources = "; ".join(f"{name}: `{peer.source}`" for name, peer in matrix.PEERS.items())
    return "\n".join([*lines, "", f"Read in {sources}."])


def _of_head(row: dict[str, Any] | None) -> str:
    if row is None or row["note"]:
        return "" if row is None else row["note"]
    return f"{_digits(row['median_ms'])}, {row['peak_extra_mib']:.0f}, {row['error']:.0e}"


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
    write(ROOT / "docs" / "trainer.md", "demo", demo(json.loads((RESULTS / "demo.json").read_text())))
    write(ROOT / "docs" / "triton.md", "aot", aot(json.loads((RESULTS / "aot.json").read_text())))
    of_logps = json.loads((RESULTS / "errors.json").read_text())
    figures.logp_errors(of_logps, ROOT / "docs" / "logp_errors.png")
    write(ROOT / "docs" / "numerics.md", "errors", errors(of_logps))
    of_tokens = json.loads((RESULTS / "tokens.json").read_text())
    title = f"The policy loss from hidden states, H = {of_tokens['hidden']}, V = {of_tokens['vocab']}, two cores"
    figures.tokens(of_tokens, ROOT / "docs" / "tokens.png", title)
    write(ROOT / "docs" / "performance.md", "tokens", tokens(of_tokens))
    of_gpu = json.loads((RESULTS / "gpu.json").read_text()) if (RESULTS / "gpu.json").exists() else None
    write(ROOT / "docs" / "performance.md", "gpu", gpu(of_gpu))
    write(ROOT / "docs" / "performance.md", "features", features(of_gpu))
    if of_gpu and "curve" in of_gpu:
        curve = of_gpu["curve"]
        title = f"The policy loss from hidden states, H = {curve['hidden']}, V = {curve['vocab']}, {curve['dtype']}"
        figures.tokens(curve, ROOT / "docs" / "gpu_tokens.png", f"{title}, {of_gpu['machine']['gpu']}")
