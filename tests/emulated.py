"""The CUDA kernels compiled for this CPU by tests/cuda/emulator.h: a backend "emulated" that tests alone have."""

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
CSRC, HERE = ROOT / "csrc", ROOT / "tests" / "cuda"
FLAGS = ["-O2", "-g0", "-fPIC", "-std=c++20", "-DRPP_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]

PROBLEM = (
    None if shutil.which(os.environ.get("CXX", "g++")) else "there is no g++ to compile the CUDA kernels for a CPU"
)


def why_not(device: str) -> str | None:
    return PROBLEM if device == "cpu" else "the emulated CUDA kernels are for CPU tensors"


@functools.cache
def kernels() -> Any:
    torch.ops.load_library(str(library()))
    return torch.ops.rpp_kernels_emulated


def library() -> Path:
    return _made("kernels", [*sorted(CSRC.glob("cuda/*.cu")), HERE / "registration.cpp"])


@functools.cache
def formulas() -> Any:
    """csrc/formulas.h and csrc/cuda/index.h as a module, which takes and gives numbers: tests/cuda/formulas.cpp."""
    import pybind11

    path = _made("formulas", [HERE / "formulas.cpp"], [pybind11.get_include(), sysconfig.get_paths()["include"]])
    spec = importlib.util.spec_from_file_location("formulas", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _made(name: str, units: list[Path], includes: Sequence[str] = ()) -> Path:
    """These units compiled into one library, anew when a source has changed; the first process to ask makes it."""
    sources = [*units, *CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), HERE / "emulator.h", Path(__file__)]
    text = b"".join(path.read_bytes() for path in sorted(sources)) + f"{torch.__version__} {sys.version}".encode()
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for old in folder.glob(f"{name}-*.so"):
                old.unlink()
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(functools.partial(_compiled, folder, includes), units))
            _run(["-shared", *map(str, objects), "-o", f"{path}.new", *_libraries()])
            os.replace(f"{path}.new", path)
    return path


def _compiled(folder: Path, more: Sequence[str], unit: Path) -> Path:
    includes = [f"-I{p}" for p in (CSRC, HERE, *cpp_extension.include_paths(), *more)]
    out = folder / f"{unit.name}.o"
    _run([*FLAGS, *includes, "-x", "c++", "-c", str(unit), "-o", str(out)])
    return out


def _libraries() -> list[str]:
    return [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]


def _run(arguments: list[str]) -> None:
    done = subprocess.run([os.environ.get("CXX", "g++"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
