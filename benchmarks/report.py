"""Writes the generated tables of the documentation from benchmarks/results: `python benchmarks/report.py`.

cpu.json and linear.json (of run.py) become tables of docs/performance.md and summaries in README.md; memory.json (of
memory.py) becomes another table there and docs/linear_memory.png; demo.json (of demo.py) the table of docs/trainer.md;
aot.json (of aot.py) that of docs/triton.md. scaling.json (of scaling.py), instructions.json (of gate.py) and the
predictions of model.py become docs/scaling.md and its figure.
aot.json (of aot.py) that of docs/triton.md; steps.json and curves.json (of steps.py and curves.py) tables and figures
of docs/steps.md.
Only what stands between a page's two markers is replaced.
"""

import json
import re
import statistics
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
    measured = json.loads((RESULTS / "scaling.json").read_text())
    figures.scaling(measured, ROOT / "docs" / "scaling.png")
    write(ROOT / "docs" / "scaling.md", "scaling", scaling(measured))
    write(ROOT / "docs" / "scaling.md", "threads", threads(measured))
    write(ROOT / "docs" / "scaling.md", "examples", examples())
    write(ROOT / "docs" / "scaling.md", "model", model.check_table())
    write(
        ROOT / "docs" / "scaling.md",
        "instructions",
        instructions(json.loads((RESULTS / "instructions.json").read_text())),
    )
    whole_steps = json.loads((RESULTS / "steps.json").read_text())
    figures.steps(whole_steps, ROOT / "docs" / "steps.png")
    write(ROOT / "docs" / "steps.md", "steps", steps(whole_steps))
    learning = json.loads((RESULTS / "curves.json").read_text())
    figures.curves(learning, ROOT / "docs" / "curves.png")
    write(ROOT / "docs" / "steps.md", "curves", curves(learning))
