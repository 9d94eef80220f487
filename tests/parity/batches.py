"""Random batches that tell one divisor, one baseline and one clamp from another.

Lengths differ (with equal ones every mean is the same mean), masks have holes, one sequence is empty, one has one
token, one fills its row; ratios leave the clip range on both sides, and groups have one to four members.
"""

import torch
from torch import Tensor

GROUP_SIZE = 4
GROUP_IDS = (3, 0, 0, 7, 7, 7, 3, 5, 7, 3, 0, 9)  # sizes 3, 3, 4, 1, 1


class Batch(dict[str, Tensor]):
    """Tensors by name, as items and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __repr__(self) -> str:  # pytest prints it where a row disagrees
        return "Batch(...)"


def make(seed: int = 0, dtype: torch.dtype = torch.float32, *, holes: bool = True) -> Batch:
    size, length, vocab, hidden = len(GROUP_IDS), 11, 23, 8
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(2, length, (size,), generator=generator)
    lengths[torch.randperm(size, generator=generator)[:3]] = torch.tensor([0, 1, length])
    mask = torch.arange(length) < lengths[:, None]
    if holes:
        kept = mask & (torch.rand(size, length, generator=generator) > 0.2)
        mask = torch.where(kept.any(1, keepdim=True), kept, mask)  # a hole is no completion
    tokens = (size, length)
    hidden_states, weight, bias = normal(*tokens, hidden), normal(vocab, hidden), normal(vocab)
    target_ids = torch.randint(vocab, tokens, generator=generator)
    logits = hidden_states @ weight.T + bias
    logps = logits.log_softmax(-1).gather(-1, target_ids[..., None])[..., 0]
    kl = 0.3 * normal(*tokens)
    far = torch.where(torch.rand(tokens, generator=generator) < 0.2, 4.0, 1.0)  # ratios a dual clip sees
    scores = 2 * normal(size)
    batch = {
        "hidden_states": hidden_states,
        "ref_hidden_states": hidden_states + 0.2 * normal(*tokens, hidden),
        "weight": weight,
        "ref_weight": weight + 0.1 * normal(vocab, hidden),
        "bias": bias,
        "logits": logits,
        "logps": logps,
        "old_logps": logps + 0.4 * far * normal(*tokens),
        "ref_logps": logps + 0.4 * normal(*tokens),
        "sampling_logps": logps + 0.4 * normal(*tokens),
        "entropy": normal(*tokens).abs(),
        "advantages": normal(*tokens),  # one for each token
        "outcomes": normal(size),  # one for each sequence
        "scores": scores,
        "kl": torch.where(mask, kl, 0.0),
        "rewards": torch.where(mask, normal(*tokens), 0.0),
        "critic": normal(*tokens),  # values, which is a method of dict
        "returns": normal(*tokens),
        "baselines": normal(size),
    }
    batch["old_values"] = batch["critic"] + 0.3 * normal(*tokens)
    batch = {name: x.to(dtype) for name, x in batch.items()}
    batch["temperature"] = torch.ones(tokens, dtype=dtype)
    batch["outcome_columns"] = batch["outcomes"][:, None]
    last = torch.where(mask, torch.arange(length), -1).amax(1)  # -1, the last column, where there is no token
    batch["score_rewards"] = torch.zeros(tokens, dtype=dtype)
    batch["score_rewards"][torch.arange(size), last] = batch["scores"]
    return Batch(batch, target_ids=target_ids, completion_mask=mask, group_ids=torch.tensor(GROUP_IDS))
