"""What is measured: for each case the op, its inputs, why that shape, its floor, and who competes.

The eager forms are what training code commonly writes. torch.compile is always of an eager form, for the one shape.
Those from hidden states are in linear_cases.py.
"""

from typing import Any

import gpu_peers
import peers
import torch
from case import OURS, Case, Data, Function, Loader, Tensors, compiled, memory_floor, plain
from linear_cases import LINEAR_CASES
from timing import Outputs
from torch import Tensor

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.testing import make_batch

# ---------------------------------------------------------------- log-probs


def _logits(dtype: torch.dtype, num_grads: int, rows: int, vocab: int, device: str) -> Data:
    batch = make_batch(1, rows, vocab=vocab, device=device)
    logits = (2 * batch["logits"][0]).to(dtype)  # the spread of a trained model's: a few nats of entropy
    grads = (batch["advantages"][0], 0.01 * batch["rewards"][0])[:num_grads]
    return Data({"logits": logits, "target_ids": batch["target_ids"][0]}, ("logits",), grads)


def eager_logps_entropy(logits: Tensor, target_ids: Tensor) -> Outputs:
    all_logps = torch.log_softmax(logits.float(), -1)
    logps = all_logps.gather(-1, target_ids[:, None]).squeeze(-1)
    entropy = -(torch.softmax(logits.float(), -1) * all_logps).sum(-1)
    return logps, entropy


def _eager_logps(logits: Tensor, target_ids: Tensor) -> Outputs:
    return (torch.log_softmax(logits.float(), -1).gather(-1, target_ids[:, None]).squeeze(-1),)


def _selective_log_softmax(logits: Tensor, target_ids: Tensor) -> Outputs:
    target = logits.gather(-1, target_ids[:, None]).squeeze(-1)
    return (target - torch.logsumexp(logits, -1),)


def _our_logps(num_outputs: int) -> Loader:
    return lambda: lambda logits, target_ids: rpp.logps_from_logits(logits, target_ids)[:num_outputs]


