"""Builds `rpp_kernels._C`, the native kernels, and nothing else. Everything declarative is in pyproject.toml.

RPP_KERNELS_BUILD says for what: `cpu`; `cuda`, which fails where there is no nvcc that will do; `auto`, the default:
with CUDA where there is one, else without and with a sentence that says why. No GPU is needed, and no torch with CUDA;
what the machine has is never asked.
"""

import os
import platform
import re
import shutil
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
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--extended-lambda"]
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden,-g0"]
NVCC_FLAGS += ["-U__CUDA_NO_HALF_CONVERSIONS__"]  # which torch defines, and csrc/cuda/scalars.h converts by
NVCC_FLAGS += ["-Xptxas=--warn-on-spills,--warning-as-error"]  # a kernel that spills is to be cut smaller
NVCC_FLAGS += [f"-gencode=arch=compute_{x},code=[{code}]" for x, code in ARCHITECTURES.items()]


class NoCUDA(Exception):
    """Why there is no nvcc that will do."""


def cuda_home() -> str:
    """The folder of the nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda, in this order, or NoCUDA."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCUDA(f"there is no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda ({error})") from None
    release = re.search(r"release (\d+)\.(\d+)", version)
    if not release or tuple(map(int, release.groups())) < LEAST_NVCC:
        least, found = "{}.{}".format(*LEAST_NVCC), release.group(0) if release else version
        raise NoCUDA(f"want nvcc {least} or later, {nvcc} is {found}")
    # The nvcc on the PATH may be a script that starts another: nvcc itself knows where it is.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(.*)", dry_run)
    return os.path.realpath(top.group(1).strip()) if top else str(Path(nvcc).resolve().parents[1])


def with_cuda() -> str | None:
    """The folder of CUDA to build with, or None for without."""
    wanted = os.environ.get("RPP_KERNELS_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"RPP_KERNELS_BUILD: want auto, cpu or cuda, got {wanted!r}")
    if wanted == "cpu":
        return None
    try:
        return cuda_home()
    except NoCUDA as why:
        if wanted == "cuda":
            raise SystemExit(f"RPP_KERNELS_BUILD=cuda: {why}") from None
        print(f"rpp-kernels is built without CUDA kernels: {why}")
        return None


def extension() -> CppExtension:
    if platform.system() != "Linux":
        raise SystemExit(f"rpp-kernels builds its native kernels on Linux only, this is {platform.system()}")
    home = with_cuda()
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    macros = [*MACROS, ("RPP_CUDA_ARCHITECTURES", '""')]
    # Conversions of float16 from libgcc.a: those of libgcc_s.so are of GCC 12, which manylinux_2_34 does not have.
    libraries, library_dirs = ["gcc"], []
    if home is not None:
        # Not CUDAExtension, which links libraries that a torch without CUDA lacks. As none of torch's is linked, nvcc
        # need not be of the CUDA that torch was built with.
        torch.utils.cpp_extension.CUDA_HOME = home
        torch.utils.cpp_extension._check_cuda_version = lambda *compiler: None
        sources += [*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")]
        names = " ".join(code.split(",")[0] for code in ARCHITECTURES.values())
        macros = [*MACROS, ("RPP_CUDA_ARCHITECTURES", f'"{names}"'), ("RPP_WITH_CUDA", None)]
        libraries += ["cudart_static", "dl", "pthread", "rt"]
        library_dirs += [f"{home}/lib64", *map(str, Path(home).glob("targets/*/lib"))]
    return CppExtension(
        "rpp_kernels._C",
        sorted(map(str, sources)),
        include_dirs=[str(CSRC.resolve()), *([f"{home}/include"] if home else [])],
        define_macros=macros,
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
        libraries=libraries,
        library_dirs=library_dirs,
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
