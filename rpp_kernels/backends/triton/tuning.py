"""Block sizes and warps, for each kernel, dtype and architecture: data, and where each figure comes from.

A row of a kernel that names no dtype or no architecture serves all that have no row of their own; the most particular
row counts. A block is what a program takes at a time: tokens, or elements of a row. At most 16 warps, which are 1024
threads where a wave has 64 (AMD).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rpp_kernels.backends import preference


class Config(NamedTuple):
    block: int
    warps: int
    source: str
    # That a thread of NVIDIA may have, for kernels of which its assembler would else spill a few bytes rather than take
    # a step more. To others it would give twice as many as they need, and half of the programs.
    registers: int | None = None


MODELLED = "modelled: enough bytes in flight for the memory of an H100 at 4 to 8 programs on each multiprocessor"
INTERPRETER = "an interpreter spends its time on programs and steps; few enough for tests to need several"
SEQUENCE = "modelled: 4 tokens a thread, since scans in float64 of 8 take 170 registers: one program a multiprocessor"
PARTIAL_SUMS = "modelled: 8 elements a thread in float64; larger would spill, smaller leave more to the last program"
PAIRS = "modelled: a program compares a block of rows with a block of others, 2 pairs in each thread"

ANY = None
# (kernel, dtype, architecture): the architecture is sm_80, sm_90, sm_100, ..., gfx942, ..., or "interpreter"
TABLE: dict[tuple[str, torch.dtype | None, str | None], Config] = {
    ("row_statistics_kernel", ANY, ANY): Config(4096, 4, MODELLED),
    ("row_statistics_kernel", torch.float32, ANY): Config(2048, 4, MODELLED),
    ("row_statistics_kernel", torch.float64, ANY): Config(1024, 4, MODELLED),
    ("row_statistics_kernel", ANY, "interpreter"): Config(512, 4, INTERPRETER),
    ("dlogits_kernel", ANY, ANY): Config(4096, 8, MODELLED),
    ("dlogits_kernel", torch.float32, ANY): Config(2048, 4, MODELLED),
    ("dlogits_kernel", torch.float64, ANY): Config(1024, 4, MODELLED),
    ("dlogits_kernel", ANY, "interpreter"): Config(512, 4, INTERPRETER),
    ("kl_kernel", ANY, ANY): Config(1024, 4, MODELLED),
    ("kl_kernel", ANY, "interpreter"): Config(64, 4, INTERPRETER),
    ("token_rewards_kernel", ANY, ANY): Config(1024, 8, SEQUENCE),
    ("token_rewards_kernel", ANY, "interpreter"): Config(32, 4, INTERPRETER),
    ("returns_kernel", ANY, ANY): Config(512, 4, SEQUENCE),
    ("returns_kernel", ANY, "sm_90"): Config(1024, 8, SEQUENCE),
    ("returns_kernel", ANY, "interpreter"): Config(32, 4, INTERPRETER),
    ("gae_fwd_kernel", ANY, ANY): Config(1024, 8, SEQUENCE),
    ("gae_fwd_kernel", ANY, "interpreter"): Config(32, 4, INTERPRETER),
    ("gae_bwd_kernel", ANY, ANY): Config(1024, 8, SEQUENCE),
    ("gae_bwd_kernel", ANY, "interpreter"): Config(32, 4, INTERPRETER),
    ("reinforce_pp_kernel", ANY, ANY): Config(1024, 8, SEQUENCE),
    ("reinforce_pp_kernel", ANY, "interpreter"): Config(64, 4, INTERPRETER),
    ("moments_kernel", ANY, ANY): Config(2048, 8, PARTIAL_SUMS),
    ("moments_kernel", ANY, "interpreter"): Config(1024, 4, INTERPRETER),
    ("whiten_kernel", ANY, ANY): Config(1024, 4, MODELLED),
    ("whiten_kernel", ANY, "interpreter"): Config(1024, 4, INTERPRETER),
    ("whiten_sums_kernel", ANY, ANY): Config(2048, 8, PARTIAL_SUMS),
    ("whiten_sums_kernel", ANY, "interpreter"): Config(1024, 4, INTERPRETER),
    ("whiten_bwd_kernel", ANY, ANY): Config(1024, 4, MODELLED),
    ("whiten_bwd_kernel", ANY, "interpreter"): Config(1024, 4, INTERPRETER),
    ("group_advantages_kernel", ANY, ANY): Config(16, 4, PAIRS, 255),
    ("group_advantages_kernel", ANY, "interpreter"): Config(16, 4, INTERPRETER),
    ("group_gradient_kernel", ANY, ANY): Config(16, 4, PAIRS, 255),
    ("group_gradient_kernel", ANY, "interpreter"): Config(16, 4, INTERPRETER),
    ("policy_kernel", ANY, ANY): Config(1024, 8, MODELLED, 255),
    ("policy_kernel", ANY, "interpreter"): Config(256, 4, INTERPRETER),
    ("value_kernel", ANY, ANY): Config(1024, 8, MODELLED),
    ("value_kernel", ANY, "interpreter"): Config(256, 4, INTERPRETER),
    ("rollout_kernel", ANY, ANY): Config(1024, 8, MODELLED, 255),
    ("rollout_kernel", ANY, "interpreter"): Config(256, 4, INTERPRETER),
    ("dpo_kernel", ANY, ANY): Config(1024, 8, MODELLED, 255),
    ("dpo_kernel", ANY, "interpreter"): Config(256, 4, INTERPRETER),
    ("copg_kernel", ANY, ANY): Config(1024, 8, MODELLED),
    ("copg_kernel", ANY, "interpreter"): Config(256, 4, INTERPRETER),
    ("spread_kernel", ANY, ANY): Config(1024, 8, MODELLED),
    ("spread_kernel", ANY, "interpreter"): Config(256, 4, INTERPRETER),
}


def config_of(kernel: str, like: Tensor) -> Config:
    return _config(kernel, like.dtype, architecture(like.device))


@functools.cache
def _config(kernel: str, dtype: torch.dtype, arch: str) -> Config:
    keys = [(kernel, d, a) for a in (arch, ANY) for d in (dtype, ANY)]
    return next(TABLE[key] for key in keys if key in TABLE)


def architecture(device: torch.device) -> str:
    """As in preference.py; "interpreter" for a CPU."""
    return "interpreter" if device.type == "cpu" else preference.architecture(device)
