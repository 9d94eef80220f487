"""Writes the generated tables and figures of the documentation: `python benchmarks/report.py`.

TABLES and FIGURES, below, say which of benchmarks/results becomes what. Of a page only what stands between a table's
two markers is replaced.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import model

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


OURS = "rpp-kernels"
OTHERS = ("eager", "torch.compile", "torch", "TRL", "verl", "OpenRLHF", "Liger")  # how names of competitors begin


def summary(result: dict[str, Any]) -> str:
    """One line for each case, of its whole, that is forward and backward where there is one; and one for another way of
    ours where it is faster. Of several forms of a competitor the fastest counts."""
    m, ways = result["machine"], _ways(result)
    shown = [other for other in OTHERS if any(way["others"][other] for way in ways)]
    lines = [
        f"{m['cpu']}, {m['threads']} threads, kernels for {m['capability']}, torch {m['torch']}, commit {m['commit']}; "
        "medians of one interleaved run, the fastest form of each.",
        "",
        f"| case | shape | ours, ms | of floor's speed | {' | '.join(shown)} |",
        f"|---|---|--:|--:|{'--:|' * len(shown)}",
    ]
    for way in ways:
        ratios = [f"{_digits(way['others'][other])}x" if way["others"][other] else "" for other in shown]
        shape = f"{result['cases'][way['case']]['shape']}, {PHASES[way['phase']]}"
        cells = [f"`{way['case']}`{way['how']}", shape, _digits(way["median_ms"]), f"{way['floor_share']:.0%}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    slower = [
        f"`{way['case']}`{way['how']} than {other}"
        for way in ways
        for other, ratio in way["others"].items()
        if ratio and ratio < 0.95
    ]
    return "\n".join(lines) + (f"\n\nWe are slower here: {', '.join(slower)}." if slower else "")


# What was aimed at: case, against whom, how many times as fast; against the floor the share of its speed.
GOALS = [
    ("logps_fp32", "eager", 5.0),
    ("logps_fp32", "torch.compile", 3.5),
    ("logps_fp32", "floor", 0.6),
    ("logps_entropy_fp32", "eager", 12.0),
    ("logps_entropy_fp32", "floor", 0.6),
    ("policy_loss_small", "eager", 5.0),
    ("reinforce_pp_advantages", "verl", 100.0),
    ("reinforce_pp_advantages", "OpenRLHF", 100.0),
]


def goals(result: dict[str, Any]) -> str:
    """Wanted and reached; and what the floor itself would reach, which is as fast as anything can be."""
    lines = ["| case | against | wanted | reached | the floor would reach |", "|---|---|--:|--:|--:|"]
    for case, other, wanted in GOALS:
        for way in _ways(result):
            if way["case"] == case:
                reached = way["floor_share"] if other == "floor" else way["others"][other]
                most = "" if other == "floor" else f"{_digits(reached / way['floor_share'])}x"
                how = f"`{case}`{way['how']}"
                lines.append(f"| {how} | {other} | {_digits(wanted)}x | {_digits(reached)}x | {most} |")
    return "\n".join(lines)


def _ways(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours in each case, and the other ways of ours that are faster, with what others take in its time."""
    found = []
    for name, case in result["cases"].items():
        whole = list(case["amount"])[-1]
        rows = [r for r in result["rows"] if (r["case"], r["phase"]) == (name, whole) and not r["note"]]
        best = {other: _fastest(rows, other) for other in OTHERS}
        for row in rows:
            if row["competitor"] == OURS or (row["competitor"].startswith(OURS) and row["times_ours"] < 0.9):
                others = {other: ratio and ratio / row["times_ours"] for other, ratio in best.items()}
                found.append(row | {"how": row["competitor"].removeprefix(OURS), "others": others})
    return found


def _fastest(rows: list[dict[str, Any]], other: str) -> float | None:
    """Its time in ours."""
    return min(
        (r["times_ours"] for r in rows if re.match(rf"{re.escape(other)}(,? |$)", r["competitor"])), default=None
    )


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
    "too long": "-: not run, it would take more than 6 seconds.",
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


