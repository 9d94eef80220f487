"""`python -m rpp_kernels`: what works on this machine, what does not and why."""

import os
import platform

import torch

import rpp_kernels
from rpp_kernels import backends
from rpp_kernels.backends import native
from rpp_kernels.backends.preference import TABLE, architecture, preferred


def _native(device: str) -> str:
    return f"instruction set {native.cpu_capability()}" if device == "cpu" else f"code for {native.ARCHITECTURES}"


def report() -> str:
    devices = ["cpu"] + [name for name in ("cuda", "xpu", "mps") if getattr(torch, name).is_available()]
    lines = [
        f"rpp-kernels {rpp_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores (torch.set_num_threads, OMP_NUM_THREADS)",
        f"CUDA kernels: {native.ARCHITECTURES or 'none were built'}",
    ]
    forced = os.environ.get("RPP_KERNELS_BACKEND")
    if forced:
        lines.append(f"forced by RPP_KERNELS_BACKEND: {forced}")
    lines.append("")
    for device in devices:
        for name in backends.NAMES:
            reason = backends.why_not(name, device)
            works = "works" + (f", {_native(device)}" if name == "native" and reason is None else "")
            lines.append(f"{device:5} {name:10} {works if reason is None else 'no: ' + reason}")
        one = torch.empty(0, device=device)
        for op in (None, *sorted(op for op, name in TABLE if op and name in (device, architecture(one.device)))):
            preference = preferred(op, one.device)
            why = "forced" if forced else preference.source if preference else "the only one that there is"
            lines.append(f"{device:5} -> {op or 'ops'} run on {backends.backend_of(one, op)!r} ({why})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
