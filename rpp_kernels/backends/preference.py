"""Which backend serves an op where several can: data, with the measurement that each line rests on.

A line for an op and an architecture counts before one for any op, and that before one for a kind of device.
"""

from typing import NamedTuple

import torch

UNMEASURED = "unmeasured: neither has run on such a device"


class Preference(NamedTuple):
    order: tuple[str, ...]  # best first; those that cannot serve are passed over, and the reference serves behind them
    source: str


ANY = None
# (public function, or "linear" for those of a head; sm_90, gfx942, ..., or a kind of device)
TABLE: dict[tuple[str | None, str], Preference] = {
    (ANY, "cpu"): Preference(("native",), "measured: the tables of docs/performance.md"),
    (ANY, "cuda"): Preference(("triton", "native"), UNMEASURED),
    (ANY, "xpu"): Preference(("triton",), "the only one that there is"),
}


def preferred(op: str | None, device: torch.device) -> Preference | None:
    """The line for an op, or that for any other op."""
    names = (device.type,) if device.type == "cpu" else (architecture(device), device.type)
    return next((TABLE[key] for key in ((o, n) for n in names for o in (op, ANY)) if key in TABLE), None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, or the kind of a device that has no such name: cpu, xpu."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
