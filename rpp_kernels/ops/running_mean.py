"""The mean of all scores that a training has seen."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rpp_kernels.distributed import gathered
from rpp_kernels.ops.checks import check_constant, check_floats, check_process_group

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class RunningMean(NamedTuple):
    """The moving-average baseline of REINFORCE: the mean of every score so far, no exponential average.

    b = 1/S sum_s R(x_s, y_s) over all S samples until now (Back to Basics 2402.14740). What is
    subtracted from a batch is the mean of the batches before it: that is independent of the batch's own samples, so
    that the gradient stays unbiased, and 0 for the first.

        baseline = RunningMean.zero(device)
        for scores in ...:
            advantages = scores - baseline.mean
            baseline = baseline.updated(scores)

    Two 0-dim float64 tensors, to be kept in a checkpoint as they are; nothing is read back or changed in place.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # the method of a tuple is of no use here

    @classmethod
    def zero(cls, device: torch.device | str | None = None) -> "RunningMean":
        """Of no scores."""
        return cls(*torch.zeros(2, dtype=torch.float64, device=device).unbind())

    @property
    def mean(self) -> Tensor:
        """0-dim float64; 0 of no scores."""
        return self.total / self.count.clamp(min=1)

    def updated(self, scores: Tensor, process_group: "ProcessGroup | None" = None) -> "RunningMean":
        """With the (B,) `scores` of a batch as well, which may be empty; of all ranks of `process_group`.

        Every rank must call, and all have the same result to the last bit. A NaN among the scores stays.

        Raises:
            ValueError: scores that are not floating (B,), not on the device of the mean, or require grad.
        """
        check_floats("scores", scores, (1,), like=self.total)
        check_constant("scores", scores)
        if process_group is not None:
            check_process_group(process_group)
        sums = torch.stack([scores.double().sum(), torch.full_like(self.count, scores.shape[0])])
        if process_group is not None:
            sums = gathered(sums, process_group).sum(0)
        total, count = sums.unbind()
        return RunningMean(self.total + total, self.count + count)
