"""kl_penalty: one read of two log-probs, one write."""

import torch
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import blocks, kernel, launch
from rpp_kernels.backends.triton.math import kl_slope, kl_value, number

__all__ = ["kl_bwd", "kl_fwd"]


@kernel
def kl_kernel(
    out,  # (T,)
    dkl,  # (T,), of the backward
    logps,  # (T,)
    ref_logps,  # (T,)
    mask,  # (T,)
    T: tl.int64,
    log_ratio_clamp: tl.float64,
    kl_clamp: tl.float64,
    estimator: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < T
    if mask is not None:
        valid &= tl.load(mask + at, mask=valid, other=0) != 0
    d = tl.load(logps + at, mask=valid, other=0.0) - tl.load(ref_logps + at, mask=valid, other=0.0)
    most, highest = number(log_ratio_clamp, F), number(kl_clamp, F)
    if dkl is None:
        result = kl_value(d, estimator, most, highest)
    else:
        result = tl.load(dkl + at, mask=valid, other=0.0) * kl_slope(d, estimator, most, highest)
    tl.store(out + at, tl.where(valid, result, 0.0), mask=at < T)


def _kl(
    dkl: Tensor | None,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None,
    estimator: int,
    log_ratio_clamp: float,
    kl_clamp: float,
) -> Tensor:
    out = torch.empty_like(logps)
    numbers = logps.numel(), log_ratio_clamp, kl_clamp
    launch(kl_kernel, blocks(kl_kernel, out), out, dkl, logps, ref_logps, mask, *numbers, like=out, estimator=estimator)
    return out


def kl_fwd(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None,
    estimator: int,
    log_ratio_clamp: float,
    kl_clamp: float,
) -> Tensor:
    return _kl(None, logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp)


def kl_bwd(
    dkl: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None,
    estimator: int,
    log_ratio_clamp: float,
    kl_clamp: float,
) -> Tensor:
    return _kl(dkl, logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp)
