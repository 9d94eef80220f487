"""Builds `rpp_kernels._C`, the native kernels, and nothing else. Everything declarative is in pyproject.toml."""

import os
import platform
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("csrc")

# torch's stable ABI and Python's limited API: one wheel for torch >= 2.10 and Python >= 3.10.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]

# No -march and no -ffast-math: instruction sets are chosen at run time (csrc/cpu/isa.h) and sums keep their order.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]
FLAGS += ["-Werror=switch", "-Werror=return-type"]  # a surrogate that one of the switches does not know


def extension() -> CppExtension:
    if platform.system() != "Linux":
        raise SystemExit(f"rpp-kernels builds its native kernels on Linux only, this is {platform.system()}")
    sources = sorted(str(path) for path in [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    return CppExtension(
        "rpp_kernels._C",
        sources,
        include_dirs=[str(CSRC.resolve())],
        define_macros=MACROS,
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
    )


os.chdir(Path(__file__).parent)
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
