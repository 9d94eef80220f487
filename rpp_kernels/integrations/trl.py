"""For TRL: functions that take the place of its own."""

import torch
from torch import Tensor

from rpp_kernels.ops.checks import describe, fail
from rpp_kernels.ops.logps import logps_from_logits


def selective_log_softmax_and_entropy(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...) integers
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...)
) -> tuple[Tensor, Tensor]:
    """`logps_from_logits(logits, index, row_mask != 0, temperature=temperature)[:2]`, with the signature of TRL.

    Stands in for `trl.kernels.selective_log_softmax_and_entropy` and the kernel of that name in `trl-lib/trl-losses`.
    Neither lengths nor the temperature compile anything anew, offsets have 64 bits, and float32 logits, float64 ones, a
    CPU and any strides are served too.

    Args:
        logits: as for `logps_from_logits`, with any number of dimensions.
        index: the token of each row whose log-prob is wanted; anything where masked.
        temperature: positive.
        row_mask: a row where it is 0 or False is not read, and its results and gradients are 0.

    Returns:
        (logps, entropy), each of the shape of `index`, float32 (float64 for float64 logits), both differentiable.

    Raises:
        ValueError: as `logps_from_logits`.
    """
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        fail("logits", "a tensor of shape (..., V)", describe(logits))
    for name, x in {"index": index, "row_mask": row_mask}.items():
        if x is not None and (not isinstance(x, Tensor) or x.shape != logits.shape[:-1]):
            fail(name, f"the shape {tuple(logits.shape[:-1])} of the rows of logits", describe(x))
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        fail("index", "integers", describe(index))
    shape, rows = index.shape, logits
    if logits.dim() not in (2, 3):
        rows, index = logits.reshape(-1, logits.shape[-1]), index.reshape(-1)
    mask = None if row_mask is None else (row_mask != 0).reshape(index.shape)
    out = logps_from_logits(rows, index.long(), mask, temperature=temperature)
    return out.logps.view(shape), out.entropy.view(shape)
