"""The cases of a GPU: the heads of large models, and those of the CPU that move bytes, by both backends."""

from collections.abc import Callable
from dataclasses import replace

import gpu_peers
import linear_cases
import peers
import torch
from case import OURS, Case, Data, Floor, Function, Loader, Tensors, compiled, matmul_floor, plain
from cases import CASES, eager_logps_entropy, logps_case
from linear_cases import WRT, eager_policy_loss, logps_then_policy_loss
from timing import Outputs
from torch import Tensor

import rpp_kernels as rpp
from rpp_kernels import reference
from rpp_kernels.testing import make_batch

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
    eager |= gpu_peers.LOGPS_ENTROPY
    why = "the log-probs and the entropy of one batch of a model with a large vocabulary"
    logits = [
        logps_case("logps_entropy_bf16", torch.bfloat16, 2, why, eager, 8192, 151936, "cuda"),
        logps_case("logps_entropy_fp32", torch.float32, 2, why, eager, 4096, 151936, "cuda"),
        logps_case(
            "logps_bf16",
            torch.bfloat16,
            1,
            "the log-probs alone, for which some have a kernel",
            gpu_peers.LOGPS,
            8192,
            151936,
            "cuda",
        ),
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

SEQUENCES = 8
HEADS = ((8192, 151936, 4096), (16384, 131072, 4096))  # tokens, vocabulary, width; the first is TRL's own benchmark


def head_inputs(tokens: int, vocab: int, hidden: int, device: str) -> Tensors:
    """(8, T / 8) tokens, bfloat16, made where they are used."""
    batch = make_batch(SEQUENCES, tokens // SEQUENCES, vocab=vocab, hidden=hidden, device=device)
    inputs = {name: batch[name] for name in ("hidden_states", "weight", "target_ids")}
    return {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in inputs.items()}


def _policy_data(inputs: Tensors) -> Data:
    """As in linear_cases.py: ratios of 0.9 to 1.1, and one advantage for a sequence."""
    hidden_states, weight, target_ids = inputs.values()
    rows = zip(hidden_states, target_ids, strict=True)
    logps = torch.stack([linear_cases.eager_logps(x, weight, ids)[0] for x, ids in rows])
    generator = torch.Generator(logps.device).manual_seed(1)
    noise, advantages = (
        torch.randn(shape, generator=generator, device=logps.device) for shape in (logps.shape, (SEQUENCES, 1))
    )
    advantages = (advantages + 0.5 - advantages.mean()).expand_as(logps).contiguous()
    policy = {"old_logps": logps + 0.02 * noise, "advantages": advantages}
    return Data(inputs | policy, WRT, (torch.ones((), device=logps.device),))


def _logps_data(inputs: Tensors) -> Data:
    ids = inputs["target_ids"]
    generator = torch.Generator(ids.device).manual_seed(1)
    return Data(inputs, WRT, (torch.randn(ids.shape, generator=generator, device=ids.device),))


def _mean_data(inputs: Tensors) -> Data:
    return Data(inputs, WRT, (torch.ones((), device=inputs["weight"].device),))


def _head_case(
    name: str,
    op: str,
    size: tuple[int, int, int],
    device: str,
    phases: tuple[str, ...],
    data: Callable[[Tensors], Data],
    spec: Function,
    competitors: dict[str, Loader],
) -> tuple[Case, Case]:
    """The case that is timed, and the same of few tokens, in which it is checked."""

    def case(tokens: int, vocab: int, hidden: int) -> Case:
        return Case(
            name="_".join(map(str, (name, tokens, vocab, hidden))),
            op=op,
            shape=f"T = {tokens}, V = {vocab}, H = {hidden} bfloat16",
            why="the head of a model of 7 or 8 billion parameters",
            data=lambda: data(head_inputs(tokens, vocab, hidden, device)),
            spec=spec,
            competitors=competitors,
            floor=matmul_floor(tokens, vocab, hidden, *phases, dtype=torch.bfloat16, device=device),
            tolerance=5e-2,
        )

    return case(*size), case(min(256, size[0]), *size[1:])


def _ours(function: Function, **options: object) -> Function:
    return lambda **inputs: function(**inputs, **options)[:1]


def head(tokens: int, vocab: int, hidden: int, device: str = "cuda", with_peers: bool = True) -> tuple[Case, Case]:
    whole = _ours(rpp.linear_policy_loss, skip_rows=False)
    competitors = {
        f"{OURS}, CUDA, one read": plain(on_backend(whole, BACKENDS["CUDA"])),
        f"{OURS}, CUDA, skip_rows": plain(on_backend(_ours(rpp.linear_policy_loss), BACKENDS["CUDA"])),
        f"{OURS}, CUDA, linear_logps then policy_loss": plain(on_backend(logps_then_policy_loss, BACKENDS["CUDA"])),
        f"{OURS}, Triton": plain(on_backend(whole, BACKENDS["Triton"])),
        "eager": plain(eager_policy_loss),
    }
    if with_peers:
        competitors |= {"torch.compile": compiled(eager_policy_loss), **peers.LINEAR_POLICY_LOSS}
        competitors |= gpu_peers.LINEAR_POLICY_LOSS
    return _head_case(
        "linear_policy_loss",
        "linear_policy_loss: the clipped policy loss from hidden states, and its gradient",
        (tokens, vocab, hidden),
        device,
        ("both",),
        _policy_data,
        _ours(reference.linear_policy_loss),
        competitors,
    )


def logps_head(tokens: int, vocab: int, hidden: int, device: str = "cuda") -> tuple[Case, Case]:
    return _head_case(
        "linear_logps",
        "linear_logps: log-probs from hidden states, for a loss that is anyone's",
        (tokens, vocab, hidden),
        device,
        ("forward", "backward", "both"),
        _logps_data,
        _ours(reference.linear_logps),
        {
            f"{OURS}, CUDA": plain(on_backend(_ours(rpp.linear_logps), BACKENDS["CUDA"])),
            f"{OURS}, Triton": plain(on_backend(_ours(rpp.linear_logps), BACKENDS["Triton"])),
            "eager": plain(linear_cases.eager_logps),
            **peers.LINEAR_LOGPS,
            **gpu_peers.LINEAR_LOGPS,
        },
    )


def cross_entropy_head(tokens: int, vocab: int, hidden: int, device: str = "cuda") -> tuple[Case, Case]:
    return _head_case(
        "linear_cross_entropy",
        "linear_loss of -logps / T: the mean cross entropy from hidden states, and its gradient",
        (tokens, vocab, hidden),
        device,
        ("both",),
        _mean_data,
        linear_cases.cross_entropy_spec,
        {
            f"{OURS}, CUDA": plain(on_backend(linear_cases.our_cross_entropy, BACKENDS["CUDA"])),
            f"{OURS}, Triton": plain(on_backend(linear_cases.our_cross_entropy, BACKENDS["Triton"])),
            "eager": plain(linear_cases.eager_cross_entropy),
            **gpu_peers.LINEAR_CROSS_ENTROPY,
        },
    )


def heads() -> list[tuple[Case, Case]]:
    """The first matters most: a run that is cut off has that."""
    first, *more = HEADS
    bare = [head(*size, with_peers=False) for size in more]
    return [head(*first), logps_head(*first), *bare, cross_entropy_head(*first)]
