"""What naive.py and ours.py train, a causal language model with a value head, and one update of it by the clock."""

import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Batch = dict[str, Tensor]
MAX_GRAD_NORM = 1.0


class Clock:
    """Seconds by what they were spent on: one thing at a time, until it is told of another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.now_on = ""
        self._since = time.perf_counter()

    def on(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[self.now_on] = self.seconds.get(self.now_on, 0.0) + now - self._since
        self.now_on, self._since = what, now


class Actor(nn.Module):
    """A model as its body, whose time is told apart from that of the rest, and the linear heads on top."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.head = model, model.get_output_embeddings()
        self.value_head = nn.Linear(self.head.in_features, 1)
        self.clock = Clock()

    def hidden_states(self, batch: Batch) -> Tensor:  # (B, S, H)
        """At the positions that predict the completion."""
        phase = self.clock.now_on
        self.clock.on(f"{phase}, body")
        attention_mask = batch["attention_mask"][:, :-1].long()  # the last token predicts nothing
        hidden: Tensor = self.model.base_model(
            input_ids=batch["input_ids"][:, :-1],
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state[:, -batch["completion_mask"].shape[1] :]
        if hidden.requires_grad:  # when the backward of the heads is done, that of the body begins
            hidden.register_hook(lambda _: self.clock.on(f"{phase}, body"))
        self.clock.on(phase)
        return hidden

    def values(self, hidden_states: Tensor) -> Tensor:  # (B, S)
        values: Tensor = self.value_head(hidden_states).squeeze(-1)
        return values


class Algorithm(Protocol):
    def log_probs(self, actor: Actor, reference: Actor, batch: Batch) -> Batch: ...
    def advantages(self, batch: Batch) -> Batch: ...
    def loss(self, actor: Actor, batch: Batch) -> Tensor: ...


def update(
    algorithm: Algorithm,
    actor: Actor,
    reference: Actor,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    train_batch_size: int,
) -> dict[str, float]:
    """All that follows a rollout and its scores: the seconds of each phase."""
    actor.clock = reference.clock = clock = Clock()
    clock.on("log-probs")
    batch = batch | algorithm.log_probs(actor, reference, batch)
    clock.on("advantages")
    batch = batch | algorithm.advantages(batch)
    for mini_batch in split(batch, train_batch_size):
        clock.on("loss")
        algorithm.loss(actor, mini_batch).backward()
        clock.on("optimizer")
        nn.utils.clip_grad_norm_(actor.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    clock.on("")
    return {what: seconds for what, seconds in clock.seconds.items() if what}


def split(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch["scores"]), size):
        yield {name: x[start : start + size] for name, x in batch.items()}
