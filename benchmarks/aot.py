"""Compiles the Triton kernels for GPUs that are not there and says what each needs: `python benchmarks/aot.py`.

Every function of the backend is called on CPU tensors, once for each variant that `workload` lists, with the launch
replaced by Triton's compiler under a driver that claims to be the GPU: what a launch there would compile is compiled.
Registers, spills and shared memory are read from the binary, and from them follows how many programs run at once.

    python benchmarks/aot.py                                   # all: benchmarks/results/aot.json, docs/triton.md
    python benchmarks/aot.py --check                           # all, and fails where those are of other kernels
    python benchmarks/aot.py --arch sm_90 --function kl --all  # prints what is asked for and writes nothing

The GPUs are those of GPUS. Triton compiles for NVIDIA and AMD; its compiler for Intel's (xpu) is in another package.
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

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


def measure(arch: str, functions: Iterable[str] = ("",)) -> tuple[list[Row], list[str]]:
    """A row for each variant of each kernel, and what is wrong; of functions whose names contain one of these."""
    rows: list[Row] = []
    failures, seen = [], set()
    what, dtype = "", torch.float32

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = kernel.__name__
        try:
            compiled = kernel.warmup(*arguments, grid=(programs,), **options)
        except Exception as error:  # of whatever kind: the next variant may compile
            failures.append(f"{name} of {what} in {dtype} for {arch}: {type(error).__name__}: {error}")
            return
        if (name, compiled.hash) not in seen:
            seen.add((name, compiled.hash))
            rows.append(_row(name, what, dtype, arch, compiled, options))

    available = kernels()
    wanted = {name for name in available if any(part in name for part in functions)}
    with pretend(arch, run), torch.no_grad():
        for name, dtype, calls in workload():  # noqa: B007, `run` reads it
            for change, values in calls.items() if name in wanted else ():
                what = f"{name} {change}".strip()
                available[name](*values)
    called = {name for name, _, _ in workload()}
    failures += [f"{name} is in no call of {Path(__file__).name}" for name in sorted(wanted - called)]
    if wanted == set(available):
        never = declared() - {row.kernel for row in rows}
        failures += [f"{name} is launched by no call for {arch}" for name in sorted(never)]
    return rows, failures


def _row(kernel: str, what: str, dtype: torch.dtype, arch: str, compiled: Any, options: dict[str, Any]) -> Row:
    gpu, warps, shared = GPUS[arch], options["num_warps"], compiled.metadata.shared
    read = _read_cubin if gpu.target[0] == "cuda" else _read_amdgcn
    registers, spills = read(compiled.asm)
    programs = programs_at_once(gpu, registers, shared, warps)
    return Row(
        kernel=kernel,
        variant=what,
        dtype=str(dtype).removeprefix("torch."),
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


def declared() -> set[str]:
    """The names of all kernels that the files of the backend declare."""
    files = {sys.modules[function.__module__] for function in kernels().values()}
    return {name for file in files for name in vars(file) if name.endswith("_kernel")}


# ---------------------------------------------------------------- the calls

Variants = dict[str, tuple[Any, ...]]  # by what is different: the arguments of a function
T, B, V = 64, 4, 256  # numbers known at run time: nothing depends on them


def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def variants(base: dict[str, Any], *changes: dict[str, Any]) -> Variants:
    """The call with these arguments, in their order, and with each change."""
    return {_label(change): tuple({**base, **change}.values()) for change in ({}, *changes)}


def _label(change: dict[str, Any]) -> str:
    def said(name: str, value: Any) -> str:
        if value is None or value is False:
            return f"no {name}"
        return name if isinstance(value, torch.Tensor) or value is True else f"{name} {value}"

    # What is known at run time only does not tell one variant from another.
    return ", ".join(said(name, value) for name, value in change.items() if not isinstance(value, float))


def each(name: str, values: Iterable[Any]) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


def workload() -> Iterator[tuple[str, torch.dtype, Variants]]:
    """Everything that is compiled: a function, the dtype it works in, its calls."""
    for dtype in (torch.float32, torch.float64):
        for table in (of_tokens, of_sequences, of_losses, of_chunks):
            for name, calls in table(dtype).items():
                yield name, dtype, calls
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for name, calls in of_logits(dtype).items():
            yield name, dtype, calls


def arguments(dtype: torch.dtype) -> SimpleNamespace:
    """t of tokens, b of sequences, and the others by their names."""
    return SimpleNamespace(
        t=new(T, dtype=dtype),
        b=new(B, dtype=dtype),
        mask=new(T, dtype=torch.bool),
        cu=torch.arange(0, T + 1, T // B),
        moments=new(3, dtype=torch.float64),
        ids=torch.zeros(T, dtype=torch.int64),
    )


NO_MASK = {"mask": None}


def of_tokens(dtype: torch.dtype) -> dict[str, Variants]:
    from rpp_kernels.ops.advantages import EPS_MODES
    from rpp_kernels.ops.kl import ESTIMATORS

    x = arguments(dtype)
    kl = {"logps": x.t, "ref_logps": x.t, "mask": x.mask, "estimator": 3, "log_ratio_clamp": 20.0, "kl_clamp": 1.0}
    estimators = each("estimator", ESTIMATORS.values())
    whiten = {
        "values": x.t,
        "mask": x.mask,
        "moments": x.moments,
        "shift_mean": True,
        "unbiased": False,
        "eps": 1e-8,
        "eps_mode": 0,
    }
    modes = [NO_MASK, {"shift_mean": False}, {"unbiased": True}, *each("eps_mode", EPS_MODES.values())]
    return {
        "kl_fwd": variants(kl, NO_MASK, *estimators),
        "kl_bwd": variants(dict(dkl=x.t, **kl), NO_MASK, *estimators),
        "moments": variants({"values": x.t, "mask": x.mask}, NO_MASK),
        "whiten_out": variants(dict(out=x.t, **whiten), *modes),
        "whiten_bwd": variants(dict(dout=x.t, **whiten), *modes),
    }


def of_sequences(dtype: torch.dtype) -> dict[str, Variants]:
    from rpp_kernels.ops.advantages import GAPS
    from rpp_kernels.ops.groups import BASELINES, STDS
    from rpp_kernels.ops.kl import ESTIMATORS
    from rpp_kernels.ops.rollout import LEVELS

    x = arguments(dtype)
    place = {"mask": x.mask, "cu_seqlens": x.cu}
    gaps = each("gap", GAPS.values())
    pipeline = dict(scores=x.b, old_logps=x.t, ref_logps=x.t, **place, beta=0.1, gamma=0.9)
    rollout = dict(old_logps=x.t, sampling_logps=x.t, **place, level=0, truncate=True, low=0.5, high=2.0, clamp=20.0)
    lengths = new(B, dtype=torch.float64)
    sizes = {
        "group_size": 2,
        "num_groups": 2,
        "baseline": 0,
        "std": 1,
        "unbiased": True,
        "eps": 1e-6,
        "keep_singletons": False,
    }
    groups = {"scores": x.b, "group_index": None, "lengths": None}
    weighted = {"lengths": lengths, "baseline": BASELINES["length-weighted"]}
    ids = {"group_index": torch.zeros(B, dtype=torch.int64), "group_size": 0, "num_groups": B}
    of_groups = [
        *({"baseline": b, "std": s} for b in BASELINES.values() if b != weighted["baseline"] for s in STDS.values()),
        *(weighted | {"std": s} for s in STDS.values()),
        *(ids | {"std": s} for s in STDS.values()),
        ids | weighted,
        {"unbiased": False},
        {"keep_singletons": True},
    ]
    return {
        "token_rewards_fwd": variants(dict(scores=x.b, kl=x.t, **place, beta=0.1), NO_MASK),
        "token_rewards_bwd": variants(dict(drewards=x.t, **place, beta=0.1), NO_MASK),
        "returns_fwd": variants(dict(rewards=x.t, **place, gamma=0.9, gap=0), NO_MASK, *gaps),
        "returns_bwd": variants(dict(dreturns=x.t, **place, gamma=0.9, gap=0), NO_MASK, *gaps),
        "gae_fwd": variants(dict(rewards=x.t, values=x.t, **place, gamma=0.9, gae_lambda=0.8, gap=0), NO_MASK, *gaps),
        "gae_bwd": variants(dict(da=x.t, dreturns=x.t, **place, gamma=0.9, gae_lambda=0.8, gap=0), NO_MASK, *gaps),
        "reinforce_pp_fwd": variants(
            pipeline | {"estimator": 1, "log_ratio_clamp": 20.0, "kl_clamp": math.inf},
            NO_MASK,
            {"ref_logps": None},
            *each("estimator", ESTIMATORS.values()),
        ),
        "rollout_weights_fwd": variants(rollout, NO_MASK, {"truncate": False}, *each("level", LEVELS.values())),
        "group_advantages_fwd": variants(
            groups | {"moments": None} | sizes, *of_groups, {"moments": x.moments, "std": STDS["batch"]}
        ),
        "group_advantages_bwd": variants({"dadvantages": x.b} | groups | sizes, *of_groups),
    }


def of_losses(dtype: torch.dtype) -> dict[str, Variants]:
    from rpp_kernels.ops.preference import LOSS_TYPES

    x = arguments(dtype)
    place = {"mask": x.mask, "cu_seqlens": x.cu}
    value = dict(values=x.t, old_values=x.t, returns=x.t, **place, epsilon=0.2, sequence_mean=False, per_token=False)
    pairs = dict(logps=x.t, ref_logps=x.t, **place, loss_type=0, beta=0.1, label_smoothing=0.0, margin=0.0)
    groups = dict(logps=x.t, ref_logps=x.t, scores=x.b, **place, group_size=2, beta=0.1, per_group=False)
    return {
        "policy_loss_fwd": policy(dtype),
        "value_loss_fwd": variants(value, NO_MASK, {"sequence_mean": True}, {"per_token": True}),
        "dpo_loss_fwd": variants(
            pairs | {"length_normalized": False, "per_pair": False},
            NO_MASK,
            {"ref_logps": None},
            {"length_normalized": True},
            {"per_pair": True},
            *each("loss_type", LOSS_TYPES.values()),
        ),
        "copg_loss_fwd": variants(groups, NO_MASK, {"per_group": True}),
        "preference_loss_bwd": variants(dict(each=x.b, **place, num_tokens=T), NO_MASK),
    }


def policy(dtype: torch.dtype) -> Variants:
    """Every surrogate at each of its levels, alone and with all that can be added; each addition alone."""
    from rpp_kernels.ops.kl import ESTIMATORS
    from rpp_kernels.ops.policy_loss import LEVELS, SURROGATES, PolicyModes, PolicyNumbers

    x = arguments(dtype)
    numbers = PolicyNumbers(0.2, 0.2, math.inf, 0.0, 20.0, 0.0, math.inf, 0.0)
    k3 = ESTIMATORS["k3"]
    base = {
        "logps": x.t,
        "old_logps": x.t,
        "advantages": x.t,
        "mask": x.mask,
        "cu_seqlens": x.cu,
        "weights": None,
        "ref_logps": None,
    }
    base |= dict(entropy=None, dloss=None, **numbers._asdict(), **PolicyModes(0, 0, k3, k3, 0)._asdict())
    kl, entropy = {"ref_logps": x.t, "beta": 0.1}, {"entropy": x.t, "entropy_coef": 0.1}
    all_of_it = kl | entropy | {"weights": x.t, "kl_bias_correction": 1}
    each_of_sequence = {"advantages": x.b, "sequence_advantages": 1, "sequence_mean": 1}
    surrogates = [
        {"surrogate": number, "level": LEVELS.index(level)}
        for number, surrogate in enumerate(SURROGATES.values())
        for level in surrogate.levels
    ]
    across = [s for s in surrogates if LEVELS[s["level"]] in ("sequence", "sequence-sum")]
    return variants(
        base,
        NO_MASK,
        *surrogates,
        *(s | all_of_it | each_of_sequence for s in surrogates),
        *(s | all_of_it | {"per_token": 1} for s in across),
        *(s | all_of_it | {"entropy": None, "dloss": x.t} for s in across),  # the backward of those
        *(kl | {"kl_estimator": e, "kl_gradient": e} for e in ESTIMATORS.values() if e),
        kl | {"kl_gradient": ESTIMATORS["none"]},
        kl | {"kl_gradient": ESTIMATORS["k2"]},
        kl | {"kl_bias_correction": 1},
        entropy,
        {"weights": x.t},
        {"sequence_advantages": 1, "advantages": x.b},
        {"sequence_mean": 1},
        {"per_token": 1},
    )


def of_chunks(dtype: torch.dtype) -> dict[str, Variants]:
    """Logits of a chunk are float32 or float64; their gradient has the dtype of the operands."""
    x = arguments(dtype)
    head = {"target_ids": x.ids, "temperature": 0.7, "token_temperature": None, "softcap": 0.0}
    changes = [{"token_temperature": x.t}, {"softcap": 30.0}]
    statistics = {"entropy": x.t, "lse": x.t, "lse_rest": x.t, "dlogps": x.t, "dentropy": None, "dlse": None}
    logits = new(T, V, dtype=dtype)
    half = [torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    return {
        "chunk_logps_fwd": variants(dict(logits=logits, **head), *changes),
        "chunk_logps_bwd_out": variants(
            dict(dlogits=logits, logits=logits, rows=None, **head, **statistics),
            *changes,
            {"rows": x.ids},
            {"dentropy": x.t},
            {"dlogps": None, "dlse": x.t},
            *({"dlogits": new(T, V, dtype=d), "dentropy": x.t, "dlse": x.t} for d in (dtype, *half)),
        ),
    }


def of_logits(dtype: torch.dtype) -> dict[str, Variants]:
    x = arguments(torch.float64 if dtype == torch.float64 else torch.float32)
    logits, dlogits = new(T, V, dtype=dtype), new(T, V, dtype=dtype)
    rows = {"target_ids": x.ids, "mask": x.mask, "temperature": 0.7, "token_temperature": None}
    changes = [NO_MASK, {"token_temperature": x.t}, {"logits": new(B, T // B + 1, V, dtype=dtype)[:, :-1]}]
    statistics = {"entropy": x.t, "lse": x.t, "lse_rest": x.t, "dlogps": x.t, "dentropy": None, "dlse": None}
    return {
        "logps_fwd": variants(dict(logits=logits, **rows), *changes),
        "logps_bwd_out": variants(
            dict(dlogits=dlogits, logits=logits, **rows, **statistics),
            *changes,
            {"dentropy": x.t},
            {"dlogps": None, "dentropy": x.t},
            {"dlogps": None, "dlse": x.t},
            {"dentropy": x.t, "dlse": x.t, "token_temperature": x.t},
        ),
    }


# ---------------------------------------------------------------- what must hold, and what is written

# On each scheduler of a multiprocessor: one warp computes while another waits for its loads, of which each has several.
LEAST_WARPS = 2
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


def stale(rows: Iterable[Row], archs: Iterable[str]) -> str | None:
    """Why the committed figures of these architectures are not those of `rows`; None where they are, or where another
    Triton made them, whose figures are its own."""
    committed = json.loads(RESULT.read_text())
    now, archs = result_of(rows), tuple(archs)
    before = [row for row in committed["rows"] if row["arch"] in archs]
    if committed["triton"] != now["triton"] or before == now["rows"]:
        return None
    changed = sorted({row["kernel"] for row in before + now["rows"] if (row in before) != (row in now["rows"])})
    return f"{RESULT.relative_to(ROOT)} is of other kernels, run `python benchmarks/aot.py`: {', '.join(changed)}"


def main() -> None:
    args = _parse()
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
    import report

    everything = not args.arch and not args.function
    measured = {arch: measure(arch, args.function or [""]) for arch in args.arch or REPORTED}
    rows = [row for of_arch, _ in measured.values() for row in of_arch]
    wrong = [failure for _, failures in measured.values() for failure in failures] + problems(rows)
    result = result_of(rows)
    if args.json:
        args.json.write_text(as_json(result))
    if args.check:
        wrong += filter(None, [stale(rows, measured)]) if not args.function else []
        if everything and report.replaced(PAGE, "aot", report.aot(json.loads(RESULT.read_text()))) != PAGE.read_text():
            wrong.append(f"the table of {PAGE.relative_to(ROOT)} is not of {RESULT.relative_to(ROOT)}")
    elif everything and not args.json:
        RESULT.write_text(as_json(result))
        report.write(PAGE, "aot", report.aot(result))
    if args.all:
        print("\n".join(_line(row) for row in rows))
    elif not everything:
        print(report.aot(result))
    if wrong:
        sys.exit("\n".join(wrong))


def _line(row: Row) -> str:
    needs = f"{row.registers:3} registers {row.spills:3} spilled {row.shared:6} shared {row.warps:2} warps"
    return f"{row.arch:7} {row.dtype:8} {needs} {row.occupancy:4.0%}  {row.kernel}: {row.variant}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(GPUS), metavar="ARCH", help=f"of {', '.join(GPUS)}")
    parser.add_argument("--function", nargs="+", metavar="PART", help="functions whose names contain one of these")
    parser.add_argument("--all", action="store_true", help="print a line for each variant")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the committed table is stale")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here and nowhere else")
    return parser.parse_args()


if __name__ == "__main__":
    main()
