"""What is relative to a group, the samples of one prompt: advantages, the best one, whether there is a difference."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.distributed import concatenated, group_name, named_group
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.advantages import check_eps, over_ranks
from rpp_kernels.ops.checks import (
    check_choice,
    check_constant,
    check_floats,
    check_ranks,
    check_shape,
    describe,
    fail,
    flat,
    may_read,
    result_dtype,
)

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup

BASELINES = {"mean": 0, "leave-one-out": 1, "length-weighted": 2}  # csrc/groups.h, enum Baseline
STDS = {"none": 0, "group": 1, "batch": 2, "leave-one-out": 3}  # enum Std


def _numbered(group_ids: Tensor | None) -> Tensor | None:
    """Groups by any id as groups from 0 on."""
    return None if group_ids is None else torch.unique(group_ids, return_inverse=True)[1]


def _num_groups(scores: Tensor, group_size: int) -> int:
    return scores.shape[0] // group_size if group_size else scores.shape[0]


@kernel_op(lambda scores, *_: torch.empty_like(scores))
def group_advantages_fwd(
    scores: Tensor,
    group_ids: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
    group_name: str,
    backend: str,
) -> Tensor:
    run, group = kernels(backend), named_group(group_name)
    begin, count, moments = 0, scores.shape[0], None
    if group is not None and group_ids is not None:
        (scores, group_ids, lengths), begin = _of_all_ranks(group, scores, group_ids, lengths)
    elif group is not None and std == STDS["batch"]:
        moments = over_ranks(run.moments(scores, None), group_name)
    options = group_size, _num_groups(scores, group_size), baseline, std, unbiased, eps, keep_singletons
    result: Tensor = run.group_advantages_fwd(scores, _numbered(group_ids), lengths, moments, *options)
    return result if count == result.shape[0] else result[begin : begin + count].clone()


def _of_all_ranks(group: Any, *columns: Tensor | None) -> tuple[list[Any], int]:
    """Each column of all ranks, and where this rank's rows begin."""
    wholes = [None if x is None else concatenated(x, group) for x in columns]
    begin = next(whole[1] for whole in wholes if whole is not None)
    return [None if whole is None else whole[0] for whole in wholes], begin


@kernel_op(lambda dadvantages, *_: torch.empty_like(dadvantages))
def group_advantages_bwd(
    dadvantages: Tensor,
    scores: Tensor,
    group_ids: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    baseline: int,
    std: int,
    unbiased: bool,
    eps: float,
    keep_singletons: bool,
    backend: str,
) -> Tensor:
    options = group_size, _num_groups(scores, group_size), baseline, std, unbiased, eps, keep_singletons
    result: Tensor = kernels(backend).group_advantages_bwd(
        dadvantages.contiguous(), scores, _numbered(group_ids), lengths, *options
    )
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, group_ids, lengths, *options, _, backend = inputs  # a process group has no gradient
    ctx.options = *options, backend
    ctx.save_for_backward(scores, group_ids, lengths)


def _backward(ctx: Any, dadvantages: Tensor) -> tuple[Tensor | None, ...]:
    return group_advantages_bwd(dadvantages, *ctx.saved_tensors, *ctx.options), *(None,) * 10


register_gradient(group_advantages_fwd, _backward, _setup_context)


