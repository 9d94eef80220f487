"""The only place that chooses which backend runs an op.

A backend is an object with one function for each kernel (`logps_fwd`, `kl_bwd`, ...), all of one meaning; `native` is
C++, and `triton` Triton. "reference" is not one of those: the public function then runs the spec itself, and PyTorch's
autograd with it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import forward_ad

from rpp_kernels.backends import native, triton
from rpp_kernels.backends.preference import preferred


class Backend(NamedTuple):
    kernels: Callable[[], Any]  # its functions, by name
    why_not: Callable[[str], str | None]  # of a device type: why it cannot serve it, with what to do about it


BACKENDS = {
    "native": Backend(native.kernels, native.why_not),
    "triton": Backend(triton.kernels, triton.why_not),
}
NAMES = (*BACKENDS, "reference")

_VARIABLE = "RPP_KERNELS_BACKEND"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS and name != "reference":
        raise ValueError(f"{source}: unknown backend {name!r}, want one of {', '.join(NAMES)}")
    return name


# A plain global and no ContextVar, so that torch.compile guards on it and recompiles when it changes.
_forced: str | None = _checked(os.environ[_VARIABLE], _VARIABLE) if os.environ.get(_VARIABLE) else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within `with use_backend("reference"):` every op of this process runs on that backend, or raises RuntimeError.

    The choice is made when a public function is called; its backward stays with the backend that ran its forward. The
    environment variable RPP_KERNELS_BACKEND makes the same choice for a whole process. Raises ValueError for a name
    that is not in `rpp_kernels.backends.NAMES`.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def backend_of(x: Tensor, op: str | None = None) -> str:
    """The backend that serves a public function, "linear" for those of a head, on the device of `x`: the forced one, or
    the best of preference.py that works. Without `op`, that of all ops that preference.py does not name."""
    device = x.device.type
    if _forced is not None:
        reason = why_not(_forced, device)
        if reason:
            raise RuntimeError(f"backend {_forced!r} was asked for and cannot run: {reason}")
    preference = preferred(op, x.device)
    works = (name for name in (preference.order if preference else ()) if not why_not(name, device))
    chosen = _forced or next(works, "reference")
    if chosen != "reference" and forward_ad._current_level >= 0:  # PyTorch would take the tangent of a kernel for zero
        raise RuntimeError("rpp_kernels has no forward-mode derivatives; use_backend('reference') has")
    return chosen


def why_not(name: str, device: str) -> str | None:
    """Why a backend cannot serve a device type, with what to do about it; None where it can."""
    return BACKENDS[name].why_not(device) if name in BACKENDS else None


def kernels(name: str) -> Any:
    """The kernels of a backend that `backend_of` has chosen."""
    return BACKENDS[name].kernels()
