"""The linear functions where the head is in pieces: vocabulary-parallel shards, and parameters of FSDP2.

Each world is started once and runs every case; what its ranks return is judged here, by the unsharded spec.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from worlds import HANG, attempt, dist, needs_gloo, of_each_rank, once

import rpp_kernels as rpp
from rpp_kernels import backends, reference
from rpp_kernels.testing import ZERO, evaluate, largest_of, within

pytestmark = needs_gloo

V, H, R, B, S = 23, 8, 3, 3, 9
CUTS = {2: (0, 10, 23), 3: (0, 5, 22, 23)}
SHARDED = ("weight", "bias", "lora_B")
LEARNED = ("hidden_states", "weight", "bias", "lora_A", "lora_B")

# ---------------------------------------------------------------- what is called


def head_batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A padded batch with holes, under which there is nothing but rubbish."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, S, generator=generator) < 0.8
    mask[1, :3] = False
    batch = {
        "hidden_states": normal(B, S, H).masked_fill(~mask[..., None], torch.nan),
        "weight": normal(V, H),
        "bias": normal(V),
        "lora_A": normal(R, H) / 2,
        "lora_B": normal(V, R) / 2,
        "temperature": torch.where(mask, normal(B, S).exp(), 0.0),
        "advantages": normal(B, S),
        "old_logps": -normal(B, S).abs() - 2,
    }
    batch = {k: x.to(dtype) for k, x in batch.items()}
    batch["target_ids"] = torch.randint(V, (B, S), generator=generator).masked_fill(~mask, -100)
    batch["completion_mask"] = mask
    return batch


PARTS = {
    "plain": {},
    "bias": {"bias": True},
    "full": {"bias": True, "lora": True, "temperature": True, "softcap": 4.0, "logit_scale": 0.7},
}


def head_options(t: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    options = {k: parts[k] for k in ("softcap", "logit_scale") if k in parts}
    options |= {k: t[k] for k in ("bias", "temperature") if k in parts}
    if "lora" in parts:
        options |= {"lora_A": t["lora_A"], "lora_B": t["lora_B"], "lora_scaling": 1.5}
    return options


def call_logps(f, t, only=None, **options):
    result = f.linear_logps(t["hidden_states"], t["weight"], t["target_ids"], t["completion_mask"], **options)
    return result if only is None else getattr(result, only)


def call_loss(f, t, **options):
    def token_loss(logps, entropy, rows):
        return -(logps - t["old_logps"][rows]).exp() * t["advantages"][rows] - 0.3 * entropy.square()

    arguments = t["hidden_states"], t["weight"], t["target_ids"], token_loss, t["completion_mask"]
    return f.linear_loss(*arguments, **options)


def call_groups(f, t, **options):
    def loss(logps, entropy, rows, cu_seqlens, sequences):
        scores = torch.arange(B)[sequences].to(logps)
        return f.copg_loss(logps, t["old_logps"][rows], scores, cu_seqlens=cu_seqlens, group_size=B).loss

    arguments = t["hidden_states"], t["weight"], t["target_ids"], loss, t["completion_mask"]
    return f.linear_loss(*arguments, group_size=B, **options)


def call_policy(f, t, on_policy=False, packed=False, extras=False, **options):
    if extras:
        options |= {"weights": t["advantages"].sigmoid(), "ref_logps": t["old_logps"] - 0.2 * t["advantages"]}
    names = "hidden_states", "weight", "target_ids", "old_logps", "advantages", "completion_mask"
    arguments = {k: t[k] for k in names} | options
    if packed:
        flat = ("hidden_states", "target_ids", "old_logps", "advantages", "completion_mask", "temperature")
        arguments |= {k: arguments[k].flatten(0, 1) for k in flat if k in arguments}
        arguments["cu_seqlens"] = torch.tensor([0, 4, 4, 15, B * S])
    if on_policy:
        arguments["old_logps"] = None
    return f.linear_policy_loss(**arguments)


@dataclass
class Case:
    call: Any
    parts: str = "full"
    dtype: torch.dtype = torch.float32
    learned: tuple[str, ...] = LEARNED
    options: dict[str, Any] = field(default_factory=dict)  # of the meaning
    plan: dict[str, Any] = field(default_factory=dict)  # of how it is done: unknown to the reference
    low: float = 0.0  # added to the bias of the second shard
    target: int | None = None  # the id of every token
    reverse: bool = False  # the last rank has the first rows
    world: int | None = None  # in this one only

    def tensors(self, world: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        t = head_batch(self.dtype)
        cuts = CUTS[world]
        t["bias"][cuts[1] : cuts[2]] += self.low
        if self.target is not None:
            t["target_ids"].masked_fill_(t["completion_mask"], self.target)
        return {k: x.to(dtype) if dtype and x.is_floating_point() else x for k, x in t.items()}

    def inputs(self) -> tuple[str, ...]:
        unused = {"plain": {"bias", "lora_A", "lora_B"}, "bias": {"lora_A", "lora_B"}}.get(self.parts, set())
        return tuple(k for k in self.learned if k not in unused)

    def run(self, f, t, **more) -> dict[str, torch.Tensor]:
        def function(t):
            return self.call(f, t, **head_options(t, PARTS[self.parts]), **self.options, **more)

        return evaluate(function, t, self.inputs())


def bounds(case: Case, world: int, rank: int) -> tuple[int, int]:
    return CUTS[world][(i := world - 1 - rank if case.reverse else rank)], CUTS[world][i + 1]


def shard(t, start, stop):
    return {k: x[start:stop] if k in SHARDED else x for k, x in t.items()}


HIDDEN = ("hidden_states",)
MANY = {"chunk_bytes": 500}  # of float32, 9 to 125 tokens by the rows of a shard; of float64 half of it
FEW = {"chunk_bytes": 1}
f64 = torch.float64
sequence = {"importance_sampling_level": "sequence", "reduction": "seq-mean-token-mean"}
everything = {"extras": True, "beta": 0.3, "kl_estimator": "k2", "kl_bias_correction": True, "entropy_coef": 0.1}
calls = {"logps": call_logps, "loss": call_loss, "policy": call_policy}

CASES: dict[str, Case] = {}
for dtype in (torch.float32, f64):
    name = str(dtype).split(".")[1]
    for call in calls:
        CASES[f"{call}-{name}"] = Case(calls[call], dtype=dtype)
        CASES[f"{call}-{name}-chunks"] = Case(calls[call], dtype=dtype, plan=MANY)
        CASES[f"{call}-{name}-frozen"] = Case(calls[call], dtype=dtype, learned=HIDDEN, plan=MANY)
    for result in ("logps", "entropy", "lse"):
        CASES[f"logps-{name}-d{result}"] = Case(call_logps, dtype=dtype, options={"only": result}, plan=MANY)
    CASES[f"entropy-{name}-frozen"] = Case(call_logps, dtype=dtype, learned=HIDDEN, options={"only": "entropy"})
    CASES[f"policy-{name}-sequence"] = Case(call_policy, dtype=dtype, options=sequence)
    CASES[f"policy-{name}-sequence-chunks"] = Case(call_policy, dtype=dtype, options=sequence, plan=FEW)
    CASES[f"policy-{name}-everything"] = Case(call_policy, dtype=dtype, options=everything, plan=MANY)
    CASES[f"policy-{name}-everything-sequence"] = Case(
        call_policy, dtype=dtype, options=everything | sequence, plan=FEW
    )
    CASES[f"policy-{name}-everything-frozen"] = Case(call_policy, dtype=dtype, learned=HIDDEN, options=everything)
    CASES[f"policy-{name}-sequence-frozen"] = Case(call_policy, dtype=dtype, learned=HIDDEN, options=sequence)
CASES |= {
    "logps-bfloat16": Case(call_logps, dtype=torch.bfloat16, plan=MANY),
    "loss-bfloat16": Case(call_loss, dtype=torch.bfloat16, plan=MANY),
    "policy-bfloat16": Case(call_policy, dtype=torch.bfloat16, plan=MANY),
    "logps-plain": Case(call_logps, parts="plain", dtype=f64, plan=FEW),
    "logps-bias": Case(call_logps, parts="bias", dtype=f64, plan=MANY),
    "loss-plain": Case(call_loss, parts="plain", dtype=f64, plan=FEW),
    "policy-plain": Case(call_policy, parts="plain", dtype=f64, plan=FEW),
    "logps-no-gradient": Case(call_logps, dtype=f64, learned=(), plan=MANY),
    "policy-no-gradient": Case(call_policy, dtype=f64, learned=(), plan=MANY),
    "loss-lora-only": Case(call_loss, dtype=f64, learned=("hidden_states", "lora_A", "lora_B"), plan=MANY),
    "logps-weight-only": Case(call_logps, dtype=f64, learned=("weight",), plan=MANY),
    "logps-keep": Case(call_logps, dtype=f64, plan={**MANY, "keep_bytes": 1000}),
    "logps-keep-all": Case(call_logps, dtype=f64, plan={**MANY, "keep_bytes": 1 << 20}),
    "logps-all-rows": Case(call_logps, dtype=f64, plan={**MANY, "skip_rows": False}),
    "loss-all-rows": Case(call_loss, dtype=f64, plan={**MANY, "skip_rows": False}),
    "groups": Case(call_groups, dtype=f64),
    "groups-chunks": Case(call_groups, dtype=f64, plan=MANY),
    "policy-all-rows": Case(call_policy, dtype=f64, plan={**MANY, "skip_rows": False}),
    "logps-invariant": Case(call_logps, dtype=f64, plan={**MANY, "batch_invariant": True}),
    "policy-invariant": Case(call_policy, dtype=f64, plan={**MANY, "batch_invariant": True}),
    "policy-on-policy": Case(call_policy, dtype=f64, options={"on_policy": True}, plan=MANY),
    "policy-packed": Case(call_policy, dtype=f64, options={"packed": True, "dual_clip": 2.0}, plan=MANY),
    "policy-packed-sequence": Case(call_policy, dtype=f64, options={"packed": True, **sequence}, plan=MANY),
    "policy-items": Case(call_policy, dtype=f64, options={"num_items_in_batch": 7.0}, plan=MANY),
    "reversed": Case(call_logps, dtype=f64, plan=MANY, reverse=True),
    "low-shard": Case(call_logps, parts="bias", low=-1e4),
    "low-shard-float64": Case(call_logps, parts="bias", dtype=f64, low=-1e4),
    "low-shard-loss": Case(call_loss, parts="bias", low=-1e4, target=0),
    "infinitely-low-shard": Case(call_logps, parts="bias", low=-torch.inf, target=0),
    "infinitely-low-shard-loss": Case(call_loss, parts="bias", low=-torch.inf, target=0),
    "infinitely-low-target": Case(call_logps, parts="bias", learned=(), low=-torch.inf, target=11),
    "high-shard": Case(call_logps, parts="bias", low=1e4),
    "sure-target": Case(call_logps, parts="bias", low=60.0, target=22, world=3),
}
NO_REFERENCE = {"reversed"}  # it takes ranks in their order

# ---------------------------------------------------------------- what is refused


def _mistakes(backend: str, group: Any, world: int, rank: int) -> dict[str, str]:
    """What each call answers on this rank."""
    start, stop = CUTS[world][rank : rank + 2]

    def answer(call, target=None, at=(2, 8), where=start, masked=False, **options):
        t = head_batch()
        if target is not None:
            t["target_ids"][at] = target
        t["completion_mask"][at] = not masked
        t["hidden_states"][at] = 1.0
        own = shard(t, start, stop)
        options = {"process_group": group, "vocab_start": where, **options}
        try:
            call(rpp, own, bias=own["bias"], **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    answers = {}
    with backends.use_backend(backend):
        answers["negative"] = answer(call_logps, -1)
        answers["masked"] = answer(call_logps, V, masked=True)
        answers["no-start"] = answer(call_logps, 0, where=None)
        answers["negative-start"] = answer(call_logps, 0, where=-1)
        answers["no-group"] = answer(call_logps, 0, process_group=None)
        if backend == "reference":  # no one but the kernels' loop knows what lies in a shard
            return answers
        for name, call in calls.items():
            answers[f"{name}-too-large"] = answer(call, V)
        answers["huge"] = answer(call_logps, 2**62)
        answers["last-chunk"] = answer(call_logps, V, **FEW)
        answers["last-chunk-all-rows"] = answer(call_logps, V, skip_rows=False, **FEW)
        answers["masked-all-rows"] = answer(call_logps, V, masked=True, skip_rows=False)
        answers["gap"] = answer(call_logps, CUTS[world][1], where=start + (rank > 0))
        answers["overlap"] = answer(call_logps, CUTS[world][1] - 1, where=start - (rank > 0))
    return answers


# ---------------------------------------------------------------- FSDP2


class Model(torch.nn.Module):
    def __init__(self, tied: bool, function: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, H)
        self.layer = torch.nn.Linear(H, H)
        self.lm_head = torch.nn.Linear(H, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight
        self.function = function

    def forward(self, ids, t):
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return self.loss(hidden, t)

    def loss(self, hidden, t):
        t, bias = t | {"hidden_states": hidden, "weight": self.lm_head.weight}, self.lm_head.bias
        if self.function == "logps":
            logps, entropy, *_ = call_logps(rpp, t, bias=bias)
            return rpp.policy_loss(logps, t["old_logps"], t["advantages"], t["completion_mask"]).loss + entropy.mean()
        return calls[self.function](rpp, t, bias=bias).loss


FSDP = {
    f"{function}-{'tied' if tied else 'untied'}{'-reshard' if reshard else ''}": (tied, function, reshard)
    for function in calls
    for tied in (False, True)
    for reshard in (False, True)
}


def _model(tied: bool, function: str) -> tuple[Model, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Model(tied, function).double(), torch.randint(V, (B, S)), head_batch(f64)


def _fully_sharded(tied: bool, function: str, reshard: bool) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, ids, t = _model(tied, function)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    results = {}
    for step in range(2):
        model.zero_grad()
        loss = model(ids, t)
        (3 * loss if step else loss).backward()
        results[f"loss{step}"] = loss.detach()
        results |= {f"d{k}{step}": p.grad.full_tensor() for k, p in model.named_parameters()}
    return results


def _outside() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    answers = {}
    for function in calls:
        model, _, t = _model(False, function)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        try:
            model.loss(t["hidden_states"], t)
            answers[function] = "nothing"
        except Exception as error:
            answers[function] = f"{type(error).__name__}: {error}"
    return answers


# ---------------------------------------------------------------- worlds


def _cases(backend: str, world: int, rank: int, at: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if case.world not in (None, world) or (backend == "reference" and name in NO_REFERENCE):
            continue
        start, stop = bounds(case, world, rank)
        at(name)
        group = dist.new_group(timeout=HANG)  # a case that breaks its group breaks no other case
        sharded = {"process_group": group, "vocab_start": start}
        with backends.use_backend(backend):
            t = shard(case.tensors(world), start, stop)
            results[name] = attempt(partial(case.run, rpp, t, **sharded, **case.plan))
        dist.destroy_process_group(group)
    at("the rest")
    results["mistakes"] = attempt(partial(_mistakes, backend, dist.new_group(timeout=HANG), world, rank))
    if world == 2 and backend == "native":
        for name, arguments in FSDP.items():
            results[f"fsdp-{name}"] = attempt(partial(_fully_sharded, *arguments))
        results["outside"] = attempt(_outside)
    return results


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return once(_cases, tmp_path_factory)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("world", CUTS)
@pytest.mark.parametrize("name", CASES)
def test_a_vocabulary_in_shards_gives_what_the_whole_one_does(name, world, backend, device, worlds):
    case = CASES[name]
    if case.world not in (None, world) or (backend == "reference" and name in NO_REFERENCE):
        pytest.skip("not in this world")
    results = of_each_rank(worlds(backend, world), name)
    actual = {}
    for k in results[0]:
        parts = [x[k] for x in results]
        if k[1:] in SHARDED and k[0] == "d":
            actual[k] = torch.cat(parts[::-1] if case.reverse else parts)
            continue
        for rank, x in enumerate(parts):
            torch.testing.assert_close(
                x, parts[0], rtol=0, atol=0, equal_nan=True, msg=f"{k} of rank {rank} is its own"
            )
        actual[k] = parts[0]
    same, exact = case.run(reference, case.tensors(world)), case.run(reference, case.tensors(world, f64))
    assert actual.keys() == exact.keys()
    if "logps" in actual:
        assert not (actual["logps"] > 0).any()
    largest = max(largest_of(x) for x in exact.values())
    for k, x in actual.items():
        floor = 1e-12 * max(1.0, largest)
        if case.dtype != f64:
            eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, torch.float32))
            floor = 4 * eps * largest_of(exact[k]) + ZERO
        within(k, x, same[k], exact[k], 2.0, floor)


REFUSED = {
    **{f"{name}-too-large": "target_ids" for name in calls},
    "huge": "target_ids",
    "negative": "target_ids",
    "masked": None,
    "no-start": "vocab_start",
    "negative-start": "vocab_start",
    "no-group": "vocab_start",
    "last-chunk": "target_ids",
    "last-chunk-all-rows": "target_ids",
    "masked-all-rows": None,
    "gap": "target_ids",
    "overlap": "target_ids",
}


@pytest.mark.parametrize("world", CUTS)
@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses(name, world, backend, device, worlds):
    answers = [x.get(name) for x in of_each_rank(worlds(backend, world), "mistakes")]
    if answers[0] is None:
        pytest.skip("of kernels only")
    for answer in answers:
        assert answer.startswith(f"ValueError: {REFUSED[name]}" if REFUSED[name] else "nothing"), answers


@pytest.mark.parametrize("name", FSDP)
def test_fully_shard_gives_the_gradients_of_one_process(name, worlds):
    tied, function, _ = FSDP[name]
    model, ids, t = _model(tied, function)
    loss = model(ids, t)
    loss.backward()
    for results in of_each_rank(worlds("native", 2), f"fsdp-{name}"):
        for step, scale in enumerate((1, 3)):
            torch.testing.assert_close(results[f"loss{step}"], loss.detach(), rtol=1e-12, atol=1e-12)
            for k, p in model.named_parameters():
                torch.testing.assert_close(
                    results[f"d{k}{step}"], scale * p.grad, rtol=1e-12, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}"
                )


def test_a_sharded_parameter_outside_the_forward_is_refused(worlds):
    for answers in of_each_rank(worlds("native", 2), "outside"):
        for answer in answers.values():
            assert answer.startswith("ValueError: weight")
            assert "DTensor" in answer
            assert "fully_shard" in answer
