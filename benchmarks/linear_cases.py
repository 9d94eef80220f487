"""The cases from hidden states: log-probs, the policy loss and the cross entropy of a linear head.

Their unit of work is the matrix product of 2 T V H flops. Whoever stores the logits needs three, one forward and two
backward. So do `linear_loss` and `linear_policy_loss`; `linear_logps` makes the logits twice, for four. With a share m
of the tokens under the mask, and a with a gradient that is not zero, these are m + 2 a and m + 3 a.
"""

from typing import Any

import gpu_peers
import peers
import torch
from case import OURS, Case, Data, Function, Loader, Tensors, compiled, matmul_floor, plain
from timing import Outputs
from torch import Tensor
from torch.nn import functional

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.testing import make_batch

_T, _H, _V = 1024, 1024, 32000
_REAL = 384, 151936, 512  # tokens, the vocabulary of Qwen2, and as wide as the time for it allows
WRT = ("hidden_states", "weight")

# ---------------------------------------------------------------- inputs


SEQUENCES = 8


def head_inputs(tokens: int, vocab: int, hidden: int) -> Tensors:
    """(8, T / 8) tokens."""
    batch = make_batch(SEQUENCES, tokens // SEQUENCES, vocab=vocab, hidden=hidden)
    return {name: batch[name] for name in ("hidden_states", "weight", "target_ids")}


def policy_inputs(tokens: int, vocab: int, hidden: int) -> Tensors:
    """The old log-probs are the policy's own but for a little noise, as in the first steps on a batch: ratios of 0.9 to
    1.1, none of which is clipped. A sequence's tokens share its advantage; these have a mean of 0.5: a loss near 0 has
    no relative error to speak of."""
    inputs = head_inputs(tokens, vocab, hidden)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logps = rpp.linear_logps(**inputs).logps
    noise, advantages = torch.randn(logps.shape, generator=generator), torch.randn(SEQUENCES, 1, generator=generator)
    advantages += 0.5 - advantages.mean()
    return inputs | {"old_logps": logps + 0.02 * noise, "advantages": advantages.expand_as(logps).contiguous()}


def idle(tokens: int) -> Tensor:
    """Which tokens have no part in the gradient: 40% of them (410 of 1024), in runs of 64 of which the first is cut."""
    return ((torch.arange(tokens) + 38) % 160 < 64).view(SEQUENCES, -1)


def _logps_data() -> Data:
    inputs = head_inputs(_T, _V, _H)
    return Data(inputs, WRT, (torch.randn(inputs["target_ids"].shape, generator=torch.Generator().manual_seed(1)),))


def _loss_data(inputs: Tensors) -> Data:
    return Data(inputs, WRT, (torch.ones(()),))


def _masked_data() -> Data:
    return _loss_data(policy_inputs(_T, _V, _H) | {"completion_mask": ~idle(_T)})


def _zero_data() -> Data:
    inputs = policy_inputs(_T, _V, _H)
    return _loss_data(inputs | {"advantages": inputs["advantages"] * ~idle(_T)})


# ---------------------------------------------------------------- log-probs


def eager_logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Outputs:
    all_logps = torch.log_softmax((hidden_states @ weight.T).float(), -1)
    return (all_logps.gather(-1, target_ids[..., None]).squeeze(-1),)


# ---------------------------------------------------------------- the policy loss


def _clipped(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logps - old_logps).clamp(-20, 20).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))


def eager_policy_loss(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
) -> Outputs:
    (logps,) = eager_logps(hidden_states, weight, target_ids)
    loss = _clipped(logps, old_logps, advantages)
    return (loss.mean() if completion_mask is None else (loss * completion_mask).sum() / completion_mask.sum(),)


def fused_policy_loss(**inputs: Tensor) -> Outputs:
    return (rpp.linear_policy_loss(**inputs).loss,)


def _without_skipping(**inputs: Tensor) -> Outputs:
    return (rpp.linear_policy_loss(**inputs, skip_rows=False).loss,)


def logps_then_policy_loss(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor
) -> Outputs:
    logps = rpp.linear_logps(hidden_states, weight, target_ids).logps
    return (rpp.policy_loss(logps, old_logps, advantages).loss,)


