"""Per-token KL penalty against the reference policy."""

from typing import Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import (
    check_choice,
    check_floats,
    check_like,
    check_mask,
    check_number,
    flat,
    flat_mask,
    result_dtype,
)

ESTIMATORS = {"none": 0, "k1": 1, "k2": 2, "k3": 3, "abs": 4}  # csrc/formulas.h, enum Kl
INFINITY = float("inf")


@kernel_op(lambda logps, *_: torch.empty_like(logps))
def kl_fwd(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None,
    estimator: int,
    gradient: int,
    log_ratio_clamp: float,
    kl_clamp: float,
    backend: str,
) -> Tensor:
    result: Tensor = kernels(backend).kl_fwd(logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp)
    return result


@kernel_op(lambda dkl, *_: torch.empty_like(dkl))
def kl_bwd(
    dkl: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor | None,
    gradient: int,
    log_ratio_clamp: float,
    kl_clamp: float,
    backend: str,
) -> Tensor:
    result: Tensor = kernels(backend).kl_bwd(
        dkl.contiguous(), logps, ref_logps, mask, gradient, log_ratio_clamp, kl_clamp
    )
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logps, ref_logps, mask, estimator, gradient, log_ratio_clamp, kl_clamp, backend = inputs
    ctx.save_for_backward(logps, ref_logps, mask)
    ctx.options = gradient, log_ratio_clamp, kl_clamp if gradient == estimator else INFINITY, backend


def _backward(ctx: Any, dkl: Tensor) -> tuple[Tensor | None, ...]:
    dlogps = kl_bwd(dkl, *ctx.saved_tensors, *ctx.options)
    return dlogps, -dlogps, None, None, None, None, None, None


register_gradient(kl_fwd, _backward, _setup_context)


def check_clamps(log_ratio_clamp: float, kl_clamp: float | None) -> None:
    check_number("log_ratio_clamp", log_ratio_clamp, "a positive number", 0, open_low=True)
    if kl_clamp is not None:
        check_number("kl_clamp", kl_clamp, "a positive number or None", 0, open_low=True)


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
    """`logps - ref_logps` and its relatives: what each token pays for leaving the reference policy, in nats.

    `torch.where(completion_mask, logps - ref_logps, 0)` for the default. With d = logps - ref_logps,

        "k1" d    "k2" d^2 / 2    "k3" exp(-d) - 1 + d    "abs" |d|

    (joschu.net/blog/kl-approx.html; REINFORCE++ 2501.03262 v9, App. B.1). As a reward term use k1. As a loss term only
    k2's gradient is that of the reverse KL; k1's expectation is zero and k3's is another divergence's.

    Args:
        logps, ref_logps: any one shape; float32, float64, or a half type, which is computed in float32.
        completion_mask: bool; elsewhere the penalty and its gradient are exactly 0, whatever lies there.
        estimator: gives the value.
        gradient: the estimator that is differentiated instead (a straight-through pair such as "k3" with the gradient
            of "k2"); "none" for a constant; None for that of `estimator`.
        log_ratio_clamp: in "k3", d is clamped to +-this before exp.
        kl_clamp: the penalty is clamped to +-this; beyond it its own gradient is 0, that of another `gradient` is not.

    Returns:
        The shape of `logps`; float64 for float64 input, else float32. Differentiable in `logps` and `ref_logps`.

    Raises:
        ValueError: a shape, dtype, device, estimator or range that is not as above.
    """
    check_floats("logps", logps, range(1, 9))
    check_like("ref_logps", ref_logps, "logps", logps)
    check_mask(completion_mask, "logps", logps.shape, logps)
    check_choice("estimator", estimator, [name for name in ESTIMATORS if name != "none"])
    if gradient is not None:
        check_choice("gradient", gradient, list(ESTIMATORS))
    check_clamps(log_ratio_clamp, kl_clamp)
    backend = backend_of(logps, "kl_penalty")
    if backend == "reference":
        return reference.kl_penalty(
            logps,
            ref_logps,
            completion_mask,
            estimator=estimator,
            gradient=gradient,
            log_ratio_clamp=log_ratio_clamp,
            kl_clamp=kl_clamp,
        )
    dtype = result_dtype(logps)
    kl: Tensor = kl_fwd(
        flat(logps, dtype),
        flat(ref_logps, dtype),
        flat_mask(completion_mask),
        ESTIMATORS[estimator],
        ESTIMATORS[gradient or estimator],
        log_ratio_clamp,
        INFINITY if kl_clamp is None else kl_clamp,
        backend,
    )
    return (kl.detach() if gradient == "none" else kl).view(logps.shape)