class _Given(torch.autograd.Function):
    """Logits as a model's last layer leaves them: computed, and of no use to it after."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _InPlace:
    """Each run loses its logits; they are written anew before the next one, outside the clock."""

    def __init__(self, num_outputs: int):
        self.num_outputs = num_outputs
        self.memory: Tensor | None = None

    def prepare(self, logits: Tensor, target_ids: Tensor) -> None:
        if self.memory is None:
            self.memory = torch.empty_like(logits)
        self.memory.copy_(logits.detach())
        self.logits = _Given.apply(logits, self.memory)

    def __call__(self, logits: Tensor, target_ids: Tensor) -> Outputs:
        return rpp.logps_from_logits(self.logits, target_ids, inplace_backward=True)[: self.num_outputs]


def logps_case(
    name: str,
    dtype: torch.dtype,
    num_outputs: int,
    why: str,
    competitors: dict[str, Loader],
    rows: int = 2048,
    vocab: int = 32000,
    device: str = "cpu",
) -> Case:
    size = rows * vocab * dtype.itemsize
    return Case(
        name=name,
        op="logps_from_logits: " + ("log-prob and entropy" if num_outputs == 2 else "log-prob alone"),
        shape=f"logits {rows} x {vocab} {str(dtype).removeprefix('torch.')}",
        why=why,
        data=lambda: _logits(dtype, num_outputs, rows, vocab, device),
        spec=lambda **inputs: reference.logps_from_logits(**inputs)[:num_outputs],
        competitors={
            OURS: _our_logps(num_outputs),
            f"{OURS}, inplace_backward": lambda: _InPlace(num_outputs),
            **competitors,
        },
        floor=memory_floor(
            "one read of the logits; backward one read and one write", forward=(size, 0), backward=(size, size)
        ),
        tolerance=2e-4 if dtype == torch.float32 else 1e-2,  # a bf16 gradient keeps 8 bits
        check_every=32,
    )


# ---------------------------------------------------------------- scans over sequences

BATCH, LENGTH = 512, 2048
TOKENS = BATCH * LENGTH


def _padded(batch: int, length: int) -> str:
    return f"{batch} x {length} float32, sequences half to all of it long"


_SCAN_SHAPE = _padded(BATCH, LENGTH)
_SCAN_WHY = "one rollout batch of a REINFORCE++ step, padded"
_GAMMA, _LAMBDA, _BETA = 1.0, 0.95, 0.01
_NO_COMPILED_LOOP = {"torch.compile of the loop": "it unrolls the loop, and 256 of 2048 columns took 39 s to compile"}


def _batch(*names: str, size: tuple[int, int] = (BATCH, LENGTH)) -> Tensors:
    batch = make_batch(*size)
    return {name: batch[name] for name in (*names, "completion_mask")}


def _loop_returns(rewards: Tensor, completion_mask: Tensor) -> Outputs:
    rewards = rewards * completion_mask
    out = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        carry = rewards[:, t] + _GAMMA * carry
        out[:, t] = carry
    return (out,)


def _cumsum_returns(rewards: Tensor, completion_mask: Tensor) -> Outputs:  # gamma = 1 only
    return ((rewards * completion_mask).flip(1).cumsum(1).flip(1),)


def _loop_gae(rewards: Tensor, values: Tensor, completion_mask: Tensor) -> Outputs:
    rewards, values = rewards * completion_mask, values * completion_mask
    columns, advantage = [], torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(advantage)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + _GAMMA * next_value - values[:, t]
        advantage = delta + _GAMMA * _LAMBDA * advantage
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def _pipeline(returns: Function) -> Function:
    def advantages(scores: Tensor, old_logps: Tensor, ref_logps: Tensor, completion_mask: Tensor) -> Outputs:
        rewards = -_BETA * (old_logps - ref_logps) * completion_mask
        last = completion_mask.sum(1) - 1
        rewards[torch.arange(len(scores)), last] += scores
        (a,) = returns(rewards, completion_mask)
        count = completion_mask.sum()
        mean = (a * completion_mask).sum() / count
        variance = ((a - mean).square() * completion_mask).sum() / count
        return ((a - mean) * variance.clamp(min=1e-8).rsqrt() * completion_mask,)

    return advantages


def _our_steps(scores: Tensor, old_logps: Tensor, ref_logps: Tensor, completion_mask: Tensor) -> Outputs:
    kl = rpp.kl_penalty(old_logps, ref_logps, completion_mask)
    rewards = rpp.token_rewards(scores, kl, completion_mask, beta=_BETA)
    return (rpp.whiten(rpp.returns(rewards, completion_mask, gamma=_GAMMA), completion_mask),)


# ---------------------------------------------------------------- the loss


def _policy_data(batch: int, length: int) -> Data:
    return Data(_batch("logps", "old_logps", "advantages", size=(batch, length)), ("logps",), (torch.ones(()),))


def _clipped_share_and_kl(loss: rpp.PolicyLoss) -> Outputs:
    stats = loss.stats
    clipped = (stats.clipped_low + stats.clipped_high) / stats.num_tokens
    return loss.loss, clipped, stats.approx_kl / stats.num_tokens


def _eager_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor) -> Outputs:
    """With the two statistics that every training loop logs beside it."""
    log_ratio = logps - old_logps
    ratio = log_ratio.clamp(-20, 20).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)

    def masked_mean(x: Tensor) -> Tensor:
        return (x * completion_mask).sum() / completion_mask.sum()

    with torch.no_grad():
        clipped_share, approx_kl = masked_mean((clipped > plain).float()), masked_mean(-log_ratio)
    return masked_mean(torch.maximum(plain, clipped)), clipped_share, approx_kl


def _policy_loss_case(name: str, batch: int, length: int, why: str) -> Case:
    tokens = batch * length
    return Case(
        name=name,
        op="policy_loss with the share of clipped tokens and the approximate KL",
        shape=_padded(batch, length),
        why=why,
        data=lambda: _policy_data(batch, length),
        spec=lambda **inputs: _clipped_share_and_kl(reference.policy_loss(**inputs)),
        competitors={
            OURS: plain(lambda **inputs: _clipped_share_and_kl(rpp.policy_loss(**inputs))),
            "eager": plain(_eager_policy_loss),
            "torch.compile": compiled(_eager_policy_loss),
            **peers.POLICY_LOSS,
        },
        floor=memory_floor(
            "three inputs and mask read; backward the gradient written",
            forward=(13 * tokens, 0),
            backward=(0, 4 * tokens),
        ),
        tolerance=1e-4,
    )


# ---------------------------------------------------------------- weights against the mismatch of a rollout engine


def _rollout_data() -> Data:
    batch = _batch("old_logps", "ref_logps", "completion_mask")
    # A mismatch of 0.01 nats a token: over a sequence it adds up to a ratio that is sometimes beyond 2.
    sampling_logps = batch["old_logps"].lerp(batch.pop("ref_logps"), 1 / 30)
    return Data(batch | {"sampling_logps": sampling_logps})


def _weights_and_kl(result: rpp.RolloutWeights) -> Outputs:
    return result.weights, result.stats.kl / result.stats.num_tokens


def _eager_rollout_weights(old_logps: Tensor, sampling_logps: Tensor, completion_mask: Tensor) -> Outputs:
    """With the statistic that every training loop logs beside it."""
    log_ratio = (old_logps - sampling_logps) * completion_mask
    ratio = log_ratio.sum(1, keepdim=True).clamp(-20, 20).exp()
    return ratio.clamp(max=2) * completion_mask, -log_ratio.sum() / completion_mask.sum()


_KL = 0.04


def _grpo_data() -> Data:
    return Data(_batch("logps", "old_logps", "advantages", "ref_logps"), ("logps",), (torch.ones(()),))


def _our_grpo_loss(f: Any) -> Function:
    def loss(**inputs: Tensor) -> Outputs:
        out = f.policy_loss(**inputs, beta=_KL, reduction="seq-mean-token-mean")
        return *_clipped_share_and_kl(out), out.stats.kl / out.stats.num_tokens

    return loss


def _eager_grpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, completion_mask: Tensor, ref_logps: Tensor
) -> Outputs:
    log_ratio, to_ref = logps - old_logps, (ref_logps - logps).clamp(-20, 20)
    ratio, kl = log_ratio.clamp(-20, 20).exp(), to_ref.exp() - 1 - to_ref
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = torch.maximum(plain, clipped) + _KL * kl
    loss = ((loss * completion_mask).sum(1) / completion_mask.sum(1)).mean()

    def masked_mean(x: Tensor) -> Tensor:
        return (x * completion_mask).sum() / completion_mask.sum()

    with torch.no_grad():
        return loss, masked_mean((clipped > plain).float()), masked_mean(-log_ratio), masked_mean(kl)


# ---------------------------------------------------------------- pairs

PAIRS, PAIR_LENGTH = 128, 1024
PAIR_TOKENS = 2 * PAIRS * PAIR_LENGTH


def _pair_data() -> Data:
    batch = make_batch(2 * PAIRS, PAIR_LENGTH)
    names = "logps", "ref_logps", "completion_mask"
    return Data({name: batch[name] for name in names}, ("logps",), (torch.ones(()),))


def _margin_and_accuracy(loss: rpp.PreferenceLoss) -> Outputs:
    stats = loss.stats
    return loss.loss, stats.margins / stats.num_pairs, stats.correct / stats.num_pairs


def _eager_dpo_loss(logps: Tensor, ref_logps: Tensor, completion_mask: Tensor) -> Outputs:
    """With the two statistics that every training loop logs beside it."""
    h = (logps * completion_mask).sum(1) - (ref_logps * completion_mask).sum(1)
    margins = 0.1 * (h[0::2] - h[1::2])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    return loss, margins.detach().mean(), (margins.detach() > 0).float().mean()


# ---------------------------------------------------------------- the table

CASES = [
    logps_case(
        "logps_entropy_fp32",
        torch.float32,
        2,
        "the log-probs and the entropy of one micro-batch, from logits far larger than any cache",
        {
            "eager": plain(eager_logps_entropy),
            "torch.compile": compiled(eager_logps_entropy),
            **peers.LOGPS_ENTROPY,
            **gpu_peers.LOGPS_ENTROPY,
        },
    ),
    logps_case(
        "logps_fp32",
        torch.float32,
        1,
        "the same where nobody asks for the entropy",
        {
            "eager, log_softmax + gather": plain(_eager_logps),
            "eager, gather - logsumexp": plain(_selective_log_softmax),
            "torch.compile, log_softmax + gather": compiled(_eager_logps),
            **peers.LOGPS,
            **gpu_peers.LOGPS,
        },
    ),
    logps_case(
        "logps_entropy_bf16",
        torch.bfloat16,
        2,
        "the same from bf16 logits, which eager code widens to float32 first",
        {
            "eager": plain(eager_logps_entropy),
            "torch.compile": compiled(eager_logps_entropy),
            **peers.LOGPS_ENTROPY,
            **gpu_peers.LOGPS_ENTROPY,
        },
    ),
    Case(
        name="returns",
        op="returns, gamma = 1",
        shape=_SCAN_SHAPE,
        why=_SCAN_WHY,
        data=lambda: Data(_batch("rewards")),
        spec=lambda **inputs: (reference.returns(**inputs, gamma=_GAMMA),),
        competitors={
            OURS: plain(lambda **inputs: (rpp.returns(**inputs, gamma=_GAMMA),)),
            "eager, Python loop": plain(_loop_returns),
            "eager, flip + cumsum (gamma = 1 only)": plain(_cumsum_returns),
            "torch.compile, flip + cumsum": compiled(_cumsum_returns),
            **peers.RETURNS,
        },
        floor=memory_floor("rewards and mask read, returns written", forward=(5 * TOKENS, 4 * TOKENS)),
        tolerance=1e-5,
        left_out=_NO_COMPILED_LOOP,
    ),
    Case(
        name="gae",
        op=f"gae, lambda = {_LAMBDA}",
        shape=_SCAN_SHAPE,
        why=_SCAN_WHY,
        data=lambda: Data(_batch("rewards", "values")),
        spec=lambda **inputs: tuple(reference.gae(**inputs, gamma=_GAMMA, gae_lambda=_LAMBDA)),
        competitors={
            OURS: plain(lambda **inputs: tuple(rpp.gae(**inputs, gamma=_GAMMA, gae_lambda=_LAMBDA))),
            "eager, Python loop": plain(_loop_gae),
            **peers.gae(_LAMBDA),
        },
        floor=memory_floor("rewards, values and mask read, two results written", forward=(9 * TOKENS, 8 * TOKENS)),
        tolerance=1e-5,
        left_out=_NO_COMPILED_LOOP,
    ),
    Case(
        name="reinforce_pp_advantages",
        op="reinforce_pp_advantages: KL, terminal reward, returns and whitening",
        shape=_SCAN_SHAPE,
        why=_SCAN_WHY,
        data=lambda: Data(_batch("scores", "old_logps", "ref_logps")),
        spec=lambda **inputs: (reference.reinforce_pp_advantages(**inputs, beta=_BETA, gamma=_GAMMA),),
        competitors={
            OURS: plain(lambda **inputs: (rpp.reinforce_pp_advantages(**inputs, beta=_BETA, gamma=_GAMMA),)),
            "rpp-kernels, step by step": plain(_our_steps),
            "eager, Python loop": plain(_pipeline(_loop_returns)),
            "eager, flip + cumsum": plain(_pipeline(_cumsum_returns)),
            "torch.compile, flip + cumsum": compiled(_pipeline(_cumsum_returns)),
            **peers.reinforce_pp(_BETA),
        },
        floor=memory_floor("two log-probs and mask read, advantages written, once", forward=(9 * TOKENS, 4 * TOKENS)),
        tolerance=1e-4,
        left_out=_NO_COMPILED_LOOP,
    ),
    _policy_loss_case("policy_loss", BATCH, LENGTH, "the loss of one whole rollout batch"),
    _policy_loss_case(
        "policy_loss_small", 64, 1024, "the loss of one mini-batch, where the calls themselves begin to cost"
    ),
    Case(
        name="rollout_weights",
        op="rollout_weights of sequences, truncated, with the KL",
        shape=_SCAN_SHAPE,
        why="the weights of one whole rollout batch",
        data=_rollout_data,
        spec=lambda **inputs: _weights_and_kl(reference.rollout_weights(**inputs, level="sequence")),
        competitors={
            OURS: plain(lambda **inputs: _weights_and_kl(rpp.rollout_weights(**inputs, level="sequence"))),
            "eager": plain(_eager_rollout_weights),
            "torch.compile": compiled(_eager_rollout_weights),
            **peers.ROLLOUT_WEIGHTS,
        },
        floor=memory_floor("two log-probs and mask read, weights written, once", forward=(9 * TOKENS, 4 * TOKENS)),
        tolerance=1e-4,
    ),
    Case(
        name="dpo_loss",
        op="dpo_loss with the mean margin and the share of pairs in the right order",
        shape=f"{PAIRS} pairs x {PAIR_LENGTH} float32, sequences half to all of it long",
        why="one batch of preference pairs, padded",
        data=_pair_data,
        spec=lambda **inputs: _margin_and_accuracy(reference.dpo_loss(**inputs)),
        competitors={
            OURS: plain(lambda **inputs: _margin_and_accuracy(rpp.dpo_loss(**inputs))),
            "eager": plain(_eager_dpo_loss),
            "torch.compile": compiled(_eager_dpo_loss),
            **peers.DPO_LOSS,
        },
        floor=memory_floor(
            "two log-probs and mask read; backward the gradient written",
            forward=(9 * PAIR_TOKENS, 0),
            backward=(0, 4 * PAIR_TOKENS),
        ),
        tolerance=1e-4,
    ),
    Case(
        name="policy_loss_kl",
        op="policy_loss with a k3 KL in the loss, and its statistics",
        shape=_SCAN_SHAPE,
        why="the loss of GRPO: clip and KL, a mean of the means of sequences",
        data=_grpo_data,
        spec=_our_grpo_loss(reference),
        competitors={
            OURS: plain(_our_grpo_loss(rpp)),
            "eager": plain(_eager_grpo_loss),
            "torch.compile": compiled(_eager_grpo_loss),
            **peers.policy_loss_kl(_KL),
        },
        floor=memory_floor(
            "four inputs and mask read; backward the gradient written",
            forward=(17 * TOKENS, 0),
            backward=(0, 4 * TOKENS),
        ),
        tolerance=1e-4,
    ),
    *LINEAR_CASES,
]
BY_NAME = {case.name: case for case in CASES}
