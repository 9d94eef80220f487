"""Fails where a CPU kernel takes more instructions than the committed result says: `make gate`.

A time says little on a machine that others use; an instruction count is the same in every run. Valgrind runs every call
of kernel_calls.py once on one thread, for AVX2 and for the plain instruction set (it knows no AVX-512, whose kernels
are the same source), and counts what the extension itself executes, its calls of libm included. Of a few public
functions it counts everything, Python, PyTorch and all, for tiny tensors: what a call costs beside its kernel. Of two
losses from hidden states it measures peak memory, which no count of instructions shows.

`python benchmarks/gate.py --write` accepts what is there now, into benchmarks/results/instructions.json. Counts depend
on the compiler: one of another major version is given a wider limit. Those of public functions are compared only under
the same PyTorch and Python.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results" / "instructions.json"
ISAS = ("avx2", "plain")
# Two runs of one build on one machine do not differ by an instruction, peaks by a megabyte. Beside its kernel a call
# runs libraries that choose their code by the processor: MKL, libc.
LIMITS = {"kernels": 1.05, "functions": 1.10, "memory": 1.10}
OTHER_COMPILER = 1.25  # not measured: there was one compiler to try


class Change(NamedTuple):
    kind: str
    name: str
    before: float | None  # None: not in the committed result
    now: float | None  # None: not measured any more
    limit: float

    @property
    def bad(self) -> bool:
        return self.before is None or self.now is None or self.now > self.limit * self.before

    @property
    def better(self) -> bool:
        return self.before is not None and self.now is not None and self.now * self.limit < self.before

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.name}: not in the committed result"
        if self.now is None:
            return f"{self.name}: in the committed result, and not measured now"
        return f"{self.name}: {self.before:,.0f} -> {self.now:,.0f}, {self.now / self.before - 1:+.1%}"


def main() -> None:
    args = _parse()
    if args.count:
        _count(args.count, args.only)
        return
    if args.write and args.only:
        sys.exit("--write wants all kernels, got --only")
    if problem := why_not():
        sys.exit(f"the gate cannot run: {problem}")
    before = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    now = measure(args.only)
    if args.write:
        again = measure(args.only)
        now["spread"] = {kind: _spread(now[kind], again[kind]) for kind in LIMITS}
        COMMITTED.write_text(json.dumps(now, indent=1) + "\n")
        print(f"wrote {COMMITTED}; a second run differed by at most {now['spread']}")
        return
    if not before:
        sys.exit(f"there is no {COMMITTED} to compare with: run with --write")
    sys.exit(judged(before, now, partial=bool(args.only)))


def why_not() -> str | None:
    import torch

    for command in ("valgrind", "vgdb"):
        if shutil.which(command) is None:
            return f"there is no {command} on the PATH; install valgrind (apt-get install valgrind)"
    if not torch._C._valgrind_supported_platform():
        return "this PyTorch cannot talk to valgrind (its wheels for Linux on x86-64 can)"
    return None


# ---------------------------------------------------------------- the judgement


def judged(before: dict[str, Any], now: dict[str, Any], *, partial: bool = False) -> int:
    """Prints what changed; 1 where something grew beyond its limit. `partial`: not everything was measured."""
    for note in notes(before["made_by"], now["made_by"]):
        print(note)
    changes = compared(before, now, partial=partial)
    bad = [change for change in changes if change.bad]
    better = [change for change in changes if change.better]
    for title, some in {"Less than before": better, "Too much": bad}.items():
        if some:
            print(f"\n{title}:", *(f"{change.kind:9s} {change}" for change in some), sep="\n  ")
    print(f"\n{len(changes)} compared with commit {before['machine']['commit']}, {len(bad)} beyond their limit.")
    if bad:
        print("To accept these: python benchmarks/gate.py --write, and say in the commit why they are worth it.")
    elif better:
        print("To hold what was won: python benchmarks/gate.py --write.")
    return int(bool(bad))


def compared(before: dict[str, Any], now: dict[str, Any], *, partial: bool = False) -> list[Change]:
    limits = dict(LIMITS)
    if _major(before["made_by"]["compiler"]) != _major(now["made_by"]["compiler"]):
        limits["kernels"] = OTHER_COMPILER
    if not _same_python(before["made_by"], now["made_by"]):
        del limits["functions"]
    changes = []
    for kind, limit in limits.items():
        old, new = before[kind], now[kind]
        names = new if partial else old | new
        changes += [Change(kind, name, old.get(name), new.get(name), limit) for name in names]
    return changes


def notes(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    if _major(before["compiler"]) != _major(now["compiler"]):
        yield (
            f"The committed counts are of GCC {before['compiler']}, this extension is of GCC {now['compiler']}: "
            f"kernels may take {OTHER_COMPILER - 1:.0%} more."
        )
    if not _same_python(before, now):
        yield (
            f"Not compared: public functions, whose counts are of PyTorch {before['torch']} and Python "
            f"{before['python']}; here are {now['torch']} and {now['python']}."
        )


def _same_python(before: dict[str, str], now: dict[str, str]) -> bool:
    return [before[k] for k in ("torch", "python")] == [now[k] for k in ("torch", "python")]


def _major(version: str) -> str:
    return version.partition(".")[0]


def _spread(a: dict[str, float], b: dict[str, float]) -> float:
    return round(max((abs(b[name] / a[name] - 1) for name in a), default=0.0), 5)


# ---------------------------------------------------------------- measuring


def measure(only: list[str]) -> dict[str, Any]:
    """Both instruction sets at once, as counts do not mind; then what memory a call takes, in a process of its own."""
    import torch
    from run import machine

    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    described = machine(1, "python benchmarks/gate.py --write")
    made_by = {"compiler": compiler(), "valgrind": valgrind, "torch": torch.__version__, "python": described["python"]}
    kernels: dict[str, int] = {}
    functions: dict[str, int] = {}
    elements: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = [(isa, _start("valgrind", isa, only, Path(folder))) for isa in ISAS]
        for isa, process in started:
            output, errors = process.communicate()
            if process.returncode:
                sys.exit(f"counting instructions of {isa} failed:\n{output}\n{errors}")
            calls = json.loads(output.splitlines()[-1])
            dumps = [Path(folder) / f"{isa}.{i + 1}" for i in range(len(calls))]
            for call, dump in zip(calls, dumps, strict=True):
                of = instructions(dump.read_text())
                if call["kernel"]:
                    kernels[f"{isa} {call['name']}"] = sum(n for ob, n in of.items() if _is_own(ob))
                    elements[call["name"]] = call["elements"]
                else:
                    functions[call["name"]] = sum(of.values())
    memory = {} if only else json.loads(_finished(_start("", "memory", [], None)))
    return {
        "machine": described,
        "made_by": made_by,
        "elements": elements,
        "kernels": kernels,
        "functions": functions,
        "memory": memory,
    }


def _start(tool: str, count: str, only: list[str], folder: Path | None) -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).resolve()), "--count", count, "--only", *only]
    if tool:
        outputs = f"--callgrind-out-file={folder}/{count}"
        command = [tool, "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", outputs, *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if count in ISAS:
        environment |= {"RPP_KERNELS_CPU_ISA": count}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _finished(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"measuring failed:\n{output}\n{errors}")
    return output


def _is_own(library: str) -> bool:
    return Path(library).name.startswith(("_C.", "libm."))


def compiler() -> str:
    """The version of GCC that compiled the extension, as the file itself says."""
    from rpp_kernels import _C

    found = re.search(rb"GCC: \(.*?\) ([\d.]+)", Path(_C.__file__).read_bytes())
    return found[1].decode() if found else "unknown"


def instructions(dump: str) -> dict[str, int]:
    """How many each library executed itself, from a file of callgrind: lines of cost stand below their `ob=`, and the
    one below `calls=` is of what was called, which is counted where it stands."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    library, is_call = "", False
    for line in dump.splitlines():
        if named := re.match(r"(c?)ob=\((\d+)\)(?: (.*))?", line):
            called, number, name = named.groups()
            if name:
                names[number] = name
            if not called:
                library = names[number]
        elif line.startswith("calls="):
            is_call = True
        elif re.match(r"[-+*\d]", line):
            if not is_call:
                counts[library] = counts.get(library, 0) + int(line.split()[-1])
            is_call = False
    return counts


