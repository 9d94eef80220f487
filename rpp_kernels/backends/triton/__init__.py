"""The Triton kernels, for every device that Triton compiles for; one file a concept, formulas in math.py.

On a CPU they run in Triton's interpreter, one program after another, which is for tests: it is asked for by the
environment variable TRITON_INTERPRET=1 and never chosen. Nothing here imports triton before a kernel is wanted.
"""

import functools
import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

# Triton reads the same variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "y", "yes")

PROBLEM: str | None = None

if importlib.util.find_spec("triton") is None:
    PROBLEM = "the package triton is not installed; torch for a GPU brings it, and `pip install triton` does"


def why_not(device: str) -> str | None:
    """Why these kernels cannot serve a device type, with what to do about it; None where they can."""
    if device == "cpu" and not INTERPRETED:
        return (
            "Triton compiles for GPUs; TRITON_INTERPRET=1, set before Python starts, interprets it on a CPU, for tests"
        )
    if device not in ("cpu", "cuda", "xpu"):
        return f"it has no kernels for {device} tensors"
    return PROBLEM


@functools.cache
def kernels() -> Any:
    """The functions of this backend, by the names that ops call them by."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in _FILES]
    return SimpleNamespace(**{name: getattr(module, name) for module in modules for name in module.__all__})


_FILES = ("advantages", "groups", "kl", "logps", "losses", "preference", "rewards", "rollout")
