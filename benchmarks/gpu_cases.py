"""The cases of a GPU: those of the CPU that move bytes, by both backends, and the sizes that performance.md aims at."""

from collections.abc import Callable
from dataclasses import replace

import torch
from case import OURS, Case, Data, Floor, Function, Tensors, compiled, matmul_floor, plain
from cases import CASES, eager_logps_entropy, logps_case
from linear_cases import WRT, eager_policy_loss, policy_inputs
from timing import Outputs
from torch import Tensor

import rpp_kernels as rpp
from rpp_kernels import reference

BACKENDS = {"CUDA": "native", "Triton": "triton"}


def on_backend(function: Function, backend: str) -> Function:
    def run(**inputs: Tensor) -> Outputs:
        with rpp.use_backend(backend):
            return function(**inputs)

    return run


def by_backend(case: Case) -> Case:
    """Ours twice, once for each backend."""
    ours = case.competitors[OURS]
    names = {f"{OURS}, {name}": (lambda b=backend: on_backend(ours(), b)) for name, backend in BACKENDS.items()}
    return replace(case, competitors=names | {k: f for k, f in case.competitors.items() if k != OURS})


def of_bytes() -> list[Case]:
    eager = {"eager": plain(eager_logps_entropy), "torch.compile": compiled(eager_logps_entropy)}
    why = "the log-probs and the entropy of one batch of a model with a large vocabulary"
    logits = [
        logps_case("logps_entropy_bf16", torch.bfloat16, 2, why, eager, 8192, 151936, "cuda"),
        logps_case("logps_entropy_fp32", torch.float32, 2, why, eager, 4096, 151936, "cuda"),
    ]
    return logits + [case for case in CASES if case.floor.unit == "GB" and not case.name.startswith("logps")]


# ---------------------------------------------------------------- one read of the logits


def _policy_of_logits(tokens: int, vocab: int, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, device=device, dtype=torch.bfloat16)
    ids = torch.randint(vocab, (tokens,), generator=generator, device=device)
    old_logps = torch.randn(tokens, generator=generator, device=device) * 0.02 - 12
    advantages = torch.randn(tokens, generator=generator, device=device) + 0.5
    return Data({"logits": logits, "target_ids": ids, "old_logps": old_logps, "advantages": advantages})


def _in_one_read(logits: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor) -> Outputs:
    """(logps, dlogits) of the summed policy loss."""
    dlogits, scale = torch.empty_like(logits), torch.ones(1, dtype=torch.float64, device=logits.device)
    head = dlogits, logits, target_ids, None, 1.0, None, 0.0, old_logps, advantages, None, None, scale
    numbers = 0.2, 0.2, float("inf"), 0.0, 20.0, 0.0, float("inf"), 0.0
    logps, *_ = torch.ops.rpp_kernels_C.chunk_policy_out(*head, *numbers, 0, 3, 3, False)
    return logps, dlogits


def _in_two_reads(
    logits: Tensor, target_ids: Tensor, old_logps: Tensor, advantages: Tensor, library: object = rpp
) -> Outputs:
    starts = torch.tensor([0, len(target_ids)], device=logits.device)
    with torch.enable_grad():
        learned = logits.detach().requires_grad_()
        logps = library.logps_from_logits(learned, target_ids).logps
        loss = library.policy_loss(logps, old_logps, advantages, reduction="none", cu_seqlens=starts).loss.sum()
    return logps.detach(), *torch.autograd.grad(loss, learned)


def one_read(tokens: int = 8192, vocab: int = 131072, device: str = "cuda") -> Case:
    size = 2.0 * tokens * vocab
    return Case(
        name="policy_loss_of_logits_bf16",
        op="the policy loss and its gradient by the logits, from logits that are there",
        shape=f"logits {tokens} x {vocab} bfloat16",
        why="what a chunk of linear_policy_loss does between its matrix products",
        data=lambda: _policy_of_logits(tokens, vocab, device),
        spec=lambda **inputs: _in_two_reads(**inputs, library=reference),
        competitors={
            f"{OURS}, CUDA, one read": plain(_in_one_read),
            f"{OURS}, CUDA, two reads": plain(on_backend(_in_two_reads, BACKENDS["CUDA"])),
            f"{OURS}, Triton, two reads": plain(on_backend(_in_two_reads, BACKENDS["Triton"])),
        },
        floor=Floor("one read and one write of the logits", "GB", {"forward": 2 * size}, lambda: None),
        tolerance=1e-2,
        check_every=32,
    )


# ---------------------------------------------------------------- the head


def _head_data(tokens: int, vocab: int, hidden: int, device: str) -> Callable[[], Data]:
    def data() -> Data:
        inputs: Tensors = policy_inputs(min(tokens, 64), vocab, hidden)  # of the CPU, where it is slow
        many = -(-tokens // 64)
        weight = inputs.pop("weight").to(device, torch.bfloat16)
        wide = {k: x.to(device).repeat(1, many, *[1] * (x.dim() - 2))[:, :tokens] for k, x in inputs.items()}
        wide["hidden_states"] = wide["hidden_states"].to(torch.bfloat16)
        return Data(wide | {"weight": weight}, WRT, (torch.ones((), device=device),))

    return data


def head(tokens: int, vocab: int, hidden: int, device: str = "cuda") -> tuple[Case, Case]:
    """The case that is timed, and the same of few tokens, in which it is checked."""

    def ours(name: str, skip_rows: bool) -> Function:
        return on_backend(lambda **x: (rpp.linear_policy_loss(**x, skip_rows=skip_rows).loss,), BACKENDS[name])

    def case(tokens: int) -> Case:
        return Case(
            name=f"linear_policy_loss_{tokens}_{vocab}_{hidden}",
            op="linear_policy_loss: the clipped policy loss from hidden states, and its gradient",
            shape=f"T = {tokens}, V = {vocab}, H = {hidden} bfloat16",
            why="the head of a model of 7 or 8 billion parameters",
            data=_head_data(tokens, vocab, hidden, device),
            spec=lambda **inputs: (reference.linear_policy_loss(**inputs).loss,),
            competitors={
                f"{OURS}, CUDA, one read": plain(ours("CUDA", False)),
                f"{OURS}, CUDA, skip_rows": plain(ours("CUDA", True)),
                f"{OURS}, Triton": plain(ours("Triton", False)),
                "eager": plain(eager_policy_loss),
            },
            floor=matmul_floor(tokens, vocab, hidden, "both", dtype=torch.bfloat16, device=device),
            tolerance=5e-2,
        )

    return case(tokens), case(256)


HEADS = ((16384, 131072, 4096), (8192, 151936, 4096))
