"""The C++ kernels: torch.ops.rpp_kernels_C, registered by importing the extension `rpp_kernels._C`.

An extension that was not built is a fact to report (`PROBLEM`); one that is there and fails to load raises at import.
"""

import importlib
import importlib.util
from typing import Any

import torch

PROBLEM: str | None = None
# For which GPUs there is code: "sm_80 sm_90a sm_100", or "" where it was built without CUDA.
ARCHITECTURES = ""

if importlib.util.find_spec("rpp_kernels._C") is None:
    PROBLEM = (
        "the extension rpp_kernels._C is not built; `pip install rpp-kernels` brings it, and in a checkout "
        "`pip install --no-build-isolation -e .` compiles it (it needs a C++20 compiler)"
    )
else:
    importlib.import_module("rpp_kernels._C")
    ARCHITECTURES = torch.ops.rpp_kernels_C.cuda_architectures()


def kernels() -> Any:
    """torch.ops.rpp_kernels_C, where the device of the tensors chooses between C++ and CUDA."""
    return torch.ops.rpp_kernels_C


def why_not(device: str) -> str | None:
    """Why these kernels cannot serve a device type, with what to do about it; None where they can."""
    if device not in ("cpu", "cuda"):
        return f"it has no kernels for {device} tensors"
    if PROBLEM or device == "cpu":
        return PROBLEM
    if not ARCHITECTURES:
        return (
            "the extension rpp_kernels._C was built without CUDA; with nvcc on the machine, RPP_KERNELS_BUILD=cuda "
            "`pip install --no-build-isolation --no-binary rpp-kernels rpp-kernels` builds it with"
        )
    if torch.version.hip:
        return "its CUDA kernels are for NVIDIA's GPUs; the backend triton serves AMD's"
    return None


def cpu_capability() -> str:
    """The instruction set that the CPU kernels run with: "avx512", "avx2" or "plain"."""
    capability: str = kernels().cpu_capability()
    return capability
