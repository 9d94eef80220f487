"""GRPO, PPO and REINFORCE++ as most people write them first: the baselines of steps.py and curves.py.

Full logits, `log_softmax`, `gather`; a pass for the old log-probs and one for the reference; Python loops over time and
over sequences; masked means. Nothing is chunked or compiled, and padding is computed and then masked. One favour is
done to them: logits are made at the positions that predict a completion, and not over the prompt as well.

An algorithm is three calls: `log_probs` and `advantages` once a rollout, `loss` once an optimizer step. They take and
add to a dict of tensors, B completions padded right to S tokens: input_ids, attention_mask (B, P+S), completion_mask
(B, S), scores (B,). ours.py has the same three calls made of rpp_kernels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from actor import Actor, Batch


@dataclass(frozen=True)
class GRPO:
    group_size: int
    epsilon: float = 0.2
    beta: float = 0.04

    def log_probs(self, actor: "Actor", reference: "Actor", batch: "Batch") -> "Batch":
        return old_and_ref_logps(actor, reference, batch)

    def advantages(self, batch: "Batch") -> "Batch":
        scores = batch["scores"].view(-1, self.group_size)
        advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
        return {"advantages": advantages.view(-1, 1)}

    def loss(self, actor: "Actor", batch: "Batch") -> Tensor:
        logps, mask = token_logps(actor, actor.hidden_states(batch), batch), batch["completion_mask"]
        gap = batch["ref_logps"] - logps
        kl = torch.exp(gap) - gap - 1
        losses = clipped_loss(logps, batch, self.epsilon) + self.beta * kl
        return ((losses * mask).sum(1) / mask.sum(1)).mean()


@dataclass(frozen=True)
class PPO:
    """With a value head on the policy's own hidden states, which learns along by the clipped value loss."""

    gamma: float = 1.0
    gae_lambda: float = 0.95
    epsilon: float = 0.2
    beta: float = 0.01
    value_coef: float = 0.5

    @torch.no_grad()
    def log_probs(self, actor: "Actor", reference: "Actor", batch: "Batch") -> "Batch":
        hidden = actor.hidden_states(batch)
        return {
            "old_logps": token_logps(actor, hidden, batch),
            "old_values": actor.values(hidden),
            "ref_logps": token_logps(reference, reference.hidden_states(batch), batch),
        }

    def advantages(self, batch: "Batch") -> "Batch":
        mask, rewards = batch["completion_mask"], token_rewards(batch, self.beta)
        values = batch["old_values"] * mask
        length = mask.shape[1]
        advantages, last = torch.zeros_like(rewards), 0.0
        for t in reversed(range(length)):
            next_values = values[:, t + 1] if t + 1 < length else 0.0
            delta = rewards[:, t] + self.gamma * next_values - values[:, t]
            last = delta + self.gamma * self.gae_lambda * last
            advantages[:, t] = last
        return {"advantages": whitened(advantages, mask), "returns": advantages + values}

    def loss(self, actor: "Actor", batch: "Batch") -> Tensor:
        hidden, mask = actor.hidden_states(batch), batch["completion_mask"]
        logps, values = token_logps(actor, hidden, batch), actor.values(hidden)
        policy_loss = masked_mean(clipped_loss(logps, batch, self.epsilon), mask)
        old_values, returns = batch["old_values"], batch["returns"]
        clipped = old_values + torch.clamp(values - old_values, -self.epsilon, self.epsilon)
        squares = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
        return policy_loss + self.value_coef * masked_mean(0.5 * squares, mask)


@dataclass(frozen=True)
class ReinforcePP:
    """Returns of the tokens' rewards, normalised over the batch; no critic and no groups."""

    gamma: float = 1.0
    epsilon: float = 0.2
    beta: float = 0.01

    def log_probs(self, actor: "Actor", reference: "Actor", batch: "Batch") -> "Batch":
        return old_and_ref_logps(actor, reference, batch)

    def advantages(self, batch: "Batch") -> "Batch":
        mask, rewards = batch["completion_mask"], token_rewards(batch, self.beta)
        returns, last = torch.zeros_like(rewards), 0.0
        for t in reversed(range(mask.shape[1])):
            last = rewards[:, t] + self.gamma * last
            returns[:, t] = last
        return {"advantages": whitened(returns, mask)}

    def loss(self, actor: "Actor", batch: "Batch") -> Tensor:
        logps = token_logps(actor, actor.hidden_states(batch), batch)
        return masked_mean(clipped_loss(logps, batch, self.epsilon), batch["completion_mask"])


# ---------------------------------------------------------------- what they share


def token_logps(actor: "Actor", hidden_states: Tensor, batch: "Batch") -> Tensor:  # (B, S)
    logits = actor.head(hidden_states)  # (B, S, V)
    logps = torch.log_softmax(logits, dim=-1)
    targets = batch["input_ids"][:, -logits.shape[1] :]
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def old_and_ref_logps(actor: "Actor", reference: "Actor", batch: "Batch") -> "Batch":
    return {
        "old_logps": token_logps(actor, actor.hidden_states(batch), batch),
        "ref_logps": token_logps(reference, reference.hidden_states(batch), batch),
    }


def clipped_loss(logps: Tensor, batch: "Batch", epsilon: float) -> Tensor:  # (B, S)
    ratio = torch.exp(logps - batch["old_logps"])
    clipped = torch.clamp(ratio, 1 - epsilon, 1 + epsilon)
    return -torch.min(ratio * batch["advantages"], clipped * batch["advantages"])


def token_rewards(batch: "Batch", beta: float) -> Tensor:  # (B, S)
    """A KL penalty at every token, and the score at the last one."""
    mask = batch["completion_mask"]
    rewards = -beta * (batch["old_logps"] - batch["ref_logps"]) * mask
    for i in range(mask.shape[0]):
        last = int(mask[i].sum()) - 1
        rewards[i, last] += batch["scores"][i]
    return rewards


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask
