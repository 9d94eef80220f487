"""The per-token KL penalty."""

import torch
from torch import Tensor

from rpp_kernels.reference.shared import clamp, result_dtype, select


def kl_penalty(
    logps: Tensor,  # (B, S) or (T,)
    ref_logps: Tensor,  # same
    completion_mask: Tensor | None = None,  # same, bool
    *,
    estimator: str = "k1",
    gradient: str | None = None,
    log_ratio_clamp: float = 20.0,
    kl_clamp: float | None = None,
) -> Tensor:
    """Per-token KL(pi || ref) from samples of pi, with d = logps - ref_logps [KL], [R++ v9, App. B.1]:

        k1 = d    k2 = d^2 / 2    k3 = exp(-d) - 1 + d    abs = |d|

    d is clamped to +-log_ratio_clamp in k3 only (it is exponentiated there), and the value to +-kl_clamp. `gradient`
    names an estimator that is differentiated, without kl_clamp, while `estimator` gives the value ("none": no
    gradient).
    """
    dtype = result_dtype(logps)
    d = select(logps.to(dtype) - ref_logps.to(dtype), completion_mask)

    def estimate(name: str) -> Tensor:
        x = clamp(d, -log_ratio_clamp, log_ratio_clamp) if name == "k3" else d
        return {"k1": lambda: x, "k2": lambda: 0.5 * x * x, "k3": lambda: torch.expm1(-x) + x, "abs": x.abs}[name]()

    value = estimate(estimator)
    if kl_clamp is not None:
        value = clamp(value, -kl_clamp, kl_clamp)
    if gradient is None or gradient == estimator:
        return value
    if gradient == "none":
        return value.detach()
    differentiated = estimate(gradient)
    # An infinite estimate has no gradient to give.
    return value.detach() + select(differentiated - differentiated.detach(), differentiated.isfinite())
