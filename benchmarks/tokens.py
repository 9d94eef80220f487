"""Time and peak memory against the number of tokens: `python benchmarks/tokens.py [--tokens N ...] [--json FILE]`.

The forward and backward of the clipped policy loss from hidden states (linear_cases.py), by us, by eager code and by
the hosts (peers.py), each in a process of its own; beside them the time of the three bare matrix products, in blocks. A
contestant is not run where the next number of tokens would take more than 10 GiB or 6 seconds, if it grew as it did.
Three minutes on two cores. benchmarks/report.py turns the JSON into the figure and the table of docs/performance.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB, HIDDEN = 32000, 64
TOKENS = [1024 << i for i in range(7)]
FLOOR, BLOCK = "three bare products", 128  # so few tokens that their logits stay in the cache
MOST_MIB, MOST_SECONDS = 10 * 1024, 6.0


def main() -> None:
    args = _parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.only:
        alone(args.only, sorted(args.tokens), args.threads)
        return
    import peers
    from run import machine

    described = machine(args.threads, " ".join(["python", "benchmarks/tokens.py", *sys.argv[1:]]))
    result: dict[str, Any] = {"machine": described, "peers": peers.versions(), "vocab": VOCAB, "hidden": HIDDEN}
    result |= {"dtype": "float32", "rows": []}
    for contestant in _contestants():
        result["rows"] += _rows(contestant, args)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _contestants() -> dict[str, Any]:
    import linear_cases
    import peers
    from case import plain

    return {
        "linear_policy_loss": plain(linear_cases.fused_policy_loss),
        "linear_logps, then policy_loss": plain(linear_cases.logps_then_policy_loss),
        "eager": plain(linear_cases.eager_policy_loss),
        **peers.LINEAR_POLICY_LOSS,
        FLOOR: None,
    }


def _rows(contestant: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the numbers of tokens that its process has no line for, it ran out of memory in earnest."""
    tokens = [str(n) for n in sorted(args.tokens)]
    command = [sys.executable, __file__, "--only", contestant, "--threads", str(args.threads), "--tokens", *tokens]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"contestant"')]
    return rows + [_row(contestant, int(n), note="out of memory") for n in tokens[len(rows) :]]


def _row(contestant: str, tokens: int, **measured: Any) -> dict[str, Any]:
    return {"contestant": contestant, "tokens": tokens, "ms": None, "peak_extra_mib": None, **measured}


def alone(contestant: str, tokens: list[int], threads: int) -> None:
    """Prints a row for each number of tokens."""
    import torch

    torch.set_num_threads(threads)
    measure, run, note = _measure(contestant), list[dict[str, Any]](), ""
    for n in tokens:
        note = note or _too_much(run, n)
        row = _row(contestant, n, **({"note": note} if note else measure(n)))
        if row["ms"]:
            run.append(row)
        print(json.dumps(row), flush=True)
        print(row, file=sys.stderr, flush=True)


def _too_much(run: list[dict[str, Any]], tokens: int) -> str:
    """By the growth of the last two, where there are two: not all that is large grows, and not all growth goes on."""
    if len(run) < 2:
        return ""
    before, last = run[-2:]
    more = (tokens - last["tokens"]) / (last["tokens"] - before["tokens"])
    ms, peak = (
        (last[field] or 0.0) + more * max(0.0, (last[field] or 0.0) - (before[field] or 0.0))
        for field in ("ms", "peak_extra_mib")
    )
    if peak > min(MOST_MIB, _available_mib()):
        return "out of memory"
    return "too long" if ms > 1e3 * MOST_SECONDS else ""


def _measure(contestant: str) -> Callable[[int], dict[str, Any]]:
    import linear_cases
    import torch
    from case import Data, matmul_floor
    from timing import Work, peak_extra_mib, run_once

    def products(tokens: int) -> dict[str, Any]:
        block = matmul_floor(min(tokens, BLOCK), VOCAB, HIDDEN).work()
        run_once(block)
        return {"ms": 1e3 * sum(run_once(block).of("both") for _ in range(0, tokens, BLOCK))}

    if contestant == FLOOR:
        return products
    try:
        function = _contestants()[contestant]()
    except ImportError as error:
        note = f"not installed: {error}"
        return lambda _: {"note": note}

    def data(n: int) -> Data:
        return Data(linear_cases.policy_inputs(n, VOCAB, HIDDEN), linear_cases.WRT, (torch.ones(()),))

    def measure(tokens: int) -> dict[str, Any]:
        work, times = data(tokens).work(function), []

        def run() -> None:
            times.append(run_once(work).of("both"))

        peak = peak_extra_mib(Work(run))
        if peak is None:
            sys.exit("peak memory is measured on Linux only")
        while len(times) < 3 and sum(times) < 1:
            run()
        return {"ms": 1e3 * statistics.median(times), "peak_extra_mib": peak}

    run_once(data(64).work(function))  # what the first call of anything loads is not counted
    return measure


def _available_mib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "tokens.json", metavar="FILE")
    parser.add_argument("--only", metavar="CONTESTANT", help=argparse.SUPPRESS)  # in the process of its own
    return parser.parse_args()


if __name__ == "__main__":
    main()
