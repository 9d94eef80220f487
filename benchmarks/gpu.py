"""All that a lent GPU is for, in one command and ten minutes: `python benchmarks/gpu.py --out DIR`.

    build      the package with its CUDA kernels, without network, into the Python that has torch
    tests      the tests of the ops on this GPU, by both backends, and those that only a GPU can have
    bench      the kernels beside eager code, torch.compile, a plain copy of as many bytes, and the bare products of a
               head: DIR/gpu.json, to be committed as benchmarks/results/gpu.json
    calls      one call of every Triton kernel, as kernel_calls.py lists them: compiles what is run below
    memcheck   the same, and every CUDA kernel, under compute-sanitizer: no access outside of a tensor
    racecheck  the same: no two threads at one place of shared memory
    initcheck  every CUDA kernel: no read of what nobody wrote

Each stage is a process with a log in DIR and its share of the time. One that fails, or whose time is up, takes nothing
from the others, and what it has written by then stays.

The benchmarks are timed by CUDA events, with the cache flushed before each run and the GPU kept busy until the host has
said what is next: kernels are timed, and not the gaps between small ones. `host_ms` is what the host takes for a call.
Everyone takes turns, and nobody is timed who disagrees with the specification in float64.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from case import Case, Data
    from timing import Sample, Work

ROOT = Path(__file__).resolve().parent.parent
HERE = [sys.executable, str(Path(__file__).resolve())]


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: int  # of ten minutes; what earlier stages leave over is added
    command: list[str]
    environment: Mapping[str, str]


SANITIZERS = ("memcheck", "racecheck", "initcheck")


def stages(out: Path) -> list[Stage]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    sanitizer = [tool, "--error-exitcode", "9", "--target-processes", "application-only", "--tool"]
    pip = ["install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    which = ["-m", "not slow", "-k", "cuda", "tests/ops", "tests/test_gpu.py"]
    calls = {name: [*HERE, "--run", "calls", "--backend", name] for name in ("native", "triton")}
    # Without torch's cache every tensor has an end of its own, behind which nothing may be touched.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("build", 100, [sys.executable, "-m", "pip", *pip], {"RPP_KERNELS_BUILD": "cuda"}),
        Stage("tests", 170, [sys.executable, "-m", "pytest", "-q", "-n", "8", *which], {"OMP_NUM_THREADS": "1"}),
        Stage("bench", 150, [*HERE, "--run", "bench", "--out", str(out)], {}),
        Stage("calls", 40, calls["triton"], {}),
        *(Stage(f"{tool}-cuda", 20, [*sanitizer, tool, *calls["native"]], apart) for tool in SANITIZERS),
        *(Stage(f"{tool}-triton", 30, [*sanitizer, tool, *calls["triton"]], apart) for tool in SANITIZERS[:2]),
    ]


def limit(stage: Stage, later: Sequence[Stage], left: float) -> float:
    """How long a stage may take: all that is left but for the shares of those behind it."""
    return max(5.0, left - sum(other.seconds for other in later))


def run_stage(stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    """Runs it with its output in a log, and ends it with all its processes when its time is up."""
    start = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PIP_NO_INDEX": "1", **stage.environment}
    status: int | str
    try:
        with (out / f"{stage.name}.log").open("w") as log:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = "time is up"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    except OSError as error:  # no such program
        status = str(error)
    return {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def run_all(chosen: Sequence[Stage], out: Path, seconds: float) -> list[dict[str, Any]]:
    out.mkdir(parents=True, exist_ok=True)
    end, done = time.monotonic() + seconds, []
    for i, stage in enumerate(chosen):
        done.append(run_stage(stage, out, limit(stage, chosen[i + 1 :], end - time.monotonic())))
        (out / "stages.json").write_text(json.dumps(done, indent=1) + "\n")
        print(f"{stage.name:10} {done[-1]['status']!s:12} {done[-1]['seconds']:6.1f} s", flush=True)
    return done


# ---------------------------------------------------------------- one call of every kernel


def calls(backend: str) -> None:
    """In float32, and logits in bfloat16 too; of each function the first variants and the last."""
    import torch
    from kernel_calls import Sizes, workload

    from rpp_kernels import backends

    functions = backends.kernels(backend)
    for name, dtype, variants in workload(Sizes(T=4100, B=4, V=5003, device="cuda"), cuda=backend == "native"):
        if dtype in (torch.float32, torch.bfloat16):
            for what in dict.fromkeys([*list(variants)[:3], *list(variants)[-2:]]):
                print(name, what, flush=True)
                getattr(functions, name)(*variants[what])
                torch.cuda.synchronize()


# ---------------------------------------------------------------- benchmarks


def cases() -> "list[tuple[Case, Case]]":
    """What is timed, each with the case that it is checked in."""
    from gpu_cases import HEADS, by_backend, head, of_bytes, one_read

    moved = [*map(by_backend, of_bytes()), one_read()]
    return [head(*size) for size in HEADS] + [(case, case) for case in moved]


def bench(out: Path, commit: str) -> None:
    import torch
    from case import Data
    from run import Row, load
    from timing import interleave

    def on_gpu(data: Data) -> Data:
        return Data({k: x.cuda() for k, x in data.inputs.items()}, data.wrt, tuple(x.cuda() for x in data.grads))

    result: dict[str, Any] = {"machine": machine(commit), "cases": {}, "rows": [], "host_ms": {}}
    for case, checked in cases():
        print(case.name, flush=True)
        in_bytes = case.floor.unit == "GB"
        described = {k: getattr(case, k) for k in ("op", "shape", "why")}
        described |= {"unit": case.floor.unit, "amount": case.floor.amount}
        described["floor"] = "a copy of as many bytes" if in_bytes else case.floor.what
        result["cases"][case.name] = described
        try:
            works, errors, notes = green(checked, on_gpu(checked.data()))
            if case is not checked:
                data, functions = on_gpu(case.data()), load(case)[0]
                works = {name: data.work(functions[name]) for name in works}
            result["rows"] += [asdict(Row(case.name, who, phase, note)) for who, note in notes for phase in case.phases]
            everyone = {"floor": copy_of(case) if in_bytes else case.floor.work(), **works}
            host: dict[str, list[float]] = {name: [] for name in everyone}
            samples = interleave(everyone, seconds=6.0, at_least=15, run=stopwatch(everyone, host))
            result["rows"] += rows_of(case, samples, errors)
            result["host_ms"][case.name] = {name: statistics.median(times) for name, times in host.items()}
        except (Exception, SystemExit) as error:  # a case that fails is a fact to write down, and the next one comes
            described["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(case.name, described["failed"], flush=True)
        torch.cuda.empty_cache()
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")


def green(case: "Case", data: "Data") -> "tuple[dict[str, Work], dict[str, float], list[tuple[str, str]]]":
    """Who can be timed, with the error of each, and why the others cannot."""
    from run import check, load

    functions, notes = load(case)
    works = {name: data.work(function) for name, function in functions.items()}
    errors, wrong = check(case, data, works)
    return {name: works[name] for name in errors}, errors, [*notes.items(), *wrong.items()]


def copy_of(case: "Case") -> "Work":
    """A copy on the device that reads and writes as many bytes as each phase of the case must."""
    import torch
    from timing import Work

    def copy(phase: str) -> Callable[..., Any]:
        count = int(case.floor.amount[phase]) // 2
        source, out = (torch.empty(count, dtype=torch.uint8, device="cuda") for _ in range(2))
        return lambda _=None: out.copy_(source)

    return Work(copy("forward"), copy("backward") if "backward" in case.phases else None)


HEAD_START = 4_000_000  # cycles, about two milliseconds, in which the host goes ahead


def stopwatch(works: "Mapping[str, Work]", host: dict[str, list[float]]) -> "Callable[[Work], Sample]":
    """Times one run on the GPU; `host` gets the milliseconds of the forward call on the host, for each name."""
    import torch
    from timing import Sample

    names = {id(work): name for name, work in works.items()}
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def run(work: "Work") -> Sample:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        if work.prepare:
            work.prepare()
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        events[0].record()
        start = time.perf_counter()
        outputs = work.forward()
        host[names[id(work)]].append(1e3 * (time.perf_counter() - start))
        events[1].record()
        gradients = work.backward(outputs) if work.backward else None
        events[2].record()
        torch.cuda.synchronize()
        del outputs, gradients
        forward, backward = (events[i].elapsed_time(events[i + 1]) / 1e3 for i in range(2))
        return Sample(forward, backward if work.backward else 0.0)

    return run


def rows_of(case: "Case", samples: "Mapping[str, list[Sample]]", errors: Mapping[str, float]) -> list[dict[str, Any]]:
    """As those of run.py: medians and spread, GB/s, and the share of the copy's speed."""
    from run import row_of

    whole = case.phases[-1]
    return [
        asdict(row_of(case, name, phase, dict(samples), None, errors.get(name) if phase == whole else None))
        for phase in case.phases
        for name in samples
    ]


def machine(commit: str) -> dict[str, Any]:
    import platform

    import torch
    import triton
    from run import commit as commit_here

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or commit_here(),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    args = _parse()
    if args.run == "calls":
        calls(args.backend)
    elif args.run == "bench":
        bench(args.out, args.commit)
    else:
        chosen = [stage for stage in stages(args.out) if not args.stage or stage.name in args.stage]
        os.environ["RPP_KERNELS_COMMIT"] = args.commit
        done = run_all(chosen, args.out, 60 * args.minutes)
        sys.exit(any(stage["status"] != 0 for stage in done))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--commit", default=os.environ.get("RPP_KERNELS_COMMIT", ""), help="where there is no .git")
    parser.add_argument("--backend", choices=["native", "triton"], default="native", help="of the calls")
    parser.add_argument("--run", choices=["calls", "bench"], help="a stage itself, in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
