"""The tensors of a rollout, and their slices."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences: prompts padded left to P, completions padded right to S, so completions all begin at column P."""

    input_ids: Tensor  # (B, P+S) int64
    attention_mask: Tensor  # (B, P+S) bool: prompt and completion tokens, no padding
    completion_mask: Tensor  # (B, S) bool: generated tokens that are trained on, up to and including the EOS
    scores: Tensor | None = None  # (B,)
    old_logps: Tensor | None = None  # (B, S), of the policy that sampled
    ref_logps: Tensor | None = None  # (B, S), of the initial policy
    advantages: Tensor | None = None  # (B, S) or (B, 1)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def target_ids(self) -> Tensor:  # (B, S)
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def split(self, size: int) -> Iterator["Batch"]:
        """Consecutive slices of `size` sequences; 0: the whole batch. Never shuffled: prompts come in random order."""
        size = size or len(self)
        for start in range(0, len(self), size):
            tensors = {f.name: getattr(self, f.name) for f in fields(self)}
            yield Batch(**{name: None if x is None else x[start : start + size] for name, x in tensors.items()})