def scaling(result: dict[str, Any]) -> str:
    """For each line the exponents, and the times at its ends; then one thread against two."""
    m = result["machine"]
    lines = [
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}. Command: `{m['command']}`.",
        "",
        "| function | grows | fixed | fitted from | | exponent | ms at the smallest | at the largest | x our time |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for line in result["lines"]:
        first, last = line["points"][0], line["points"][-1]
        for name, fit in line["fits"].items():
            cells = [
                f"`{line['name']}`",
                f"{line['axis']}, {first['size']} to {last['size']}",
                line["fixed"],
                str(fit["from"]),
                name,
                f"{fit['exponent']:.2f}",
                _digits(first["ms"][name][0]),
                _digits(last["ms"][name][0]),
                f"{last['ms'][name][0] / last['ms']['rpp-kernels'][0]:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def threads(result: dict[str, Any]) -> str:
    if not result["threads"]:
        return "Not measured: `scaling.py` ran on one thread."
    lines = ["| function | size | | ms, 1 thread | ms, 2 threads | faster by |", "|---|---|---|--:|--:|--:|"]
    for row in result["threads"]:
        cells = [f"`{row['name']}`", row["sizes"], row["contestant"], *(_digits(ms[0]) for ms in row["ms"].values())]
        lines.append("| " + " | ".join([*cells, f"{row['speedup']:.2f}x"]) + " |")
    return "\n".join(lines)


def examples() -> str:
    """What the model answers for a batch on this CPU's scale and for one of a GPU."""
    asked = [
        (model.Shape(8192, 32000, 1024), "cpu", 2.0),
        (model.Shape(16384, 151936, 3584, "bfloat16"), "h100", 24.0),
    ]
    return "```\n" + "\n\n".join(model.answer(shape, device, gib * model.GIB) for shape, device, gib in asked) + "\n```"


def instructions(result: dict[str, Any]) -> str:
    """Of each kernel's plain call, instructions for each element."""
    by = result["made_by"]
    lines = [
        f"GCC {by['compiler']}, {by['valgrind']}, commit {result['machine']['commit']}; {len(result['kernels'])} calls "
        "in all.",
        "",
        "| kernel | elements | AVX2 | plain |",
        "|---|--:|--:|--:|",
    ]
    for name, elements in result["elements"].items():
        if "," not in name:
            counts = (result["kernels"][f"{isa} {name}"] / elements for isa in ("avx2", "plain"))
            lines.append(f"| `{name}` | {elements} | {' | '.join(map(_digits, counts))} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- whole steps: steps.py and curves.py


FASTER, LESS_MEMORY = 1.5, 1 / 3  # what was aimed at


def steps(result: dict[str, Any]) -> str:
    """What was run, how ours compares, what everyone took, and where the time went."""
    m, rows = result["machine"], result["rows"]
    sizes = {size["name"]: size for size in result["sizes"]}
    pairs = [(row, _naive(row, rows)) for row in rows if row["contestant"] != "naive"]
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['system']}, kernels for {m['capability']}, Python {m['python']}, "
        f"torch {m['torch']}, commit {m['commit']}. Command: `{m['command']}`.",
        "",
        "| size | what | layers, H, V | parameters, head | completions x S, tokens | a step of | threads |",
        "|---|---|---|---|---|--:|--:|",
        *(_size(size) for size in sizes.values()),
        "",
        "How ours compares, and whether it is the same:",
        "",
        "| size | algorithm | update, naive / ours | at most | policy part, naive / ours | head's peak, ours / naive | "
        "update's peak, ours / naive | loss differs by | gradient differs by |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_comparison(ours, naive) for ours, naive in pairs),
        "",
        _against_goal(pairs),
        "",
        "What everyone took:",
        "",
        "| size | algorithm | | rounds | update s | p20 to p80 | tokens/s | policy part s | head's peak MiB | "
        "update's peak MiB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_taken(row) for row in rows),
        "",
        "Where the time of a step went, in ms:",
        "",
        "| size | algorithm | | rollout | reward | log-probs, body | log-probs | advantages | loss, body | loss | "
        "optimizer |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_broken_down(row, sizes[row["size"]]) for row in rows),
    ]
    return "\n".join(lines)


