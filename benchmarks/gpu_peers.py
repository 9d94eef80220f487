"""Competitors that need a GPU: the Triton and CuTe kernels of TRL, verl, Liger, Apple, QuACK and flash-attn.

A table for each kind of case, name -> loader (case.py). A package that is not installed, cannot be imported, or finds
no CUDA device is listed as that. Each is called as its own host calls it, with its own defaults; what knows only one
advantage for a sequence takes that of the first token. Signatures and, where a kernel runs in Triton's interpreter,
values are tested without a GPU (tests/test_gpu_peers.py).

verl's Triton kernel counted the columns beyond a vocabulary that 1024 does not divide; release 0.9.1 does not. Liger's
scaled cross entropy and QuACK are CuTe kernels: they need nvidia-cutlass-dsl, which is 92 MB.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from case import Function
from timing import Outputs
from torch import Tensor

PACKAGES = peers.PACKAGES | {"Apple": "cut_cross_entropy", "QuACK": "quack", "flash-attn": "flash_attn"}
peer = partial(peers.peer, packages=PACKAGES, cuda=True)


# ---------------------------------------------------------------- log-probs from logits


def _trl_logps_entropy() -> Function:
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda logits, target_ids: selective_log_softmax_and_entropy(logits, target_ids)


def _flash_attn_logps() -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, target_ids: (-cross_entropy_loss(logits, target_ids)[0],)


def _quack_logps() -> Function:
    from quack.cross_entropy import cross_entropy

    return lambda logits, target_ids: (-cross_entropy(logits, target_ids, reduction="none"),)


LOGPS = {
    **peer("flash-attn, Triton cross_entropy_loss", _flash_attn_logps),
    **peer("QuACK, cross_entropy", _quack_logps),
}
LOGPS_ENTROPY = peer("TRL, Triton selective_log_softmax_and_entropy", _trl_logps_entropy)


# ---------------------------------------------------------------- from hidden states

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_states (B, S, H), weight (V, H), target_ids (B, S) -> (B, S)


def _verl_head() -> Head:
    function = peers.hosts.module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return function(hidden_states, weight, target_ids, 1.0, "none")[0].view(target_ids.shape)

    return logps


def _liger_head() -> Head:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        function = LigerFusedLinearScaledCrossEntropyFunction
        return -function.apply(hidden_states.flatten(0, 1), weight, target_ids.flatten()).view(target_ids.shape)

    return logps


def _apple_head(**options: Any) -> Head:
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden_states, weight, target_ids, reduction="none", **options)

    return logps


def _liger_chunked_loss() -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.2)

    def loss(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor
    ) -> Outputs:
        everywhere = torch.ones_like(old_logps)
        out, _ = function(
            hidden_states, weight, target_ids, everywhere, advantages[:, 0], old_per_token_logps=old_logps
        )
        return (out,)

    return loss


def _liger_triton_loss() -> Function:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor
    ) -> Outputs:
        # It takes the logits of S + 1 tokens, as a model gives them, and does not read the last.
        logits = torch.nn.functional.pad(hidden_states, (0, 0, 0, 1)) @ weight.T
        out, _ = triton_grpo_loss(
            logits,
            old_logps,
            None,
            target_ids,
            advantages[:, 0].contiguous(),
            temperature=1.0,
            beta=0.0,
            eps_low=0.2,
            eps_high=0.2,
            reduce=True,
        )
        return (out,)

    return loss


LINEAR_LOGPS = {
    **peer("verl, Triton linear_cross_entropy", peers.logps, head=_verl_head),
    **peer("Liger, CuTe scaled cross entropy", peers.logps, head=_liger_head),
    **peer("Apple, linear_cross_entropy", peers.logps, head=_apple_head),
    **peer("Apple, linear_cross_entropy, unfiltered", peers.logps, head=_apple_head, filter_eps=None),
}
LINEAR_POLICY_LOSS = {
    **peer("verl, Triton linear_cross_entropy, then the loss", peers.then_clipped_loss, head=_verl_head),
    **peer("Liger, CuTe scaled cross entropy, then the loss", peers.then_clipped_loss, head=_liger_head),
    **peer("Apple, linear_cross_entropy, then the loss", peers.then_clipped_loss, head=_apple_head),
    **peer(
        "Apple, linear_cross_entropy, unfiltered, then the loss",
        peers.then_clipped_loss,
        head=_apple_head,
        filter_eps=None,
    ),
    **peer("Liger, LigerFusedLinearGRPOLoss", _liger_chunked_loss),
    **peer("Liger, logits, then triton_grpo_loss", _liger_triton_loss),
}


# ---------------------------------------------------------------- the mean cross entropy from hidden states


def _liger_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden_states, weight, target_ids: (
        liger_fused_linear_cross_entropy(hidden_states.flatten(0, 1), weight, target_ids.flatten()),
    )


def _apple_cross_entropy(**options: Any) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden_states, weight, target_ids: (
        linear_cross_entropy(hidden_states, weight, target_ids, **options),
    )


def _quack_cross_entropy() -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden_states, weight, target_ids: (
        chunked_linear_cross_entropy(hidden_states.flatten(0, 1), weight, target_ids.flatten()),
    )


LINEAR_CROSS_ENTROPY = {
    **peer("Liger, fused_linear_cross_entropy", _liger_cross_entropy),
    **peer("Apple, linear_cross_entropy", _apple_cross_entropy),
    **peer("Apple, linear_cross_entropy, unfiltered", _apple_cross_entropy, filter_eps=None),
    **peer("QuACK, chunked_linear_cross_entropy", _quack_cross_entropy),
}
