"""What each provider of log-probs or a loss from hidden states can do: the matrix of docs/performance.md.

Ours is derived: from the signatures of the public functions, and for what no signature says from the tests that hold
it. That of a peer is read in the source of the version named here, in the file named here; what its signature can say
of that is compared with the installed version by tests/test_features.py. report.py puts the times beside it.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import rpp_kernels as rpp
from rpp_kernels.backends import native

TESTS = Path(__file__).resolve().parent.parent / "tests"
YES, NO = "yes", "no"
COLUMNS = (
    "entropy, with gradient",
    "advantages or weights",
    "temperature",
    "softcap",
    "bias",
    "LoRA on the head",
    "packed sequences",
    "sharded vocabulary",
    "skips masked tokens",
    "logits not rounded",
    "exact gradient",
    "CPU",
    "statistics as sums",
)


@dataclass(frozen=True)
class Peer:
    distribution: str
    version: str
    source: str
    facts: tuple[str, ...]  # in the order of COLUMNS
    arguments: tuple[str, ...]  # those of its function that have a part in the facts
    competitor: str = ""  # its name among the timings of gpu.json

    def __post_init__(self) -> None:
        if len(self.facts) != len(COLUMNS):
            raise ValueError(f"{self.source} has {len(self.facts)} facts, wanted {len(COLUMNS)}")


PER_TOKEN, SCALAR = "per token", "one number"

PEERS = {
    "TRL, ChunkedLogProbFunction": Peer(
        "trl",
        "1.16.0",
        "trl/kernels/chunked_logprob.py",
        (YES, PER_TOKEN, SCALAR, YES, YES, NO, YES, NO, "on a GPU", NO, YES, YES, NO),
        ("temperature", "final_logit_softcapping", "bias"),
        "TRL, ChunkedLogProbFunction, then the loss",
    ),
    "verl, Triton linear_cross_entropy": Peer(
        "verl",
        "0.9.1",
        "verl/utils/kernel/kernels.py",
        (YES, PER_TOKEN, SCALAR, NO, NO, NO, YES, YES, NO, YES, YES, NO, NO),
        ("temperature", "dist_process_group"),
        "verl, Triton linear_cross_entropy, then the loss",
    ),
    "verl, FusedLinearForPPO": Peer(
        "verl",
        "0.9.1",
        "verl/utils/experimental/torch_functional.py",
        (YES, PER_TOKEN, SCALAR, NO, NO, NO, YES, NO, NO, NO, YES, YES, NO),
        ("temperature",),
        "verl, FusedLinearForPPO, then the loss",
    ),
    "Liger, LigerFusedLinearGRPOLoss": Peer(
        "liger-kernel",
        "0.8.5",
        "liger_kernel/chunked_loss/fused_linear_ppo.py",
        (NO, "per sequence", SCALAR, NO, YES, NO, NO, NO, NO, NO, YES, YES, NO),
        ("temperature", "bias"),
        "Liger, LigerFusedLinearGRPOLoss",
    ),
    "Liger, scaled cross entropy": Peer(
        "liger-kernel",
        "0.8.5",
        "liger_kernel/ops/fused_linear_scaled_cross_entropy.py",
        (YES, PER_TOKEN, SCALAR, NO, NO, NO, YES, YES, NO, NO, YES, YES, NO),
        ("temperature",),
        "Liger, CuTe scaled cross entropy, then the loss",
    ),
    "Apple, linear_cross_entropy": Peer(
        "cut-cross-entropy",
        "25.1.1",
        "cut_cross_entropy/cce.py",
        (NO, PER_TOKEN, NO, YES, NO, NO, YES, NO, YES, YES, "unfiltered", NO, NO),
        ("softcap",),
        "Apple, linear_cross_entropy, then the loss",
    ),
    "QuACK, chunked_linear_cross_entropy": Peer(
        "quack-kernels",
        "0.6.5",
        "quack/linear_cross_entropy.py",
        (NO, NO, NO, NO, NO, NO, YES, NO, NO, NO, YES, NO, NO),
        (),
    ),
}

# What no signature says, and the test that says it: (file, function).
HELD = {
    "logits not rounded": (
        "ops/test_linear.py",
        "test_log_probs_of_half_operands_are_a_hundred_times_closer_than_those_of_half_logits",
    ),
    "exact gradient": ("ops/test_linear_policy_loss.py", "test_it_is_the_spec"),
    "skips masked tokens": ("ops/test_linear.py", "test_masked_tokens_are_never_projected"),
}


def ours() -> tuple[str, ...]:
    """The facts of linear_policy_loss."""
    parameters = inspect.signature(rpp.linear_policy_loss).parameters

    def has(*names: str) -> str:
        return YES if parameters.keys() >= set(names) else NO

    def held(column: str) -> str:
        file, function = HELD[column]
        return YES if re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE) else NO

    temperature = PER_TOKEN if "Tensor" in str(parameters["temperature"].annotation) else SCALAR
    sums = {"num_tokens", "clipped_low", "approx_kl"} <= set(rpp.PolicyStats._fields)
    facts = {
        "entropy, with gradient": has("entropy_coef"),
        "advantages or weights": PER_TOKEN if has("advantages", "weights") == YES else NO,
        "temperature": temperature,
        "softcap": has("softcap"),
        "bias": has("bias"),
        "LoRA on the head": has("lora_A", "lora_B"),
        "packed sequences": has("cu_seqlens"),
        "sharded vocabulary": has("process_group", "vocab_start"),
        "CPU": YES if native.why_not("cpu") is None else NO,
        "statistics as sums": YES if sums else NO,
        **{column: held(column) for column in HELD},
    }
    return tuple(facts[column] for column in COLUMNS)
