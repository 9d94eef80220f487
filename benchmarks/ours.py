"""The algorithms of naive.py made of rpp_kernels, from hidden states: the other side of steps.py and curves.py.

What is known of a loss before it is made is the user's to use: `linear_loss` takes hidden states and the head's weight
and makes loss and gradient a chunk of logits at a time, `linear_logps` the log-probs that need no gradient.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rpp_kernels as rpp

if TYPE_CHECKING:
    from actor import Actor, Batch


@dataclass(frozen=True)
class Ours:
    recipe: rpp.Recipe
    group_size: int
    value_coef: float = 0.5

    @property
    def has_critic(self) -> bool:
        return self.recipe.baseline == "critic"

    @torch.no_grad()
    def log_probs(self, actor: "Actor", reference: "Actor", batch: "Batch") -> "Batch":
        hidden = actor.hidden_states(batch)
        values = {"old_values": actor.values(hidden)} if self.has_critic else {}
        old_logps = _logps(actor, hidden, batch)
        ref_logps = _logps(reference, reference.hidden_states(batch), batch)
        return {"old_logps": old_logps, "ref_logps": ref_logps, **values}

    def advantages(self, batch: "Batch") -> "Batch":
        worth = self.recipe.advantages(
            batch["scores"],
            batch["completion_mask"],
            old_logps=batch["old_logps"],
            ref_logps=batch["ref_logps"],
            values=batch.get("old_values"),
            group_size=self.group_size,
        )
        returns = {} if worth.returns is None else {"returns": worth.returns}
        return {"advantages": worth.advantages, **returns}

    def loss(self, actor: "Actor", batch: "Batch") -> Tensor:
        hidden, mask = actor.hidden_states(batch), batch["completion_mask"]
        loss = self.recipe.linear_loss(
            hidden,
            actor.head.weight,
            _targets(batch),
            batch["old_logps"],
            batch["advantages"],
            mask,
            ref_logps=batch["ref_logps"],
        ).loss
        if not self.has_critic:
            return loss
        values = rpp.value_loss(actor.values(hidden), batch["old_values"], batch["returns"], mask)
        return loss + self.value_coef * values.loss


def _logps(actor: "Actor", hidden_states: Tensor, batch: "Batch") -> Tensor:  # (B, S)
    mask = batch["completion_mask"]
    return rpp.linear_logps(hidden_states, actor.head.weight, _targets(batch), mask).logps


def _targets(batch: "Batch") -> Tensor:  # (B, S)
    return batch["input_ids"][:, -batch["completion_mask"].shape[1] :]
