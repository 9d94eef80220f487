"""All that a lent GPU is for, in one command and ten minutes: `python benchmarks/gpu.py --out DIR --wheels WHEELS`.

    build      the package with its CUDA kernels, without network, into the Python that has torch
    peers      the wheels of the packages that we are compared with, into DIR/peers; without --wheels they are left out
    tests      the tests of the ops on this GPU, by both backends, and those that only a GPU can have
    heads      from hidden states to log-probs, the policy loss and the cross entropy, beside eager code, torch.compile,
               the peers and the bare matrix products
    curve      time and peak memory of the policy loss against the number of tokens, until each runs out
    bytes      the other kernels beside eager code, torch.compile, the peers and a plain copy of as many bytes
    calls      one call of every Triton kernel, as kernel_calls.py lists them: compiles what is run below
    memcheck   the same, and every CUDA kernel, under compute-sanitizer: no access outside of a tensor
    racecheck  the same: no two threads at one place of shared memory
    initcheck  every CUDA kernel: no read of what nobody wrote

Each stage is a process with a log in DIR and its share of the time. One that fails, or whose time is up, takes nothing
from the others, and what it has written by then stays. The three that measure write DIR/gpu.json, after every case: to
be committed as benchmarks/results/gpu.json.

The benchmarks are timed by CUDA events, with the cache flushed before each run and the GPU kept busy until the host has
said what is next: kernels are timed, and not the gaps between small ones. `host_ms` is what the host takes for a call.
Everyone takes turns, and nobody is timed who disagrees with the specification in float64. Peak memory is that of
torch's allocator, results and gradients included. A peer that fails is a note beside the others' numbers; where it
leaves the device unusable, the stage starts again without it.

The wheels, 5 MB, are fetched where there is a network: `python benchmarks/gpu.py --fetch-wheels WHEELS`. They are for
Python 3.12 on x86-64, beside torch, transformers and accelerate, which must be there. QuACK is not among them, and
Liger's CuTe kernels will not run: they need nvidia-cutlass-dsl, which is 92 MB.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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


def stages(out: Path, wheels: Path | None = None) -> list[Stage]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    sanitizer = [tool, "--error-exitcode", "9", "--target-processes", "application-only", "--tool"]
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    which = ["-m", "not slow", "-k", "cuda", "tests/ops", "tests/test_gpu.py"]
    calls = {name: [*HERE, "--run", "calls", "--backend", name] for name in ("native", "triton")}
    # Without torch's cache every tensor has an end of its own, behind which nothing may be touched.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    target = out.resolve() / "peers"
    beside = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(target)])}
    fetched = [str(wheel.resolve()) for wheel in sorted(wheels.glob("*.whl"))] if wheels else []
    peers = [Stage("peers", 20, [*pip, "--upgrade", "--target", str(target), *fetched], {})] if fetched else []
    measured = {name: [*HERE, "--run", name, "--out", str(out.resolve())] for name in ("heads", "curve", "bytes")}
    return [
        Stage("build", 90, [*pip, "--no-build-isolation", "-e", "."], {"RPP_KERNELS_BUILD": "cuda"}),
        *peers,
        Stage("tests", 100, [sys.executable, "-m", "pytest", "-q", "-n", "8", *which], {"OMP_NUM_THREADS": "1"}),
        Stage("heads", 110, measured["heads"], beside),
        Stage("curve", 70, measured["curve"], beside),
        Stage("bytes", 60, measured["bytes"], beside),
        Stage("calls", 30, calls["triton"], {}),
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


def cases(kind: str) -> "list[tuple[Case, Case]]":
    """What is timed, each with the case that it is checked in."""
    from gpu_cases import by_backend, heads, of_bytes, one_read

    return heads() if kind == "heads" else [(case, case) for case in [*map(by_backend, of_bytes()), one_read()]]


class Record:
    """DIR/gpu.json: what is there of the same commit is kept, so that stages add to it and go on where they ended."""

    def __init__(self, out: Path, commit: str) -> None:
        self.file, here = out / "gpu.json", machine(commit)
        if self.file.exists():
            self.result = json.loads(self.file.read_text())
            if self.result["machine"]["commit"] == here["commit"]:
                return
        self.result = {"machine": here, "cases": {}, "rows": [], "host_ms": {}, "broken": {}}

    def write(self) -> None:
        self.file.write_text(json.dumps(self.result, indent=1) + "\n")


def tried(works: "Mapping[str, Work]", record: Record) -> tuple[dict[str, float], dict[str, str]]:
    """Everyone's peak memory in MiB, and why the others cannot run."""
    peaks, notes = {}, {}
    for name, work in works.items():
        try:
            if name in record.result["broken"]:
                raise RuntimeError(record.result["broken"][name])
            peak_mib(work)  # compiles
            peaks[name] = peak_mib(work)
        except Exception as error:
            notes[name] = reason(error)
        start_again_if_dead(name, notes.get(name, ""), record)
    return peaks, notes