def _loss_in_python(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor
) -> Outputs:
    def token_loss(logps: Tensor, entropy: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        return _clipped(logps, old_logps[rows], advantages[rows]) / target_ids.numel()

    return (rpp.linear_loss(hidden_states, weight, target_ids, token_loss).loss,)


def _policy_spec(**inputs: Tensor) -> Outputs:
    return (reference.linear_policy_loss(**inputs).loss,)


# ---------------------------------------------------------------- the cross entropy


def our_cross_entropy(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Outputs:
    def token_loss(logps: Tensor, entropy: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        return -logps / target_ids.numel()

    return (rpp.linear_loss(hidden_states, weight, target_ids, token_loss).loss,)


def eager_cross_entropy(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Outputs:
    return (functional.cross_entropy((hidden_states @ weight.T).flatten(0, 1), target_ids.flatten()),)


def _torch_cross_entropy(chosen: dict[str, Any] | None = None) -> Loader:
    """With those options, or without any, where it stores the logits. Of torch 2.13 and later."""

    def load() -> Function:
        try:
            linear_cross_entropy = functional.linear_cross_entropy
            options = None if chosen is None else torch.nn.LinearCrossEntropyOptions(**chosen)
        except AttributeError as error:
            raise ImportError(str(error)) from error
        return lambda hidden_states, weight, target_ids: (
            linear_cross_entropy(hidden_states.flatten(0, 1), weight, target_ids.flatten(), options=options),
        )

    return load


def cross_entropy_spec(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Outputs:
    return (-reference.linear_logps(hidden_states, weight, target_ids).logps.mean(),)


# ---------------------------------------------------------------- the table


def _shape(tokens: int, vocab: int, hidden: int) -> str:
    return f"T = {tokens}, H = {hidden}, V = {vocab} float32"


def _loss_case(name: str, size: tuple[int, int, int] = (_T, _V, _H), **the_others: Any) -> Case:
    return Case(name=name, shape=_shape(*size), floor=matmul_floor(*size, "both"), tolerance=1e-4, **the_others)


def _skipping_case(name: str, **the_others: Any) -> Case:
    competitors = {
        OURS: plain(fused_policy_loss),
        "rpp-kernels, skip_rows=False": plain(_without_skipping),
        "eager": plain(eager_policy_loss),
    }
    return _loss_case(name, spec=_policy_spec, competitors=competitors, **the_others)


LINEAR_CASES = [
    Case(
        name="linear_logps",
        op="linear_logps: log-prob from hidden states",
        shape=_shape(_T, _V, _H),
        why="the head of a small model, where the logits outweigh everything else. Ours takes four matrix products, "
        "whoever stores the logits three",
        data=_logps_data,
        spec=lambda **inputs: reference.linear_logps(**inputs)[:1],
        competitors={
            OURS: plain(lambda **inputs: rpp.linear_logps(**inputs)[:1]),
            "eager, logits + log_softmax": plain(eager_logps),
            "torch.compile": compiled(eager_logps),
            **peers.LINEAR_LOGPS,
            **gpu_peers.LINEAR_LOGPS,
        },
        floor=matmul_floor(_T, _V, _H),
        tolerance=1e-4,
    ),
    _loss_case(
        "linear_policy_loss",
        op="linear_policy_loss: the clipped policy loss from hidden states, and its gradient",
        why="the same head with its loss. Everyone takes three matrix products, linear_logps then policy_loss four",
        data=lambda: _loss_data(policy_inputs(_T, _V, _H)),
        spec=_policy_spec,
        competitors={
            OURS: plain(fused_policy_loss),
            "rpp-kernels, linear_logps then policy_loss": plain(logps_then_policy_loss),
            "rpp-kernels, linear_loss": plain(_loss_in_python),
            "eager": plain(eager_policy_loss),
            "torch.compile": compiled(eager_policy_loss),
            **gpu_peers.LINEAR_POLICY_LOSS,
            **peers.LINEAR_POLICY_LOSS,
        },
    ),
    _loss_case(
        "linear_policy_loss_152k",
        _REAL,
        op="linear_policy_loss: the same with a real vocabulary",
        why="the head of a small Qwen2, nearly 300 times as wide as its hidden states",
        data=lambda: _loss_data(policy_inputs(*_REAL)),
        spec=_policy_spec,
        competitors={
            OURS: plain(fused_policy_loss),
            "eager": plain(eager_policy_loss),
            "torch.compile": compiled(eager_policy_loss),
            **peers.LINEAR_POLICY_LOSS,
        },
    ),
    _skipping_case(
        "linear_policy_loss_40_masked",
        op="linear_policy_loss, 40% of the tokens outside the mask",
        why="prompts and padding, in runs of 64 tokens. Ours takes 0.6 + 2 x 0.6 = 1.8 matrix products, without "
        "skipping three, as eager does",
        data=_masked_data,
    ),
    _skipping_case(
        "linear_policy_loss_40_zero",
        op="linear_policy_loss, 40% of the tokens with an advantage of 0",
        why="sequences of groups whose rewards are all the same, in runs of 64 tokens. Ours takes 1 + 2 x 0.6 = 2.2 "
        "matrix products, without skipping three, as eager does",
        data=_zero_data,
    ),
    _loss_case(
        "linear_cross_entropy",
        op="linear_loss of -logps / T: the mean cross entropy from hidden states, and its gradient",
        why="the one loss from hidden states that PyTorch has in chunks as well. Everyone takes three matrix products",
        data=lambda: _loss_data(head_inputs(_T, _V, _H)),
        spec=cross_entropy_spec,
        competitors={
            OURS: plain(our_cross_entropy),
            "torch linear_cross_entropy": _torch_cross_entropy(),
            "torch linear_cross_entropy, its chunks (16 tokens)": _torch_cross_entropy({}),
            "torch linear_cross_entropy, chunks of 512 tokens": _torch_cross_entropy(
                {"batch_chunk_size": 512, "chunking_method": None}
            ),
            "eager": plain(eager_cross_entropy),
            "torch.compile": compiled(eager_cross_entropy),
            **gpu_peers.LINEAR_CROSS_ENTROPY,
        },
    ),
]