def _naive(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = (row["size"], row["algorithm"], "naive")
    return next(r for r in rows if (r["size"], r["algorithm"], r["contestant"]) == wanted)


def _size(size: dict[str, Any]) -> str:
    cells = [
        size["name"],
        size["why"],
        f"{size['layers']}, {size['hidden']}, {size['vocab']}",
        f"{size['parameters'] / 1e6:.3g}M, {size['head_share']:.0%}",
        f"{size['sequences']} x {size['completion']}, {size['tokens']}",
        str(min(size["train_batch_size"], size["sequences"])),
        str(size["threads"]),
    ]
    return f"| {' | '.join(cells)} |"


def _comparison(ours: dict[str, Any], naive: dict[str, Any]) -> str:
    def share(name: str) -> str:
        return "" if ours[name] is None else f"{ours[name] / naive[name]:.2f}"

    times, difference = ours["naive_over_this"], ours["difference"]
    update, policy_part = (naive["seconds"][what]["median"] for what in ("update", "policy part"))
    cells = [
        ours["size"],
        ours["algorithm"],
        f"{times['update']:.2f}",
        f"{update / (update - policy_part):.2f}",
        f"{times['policy part']:.2f}",
        share("head_peak_mib"),
        share("update_peak_mib"),
        f"{difference['loss']:.0e}",
        f"{difference['gradient']:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def _against_goal(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    reached, missed = [], []
    for ours, naive in pairs:
        name = f"{ours['size']} {ours['algorithm']}"
        faster, memory = ours["naive_over_this"]["update"], (ours["head_peak_mib"] or 0) / (naive["head_peak_mib"] or 1)
        if faster >= FASTER and memory <= LESS_MEMORY:
            reached.append(name)
        else:
            missed.append(f"{name} ({faster:.2f} x, {memory:.2f})")
    return (
        f"The goal was an update {FASTER} times as fast with a third of the head's peak. Reached: "
        f"{', '.join(reached) or 'nowhere'}. Missed: {', '.join(missed) or 'nowhere'}."
    )


def _taken(row: dict[str, Any]) -> str:
    update = row["seconds"]["update"]
    cells = [
        row["size"],
        row["algorithm"],
        row["contestant"],
        str(row["rounds"]),
        _digits(update["median"]),
        f"{_digits(update['p20'])} to {_digits(update['p80'])}",
        _digits(row["tokens_per_second"]),
        _digits(row["seconds"]["policy part"]["median"]),
        *("" if row[name] is None else _digits(row[name]) for name in ("head_peak_mib", "update_peak_mib")),
    ]
    return f"| {' | '.join(cells)} |"


def _broken_down(row: dict[str, Any], size: dict[str, Any]) -> str:
    phases = "log-probs, body", "log-probs", "advantages", "loss, body", "loss", "optimizer"
    seconds = [size["rollout"], size["reward"], *(row["seconds"][phase]["median"] for phase in phases)]
    cells = [row["size"], row["algorithm"], row["contestant"], *(_digits(1e3 * x) for x in seconds)]
    return f"| {' | '.join(cells)} |"


def curves(result: dict[str, Any]) -> str:
    """One line for each seed and contestant."""
    m = result["machine"]
    lines = [
        f"{result['algorithm']}; {m['cpu']}, {m['threads']} thread, torch {m['torch']}, commit {m['commit']}. "
        f"Command: `{m['command']}`.",
        "",
        "| seed | | steps | mean score, first | last ten | accuracy before | after | rollouts differ from step | "
        "ms a step | of it the update |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        rewards, last = row["rewards"], row["rewards"][-10:]
        cells = [
            str(row["seed"]),
            row["contestant"],
            str(len(rewards)),
            f"{rewards[0]:.3f}",
            f"{sum(last) / len(last):.3f}",
            f"{row['accuracy_before']:.3f}",
            f"{row['accuracy_after']:.3f}",
            "none" if row["parted_at"] is None else str(row["parted_at"]),
            *(_digits(1e3 * statistics.median(row[name])) for name in ("seconds", "update_seconds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
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


def _figure_of_tokens(result: dict[str, Any], file: Path) -> None:
    title = f"The policy loss from hidden states, H = {result['hidden']}, V = {result['vocab']}, two cores"
    figures.tokens(result, file, title)


def _figure_of_gpu(result: dict[str, Any], file: Path) -> None:
    if "curve" in result:
        curve = result["curve"]
        title = f"The policy loss from hidden states, H = {curve['hidden']}, V = {curve['vocab']}, {curve['dtype']}"
        figures.tokens(curve, file, f"{title}, {result['machine']['gpu']}")


# Result -> the tables that are made of it: page, name and function.
TABLES: dict[str, list[tuple[str, str, Callable[[Any], str]]]] = {
    "cpu": [
        ("docs/performance.md", "cpu", markdown),
        ("docs/performance.md", "goals", goals),
        ("README.md", "summary", summary),
    ],
    "linear": [("docs/performance.md", "linear", markdown), ("README.md", "linear", summary)],
    "tokens": [("docs/performance.md", "tokens", tokens)],
    "gpu": [("docs/performance.md", "gpu", gpu), ("docs/performance.md", "features", features)],
    "errors": [("docs/numerics.md", "errors", errors)],
    "demo": [("docs/trainer.md", "demo", demo)],
    "aot": [("docs/triton.md", "aot", aot)],
    "steps": [("docs/steps.md", "steps", steps)],
    "curves": [("docs/steps.md", "curves", curves)],
    "scaling": [
        ("docs/scaling.md", "scaling", scaling),
        ("docs/scaling.md", "threads", threads),
        ("docs/scaling.md", "examples", lambda _: examples()),
        ("docs/scaling.md", "model", lambda _: model.check_table()),
    ],
    "instructions": [("docs/scaling.md", "instructions", instructions)],
}
FIGURES: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "tokens": ("tokens", _figure_of_tokens),
    "gpu": ("gpu_tokens", _figure_of_gpu),
    "errors": ("logp_errors", figures.logp_errors),
    "steps": ("steps", figures.steps),
    "curves": ("curves", figures.curves),
    "scaling": ("scaling", figures.scaling),
}


def main() -> None:
    """What needs a GPU may not have been measured: its tables then say so, and it has no figure."""
    for name, tables in TABLES.items():
        file = RESULTS / f"{name}.json"
        result = json.loads(file.read_text()) if name != "gpu" or file.exists() else None
        for page, table, function in tables:
            write(ROOT / page, table, function(result))
        if name in FIGURES and result is not None:
            picture, draw = FIGURES[name]
            draw(result, ROOT / "docs" / f"{picture}.png")


if __name__ == "__main__":
    main()
