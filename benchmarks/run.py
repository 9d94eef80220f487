"""Times the cases: `python benchmarks/run.py [--case NAME ...] [--skip NAME ...] [--rounds N] [--json FILE]`.

Each case is checked against the float64 specification first, gradients included, and nothing is printed when anyone who
would be timed is wrong. `benchmarks/report.py` turns the JSON into the tables of docs/performance.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from case import Case, Data, Function
    from timing import Sample, Work

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One competitor in one phase. Times in milliseconds; ratios are medians over rounds."""

    case: str
    competitor: str
    phase: str
    note: str = ""  # why there are no numbers
    rounds: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rate: float | None = None  # the floor's bytes or flops over the median, in 1e9 a second
    floor_share: float | None = None
    times_ours: float | None = None
    # In the last phase, of the whole run:
    peak_extra_mib: float | None = None
    error: float | None = None  # relative to the largest value, gradients included


def main() -> None:
    args = _parse()
    # GNU OpenMP reads this once, when torch is loaded.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import cases
    import report
    import torch

    torch.set_num_threads(args.threads)
    for asked in [*args.case, *args.skip]:
        if not any(name.startswith(asked) for name in cases.BY_NAME):
            sys.exit(f"unknown case {asked}; there are {', '.join(cases.BY_NAME)}")
    left = [case for case in cases.CASES if not case.name.startswith(tuple(args.skip))]
    chosen = [case for case in left if not args.case or case.name.startswith(tuple(args.case))]
    described_machine = machine(args.threads, " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]))
    rows = [row for case in chosen for row in measure(case, args.rounds)]
    described = {case.name: {k: getattr(case, k) for k in ("op", "shape", "why")} for case in chosen}
    for case in chosen:
        described[case.name] |= {"floor": case.floor.what, "unit": case.floor.unit, "amount": case.floor.amount}
    result = {
        "machine": described_machine,
        "cases": described,
        "rows": [asdict(row) for row in rows],
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report.markdown(result))


def load(case: "Case") -> tuple[dict[str, "Function"], dict[str, str]]:
    """The competitors that run here, and of the others why they do not."""
    functions, notes = {}, dict(case.left_out)
    for name, loader in case.competitors.items():
        try:
            functions[name] = loader()
        except ImportError as error:
            notes[name] = f"not installed: {error}"
    return functions, notes


def check(case: "Case", data: "Data", works: "dict[str, Work]") -> tuple[dict[str, float], dict[str, str]]:
    """The errors of those who agree with the specification, gradients included, and what is wrong with the others.

    Exits where it is us: benchmark only on green. Of the statistics beside a result a host may give fewer, or none.
    """
    from case import OURS, rows
    from timing import relative_error, results

    exact = results(data.sample(case.check_every).work(case.spec))
    errors, wrong = {}, {}
    for name, work in works.items():
        try:
            got = results(work)
            given = max(len(got.outputs), len(data.grads), 1)
            wanted = [*exact.outputs[:given], *exact.gradients]
            error = relative_error([rows(x, case.check_every) for x in (*got.outputs, *got.gradients)], wanted)
            if error <= case.tolerance:
                errors[name] = error
            else:
                wrong[name] = f"wrong: error {error:.1e} where {case.tolerance:.0e} is allowed"
        except Exception as failure:  # of a host: what runs here is for it to say
            wrong[name] = f"fails: {type(failure).__name__}: {failure}"[:300]
        if name in wrong and name.startswith(OURS):
            sys.exit(f"{case.name}: {name} is {wrong[name]}")
    return errors, wrong


def measure(case: "Case", rounds: int | None) -> list[Row]:
    from timing import interleave, peak_extra_mib

    print(case.name, file=sys.stderr, flush=True)
    functions, notes = load(case)
    data = case.data()
    works = {name: data.work(function) for name, function in functions.items()}
    errors, wrong = check(case, data, works)
    works = {name: works[name] for name in errors}
    notes |= wrong
    samples = interleave({"floor": case.floor.work(), **works}, rounds=rounds)
    peaks = {name: peak_extra_mib(work) for name, work in works.items()}
    whole = case.phases[-1]
    rows = [
        row_of(case, name, phase, samples, *((peaks.get(name), errors.get(name)) if phase == whole else ()))
        for phase in case.phases
        for name in samples
    ]
    return rows + [Row(case.name, name, phase, note) for name, note in notes.items() for phase in case.phases]


def row_of(
    case: "Case",
    name: str,
    phase: str,
    samples: "dict[str, list[Sample]]",
    peak: float | None = None,
    error: float | None = None,
) -> Row:
    from case import OURS
    from timing import median_ratio, spread

    seconds = {who: [sample.of(phase) for sample in samples[who]] for who in (name, "floor", OURS)}
    median, p20, p80 = spread(seconds[name])
    return Row(
        case=case.name,
        competitor=name,
        phase=phase,
        rounds=len(seconds[name]),
        median_ms=1e3 * median,
        p20_ms=1e3 * p20,
        p80_ms=1e3 * p80,
        rate=case.floor.amount[phase] / median / 1e9,
        floor_share=median_ratio(seconds["floor"], seconds[name]),
        times_ours=median_ratio(seconds[name], seconds[OURS]),
        peak_extra_mib=peak,
        error=error,
    )


def machine(threads: int, command: str) -> dict[str, Any]:
    import torch

    from rpp_kernels.backends import native

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "capability": native.cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": command,
    }


def _cpu_model() -> str:
    """Virtual machines hide the marketing name, so family and model stand beside it."""
    fields = dict.fromkeys(("model name", "cpu family", "model"), "?")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain", "-uno", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="names or how they begin; default: all")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="the same, of cases to leave out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default: as many as fit into six seconds a case, 5 to 100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
