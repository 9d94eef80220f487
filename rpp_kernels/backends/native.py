"""The C++ kernels: torch.ops.rpp_kernels_C, registered by importing the extension `rpp_kernels._C`.

An extension that was not built is a fact to report (`PROBLEM`); one that is there and fails to load raises at import.
"""

import importlib
import importlib.util

import torch

PROBLEM: str | None = None

if importlib.util.find_spec("rpp_kernels._C") is None:
    PROBLEM = (
        "the extension rpp_kernels._C is not built; `pip install rpp-kernels` brings it, and in a checkout "
        "`pip install --no-build-isolation -e .` compiles it (it needs a C++20 compiler)"
    )
else:
    importlib.import_module("rpp_kernels._C")

kernels = torch.ops.rpp_kernels_C


def cpu_capability() -> str:
    """The instruction set that the CPU kernels run with: "avx512", "avx2" or "plain"."""
    capability: str = kernels.cpu_capability()
    return capability