# ---------------------------------------------------------------- in a process of its own


def _count(what: str, only: list[str]) -> None:
    """Prints what was called, in the order of callgrind's files; or the peaks of memory."""
    import gc

    import torch

    torch.manual_seed(0)
    gc.disable()
    if what == "memory":
        print(json.dumps(dict(_peaks())))
        return
    every = [*kernel_calls(), *(public_calls() if what == ISAS[0] else ())]
    calls = [call for call in every if not only or call[0].startswith(tuple(only))]
    subprocess.run(["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"], check=True, capture_output=True)
    said = []
    for name, elements, call in calls:
        for _ in range(1 if elements else 3):
            call()  # what the first call alone does
        torch._C._valgrind_toggle()
        call()
        torch._C._valgrind_toggle_and_dump_stats()
        said.append({"name": name, "kernel": elements > 0, "elements": elements})
    print(json.dumps(said))


Call = tuple[str, int, Callable[[], Any]]  # with the number of elements of its largest tensor, 0 for a public function


def kernel_calls() -> Iterator[Call]:
    """Each with tensors of its own: some are written to."""
    import torch
    from kernel_calls import Sizes, workload

    from rpp_kernels.backends import native

    of_logits = ("logps_fwd", "logps_bwd_out", "chunk_logps_fwd", "chunk_logps_bwd_out")

    def own(x: Any, chunk: bool) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.T.clone(memory_format=torch.contiguous_format).T if chunk and x.dim() == 2 else x.clone()

    for sizes, wanted in ((Sizes(T=8192, B=64), False), (Sizes(T=32, B=4, V=8192), True)):
        for name, dtype, calls in workload(sizes):
            if (name in of_logits) != wanted or dtype not in (torch.float32, torch.bfloat16):
                continue
            for label, arguments in calls.items():
                tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
                chunk = name.startswith("chunk")
                if chunk and len({x.dtype for x in tensors if x.dim() == 2}) > 1:
                    continue  # of a GPU: here the gradient takes the place of the logits
                said = f"{name} {str(dtype).removeprefix('torch.')}" + (f", {label}" if label else "")
                bound = [own(x, chunk) for x in arguments]
                function = getattr(native.kernels(), name)
                yield said, max(x.numel() for x in tensors), lambda f=function, a=bound: f(*a)