def check_groups(scores: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    check_floats("scores", scores, (1,))
    if (group_size is None) == (group_ids is None):
        fail("group_size, group_ids", "exactly one of them", "both" if group_ids is not None else "neither")
    whole = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    if group_size is not None and (not whole or scores.shape[0] % group_size):
        fail("group_size", f"a positive divisor of the {scores.shape[0]} scores", group_size)
    if group_ids is not None:
        if not isinstance(group_ids, Tensor) or group_ids.dtype != torch.int64 or group_ids.device != scores.device:
            fail("group_ids", f"an int64 tensor on {scores.device}", describe(group_ids))
        check_shape("group_ids", group_ids, scores.shape, "of scores")


def _check_lengths(lengths: Tensor | None, baseline: str, scores: Tensor) -> None:
    if (lengths is None) != (baseline != "length-weighted"):
        wanted = "a tensor of one for each score" if lengths is None else "None"
        got = "None" if lengths is None else describe(lengths)
        fail("lengths", f"{wanted} with baseline {baseline!r}", got)
    if lengths is None:
        return
    check_shape("lengths", lengths, scores.shape, "of scores")
    if lengths.dtype == torch.bool or lengths.is_complex() or lengths.device != scores.device:
        fail("lengths", f"integers or floats on {scores.device}", describe(lengths))
    check_constant("lengths", lengths)
    if may_read(lengths) and lengths.numel():
        low, high = lengths.aminmax()
        if not (low >= 0 and high < float("inf")):
            fail("lengths", "finite numbers from 0", f"numbers from {float(low)} to {float(high)}")


def group_advantages(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    baseline: str = "mean",
    lengths: Tensor | None = None,  # (B,)
    std: str = "none",
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: str = "zero",
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`scores - scores.view(-1, group_size).mean(1, keepdim=True)` and its relatives, one advantage for each sequence.

        A_i = (s_i - b_i) / (std + eps)

        baseline "mean": the group's mean, i included (GRPO 2402.03300; REINFORCE++ v9 eq. 6; Dr. GRPO with std "none")
        baseline "leave-one-out": the mean of the others (RLOO, Back to Basics 2402.14740)
        baseline "length-weighted": sum_j l_j s_j / sum_j l_j over the group, i included (OPO 2505.23585): of least
            variance where the gradient of a sequence grows with its length
        std "none": no division; "group": by that of the group's scores (GRPO); "batch": by that of all scores
        std "leave-one-out": by that of the others' scores, and no division where these are all equal, so that not one
            outlier becomes immense (as in NeMo-RL, with the baseline of the same name)

    Args:
        scores: one for each sequence.
        group_size: sequences of a group stand next to each other, so many at a time; B must be a multiple of it.
        group_ids: instead of `group_size`: sequences with the same id are a group, in any order and of any size. On an
            accelerator this reads the ids back (torch.unique).
        lengths: with "length-weighted": valid tokens of each sequence, integers or floats, from 0. A sequence of length
            0 weighs nothing, whatever its score; a group of nothing but those has the baseline 0.
        unbiased: standard deviation over n - 1.
        eps: added to the standard deviation, which for equal scores is exactly 0.
        singleton: a group of one has no baseline to speak of: its advantage is 0 ("zero") or its score ("keep"), which
            "group" and "leave-one-out" do not divide.
        process_group: the batch is that of all its ranks, each of which must call this, one without scores too: groups
            by `group_ids` may span ranks, and "batch" is the standard deviation of all ranks' scores. Groups of
            `group_size` stay on their rank: then only "batch" needs a collective, of three numbers, while `group_ids`
            gathers the scores and, on an accelerator, waits to read back how many there are.

    Returns:
        (B,), float64 for float64 input, else float32. Statistics are taken in float64. Differentiable in `scores`
        without a process_group: the gradient through other ranks' statistics is not offered.

    Raises:
        ValueError: both or neither of `group_size` and `group_ids`; `lengths` with another baseline, or none with
            theirs; a shape, dtype, option or range not as above; with process_group, `scores` that require grad.
    """
    check_groups(scores, group_size, group_ids)
    check_choice("baseline", baseline, list(BASELINES))
    check_choice("std", std, list(STDS))
    check_choice("singleton", singleton, ("zero", "keep"))
    check_eps(eps)
    _check_lengths(lengths, baseline, scores)
    check_ranks(process_group, scores=scores)
    backend = backend_of(scores, "group_advantages")
    if backend == "reference":
        return reference.group_advantages(
            scores,
            group_size=group_size,
            group_ids=group_ids,
            baseline=baseline,
            lengths=lengths,
            std=std,
            unbiased=unbiased,
            eps=eps,
            singleton=singleton,
            process_group=process_group,
        )
    result: Tensor = group_advantages_fwd(
        flat(scores, result_dtype(scores)),
        None if group_ids is None else group_ids.contiguous(),
        None if lengths is None else flat(lengths, torch.float64),
        group_size or 0,
        BASELINES[baseline],
        STDS[std],
        unbiased,
        eps,
        singleton == "keep",
        group_name(process_group),
        backend,
    )
    return result


# ---------------------------------------------------------------- comparisons within a group
#
# Without kernels: two reductions over B numbers. They are ops for the sake of process_group under torch.compile.


def _reduced(scores: Tensor, index: Tensor, how: str) -> Tensor:
    """The "amax" or "amin" of each row's group."""
    return torch.zeros_like(scores).scatter_reduce(0, index, scores, how, include_self=False)[index]


def _indexed(
    scores: Tensor, group_ids: Tensor | None, group_size: int, group_name: str
) -> tuple[Tensor, Tensor, slice]:
    """Scores and the number of each's group, of all ranks where groups may span them; which rows are this rank's."""
    begin, count, group = 0, scores.shape[0], named_group(group_name)
    if group_ids is None:
        return scores, torch.arange(count, device=scores.device) // group_size, slice(0, count)
    if group is not None:
        (scores, group_ids), begin = _of_all_ranks(group, scores, group_ids)
    index = torch.unique(group_ids, return_inverse=True)[1]
    return scores, index, slice(begin, begin + count)


@kernel_op(lambda scores, *_: torch.empty_like(scores))
def best_rows(scores: Tensor, group_ids: Tensor | None, group_size: int, group_name: str) -> Tensor:
    scores, index, own = _indexed(scores, group_ids, group_size, group_name)
    place = torch.arange(scores.shape[0], device=scores.device)
    best = (scores == _reduced(scores, index, "amax")) | scores.isnan()
    first = _reduced(torch.where(best, place, scores.shape[0]), index, "amin")
    return (first == place)[own].to(scores.dtype)


@kernel_op(lambda scores, *_: torch.empty_like(scores, dtype=torch.bool))
def informative_rows(scores: Tensor, group_ids: Tensor | None, group_size: int, group_name: str) -> Tensor:
    scores, index, own = _indexed(scores, group_ids, group_size, group_name)
    return (_reduced(scores, index, "amax") != _reduced(scores, index, "amin"))[own].clone()


def best_of_group(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`one_hot(scores.view(-1, group_size).argmax(1), group_size).flatten()`: 1 for the best of each group, else 0.

    RAFT (2304.06767; Back to Basics 2402.14740) learns the best of k samples as if it were data:
    `policy_loss` with these as advantages or weights and the surrogate "reinforce".

    Args:
        scores: one for each sequence. Of several that are best the first is; a NaN counts as the largest.
        group_size, group_ids, process_group: as in `group_advantages`; the first across ranks is the first of the
            lowest rank. Without `group_ids` nothing is read back and nothing gathered.

    Returns:
        (B,), float64 for float64 input, else float32; a constant.

    Raises:
        ValueError: as `group_advantages` for these arguments.
    """
    check_groups(scores, group_size, group_ids)
    check_ranks(process_group, scores=scores)
    if backend_of(scores, "best_of_group") == "reference":
        return reference.best_of_group(scores, group_size=group_size, group_ids=group_ids, process_group=process_group)
    result: Tensor = best_rows(*_comparable(scores, group_ids), group_size or 0, group_name(process_group))
    return result


def informative_groups(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """`groups.amax(1) != groups.amin(1)` of `groups = scores.view(-1, group_size)`, for each sequence of the group.

    The dynamic sampling of DAPO (2503.14476 eq. 11) drops a prompt whose samples all scored the same, and draws
    another: it has no advantage, yet counts in the mean of the loss. The comparison is exact; no tolerance.

    Args:
        scores: one for each sequence. A NaN differs from everything, so its group stays and no one misses it.
        group_size, group_ids, process_group: as in `group_advantages`. Without `group_ids` nothing is read back and
            nothing gathered.

    Returns:
        (B,) bool. A group of one is not informative.

    Raises:
        ValueError: as `group_advantages` for these arguments.
    """
    check_groups(scores, group_size, group_ids)
    check_ranks(process_group, scores=scores)
    if backend_of(scores, "informative_groups") == "reference":
        return reference.informative_groups(
            scores, group_size=group_size, group_ids=group_ids, process_group=process_group
        )
    result: Tensor = informative_rows(*_comparable(scores, group_ids), group_size or 0, group_name(process_group))
    return result


def _comparable(scores: Tensor, group_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Nothing has a gradient here. Contiguous, for collectives."""
    return flat(scores.detach(), result_dtype(scores)), None if group_ids is None else group_ids.contiguous()
