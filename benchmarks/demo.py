"""Runs the trainer's demo for several seeds: `python benchmarks/demo.py [--seeds 0 1 2] [--json FILE]`.

What README promises of `make demo`, as numbers: held-out accuracy before and after RL, and the time it took.
benchmarks/report.py turns the JSON into the table of docs/trainer.md.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "demo.json", metavar="FILE")
    args = parser.parse_args()
    from rpp_trainer.config import Config
    from rpp_trainer.train import train
    from run import machine

    described = machine(1, " ".join(["python", "benchmarks/demo.py", *sys.argv[1:]]))
    rows = []
    for seed in args.seeds:
        started, cpu_started = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            path = train(Config(seed=seed, output_dir=folder)).path
            metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        rows.append(
            {
                "seed": seed,
                "before": metrics[0]["held_out_accuracy"],
                "after": metrics[-1]["held_out_accuracy"],
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu_started,
                "peak_memory_mb": metrics[-1]["peak_memory_mb"],
            }
        )
    args.json.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