def public_calls() -> Iterator[Call]:
    """Forward and backward of tiny tensors, where the call is all there is."""
    import torch

    import rpp_kernels as rpp
    from rpp_kernels.testing import make_batch

    batch = make_batch(4, 8, vocab=16)
    linear = make_batch(4, 8, vocab=16, hidden=8)
    mask, ids = batch["completion_mask"], batch["target_ids"]
    logps, old, ref = batch["logps"].requires_grad_(), batch["old_logps"], batch["ref_logps"]
    logits = batch["logits"].requires_grad_()
    hidden, weight = linear["hidden_states"].requires_grad_(), linear["weight"].requires_grad_()
    head, target = (hidden, weight), (hidden, weight, linear["target_ids"])

    def differentiated(function: Callable[[], torch.Tensor], *wrt: torch.Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function().sum(), wrt)

    yield "kl_penalty", 0, differentiated(lambda: rpp.kl_penalty(logps, ref, mask), logps)
    yield "returns", 0, lambda: rpp.returns(batch["rewards"], mask, gamma=0.9)
    yield "whiten", 0, lambda: rpp.whiten(batch["advantages"], mask)
    yield "group_advantages", 0, lambda: rpp.group_advantages(batch["scores"], group_size=2)
    yield "reinforce_pp_advantages", 0, lambda: rpp.reinforce_pp_advantages(batch["scores"], old, ref, mask)
    yield "policy_loss", 0, differentiated(lambda: rpp.policy_loss(logps, old, batch["advantages"], mask).loss, logps)
    yield "logps_from_logits", 0, differentiated(lambda: rpp.logps_from_logits(logits, ids, mask).logps, logits)
    yield "linear_logps", 0, differentiated(lambda: rpp.linear_logps(*target, mask).logps, *head)
    linear_loss = differentiated(lambda: rpp.linear_policy_loss(*target, old, batch["advantages"], mask).loss, *head)
    yield "linear_policy_loss", 0, linear_loss


def _peaks() -> Iterator[tuple[str, float]]:
    """MiB of a forward and backward, their results included."""
    import torch
    from case import Data
    from linear_cases import WRT, fused_policy_loss, logps_then_policy_loss, policy_inputs
    from timing import peak_extra_mib, run_once

    tokens, vocab, hidden = 4096, 32000, 64
    for function in (fused_policy_loss, logps_then_policy_loss):
        for T in (64, tokens):
            work = Data(policy_inputs(T, vocab, hidden), WRT, (torch.ones(()),)).work(function)
            run_once(work)
        peak = peak_extra_mib(work)
        if peak is not None:
            yield f"MiB of {function.__name__}, T = {tokens}, V = {vocab}, H = {hidden}", round(peak, 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="kernels whose names begin so")
    parser.add_argument("--write", action="store_true", help="make what is measured now the committed result")
    parser.add_argument("--count", help=argparse.SUPPRESS)  # in the process that valgrind watches
    return parser.parse_args()


if __name__ == "__main__":
    main()
