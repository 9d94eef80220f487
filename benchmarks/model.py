"""Will it fit, and how long will it take?

    python -m benchmarks.model --tokens 16384 --vocab 151936 --hidden 3584 --dtype bfloat16 --device h100
    python -m benchmarks.model --tokens 8192 --vocab 32000 --hidden 1024 --available-gib 2
    python -m benchmarks.model --check

Predicts peak memory and time of one forward and backward of the clipped policy loss from hidden states: by
linear_policy_loss, by linear_logps and policy_loss, and by eager code that stores the logits. Memory is added up from
the buffers that each of them holds at its peak, ours by the package's own sizes of chunks; hidden states and weight are
there already and do not count. Time is that of the products, of the bytes that go by and of the calls. On a CPU its
rates are fitted to benchmarks/results/scaling.json, so it speaks of the machine that file was measured on. GPUs have
rates from published figures: modelled, not measured. `--check` compares with what was measured.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30

FUSED, THEN, EAGER = "linear_policy_loss", "linear_logps, then policy_loss", "eager"
CONTESTANTS = (FUSED, THEN, EAGER)
PRODUCTS = {FUSED: 3, THEN: 4, EAGER: 3}  # of 2 T V H flops
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


class Shape(NamedTuple):
    tokens: int
    vocab: int
    hidden: int
    dtype: str = "float32"

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * self.vocab * self.hidden

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab

    @property
    def head(self) -> int:
        return self.vocab * self.hidden


# ---------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """Of a GPU: flops a second of its library's products, bytes a second of its memory, and how much of that it has."""

    half: float
    full: float  # float32, TF32 off
    bandwidth: float
    gib: int
    source: str


GPUS = {
    "h100": Device(730e12, 50e12, 3.0e12, 80, "bare products of a head in bfloat16 as TRL published them, 730 Tflop/s"),
    "h200": Device(750e12, 50e12, 4.2e12, 141, "fused heads at 720 to 790 Tflop/s published by Liger"),
    "a100": Device(250e12, 16e12, 1.75e12, 80, "80% of the nominal 312 Tflop/s, 87% of the nominal 2.0 TB/s"),
    "b200": Device(1450e12, 55e12, 7.0e12, 180, "a head's cross entropy at 1470 Tflop/s published by Liger"),
}
LAUNCH = 5e-6  # seconds
LAUNCHES_A_CHUNK, LAUNCHES_A_CALL = 15, 60
# Bytes that go by for each logit, beside the products that make it. Ours: float32 read for the statistics and again for
# the gradient, which is written in the operands' dtype. Eager bfloat16: 59 ms where the bare products take 42, as TRL
# published for 8192 x 151936 logits on an H100.
EAGER_BYTES = 41


# ---------------------------------------------------------------- memory


def chunks(shape: Shape, cpu: bool) -> tuple[int, int]:
    """How many tokens have logits at a time, and for how many there is room for gradients; 0 where they take the place
    of the logits. Both as the package decides."""
    import torch

    from rpp_kernels.ops.chunks import balanced, chunk_tokens
    from rpp_kernels.ops.head import Plan

    operands = torch.float32 if cpu or shape.dtype == "float16" else getattr(torch, shape.dtype)
    plan = Plan(vocab_start=0, chunk_bytes=0, skip_rows=1, batch_invariant=0)
    tokens, together = chunk_tokens(cpu, torch.float32, operands, shape.vocab, shape.hidden, plan)
    longest = max((part.stop - part.start for part in balanced(shape.tokens, tokens)), default=0)
    return longest, 0 if cpu else together


def buffers(shape: Shape, contestant: str, cpu: bool) -> dict[str, float]:
    """Bytes at the peak by what they are for; gradients that are returned included."""
    width = WIDTH[shape.dtype]
    found = {"gradients": width * (shape.head + shape.tokens * shape.hidden)}
    if contestant == EAGER:
        # The log-softmax that is kept, the gradient of its gather and its own, in float32; or later the last of these
        # beside the gradients.
        most = max(found["gradients"], 8 * shape.logits)
        return {"logits, and gradients when these are gone": most + 4 * shape.logits}
    wide = cpu or shape.dtype == "float16"  # products of float32 operands
    operand = 4 if wide else width
    logits, gradients = chunks(shape, cpu)
    together = max(logits, min(gradients, shape.tokens))
    found["a chunk of logits"] = 4 * logits * shape.vocab
    found["a chunk of gradients"] = operand * min(gradients, shape.tokens) * shape.vocab
    found["hidden states of a chunk"] = (2 * operand + 4) * together * shape.hidden
    if width < 4:
        found["float32 sums"] = 4 * (shape.head + (shape.tokens * shape.hidden if shape.dtype == "float16" else 0))
        found["float32 copy of the weight"] = 4 * shape.head if wide else 0
    return found | {"of each token": 64 * shape.tokens}


def peak(shape: Shape, contestant: str, cpu: bool) -> float:
    return sum(buffers(shape, contestant, cpu).values())


