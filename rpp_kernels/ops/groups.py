"""Advantages over a group: the samples of one prompt."""

from typing import Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.advantages import check_eps
from rpp_kernels.ops.checks import check_choice, check_floats, check_shape, describe, fail, flat, result_dtype

BASELINES = {"mean": 0, "leave-one-out": 1}  # csrc/cpu/groups.cpp, enum Baseline
STDS = {"none": 0, "group": 1, "batch": 2}  # enum Std


@kernel_op(lambda scores, *_: torch.empty_like(scores))
def group_advantages_fwd(
    scores: Tensor,
    group_index: Tensor | None,
    group_size: int,
    num_groups: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
    backend: str,
) -> Tensor:
    result: Tensor = kernels(backend).group_advantages_fwd(
        scores, group_index, group_size, num_groups, baseline, std, unbiased, eps, keep_singletons
    )
    return result


@kernel_op(lambda dadvantages, *_: torch.empty_like(dadvantages))
def group_advantages_bwd(
    dadvantages: Tensor,
    scores: Tensor,
    group_index: Tensor | None,
    group_size: int,
    num_groups: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
    backend: str,
) -> Tensor:
    result: Tensor = kernels(backend).group_advantages_bwd(
        dadvantages.contiguous(),
        scores,
        group_index,
        group_size,
        num_groups,
        baseline,
        std,
        unbiased,
        eps,
        keep_singletons,
    )
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, group_index, *ctx.options = inputs
    ctx.save_for_backward(scores, group_index)


def _backward(ctx: Any, dadvantages: Tensor) -> tuple[Tensor | None, ...]:
    dscores = group_advantages_bwd(dadvantages, *ctx.saved_tensors, *ctx.options)
    return dscores, None, None, None, None, None, None, None, None, None


register_gradient(group_advantages_fwd, _backward, _setup_context)


def group_advantages(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    baseline: str = "mean",
    std: str = "none",
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """`scores - scores.view(-1, group_size).mean(1, keepdim=True)` and its relatives, one advantage for each sequence.

        A_i = (s_i - b_i) / (std + eps)

        baseline "mean": the group's mean, i included (GRPO 2402.03300; REINFORCE++ v9 eq. 6; Dr. GRPO with std "none")
        baseline "leave-one-out": the mean of the others (RLOO, Back to Basics 2402.14740)
        std "none": no division; "group": by that of the group's scores (GRPO); "batch": by that of all scores

    Args:
        scores: one for each sequence.
        group_size: sequences of a group stand next to each other, so many at a time; B must be a multiple of it.
        group_ids: instead of `group_size`: sequences with the same id are a group, in any order and of any size. On an
            accelerator this reads the ids back (torch.unique).
        unbiased: standard deviation over n - 1.
        eps: added to the standard deviation, which for equal scores is exactly 0.
        singleton: a group of one has no baseline to speak of: its advantage is 0 ("zero") or its score ("keep"), which
            "group" does not divide.

    Returns:
        (B,), float64 for float64 input, else float32. Statistics are taken in float64. Differentiable in `scores`.

    Raises:
        ValueError: both or neither of `group_size` and `group_ids`; a shape, dtype, option or range not as above.
    """
    check_floats("scores", scores, (1,))
    if (group_size is None) == (group_ids is None):
        fail("group_size, group_ids", "exactly one of them", "both" if group_ids is not None else "neither")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1 or scores.shape[0] % group_size):
        fail("group_size", f"a positive divisor of the {scores.shape[0]} scores", group_size)
    if group_ids is not None:
        if not isinstance(group_ids, Tensor) or group_ids.dtype != torch.int64 or group_ids.device != scores.device:
            fail("group_ids", f"an int64 tensor on {scores.device}", describe(group_ids))
        check_shape("group_ids", group_ids, scores.shape, "of scores")
    check_choice("baseline", baseline, list(BASELINES))
    check_choice("std", std, list(STDS))
    check_choice("singleton", singleton, ("zero", "keep"))
    check_eps(eps)
    backend = backend_of(scores)
    if backend == "reference":
        return reference.group_advantages(
            scores,
            group_size=group_size,
            group_ids=group_ids,
            baseline=baseline,
            std=std,
            unbiased=unbiased,
            eps=eps,
            singleton=singleton,
        )
    index = None if group_ids is None else torch.unique(group_ids, return_inverse=True)[1]
    result: Tensor = group_advantages_fwd(
        flat(scores, result_dtype(scores)),
        index,
        group_size or 0,
        scores.shape[0] if group_size is None else scores.shape[0] // group_size,
        BASELINES[baseline],
        STDS[std],
        unbiased,
        eps,
        singleton == "keep",
        backend,
    )
    return result
