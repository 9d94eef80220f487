"""How cost grows: `python benchmarks/scaling.py [--only NAME ...] [--json FILE]`, some four minutes on two cores.

One size at a time grows and the others stay: tokens, vocabulary and hidden size of a head, tokens and vocabulary of
logits, the size of groups, the length of sequences. Ours, eager code and a floor of bare library calls take turns, as
in run.py. Of each an exponent is fitted in log-log over the larger half of the sizes, where the fixed cost of a call no
longer counts: 1 is linear. Then the same on one thread and on two, and the peak memory of a head at a few sizes, which
benchmarks/model.py is checked against. benchmarks/report.py turns the JSON into docs/scaling.md and its figure.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from case import Case
    from timing import Work

HERE = Path(__file__).resolve().parent
LEAST, MOST = 5, 25  # rounds
SECONDS = 1.0  # of rounds beyond the least, for each size
T, V, H = 512, 16384, 512  # of a head, while one of them grows
SEQUENCES, SCORES = 64, 1 << 18
THEN = "rpp-kernels, linear_logps then policy_loss"
# (T, V, H, dtype) of the peaks: more tokens, a larger vocabulary, a larger hidden size, operands of half the width.
PEAKS = [
    (512, 32000, 256, "float32"),
    (4096, 32000, 256, "float32"),
    (1024, 65536, 256, "float32"),
    (1024, 32000, 1024, "float32"),
    (4096, 32000, 256, "bfloat16"),
    (1024, 32000, 1024, "bfloat16"),
]


@dataclass(frozen=True)
class Line:
    """A case of each size."""

    name: str
    axis: str
    fixed: str
    sizes: Sequence[int]
    case: "Callable[[int], Case]"
    alone: int  # the size at which one thread is compared with two


def main() -> None:
    args = _parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.peak:
        print(json.dumps(_peak(*json.loads(args.peak))))
        return
    from run import machine

    chosen = [line for line in lines() if not args.only or line.name.startswith(tuple(args.only))]
    described = machine(args.threads, " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]))
    measured = [_measured(line) for line in chosen]
    each = {line.name: line for line in chosen}.values()
    threads = [row for line in each for row in _threads(line, args.threads)] if args.threads > 1 else []
    peaks = [] if args.only else list(_peaks())
    result = {"machine": described, "lines": measured, "threads": threads, "peaks": peaks}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in measured:
        fits = ", ".join(f"{name} {fit['exponent']:.2f}" for name, fit in line["fits"].items())
        print(f"{line['name']} along {line['axis']}: {fits}")


def lines() -> list[Line]:
    import torch
    from case import OURS, Case, Data, memory_floor, plain
    from cases import BY_NAME, eager_logps_entropy, logps_case
    from linear_cases import WRT, matmul_floor, policy_inputs

    import rpp_kernels as rpp
    from rpp_kernels.testing import make_batch

    def head(t: int = T, v: int = V, h: int = H) -> Case:
        case = BY_NAME["linear_policy_loss"]
        return replace(
            case,
            data=lambda: Data(policy_inputs(t, v, h), WRT, (torch.ones(()),)),
            floor=matmul_floor(t, v, h, "both"),
            competitors={name: case.competitors[name] for name in (OURS, THEN, "eager")},
        )

    def logits(rows: int = 256, vocab: int = 16384) -> Case:
        eager = {"eager": plain(eager_logps_entropy)}
        return logps_case("logps", torch.float32, 2, "", eager, rows, vocab)

    def group_advantages(size: int) -> Case:
        def eager(scores: torch.Tensor) -> tuple[torch.Tensor]:
            groups = scores.view(-1, size)
            return (((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1),)

        return Case(
            name="group_advantages",
            op="",
            shape="",
            why="",
            data=lambda: Data({"scores": torch.randn(SCORES, generator=torch.Generator().manual_seed(0))}),
            spec=eager,  # the specification compares every score with every other
            competitors={
                OURS: plain(lambda scores: (rpp.group_advantages(scores, group_size=size, eps=1e-6, std="group"),)),
                "eager": plain(eager),
            },
            floor=memory_floor("", forward=(4 * SCORES, 4 * SCORES)),
            tolerance=1e-4,
        )

    def sequences(name: str, eager: str, **floor: tuple[int, int]) -> Callable[[int], Case]:
        """The floor is bytes read and written of each token."""
        case = BY_NAME[name]
        whole = case.data()

        def of(length: int) -> Case:
            batch, tokens = make_batch(SEQUENCES, length), SEQUENCES * length
            return replace(
                case,
                data=lambda: replace(whole, inputs={k: batch[k] for k in whole.inputs}),
                floor=memory_floor("", **{k: (tokens * read, tokens * wrote) for k, (read, wrote) in floor.items()}),
                competitors={OURS: case.competitors[OURS], "eager": case.competitors[eager]},
            )

        return of

    of_head, of_logits = f"T = {T}, V = {V}, H = {H}", "T = 256, V = 16384"
    of_length = f"{SEQUENCES} sequences"
    lengths = [64 << i for i in range(9)]
    return [
        Line("linear_policy_loss", "H", of_head, [32 << i for i in range(6)], lambda n: head(h=n), H),
        Line("linear_policy_loss", "V", of_head, [1024 << i for i in range(6)], lambda n: head(v=n), V),
        Line("linear_policy_loss", "T", of_head, [64 << i for i in range(6)], lambda n: head(t=n), T),
        Line("logps_from_logits", "V", of_logits, [512 << i for i in range(9)], lambda n: logits(vocab=n), 16384),
        Line("logps_from_logits", "T", of_logits, [8 << i for i in range(9)], lambda n: logits(rows=n), 256),
        Line(
            "group_advantages",
            "group size",
            f"{SCORES} scores in all",
            [4 << i for i in range(0, 12, 2)],
            group_advantages,
            32,
        ),
        Line(
            "returns",
            "length",
            of_length,
            lengths,
            sequences("returns", "eager, flip + cumsum (gamma = 1 only)", forward=(5, 4)),
            4096,
        ),
        Line(
            "reinforce_pp_advantages",
            "length",
            of_length,
            lengths,
            sequences("reinforce_pp_advantages", "eager, flip + cumsum", forward=(9, 4)),
            4096,
        ),
        Line(
            "policy_loss",
            "length",
            of_length,
            lengths,
            sequences("policy_loss", "eager", forward=(13, 0), backward=(0, 4)),
            4096,
        ),
    ]


# ---------------------------------------------------------------- one size after another


def _measured(line: Line) -> dict[str, Any]:
    from run import check
    from timing import interleave, spread

    points = []
    for size in line.sizes:
        print(f"{line.name}, {line.axis} = {size}", file=sys.stderr, flush=True)
        case = line.case(size)
        works = _works(case)
        if size == line.sizes[0]:
            check(case, case.data(), {name: work for name, work in works.items() if name != "floor"})
        phase = case.phases[-1]
        samples = interleave(works, seconds=SECONDS, at_least=LEAST, at_most=MOST)
        ms = {name: list(spread([1e3 * one.of(phase) for one in some])) for name, some in samples.items()}
        points.append({"size": size, "ms": ms, "rounds": len(samples["floor"])})
    names = list(points[0]["ms"])
    fits = {name: fitted([(p["size"], p["ms"][name][0]) for p in points]) for name in names}
    return {"name": line.name, "axis": line.axis, "fixed": line.fixed, "phase": phase, "points": points, "fits": fits}


def _works(case: "Case") -> "dict[str, Work]":
    data = case.data()
    return {"floor": case.floor.work()} | {name: data.work(load()) for name, load in case.competitors.items()}


def fitted(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The exponent of a power law by least squares in log-log, over the larger half of the sizes."""
    upper = sorted(points)[len(points) // 2 :]
    x, y = ([math.log(p[i]) for p in upper] for i in (0, 1))
    slope, intercept = statistics.linear_regression(x, y)
    return {"exponent": slope, "at_1": math.exp(intercept), "from": upper[0][0], "to": upper[-1][0]}


# ---------------------------------------------------------------- one thread and two


def _threads(line: Line, most: int) -> Iterator[dict[str, Any]]:
    """Everyone on one thread and on all of them, in the same rounds."""
    import torch
    from timing import Sample, interleave, median_ratio, run_once, spread

    case = line.case(line.alone)
    both = {(name, n): replace(work) for n in (1, most) for name, work in _works(case).items()}
    threads_of = {id(work): n for (_, n), work in both.items()}

    def run(work: "Work") -> Sample:
        torch.set_num_threads(threads_of[id(work)])
        return run_once(work)

    named = {f"{name}@{n}": work for (name, n), work in both.items()}
    samples = interleave(named, seconds=2 * SECONDS, at_least=LEAST, at_most=MOST, run=run)
    torch.set_num_threads(most)
    phase = case.phases[-1]
    seconds = {name: [one.of(phase) for one in some] for name, some in samples.items()}
    for name in dict.fromkeys(name for name, _ in both):
        one, more = seconds[f"{name}@1"], seconds[f"{name}@{most}"]
        yield {
            "name": line.name,
            "sizes": line.fixed if line.axis in "TVH" else f"{line.fixed}, {line.axis} {line.alone}",
            "contestant": name,
            "ms": {n: list(spread([1e3 * s for s in some])) for n, some in (("1", one), (str(most), more))},
            "speedup": median_ratio(one, more),
        }


# ---------------------------------------------------------------- memory of a head


def _peaks() -> Iterator[dict[str, Any]]:
    """Each in a process of its own, as in tokens.py."""
    for tokens, vocab, hidden, dtype in PEAKS:
        for contestant in ("fused_policy_loss", "logps_then_policy_loss", "eager_policy_loss"):
            print(f"peak of {contestant}, {tokens} {vocab} {hidden} {dtype}", file=sys.stderr, flush=True)
            asked = json.dumps([contestant, tokens, vocab, hidden, dtype])
            command = [sys.executable, str(Path(__file__).resolve()), "--peak", asked]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            place = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "dtype": dtype}
            yield place | {"contestant": contestant, "peak_extra_mib": json.loads(done.stdout)}


def _peak(contestant: str, tokens: int, vocab: int, hidden: int, dtype: str) -> float | None:
    import linear_cases
    import torch
    from case import Data
    from timing import peak_extra_mib, run_once

    def work(n: int) -> "Work":
        inputs = linear_cases.policy_inputs(n, vocab, hidden)
        operands = {name: inputs[name].to(getattr(torch, dtype)) for name in linear_cases.WRT}
        data = Data(inputs | operands, linear_cases.WRT, (torch.ones(()),))
        return data.work(getattr(linear_cases, contestant))

    run_once(work(64))  # what the first call of anything loads is not counted
    return peak_extra_mib(work(tokens))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="lines whose names begin so, no peaks")
    parser.add_argument("--threads", type=int, default=2, help="default: 2; with 1 they are not compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # in the process of its own
    return parser.parse_args()


if __name__ == "__main__":
    main()
