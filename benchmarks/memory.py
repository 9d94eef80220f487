"""Peak memory against the number of tokens: `python benchmarks/memory.py [--tokens N ...] [--json FILE]`.

The forward and backward of the clipped policy loss from hidden states (linear_cases.py), each in a process of its own.
benchmarks/report.py turns the JSON into the plot and the table of docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

VOCAB, HIDDEN = 32000, 64
TOKENS = [1024 << i for i in range(7)]
CONTESTANTS = {
    "linear_policy_loss": "fused_policy_loss",
    "linear_logps, then policy_loss": "logps_then_policy_loss",
    "eager": "eager_policy_loss",
}
MOST_MIB = 12 * 1024


def main() -> None:
    args = _parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.only:
        print(json.dumps(_measured(args.only, args.tokens[0])))
        return
    from run import machine

    described = machine(args.threads, " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]))
    rows = [row for contestant in CONTESTANTS for row in _rows(contestant, sorted(args.tokens), args.threads)]
    result = {"machine": described, "vocab": VOCAB, "hidden": HIDDEN, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def _rows(contestant: str, tokens: list[int], threads: int) -> list[dict[str, Any]]:
    """None from where it would take too much, if it grew with the number of tokens from what it took last."""
    rows: list[dict[str, Any]] = []
    last: tuple[int, float] | None = None
    for n in tokens:
        peak = None
        if last is None or last[1] * n / last[0] <= min(MOST_MIB, _available_mib()):
            command = [sys.executable, __file__, "--only", contestant, "--tokens", str(n), "--threads", str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peak = json.loads(done.stdout)
            last = n, peak
        print(f"{contestant}, {n} tokens: {peak and round(peak)} MiB", file=sys.stderr, flush=True)
        rows.append({"contestant": contestant, "tokens": n, "peak_extra_mib": peak})
    return rows


def _measured(contestant: str, tokens: int) -> float:
    import linear_cases
    import torch
    from case import Data
    from timing import peak_extra_mib, run_once

    function = getattr(linear_cases, CONTESTANTS[contestant])

    def data(n: int) -> Data:
        return Data(linear_cases.policy_inputs(n, VOCAB, HIDDEN), linear_cases.WRT, (torch.ones(()),))

    run_once(data(64).work(function))  # what the first call of anything loads is not counted
    peak = peak_extra_mib(data(tokens).work(function))
    if peak is None:
        sys.exit("peak memory is measured on Linux only")
    return peak


def _available_mib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory.json", metavar="FILE")
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)  # in the process of its own
    return parser.parse_args()


if __name__ == "__main__":
    main()
