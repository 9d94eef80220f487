"""Builds `rpp_kernels._C`, the native kernels, and nothing else. Everything declarative is in pyproject.toml.

RPP_KERNELS_BUILD says for what: `cpu`; `cuda`, which fails where there is no nvcc that will do; `auto`, the default:
with CUDA where nvcc is found. No GPU is needed, and no torch with CUDA; what the machine has is never asked.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch.utils.cpp_extension
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("csrc")

# torch's stable ABI and Python's limited API: one wheel for torch >= 2.10 and Python >= 3.10.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]

# No -march and no -ffast-math: instruction sets are chosen at run time (csrc/cpu/isa.h) and sums keep their order.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]
FLAGS += ["-Werror=switch", "-Werror=return-type"]  # a surrogate that one of the switches does not know

# Code for A100 and its like, Hopper and Blackwell; PTX of the newest, which later ones compile when it is first run.
ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100": "sm_100,compute_100"}
LEAST_NVCC = (12, 8)  # knows sm_100
NVCC_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "--extended-lambda",
    "-Xcompiler=-fvisibility=hidden",
]
NVCC_FLAGS += ["-Xptxas=--warn-on-spills,--warning-as-error"]  # a kernel that spills is to be cut smaller
NVCC_FLAGS += [f"-gencode=arch=compute_{x},code=[{code}]" for x, code in ARCHITECTURES.items()]


def cuda_home() -> str | None:
    """Where nvcc lives; the one on the PATH may be a script that starts another. Raises for one that is too old."""
    nvcc = next((str(x) for x in (Path(d) / "nvcc" for d in os.environ["PATH"].split(os.pathsep)) if x.is_file()), None)
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else nvcc or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if not release or tuple(map(int, release.groups())) < LEAST_NVCC:
        found = release.group(0) if release else version
        raise SystemExit(f"rpp-kernels needs nvcc {LEAST_NVCC[0]}.{LEAST_NVCC[1]} or later, {nvcc} is {found}")
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(.*)", dry_run)
    return os.path.realpath(top.group(1).strip()) if top else str(Path(nvcc).resolve().parents[1])


def with_cuda() -> str | None:
    wanted = os.environ.get("RPP_KERNELS_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"RPP_KERNELS_BUILD: want auto, cpu or cuda, got {wanted!r}")
    home = None if wanted == "cpu" else cuda_home()
    if wanted == "cuda" and home is None:
        raise SystemExit("RPP_KERNELS_BUILD=cuda needs nvcc: neither on the PATH, nor in CUDA_HOME or /usr/local/cuda")
    return home


def extension() -> CppExtension:
    if platform.system() != "Linux":
        raise SystemExit(f"rpp-kernels builds its native kernels on Linux only, this is {platform.system()}")
    home = with_cuda()
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    macros, options = [*MACROS, ("RPP_CUDA_ARCHITECTURES", '""')], {}
    if home is not None:
        # Not CUDAExtension, which links libraries that a torch without CUDA lacks.
        torch.utils.cpp_extension.CUDA_HOME = home
        sources += [*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")]
        names = " ".join(code.split(",")[0] for code in ARCHITECTURES.values())
        macros = [*MACROS, ("RPP_CUDA_ARCHITECTURES", f'"{names}"'), ("RPP_WITH_CUDA", None)]
        options = {
            "libraries": ["cudart_static", "dl", "pthread", "rt"],
            "library_dirs": [f"{home}/lib64", f"{home}/targets/{platform.machine()}-linux/lib"],
        }
    return CppExtension(
        "rpp_kernels._C",
        sorted(map(str, sources)),
        include_dirs=[str(CSRC.resolve()), *([f"{home}/include"] if home else [])],
        define_macros=macros,
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
        **options,
    )


os.chdir(Path(__file__).parent)
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
