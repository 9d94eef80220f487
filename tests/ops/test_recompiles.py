"""No length, no size and no number of a call makes Triton compile a kernel anew."""

import json
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

import rpp_kernels as rpp
from rpp_kernels.testing import make_batch

ROOT = Path(__file__).parents[2]

# Batch, length, vocabulary, hidden size, group size and a number; the first call compiles. What Triton would take for a
# constant if it were let: 1, and multiples of 16.
CALLS = (
    (4, 16, 64, 16, 2, 0.5),
    (6, 7, 11, 5, 3, 0.25),
    (2, 1, 1, 1, 2, 1.0),
    (8, 33, 1001, 3, 4, 0.7),
    (16, 32, 128, 16, 16, 1.0),
)


def every_function(x, mask, cu, size, v):
    """One call of each public function that has a kernel, in each mode that chooses between kernels."""
    fixed = {name: tensor.detach() for name, tensor in x.items()}
    ids, logits, layout = x["target_ids"], x["logits"], {"cu_seqlens": cu}
    apart = torch.cat([logits, logits], -1)[..., : logits.shape[-1]]  # rows that do not follow each other
    each = torch.full(ids.shape, v)
    head, old = (x["hidden_states"], x["weight"], ids), fixed["old_logps"]
    worth = fixed["scores"] if cu is None else fixed["scores"][:, None]
    of_tokens = x["logps"], old, fixed["advantages"], mask
    of_sequences = x["logps"], old, worth, mask
    extras = {"weights": fixed["logps"].exp(), "ref_logps": fixed["ref_logps"], "entropy": x["kl"]}
    extras |= {"beta": v, "entropy_coef": v, "kl_clamp": v, "log_ratio_clamp": 20 * v}
    sequence = {"importance_sampling_level": "sequence"}
    chunks = {"chunk_bytes": 1 << 12}
    return {
        "logps_from_logits": lambda: rpp.logps_from_logits(logits, ids, mask, temperature=v),
        "logps_from_logits, rows apart": lambda: rpp.logps_from_logits(apart, ids, mask, temperature=v),
        "logps_from_logits, each temperature": lambda: rpp.logps_from_logits(logits, ids, temperature=each),
        "linear_logps": lambda: rpp.linear_logps(*head, mask, temperature=v, softcap=30 * v, logit_scale=v, **chunks),
        "linear_policy_loss": lambda: (
            rpp.linear_policy_loss(
                *head, old, fixed["advantages"], mask, epsilon_low=v, temperature=v, **chunks, **layout
            ).loss
        ),
        "linear_policy_loss of sequences": lambda: (
            rpp.linear_policy_loss(*head, old, worth, mask, **sequence, **chunks, **layout).loss
        ),
        "kl_penalty": lambda: rpp.kl_penalty(x["logps"], x["ref_logps"], mask, kl_clamp=v, log_ratio_clamp=20 * v),
        "token_rewards": lambda: rpp.token_rewards(x["scores"], x["kl"], mask, beta=v, **layout),
        "returns": lambda: rpp.returns(x["rewards"], mask, gamma=v, **layout),
        "gae": lambda: rpp.gae(x["rewards"], x["values"], mask, gamma=v, gae_lambda=v, **layout),
        "whiten": lambda: rpp.whiten(x["advantages"], mask, eps=v),
        "normalize_rewards": lambda: rpp.normalize_rewards(x["scores"], scale=v, eps=v),
        "group_advantages": lambda: rpp.group_advantages(x["scores"], group_size=size, std="group", eps=v),
        "group_advantages by ids": lambda: rpp.group_advantages(
            x["scores"], group_ids=torch.arange(len(x["scores"])) // size, std="group", eps=v
        ),
        "reinforce_pp_advantages": lambda: rpp.reinforce_pp_advantages(
            x["scores"], x["old_logps"], x["ref_logps"], mask, beta=v, gamma=v, kl_clamp=v, eps=v, **layout
        ),
        "policy_loss": lambda: (
            rpp.policy_loss(
                *of_tokens, epsilon_low=v, epsilon_high=v, dual_clip=1 + v, num_items_in_batch=v, **layout
            ).loss
        ),
        "policy_loss with everything": lambda: rpp.policy_loss(*of_tokens, **extras, **layout).loss,
        "policy_loss of sequences": lambda: (
            rpp.policy_loss(*of_sequences, **sequence, reduction="seq-mean-token-mean", **layout).loss
        ),
        "policy_loss of each token": lambda: rpp.policy_loss(*of_tokens, **sequence, reduction="none", **layout).loss,
        "value_loss": lambda: (
            rpp.value_loss(x["values"], fixed["old_values"], fixed["returns"], mask, epsilon=v, **layout).loss
        ),
        "rollout_weights": lambda: (
            rpp.rollout_weights(
                old, fixed["ref_logps"], mask, low=v / 2, high=1 + v, log_ratio_clamp=20 * v, **layout
            ).weights
        ),
        "dpo_loss": lambda: rpp.dpo_loss(x["logps"], fixed["ref_logps"], mask, beta=v, margin=v, **layout).loss,
        "copg_loss": lambda: (
            rpp.copg_loss(x["logps"], fixed["ref_logps"], fixed["scores"], mask, group_size=size, beta=v, **layout).loss
        ),
    }


def with_gradient(call, x):
    """Calls a function and its gradient."""
    out = call()
    parts = out if isinstance(out, tuple) else (out,)
    total = sum(part.sum() for part in parts if part is not None)
    if total.requires_grad:
        torch.autograd.grad(total, [y for y in x.values() if y.requires_grad], allow_unused=True)


def count(arch):
    """For each function, how many kernels the first call compiles, and which each later one."""
    import triton
    from aot import pretend

    from rpp_kernels.backends import triton as backend

    backend.INTERPRETED = True  # that CPU tensors are taken; the kernels themselves are not interpreted here
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what no kernel writes
    seen, current = set(), []

    def about_to_compile(*, fn, compile, **_):
        key = fn.name, compile["key"]
        current.extend({key} - seen)
        seen.add(key)
        return True  # no need to do it

    triton.knobs.runtime.jit_cache_hook = about_to_compile

    def run(kernel, programs, arguments, options):
        kernel.warmup(*arguments, grid=(programs,), **options)

    compiled = {}
    with pretend(arch, run), rpp.use_backend("triton"):
        for (B, S, V, H, size, v), packed in zip_longest(CALLS * 2, [False] * len(CALLS), fillvalue=True):
            x = make_batch(B, S, vocab=V, packed=packed)
            x = make_batch(B, S, vocab=V, hidden=H, packed=packed) | x
            x = {k: y.requires_grad_() if y.is_floating_point() else y for k, y in x.items()}
            for name, call in every_function(x, x["completion_mask"], x.get("cu_seqlens"), size, v).items():
                current.clear()
                with_gradient(call, x)
                compiled.setdefault(name, []).append([f"{kernel}: {key}" for kernel, key in current])
    return compiled


def test_no_length_size_or_number_of_a_call_compiles_a_kernel_anew():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests/ops")))}
    code = "import json, test_recompiles; print(json.dumps(test_recompiles.count('sm_90')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert sum(len(first) for first, *_ in compiled.values()) > len(compiled) / 2  # the hook is called at all
    assert {name: later for name, (_, *later) in compiled.items() if any(later)} == {}
