"""Compiles the Triton kernels for GPUs that are not there and says what each needs: `python benchmarks/aot.py`.

The functions of the backend are called on CPU tensors, as kernel_calls.py lists them, with the launch replaced by
Triton's compiler under a driver that claims to be the GPU: what a launch there would compile is compiled. Registers,
spills and shared memory are read from the binary, and from them follows how many programs run at once.

    python benchmarks/aot.py            # about three minutes: benchmarks/results/aot.json, the table of docs/triton.md
    python benchmarks/aot.py --check    # the same, and fails where those are of other kernels
    python benchmarks/aot.py --arch sm_80 --full --function kl gae --all    # prints a line for each variant

Every variant is compiled for sm_90 in the dtypes of 32 and 16 bits; in float64 and for the other GPUs those variants of
each kernel that need the most registers there. With --full it is all of them, with --quick the one of each that needed
the most when aot.json was written. The GPUs are those of GPUS: Triton compiles for NVIDIA and AMD, and its compiler for
Intel's (xpu) comes in another package.
"""

import argparse
import contextlib
import heapq
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_calls import workload

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "aot.json"
PAGE = ROOT / "docs" / "triton.md"

# ---------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class GPU:
    """What a multiprocessor has (AMD: a compute unit), by which programs run on it at the same time."""

    target: tuple[str, int | str, int]  # backend, architecture, lanes of a warp: triton's GPUTarget
    warps: int  # on each of its four schedulers
    programs: int
    shared: int  # bytes
    reserved: int  # of them, for each program, by the system
    shared_step: int  # shared memory is given out in multiples of this
    source: str
    schedulers: int = 4
    registers: int = 512  # for each lane of a scheduler
    registers_step: int = 8


_NVIDIA = "CUDA C++ Programming Guide, technical specifications per compute capability; cuda_occupancy.h of CUDA 13"
_AMD = "AMD CDNA3 and CDNA2 ISA guides; AMDGPUBaseInfo.cpp of LLVM, which gives programs of one wave more than 16"

GPUS = {
    "sm_80": GPU(("cuda", 80, 32), 16, 32, 164 << 10, 1 << 10, 128, _NVIDIA),
    "sm_90": GPU(("cuda", 90, 32), 16, 32, 228 << 10, 1 << 10, 128, _NVIDIA),
    "sm_100": GPU(("cuda", 100, 32), 16, 32, 228 << 10, 1 << 10, 128, _NVIDIA),
    "gfx942": GPU(("hip", "gfx942", 64), 8, 16, 64 << 10, 0, 512, _AMD),
    "gfx90a": GPU(("hip", "gfx90a", 64), 8, 16, 64 << 10, 0, 512, _AMD),
}
REPORTED = ("sm_80", "sm_90", "sm_100", "gfx942")  # the others when asked for


