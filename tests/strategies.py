"""Random ragged batches, from a seed or from hypothesis: the same data padded `(B, S)` and packed `(T,)`."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

PER_SEQUENCE = frozenset({"scores", "sequence_advantages"})
SHARED = frozenset({"weight", "bias"})


class Batch(NamedTuple):
    """Named tensors. Those not in PER_SEQUENCE or SHARED are per token: `(B, S, ...)`, or packed `(T, ...)`."""

    tensors: dict[str, Tensor]
    mask: Tensor  # (B, S) or (T,) bool
    lengths: Tensor  # (B,): tokens a sequence takes when packed; its mask may have holes among them
    cu_seqlens: Tensor | None = None  # (B+1,) int32 where packed

    @property
    def inside(self) -> Tensor:
        """(B, S): positions that packing keeps. Every valid token is one of them."""
        return torch.arange(self.mask.shape[1]) < self.lengths[:, None]

    def map_tokens(self, function) -> "Batch":
        """The batch with `function` applied to every per-token tensor, the mask left alone."""
        apart = PER_SEQUENCE | SHARED
        return self._replace(tensors={k: x if k in apart else function(x) for k, x in self.tensors.items()})


def random_batch(mask: Tensor, lengths: Tensor, *, vocab: int = 4, seed: int = 0, dtype=torch.float64) -> Batch:
    """A padded batch of generic numbers: log-probs below 0, ratios near 1, some of them outside the clip range."""
    generator = torch.Generator().manual_seed(seed)
    B, S = mask.shape
    H = 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old_logps, old_values = -normal(B, S).exp(), normal(B, S)
    tensors = {
        "logits": 2 * normal(B, S, vocab),
        "hidden_states": normal(B, S, H),
        "weight": normal(vocab, H),
        "bias": normal(vocab),
        "temperature": 0.5 + normal(B, S).sigmoid(),
        "old_logps": old_logps,
        "logps": old_logps + 0.3 * normal(B, S),
        "ref_logps": old_logps + 0.3 * normal(B, S),
        "kl": normal(B, S),
        "rewards": normal(B, S),
        "old_values": old_values,
        "values": old_values + 0.3 * normal(B, S),
        "returns": normal(B, S),
        "advantages": normal(B, S),
        "scores": normal(B),
        "sequence_advantages": normal(B),
    }
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["target_ids"] = torch.randint(vocab, (B, S), generator=generator)
    return Batch(tensors, mask & (torch.arange(S) < lengths[:, None]), lengths)


def packed(batch: Batch) -> Batch:
    """The same sequences end to end, without the padding behind them."""
    inside = batch.inside
    cu_seqlens = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)).to(torch.int32)
    flat = batch.map_tokens(lambda x: x[inside])
    return flat._replace(mask=batch.mask[inside], cu_seqlens=cu_seqlens)


def poisoned(batch: Batch, fill: float) -> Batch:
    """The same padded batch with `fill` where it must not matter (-100 in ids): at masked positions, and as what an
    empty sequence is worth."""

    def poison(x: Tensor, keep: Tensor) -> Tensor:
        keep = keep.reshape(*keep.shape, *[1] * (x.dim() - keep.dim()))
        return torch.where(keep, x, fill if x.is_floating_point() else -100)

    tensors = batch.map_tokens(lambda x: poison(x, batch.mask)).tensors
    return batch._replace(
        tensors={k: poison(x, batch.mask.any(1)) if k in PER_SEQUENCE else x for k, x in tensors.items()}
    )


def permuted(batch: Batch, order: Tensor) -> Batch:
    """The same padded batch with its sequences in another order."""
    tensors = {k: x if k in SHARED else x[order] for k, x in batch.tensors.items()}
    return Batch(tensors, batch.mask[order], batch.lengths[order])


def rows(batch: Batch, which: slice) -> Batch:
    """Some sequences of a padded batch."""
    return permuted(batch, torch.arange(batch.mask.shape[0])[which])


@st.composite
def ragged_batches(draw, *, max_sequences: int = 4, max_length: int = 5) -> Batch:
    """Padded batches of any shape from one token up: empty sequences, holes, nothing valid at all, V = 1."""
    B, S = draw(st.integers(1, max_sequences)), draw(st.integers(1, max_length))
    lengths = torch.tensor(draw(st.lists(st.integers(0, S), min_size=B, max_size=B)))
    bits = draw(st.lists(st.booleans(), min_size=B * S, max_size=B * S))
    mask = torch.tensor(bits).reshape(B, S)
    return random_batch(mask, lengths, vocab=draw(st.integers(1, 4)), seed=draw(st.integers(0, 2**16)))
