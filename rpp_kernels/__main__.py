"""`python -m rpp_kernels`: what works on this machine, what does not and why."""

import os
import platform

import torch

import rpp_kernels
from rpp_kernels import backends
from rpp_kernels.backends import native


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
            works = "works" + (f", instruction set {native.cpu_capability()}" if name == "native" else "")
            lines.append(f"{device:5} {name:10} {works if reason is None else 'no: ' + reason}")
        chosen = backends.backend_of(torch.empty(0, device=device))
        lines.append(f"{device:5} -> ops run on {chosen!r}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