def programs_at_once(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """How many programs are on a multiprocessor at the same time; 0 where not even one fits."""

    def rounded(x: int, step: int) -> int:
        return -(-x // step) * step

    of_scheduler = min(gpu.warps, gpu.registers // rounded(max(registers, 1), gpu.registers_step))
    by_shared = gpu.shared // max(rounded(shared + gpu.reserved, gpu.shared_step), 1)
    return min(gpu.programs, gpu.schedulers * of_scheduler // warps, by_shared)


# ---------------------------------------------------------------- the compiler in the place of a launch


class Driver:
    """What Triton asks of the driver of a GPU in order to compile for it."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch, self.target = arch, GPUTarget(*GPUS[arch].target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.arch  # Triton keeps what it has compiled apart by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


Launch = Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]


@contextlib.contextmanager
def pretend(arch: str, run: Launch) -> Iterator[None]:
    """Within it this process has that GPU, its tensors are those of the CPU, and `run` is what a launch does."""
    import triton

    from rpp_kernels.backends.triton import launch, tuning

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels that are interpreted are not compiled")
    before = launch.run, tuning.architecture
    triton.runtime.driver.set_active(Driver(arch))
    launch.run, tuning.architecture = run, lambda device: arch
    try:
        yield
    finally:
        launch.run, tuning.architecture = before


@dataclass(frozen=True)
class Row:
    """One kernel in one variant."""

    kernel: str
    variant: str  # the first call that needs it
    dtype: str
    arch: str
    registers: int  # of a thread
    spills: int  # bytes of a thread
    shared: int  # bytes of a program, without those that the system reserves
    block: int
    warps: int
    programs: int  # on a multiprocessor at the same time
    occupancy: float  # warps on a multiprocessor of those that it can hold
    inline_assembly: bool


Wanted = set[tuple[str, str]]  # kernels and variants
Measured = tuple[list[Row], list[str]]  # and what failed


def measure(arch: str, functions: Iterable[str], dtypes: Iterable[torch.dtype], only: Wanted | None = None) -> Measured:
    """A row for each variant of each kernel that these functions launch, or for those of `only`; and what failed."""
    rows: list[Row] = []
    failures: dict[str, list[str]] = {}  # by what is wrong
    seen = set()
    available, functions, dtypes = kernels(), set(functions), set(dtypes)

    def call(name: str, variant: str, dtype: torch.dtype, values: tuple[Any, ...]) -> None:
        def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if only is not None and (kernel.__name__, variant) not in only:
                return
            try:
                compiled = kernel.warmup(*arguments, grid=(programs,), **options)
            except Exception as error:  # of whatever kind: the next variant may compile
                why = "\n".join([f"{kernel.__name__} fails for {arch}:", *str(error).strip().splitlines()[-3:]])
                failures.setdefault(why, []).append(f"({variant}, {_name(dtype)})")
                return
            if (kernel.__name__, compiled.hash) not in seen:
                seen.add((kernel.__name__, compiled.hash))
                rows.append(_row(kernel.__name__, variant, dtype, arch, compiled, options))

        with pretend(arch, run):
            available[name](*values)

    called = {variant for _, variant in only or ()}
    with torch.no_grad():
        for name, dtype, calls in workload():
            if name in functions and dtype in dtypes:
                for change, values in calls.items():
                    variant = f"{name} {change}".strip()
                    if only is None or variant in called:
                        call(name, variant, dtype, values)
    return rows, [f"{why}\nin {len(where)} variants, as {where[0]}" for why, where in failures.items()]


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FIRST, MOST = "sm_90", 2  # where all variants are compiled, and how many of each kernel elsewhere


def full(archs: Iterable[str], functions: set[str]) -> Measured:
    measured = [measure(arch, functions, DTYPES) for arch in archs]
    return [row for rows, _ in measured for row in rows], [line for _, failures in measured for line in failures]


def sample(archs: Iterable[str], functions: set[str]) -> Measured:
    rows, failures = measure(FIRST, functions, DTYPES[:3])
    some = {dtype: greediest(rows, dtype, MOST) for dtype in DTYPES[:3]}
    some[torch.float64] = some[torch.float32]
    found = []
    for arch in archs:
        found += rows if arch == FIRST else []
        for dtype in DTYPES[3:] if arch == FIRST else DTYPES:
            more, wrong = measure(arch, functions, [dtype], some[dtype])
            found, failures = found + more, failures + wrong
    return found, failures


def quick(archs: Iterable[str], functions: set[str]) -> Measured:
    before = [Row(**row) for row in json.loads(RESULT.read_text())["rows"]]
    found, failures = [], []
    for arch in archs:
        for dtype in DTYPES:
            of_arch = [row for row in before if row.arch == arch]
            more, wrong = measure(arch, functions, [dtype], greediest(of_arch, dtype, 1))
            found, failures = found + more, failures + wrong
    return found, failures


def greediest(rows: Iterable[Row], dtype: torch.dtype, most: int) -> Wanted:
    """The variants of each kernel that need the most registers."""
    of_kernel: dict[str, list[Row]] = {}
    for row in rows:
        if row.dtype == _name(dtype):
            of_kernel.setdefault(row.kernel, []).append(row)
    chosen = (heapq.nlargest(most, some, key=lambda row: row.registers) for some in of_kernel.values())
    return {(row.kernel, row.variant) for some in chosen for row in some}


def forgotten(rows: Iterable[Row], functions: set[str]) -> list[str]:
    """Functions that no call is of, and kernels of their files that no call launches."""
    available, called = kernels(), {name for name, _, _ in workload()}
    missing = [f"{name} is in no call of benchmarks/kernel_calls.py" for name in sorted(functions - called)]
    files = {name: sys.modules[function.__module__] for name, function in available.items()}
    whole = {file for file in files.values() if functions >= {name for name in files if files[name] is file}}
    launched = {row.kernel for row in rows}
    return missing + [f"{kernel} is compiled for no call" for kernel in sorted(declared(whole) - launched)]


def _row(kernel: str, what: str, dtype: torch.dtype, arch: str, compiled: Any, options: dict[str, Any]) -> Row:
    gpu, warps, shared = GPUS[arch], options["num_warps"], compiled.metadata.shared
    read = _read_cubin if gpu.target[0] == "cuda" else _read_amdgcn
    registers, spills = read(compiled.asm)
    programs = programs_at_once(gpu, registers, shared, warps)
    return Row(
        kernel=kernel,
        variant=what,
        dtype=_name(dtype),
        arch=arch,
        registers=registers,
        spills=spills,
        shared=shared,
        block=options["BLOCK"],
        warps=warps,
        programs=programs,
        occupancy=programs * warps / (gpu.schedulers * gpu.warps),
        inline_assembly="inline_asm" in compiled.asm["ttir"],
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _usage_of_cubin(out)


def _usage_of_cubin(dump: str) -> tuple[int, int]:
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump)
    if len(found) != 1:
        raise ValueError(f"want the resources of one kernel, got {dump!r}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    def number(name: str) -> int:
        (value,) = re.findall(rf"^ *-? *\.{name}: *(\d+)", asm["amdgcn"], flags=re.M)
        return int(value)

    return number("vgpr_count"), number("private_segment_fixed_size")


def kernels() -> dict[str, Callable[..., Any]]:
    """The functions of the backend by name."""
    from rpp_kernels.backends import triton

    return dict(vars(triton.kernels()))


def declared(files: Iterable[Any] | None = None) -> set[str]:
    """The names of the kernels that files of the backend declare, or all of them."""
    if files is None:
        files = {sys.modules[function.__module__] for function in kernels().values()}
    return {name for file in files for name in vars(file) if name.endswith("_kernel")}


# ---------------------------------------------------------------- what must hold, and what is written

# On each scheduler of a multiprocessor: one warp computes while another waits for its loads, of which each has several.
LEAST_WARPS = 2
MOST_SAID = 40
MOST_WARPS = 16  # 1024 threads where a wave has 64


def problems(rows: Iterable[Row]) -> list[str]:
    """What no kernel may need or do, in words; nothing where all is well."""
    found = []
    for row in rows:
        where = f"{row.kernel} ({row.variant}, {row.dtype}, {row.arch})"
        if row.spills:
            found.append(f"{where} spills {row.spills} bytes")
        if row.warps > MOST_WARPS:
            found.append(f"{where} has {row.warps} warps, more than {MOST_WARPS}")
        if row.programs * row.warps < LEAST_WARPS * GPUS[row.arch].schedulers:
            found.append(f"{where} leaves less than {LEAST_WARPS} warps to each scheduler: {row.registers} registers")
        if row.inline_assembly:
            found.append(f"{where} has inline assembly")
    return found


def result_of(rows: Iterable[Row]) -> dict[str, Any]:
    import triton

    return {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}


def as_json(result: dict[str, Any]) -> str:
    """A line for each row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return f'{{\n "triton": {json.dumps(result["triton"])},\n "rows": [\n{rows}\n ]\n}}\n'


def stale(rows: Iterable[Row], archs: Iterable[str], functions: Iterable[str], mode: Any) -> list[str]:
    """Kernels whose committed figures are not those of `rows`; none where they are of another Triton."""
    committed, now = json.loads(RESULT.read_text()), result_of(rows)
    if committed["triton"] != now["triton"]:
        return []
    archs, functions = set(archs), set(functions)
    before = [row for row in committed["rows"] if row["arch"] in archs and row["variant"].split()[0] in functions]
    gone = [row for row in before if row not in now["rows"]] if mode is not quick else []
    changed = [row for row in now["rows"] if row not in before] if mode is not full else []
    return sorted({row["kernel"] for row in gone + changed})


def main() -> None:
    args = _parse()
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
    import report

    mode = full if args.full else quick if args.quick else sample
    archs = args.arch or REPORTED
    functions = {name for name in kernels() if any(part in name for part in args.function or [""])}
    rows, wrong = mode(archs, functions)
    wrong += [] if wrong else forgotten(rows, functions)
    wrong += problems(rows)
    result = result_of(rows)
    if args.check:
        old = stale(rows, archs, functions, mode)
        if old:
            wrong.append(f"{RESULT.relative_to(ROOT)} is of other kernels, run `python benchmarks/aot.py`: {old}")
        if report.replaced(PAGE, "aot", report.aot(json.loads(RESULT.read_text()))) != PAGE.read_text():
            wrong.append(f"the table of {PAGE.relative_to(ROOT)} is not of {RESULT.relative_to(ROOT)}")
    elif mode is sample and not args.arch and not args.function:
        RESULT.write_text(as_json(result))
        report.write(PAGE, "aot", report.aot(result))
    print("\n".join(map(_line, rows)) if args.all else report.aot(result))
    if wrong:
        rest = [f"and {len(wrong) - MOST_SAID} more"] if len(wrong) > MOST_SAID else []
        sys.exit("\n".join(wrong[:MOST_SAID] + rest))


def _line(row: Row) -> str:
    needs = f"{row.registers:3} registers {row.spills:3} spilled {row.shared:6} shared {row.warps:2} warps"
    return f"{row.arch:7} {row.dtype:8} {needs} {row.occupancy:4.0%}  {row.kernel}: {row.variant}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(GPUS), metavar="ARCH", help=f"of {', '.join(GPUS)}")
    parser.add_argument("--function", nargs="+", metavar="PART", help="functions whose names contain one of these")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--full", action="store_true", help="every variant in every dtype for every GPU")
    how_many.add_argument("--quick", action="store_true", help="of each kernel the greediest variant")
    parser.add_argument("--all", action="store_true", help="print a line for each variant, not the table")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the committed table is stale")
    return parser.parse_args()


if __name__ == "__main__":
    main()