# ---------------------------------------------------------------- time


def gpu_seconds(shape: Shape, contestant: str, device: Device) -> float:
    wide = shape.dtype in ("float32", "float16")  # half operands of ours are widened first, but bfloat16
    rate = device.full if (shape.dtype == "float32" or (wide and contestant != EAGER)) else device.half
    seconds = PRODUCTS[contestant] * shape.flops / rate
    if contestant == EAGER:
        return seconds + EAGER_BYTES * shape.logits / device.bandwidth + LAUNCHES_A_CALL * LAUNCH
    operand = 4 if wide else 2
    logits, together = chunks(shape, cpu=False)
    seconds += (8 + operand) * shape.logits / device.bandwidth
    # The weight's gradient is read and written once for each group of chunks, half of it behind the product's end.
    seconds += math.ceil(shape.tokens / together) * 8 * shape.head / 2 / device.bandwidth
    calls = math.ceil(shape.tokens / logits) * (PRODUCTS[contestant] - 2)
    return seconds + (LAUNCHES_A_CALL + LAUNCHES_A_CHUNK * calls) * LAUNCH


def features(shape: Shape, contestant: str) -> list[float]:
    """What seconds on a CPU are a sum of: flops, bytes of logits, bytes of the weight's gradient, one call."""
    return [PRODUCTS[contestant] * shape.flops, 4.0 * shape.logits, 4.0 * shape.head, 1.0]