def start_again_if_dead(name: str, note: str, record: Record) -> None:
    """Without the one who left the device so: nothing in this process recovers from that."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        record.result["broken"][name] = f"it left the device unusable, {note}"
        record.write()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def reason(error: Exception) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"fails, {type(error).__name__}: {error}"[:300]


def peak_mib(work: "Work") -> float:
    """How far the allocated memory rises, results and gradients included."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = work.forward()
    gradients = work.backward(outputs) if work.backward else None
    torch.cuda.synchronize()
    del outputs, gradients
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench(kind: str, out: Path, commit: str) -> None:
    import torch
    from case import Data
    from run import Row, load
    from timing import interleave

    def on_gpu(data: Data) -> Data:
        return Data({k: x.cuda() for k, x in data.inputs.items()}, data.wrt, tuple(x.cuda() for x in data.grads))

    record = Record(out, commit)
    result = record.result
    for case, checked in cases(kind):
        if case.name in result["cases"]:
            continue
        print(case.name, flush=True)
        in_bytes = case.floor.unit == "GB"
        described = {k: getattr(case, k) for k in ("op", "shape", "why")}
        described |= {"unit": case.floor.unit, "amount": case.floor.amount}
        described["floor"] = "a copy of as many bytes" if in_bytes else case.floor.what
        try:
            works, errors, notes = green(checked, on_gpu(checked.data()), record)
            if case is not checked:
                data, functions = on_gpu(case.data()), load(case)[0]
                works = {name: data.work(functions[name]) for name in works}
            peaks, failed = tried(works, record)
            everyone = {"floor": copy_of(case) if in_bytes else case.floor.work()}
            everyone |= {name: works[name] for name in peaks}
            host: dict[str, list[float]] = {name: [] for name in everyone}
            # What takes long is measured well by few rounds.
            rounds = {"seconds": 3.0, "at_least": 15} if in_bytes else {"seconds": 10.0, "at_least": 7}
            samples = interleave(everyone, **rounds, run=stopwatch(everyone, host))
            result["rows"] += rows_of(case, samples, errors, peaks)
            reasons = (notes | failed).items()
            result["rows"] += [
                asdict(Row(case.name, who, phase, note)) for who, note in reasons for phase in case.phases
            ]
            result["host_ms"][case.name] = {name: statistics.median(times) for name, times in host.items()}
        except (Exception, SystemExit) as error:  # a case that fails is a fact to write down, and the next one comes
            described["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(case.name, described["failed"], flush=True)
        result["cases"][case.name] = described
        data = works = everyone = samples = None
        torch.cuda.empty_cache()
        record.write()


def green(case: "Case", data: "Data", record: Record) -> "tuple[dict[str, Work], dict[str, float], dict[str, str]]":
    """Who can be timed, with the error of each, and why the others cannot."""
    from run import check, load

    functions, notes = load(case)
    works = {name: data.work(function) for name, function in functions.items()}
    running, failed = tried(works, record)
    errors, wrong = check(case, data, {name: works[name] for name in running})
    return {name: works[name] for name in errors}, errors, notes | failed | wrong


# ---------------------------------------------------------------- time and memory against tokens

TOKENS = [1024 << i for i in range(7)]
LONGEST = 4.0  # seconds of one forward and backward


def curve(out: Path, commit: str) -> None:
    """Everyone at few tokens, then at twice as many: a run that is cut off has all of the small ones."""
    from gpu_cases import HEADS, head
    from run import load
    from timing import Work

    record = Record(out, commit)
    _, vocab, hidden = HEADS[0]
    here = record.result["curve"] = {"vocab": vocab, "hidden": hidden, "dtype": "bfloat16", "rows": []}
    _, checked = head(*HEADS[0])
    works, _, stopped = green(checked, checked.data(), record)
    left: dict[str, str] = {}
    for tokens in TOKENS:
        case, _ = head(tokens, vocab, hidden)
        data, functions = case.data(), load(case)[0]
        everyone: dict[str, Callable[[], Work]] = {"floor": case.floor.work}
        everyone |= {name: partial(data.work, functions[name]) for name in works}
        for name, make in everyone.items():
            row: dict[str, Any] = {"contestant": name, "tokens": tokens, "ms": None, "peak_extra_mib": None}
            if name in left:
                row["note"] = left[name]
            else:
                row |= timed(make)
                start_again_if_dead(name, row.get("note", ""), record)
                if row["ms"] is None:
                    left[name] = f"{row['note']} at {tokens} tokens"
                elif 2 * row["ms"] > 1e3 * LONGEST:
                    left[name] = f"not run: {row['ms']:.0f} ms at {tokens} tokens"
            here["rows"].append(row)
            print(row, flush=True)
            record.write()
    here["rows"] += [{"contestant": name, "note": note} for name, note in stopped.items()]
    record.write()


def timed(make: "Callable[[], Work]", seconds: float = 0.4) -> dict[str, Any]:
    """The median of as many runs as fit, at least two, and the peak of one."""
    import torch

    try:
        work = make()
        peak_mib(work)
        peak, times = peak_mib(work), []
        while len(times) < 2 or sum(times) < seconds:
            torch.cuda.synchronize()
            start = time.perf_counter()
            outputs = work.forward()
            gradients = work.backward(outputs) if work.backward else None
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            del outputs, gradients
        return {"ms": 1e3 * statistics.median(times), "peak_extra_mib": peak}
    except Exception as error:
        return {"note": reason(error)}


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


def rows_of(
    case: "Case", samples: "Mapping[str, list[Sample]]", errors: Mapping[str, float], peaks: Mapping[str, float]
) -> list[dict[str, Any]]:
    """As those of run.py; what is ours is the first of our names."""
    from case import OURS
    from run import row_of

    whole = case.phases[-1]
    ours = next(name for name in samples if name.startswith(OURS))
    everyone = {**samples, OURS: samples[ours]}
    return [
        asdict(row_of(case, name, phase, everyone, *((peaks.get(name), errors.get(name)) if phase == whole else ())))
        for phase in case.phases
        for name in samples
    ]


def machine(commit: str) -> dict[str, Any]:
    import platform

    import gpu_peers
    import peers
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
        "peers": peers.versions(gpu_peers.PACKAGES),
        "commit": commit or commit_here(),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------- wheels

# Beside those of requirements-parity.txt: TRL imports datasets, and verl omegaconf. The GPU's machine has the rest.
WHEELS = ("trl", "datasets", "dill", "multiprocess", "omegaconf", "cut-cross-entropy")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux1_x86_64")
FLASH_ATTN = "2.8.3"


def fetch_wheels(folder: Path) -> None:
    """What stage `peers` installs; what cannot be had is said."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = (ROOT / "requirements-parity.txt").read_text().splitlines()
    of_python = ["--only-binary", ":all:", "--python-version", "3.12", *(f"--platform={name}" for name in PLATFORMS)]
    for name in [*WHEELS, *(line for line in listed if not line.startswith("#"))]:
        if not downloaded(folder, *of_python, "-c", "constraints.txt", name):
            print(f"{name} could not be had", flush=True)
    if not flash_attn_wheel(folder):
        print("flash-attn could not be had", flush=True)
    print(f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB in {folder}", flush=True)


def downloaded(folder: Path, *arguments: str) -> bool:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", "--no-deps", "-d", str(folder)]
    env = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    return subprocess.run([*pip, *arguments], cwd=ROOT, env=env).returncode == 0


def flash_attn_wheel(folder: Path) -> bool:
    """Its Triton kernels alone: the registry has only its source, and the rest of that takes an hour to compile."""
    name, wanted = f"flash_attn-{FLASH_ATTN}", ("flash_attn/ops/triton/", "LICENSE")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / f"{name}.tar.gz"
        options = "--no-binary", "flash-attn", "--no-build-isolation"
        if not downloaded(source.parent, *options, f"flash-attn=={FLASH_ATTN}"):
            return False
        with tarfile.open(source) as files:
            found = [file for file in files if file.isfile() and file.name.partition("/")[2].startswith(wanted)]
            contents = {file.name.partition("/")[2]: files.extractfile(file).read() for file in found}
    contents[f"{name}.dist-info/LICENSE"] = contents.pop("LICENSE")
    contents[f"{name}.dist-info/METADATA"] = (
        f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {FLASH_ATTN}\n".encode()
    )
    contents[f"{name}.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{name}.dist-info/RECORD"
    contents[record] = "".join(f"{path},,\n" for path in [*contents, record]).encode()
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, content in contents.items():
            wheel.writestr(path, content)
    return True


def main() -> None:
    args = _parse()
    if args.fetch_wheels:
        fetch_wheels(args.fetch_wheels.resolve())
    elif args.run == "calls":
        calls(args.backend)
    elif args.run == "curve":
        curve(args.out, args.commit)
    elif args.run:
        bench(args.run, args.out, args.commit)
    else:
        chosen = [stage for stage in stages(args.out, args.wheels) if not args.stage or stage.name in args.stage]
        if not args.stage:
            (args.out / "gpu.json").unlink(missing_ok=True)
        os.environ["RPP_KERNELS_COMMIT"] = args.commit
        done = run_all(chosen, args.out, 60 * args.minutes)
        sys.exit(any(stage["status"] != 0 for stage in done))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="of the peers, as --fetch-wheels leaves them")
    parser.add_argument("--fetch-wheels", type=Path, metavar="DIR", help="fill it, and do nothing else")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="only these; gpu.json goes on where it ended")
    parser.add_argument("--commit", default=os.environ.get("RPP_KERNELS_COMMIT", ""), help="where there is no .git")
    parser.add_argument("--backend", choices=["native", "triton"], default="native", help="of the calls")
    parser.add_argument("--run", choices=["calls", "heads", "curve", "bytes"], help="a stage itself, in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