def fitted(scaling: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds for each of the features on the machine of scaling.json, not negative, by least squares of the relative
    error: one coefficient after another takes its best value, until none moves."""
    found = {}
    for contestant in CONTESTANTS:
        rows, sought = [], []
        for at, seconds in measured_times(scaling, contestant):
            rows.append([x / seconds for x in features(at, contestant)])
            sought.append(1.0)
        scale = [max(row[i] for row in rows) for i in range(len(rows[0]))]
        rows = [[x / s for x, s in zip(row, scale, strict=True)] for row in rows]
        weights = [0.0] * len(scale)
        for _ in range(5000):
            for i in range(len(weights)):
                rest = [want - _dot(row, weights) + row[i] * weights[i] for row, want in zip(rows, sought, strict=True)]
                best = sum(r * row[i] for r, row in zip(rest, rows, strict=True)) / sum(row[i] ** 2 for row in rows)
                weights[i] = max(0.0, best)
        found[contestant] = [w / s for w, s in zip(weights, scale, strict=True)]
    return found


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cpu_seconds(shape: Shape, contestant: str, rates: dict[str, list[float]]) -> float:
    return _dot(features(shape, contestant), rates[contestant])


# ---------------------------------------------------------------- what was measured


def measured_times(scaling: dict[str, Any], contestant: str) -> Iterator[tuple[Shape, float]]:
    """Of the lines of a head in scaling.json, float32."""
    name = {FUSED: "rpp-kernels", THEN: "rpp-kernels, linear_logps then policy_loss", EAGER: "eager"}[contestant]
    for line in scaling["lines"]:
        if line["name"] != "linear_policy_loss":
            continue
        fixed = {key: int(value) for key, value in (x.split(" = ") for x in line["fixed"].split(", "))}
        for point in line["points"]:
            at = fixed | {line["axis"]: point["size"]}
            yield Shape(at["T"], at["V"], at["H"]), point["ms"][name][0] / 1e3


def measured_peaks(scaling: dict[str, Any], tokens: dict[str, Any]) -> Iterator[tuple[Shape, str, float]]:
    """Bytes, of scaling.json and of tokens.json."""
    names = {"fused_policy_loss": FUSED, "logps_then_policy_loss": THEN, "eager_policy_loss": EAGER}
    for row in scaling["peaks"]:
        shape = Shape(row["tokens"], row["vocab"], row["hidden"], row["dtype"])
        yield shape, names[row["contestant"]], row["peak_extra_mib"] * MIB
    for row in tokens["rows"]:
        if row["contestant"] in CONTESTANTS and row["peak_extra_mib"] is not None:
            shape = Shape(row["tokens"], tokens["vocab"], tokens["hidden"])
            yield shape, row["contestant"], row["peak_extra_mib"] * MIB


class Checked(NamedTuple):
    what: str
    shape: Shape
    contestant: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def checks() -> list[Checked]:
    """Every measured point beside its prediction. Those of linear.json, where of the same machine, took no part
    in the fit."""
    scaling, tokens, linear = (json.loads((RESULTS / f"{x}.json").read_text()) for x in ("scaling", "tokens", "linear"))
    rates = fitted(scaling)
    found = [
        Checked("peak, bytes", shape, contestant, peak(shape, contestant, cpu=True), measured)
        for shape, contestant, measured in measured_peaks(scaling, tokens)
    ]
    found += [
        Checked("seconds, fitted", shape, contestant, cpu_seconds(shape, contestant, rates), measured)
        for contestant in CONTESTANTS
        for shape, measured in measured_times(scaling, contestant)
    ]
    names = {"rpp-kernels": FUSED, "rpp-kernels, linear_logps then policy_loss": THEN, "eager": EAGER}
    same = all(scaling["machine"][key] == linear["machine"][key] for key in ("cpu", "threads"))
    for row in linear["rows"] if same else []:
        if row["case"] == "linear_policy_loss" and row["competitor"] in names and row["median_ms"]:
            shape, contestant = Shape(1024, 32000, 1024), names[row["competitor"]]
            predicted = cpu_seconds(shape, contestant, rates)
            found.append(Checked("seconds, not fitted", shape, contestant, predicted, row["median_ms"] / 1e3))
    return found


def check_table() -> str:
    lines = ["| | T | V | H | dtype | | predicted | measured | error |", "|---|--:|--:|--:|---|---|--:|--:|--:|"]
    for row in checks():
        shape = " | ".join(map(str, row.shape))
        of_bytes = row.what.endswith("bytes")
        numbers = [f"{x / MIB:.0f} MiB" if of_bytes else f"{1e3 * x:.3g} ms" for x in (row.predicted, row.measured)]
        what = row.what.replace(", bytes", "").replace("seconds", "time")
        lines.append(f"| {what} | {shape} | {row.contestant} | {' | '.join(numbers)} | {row.error:+.0%} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the answer


def answer(shape: Shape, device: str, available: float) -> str:
    """A table of who fits into so many bytes, and how long each takes."""
    cpu = device == "cpu"
    if cpu:
        scaling = json.loads((RESULTS / "scaling.json").read_text())
        rates, machine = fitted(scaling), scaling["machine"]
        source = f"Rates fitted to measurements of {machine['cpu']}, {machine['threads']} thread(s)."
        seconds = {name: cpu_seconds(shape, name, rates) for name in CONTESTANTS}
    else:
        source = f"Modelled, not measured. Rates: {GPUS[device].source}."
        seconds = {name: gpu_seconds(shape, name, GPUS[device]) for name in CONTESTANTS}
    given = WIDTH[shape.dtype] * (shape.head + shape.tokens * shape.hidden)
    lines = [
        f"{shape.tokens} tokens, vocabulary {shape.vocab}, hidden size {shape.hidden}, {shape.dtype}, {device}.",
        source,
        f"One copy of the logits is {_size(WIDTH[shape.dtype] * shape.logits)}, hidden states and weight are "
        f"{_size(given)}. {_size(available)} are there beside these.",
        "",
        f"{'':32}{'Tflop':>8}{'peak':>11}{'time':>10}  ",
    ]
    for name in CONTESTANTS:
        needed = peak(shape, name, cpu)
        verdict = "fits" if needed <= available else f"does not fit, {_size(needed - available)} too much"
        flops = PRODUCTS[name] * shape.flops / 1e12
        lines.append(f"{name:32}{flops:8.3g}{_size(needed):>11}{_duration(seconds[name]):>10}  {verdict}")
    lines.append("")
    for name in (FUSED, EAGER):
        parts = ", ".join(f"{what} {_size(n)}" for what, n in buffers(shape, name, cpu).items() if n)
        lines.append(f"{name}: {parts}")
    return "\n".join(lines)


def _size(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / MIB:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def available_bytes(device: str, given: float) -> float:
    """Of a GPU all its memory but what hidden states and weight take; of this machine what it says is free."""
    if device in GPUS:
        return GPUS[device].gib * GIB - given
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def main() -> None:
    args = _parse()
    if args.check:
        print(check_table())
        return
    shape = Shape(args.tokens, args.vocab, args.hidden, args.dtype)
    given = WIDTH[shape.dtype] * (shape.head + shape.tokens * shape.hidden)
    available = available_bytes(args.device, given) if args.available_gib is None else args.available_gib * GIB
    print(answer(shape, args.device, available))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in {"tokens": "T", "vocab": "V, rows of the weight", "hidden": "H"}.items():
        parser.add_argument(f"--{name}", type=_positive, metavar="N", help=meaning)
    parser.add_argument("--dtype", choices=WIDTH, default="float32", help="of hidden states and weight")
    parser.add_argument("--device", choices=["cpu", *GPUS], default="cpu")
    parser.add_argument("--available-gib", type=float, metavar="X", help="beside hidden states and weight")
    parser.add_argument("--check", action="store_true", help="predictions beside what was measured on a CPU")
    args = parser.parse_args()
    missing = [f"--{name}" for name in ("tokens", "vocab", "hidden") if getattr(args, name) is None]
    if missing and not args.check:
        parser.error(f"want {', '.join(missing)}, or --check")
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"want a positive integer, got {text}")
    return number


if __name__ == "__main__":
    if str(ROOT) not in sys.path:  # run as a script, it finds the package beside it as with -m
        sys.path.insert(0, str(ROOT))
    main()
