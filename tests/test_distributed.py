"""Statistics, groups and divisors across processes: what ranks have together is what one process has of it all.

A world of three is started once. In it three ranks, and two of them, run every case on their rows; what they return is
judged by the spec on the whole batch.
"""

import itertools
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from worlds import HANG, attempt, dist, needs_gloo, of_each_rank, once

import rpp_kernels as rpp
from rpp_kernels import backends, reference

pytestmark = needs_gloo

ROOT = Path(__file__).parents[1]
B, S, H, V = 8, 6, 3, 5
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
f64 = torch.float64

# Which rows each rank has, and of which no token is valid. Pairs, as groups of two stay together.
SPLITS = {
    2: {
        "unequal": ((0, 6, 8), ()),
        "empty": ((0, 0, 8), ()),
        "masked": ((0, 2, 8), (0, 1)),
        "nothing": ((0, 0, 0), ()),
    },
    3: {
        "unequal": ((0, 2, 6, 8), ()),
        "empty": ((0, 4, 4, 8), ()),
        "masked": ((0, 4, 6, 8), (4, 5)),
        "none valid": ((0, 2, 4, 8), range(8)),
    },
}
RANKS = {2: (1, 2), 3: (0, 1, 2)}  # so that a rank's number in its group is not always that in the world

# ---------------------------------------------------------------- what is called


def whole_batch(masked=(), dtype=f64) -> dict[str, torch.Tensor]:
    """Rubbish where masked; groups by id that lie on several ranks, one of them a single sequence."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=f64)

    mask = torch.rand(B, S, generator=generator) < 0.7
    mask[3], mask[list(masked)] = False, False
    old_logps = -normal(B, S).exp()
    tokens = {
        "hidden_states": normal(B, S, H),
        "values": 5 + normal(B, S),
        "old_logps": old_logps,
        "logps": old_logps + 0.3 * normal(B, S),
        "ref_logps": old_logps + 0.3 * normal(B, S),
        "advantages": normal(B, S),
    }
    batch = {k: torch.where(mask.view(B, S, *[1] * (x.dim() - 2)), x, torch.nan).to(dtype) for k, x in tokens.items()}
    batch["target_ids"] = torch.randint(V, (B, S), generator=generator)
    batch["scores"] = torch.tensor([1.0, 2.0, 2.0, -1.0, 0.5, 0.5, 0.5, 3.0], dtype=dtype)
    batch["group_ids"] = torch.tensor([1 << 40, -3, 1 << 40, 7, -3, 7, -3, 5])
    batch["lengths"] = mask.sum(1)
    batch["mask"] = mask
    return batch


def part(t: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {k: x[start:stop] for k, x in t.items()}


def packed(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"cu_seqlens": torch.arange(x.shape[0] + 1) * S}


def whiten(f, t, **options):
    return f.whiten(t["values"], t["mask"], **options)


def normalize(f, t, **options):
    return f.normalize_rewards(t["scores"], **options)


def reinforce_pp(f, t, pack=False, **options):
    names = "old_logps", "ref_logps", "mask"
    tokens = [t[k].flatten() if pack else t[k] for k in names]
    options |= packed(t["mask"]) if pack else {}
    result = f.reinforce_pp_advantages(t["scores"], *tokens, beta=0.3, gamma=0.9, kl_estimator="k3", **options)
    return result.view(-1, S)


def groups(f, t, name="group_advantages", by_id=True, **options):
    options |= {"group_ids": t["group_ids"]} if by_id else {"group_size": 2}
    if options.get("baseline") == "length-weighted":
        options["lengths"] = t["lengths"]
    return getattr(f, name)(t["scores"], **options)


def items(f, t, reduction, pack=False, **options):
    mask = t["mask"].flatten() if pack else t["mask"]
    return f.num_items_in_batch(mask, reduction, **(packed(t["mask"]) if pack else {}), **options)


class Mixed(NamedTuple):
    count: torch.Tensor
    histogram: torch.Tensor
    bits: torch.Tensor


def totals(f, t, of, process_group=None):
    if of == "policy":
        stats = f.policy_loss(t["logps"], t["old_logps"], t["advantages"], t["mask"]).stats
    elif of == "value":
        stats = f.value_loss(t["values"], t["old_logps"], t["advantages"], t["mask"]).stats
    else:
        stats = Mixed(t["mask"].sum(), t["mask"].sum(0).float().view(2, 3), t["mask"].sum().to(torch.int32))
    summed = f.sum_over_ranks(stats, process_group)
    assert type(summed) is type(stats)
    assert [(x.dtype, x.shape) for x in summed] == [(x.dtype, x.shape) for x in stats]
    return torch.cat([x.double().flatten() for x in summed])


EACH_ROW = {
    "whiten": whiten,
    "whiten add_std": partial(whiten, unbiased=True, eps_mode="add_std", eps=0.1, shift_mean=False),
    "normalize_rewards": partial(normalize, clip=(-1.0, 1.5), scale=2.0),
    "normalize_rewards without z-score": partial(normalize, zscore=False),
    "reinforce_pp_advantages": reinforce_pp,
    "reinforce_pp_advantages packed": partial(reinforce_pp, pack=True),
    **{
        f"group_advantages {baseline} {std} by {'id' if by_id else 'size'}": partial(
            groups, baseline=baseline, std=std, by_id=by_id, unbiased=by_id
        )
        for baseline, std, by_id in itertools.product(
            ("mean", "leave-one-out", "length-weighted"), ("none", "group", "batch", "leave-one-out"), (True, False)
        )
    },
    "group_advantages of singletons": partial(groups, singleton="keep", std="batch"),
    **{
        f"{name} by {'id' if by_id else 'size'}": partial(groups, name=name, by_id=by_id)
        for name in ("best_of_group", "informative_groups")
        for by_id in (True, False)
    },
}
OF_ALL = {
    **{
        f"num_items_in_batch {r} {'packed' if pack else 'padded'}": partial(items, reduction=r, pack=pack)
        for r in REDUCTIONS
        for pack in (False, True)
    },
    **{f"sum_over_ranks {of}": partial(totals, of=of) for of in ("policy", "value", "mixed")},
}


# ---------------------------------------------------------------- a step of training, on one process and on many


def loss_of(t: dict[str, torch.Tensor], loss: str, reduction: str, count: Any) -> torch.Tensor:
    options = {"reduction": reduction, "num_items_in_batch": count}
    options |= {"max_completion_length": S} if reduction.endswith("norm") else {}
    if loss == "value":
        return rpp.value_loss(t["values"], t["old_logps"], t["advantages"], t["mask"], **options).loss
    tensors = t["old_logps"], t["advantages"], t["mask"]
    if loss == "linear":
        return rpp.linear_policy_loss(t["hidden_states"], t["weight"], t["target_ids"], *tensors, **options).loss
    return rpp.policy_loss(t["logps"], *tensors, **options).loss


LEARNED = {"policy": ("logps",), "value": ("values",), "linear": ("hidden_states", "weight")}


def step(
    t: dict[str, torch.Tensor], loss: str, reduction: str, micro: int = B, group: Any = None
) -> dict[str, torch.Tensor]:
    """The losses of micro-batches of so many rows, added, and their gradients; without a group, of one call."""
    generator = torch.Generator().manual_seed(3)
    t = t | {"weight": torch.randn(V, H, generator=generator, dtype=f64)}
    learned = {k: t[k].clone().requires_grad_() for k in LEARNED[loss]}
    count = None if group is None else rpp.num_items_in_batch(t["mask"], reduction, process_group=group)
    total = torch.zeros((), dtype=f64)
    for start in range(0, len(t["mask"]), micro):
        cut = {k: x if k == "weight" else x[start : start + micro] for k, x in (t | learned).items()}
        one = loss_of(cut, loss, reduction, count)
        one.backward()
        total += one.detach()
    return {"loss": total} | {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in learned.items()}


STEPS = list(itertools.product(LEARNED, REDUCTIONS, (1, 3, B)))


def model_of(t: dict[str, torch.Tensor]) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(H, V).double()


def model_loss(model: Any, t: dict[str, torch.Tensor], reduction: str, count: torch.Tensor) -> torch.Tensor:
    hidden_states = torch.where(t["mask"][..., None], t["hidden_states"], 0.0)
    logps = rpp.logps_from_logits(model(hidden_states), t["target_ids"], t["mask"]).logps
    return loss_of(t | {"logps": logps}, "policy", reduction, count)


def data_parallel(t: dict[str, torch.Tensor], reduction: str, group: Any) -> list[torch.Tensor]:
    """Gradients of a model that DistributedDataParallel averages over ranks."""
    model = torch.nn.parallel.DistributedDataParallel(model_of(t), process_group=group)
    count = rpp.num_items_in_batch(t["mask"], reduction, process_group=group)
    (model_loss(model, t, reduction, count) * group.size()).backward()
    return [p.grad for p in model.parameters()]


# ---------------------------------------------------------------- worlds


def _cases(backend: str, world: int, rank: int, at: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for size, split in ((n, split) for n in RANKS for split in SPLITS[n]):
        dist.barrier()  # a rank that has no part in a split waits here, for as long as the others need
        group = dist.new_group(RANKS[size], timeout=HANG)  # a case that breaks its group breaks no other split
        if rank not in RANKS[size]:
            continue
        for name, case in _of_one_split(split, size, group).items():
            at(f"{size}-{split}-{name}")
            with backends.use_backend(backend):
                results[f"{size}-{split}-{name}"] = attempt(case)
        dist.destroy_process_group(group)
    return results


def _of_one_split(split: str, size: int, group: Any) -> dict[str, Any]:
    cuts, masked = SPLITS[size][split]
    t = part(whole_batch(masked), *cuts[group.rank() :][:2])
    calls = {name: partial(call, rpp, t, process_group=group) for name, call in (EACH_ROW | OF_ALL).items()}
    calls |= {f"{name} of the spec": partial(call, reference, t, process_group=group) for name, call in OF_ALL.items()}
    steps = {"-".join(map(str, how)): partial(step, t, *how, group) for how in STEPS}
    if split != "nothing":
        steps |= {f"{r}-parallel": partial(data_parallel, t, r, group) for r in REDUCTIONS}
    return calls | steps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    world = once(_cases, tmp_path_factory)

    def of(backend: str, size: int, name: str) -> list[Any]:
        """What each rank of the group of so many returned."""
        return of_each_rank([world(backend, 3)[rank] for rank in RANKS[size]], f"{size}-{name}")

    return of


def expected_batch(size: int, split: str) -> dict[str, torch.Tensor]:
    cuts, masked = SPLITS[size][split]
    return part(whole_batch(masked), cuts[0], cuts[-1])


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


everywhere = pytest.mark.parametrize(
    ("size", "split"), [(size, split) for size in RANKS for split in SPLITS[size]], ids=lambda x: str(x)
)

# ---------------------------------------------------------------- tests


@everywhere
@pytest.mark.parametrize("name", EACH_ROW)
def test_each_rank_has_its_rows_of_what_one_process_has(name, size, split, backend, ranks):
    parts = ranks(backend, size, f"{split}-{name}")
    cuts, _ = SPLITS[size][split]
    assert [len(x) for x in parts] == [stop - start for start, stop in itertools.pairwise(cuts)]
    whole = EACH_ROW[name](reference, expected_batch(size, split))
    assert_same(torch.cat(parts), whole)


@everywhere
@pytest.mark.parametrize("name", OF_ALL)
@pytest.mark.parametrize("whose", ["", " of the spec"])  # which no backend runs
def test_all_ranks_have_what_one_process_has_to_the_same_bit(name, whose, size, split, backend, ranks):
    parts = ranks(backend, size, f"{split}-{name}{whose}")
    assert all(torch.equal(x, parts[0]) for x in parts)
    assert_same(parts[0], OF_ALL[name](reference, expected_batch(size, split)))


@everywhere
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LEARNED)
def test_losses_and_gradients_of_ranks_and_micro_batches_are_those_of_one_call(
    loss, reduction, size, split, backend, ranks
):
    with rpp.use_backend(backend):
        whole = step(expected_batch(size, split), loss, reduction)
    for micro in (1, 3, B):
        parts = ranks(backend, size, f"{split}-{loss}-{reduction}-{micro}")
        for name, x in whole.items():
            every = [one[name] for one in parts]
            assert_same(sum(every) if name in ("loss", "weight") else torch.cat(every), x)


@everywhere
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_data_parallel_gradients_are_those_of_one_process_given_the_factor(reduction, size, split, backend, ranks):
    if split == "nothing":
        pytest.skip("no rank has a batch to differentiate")
    t = expected_batch(size, split)
    model = model_of(t)
    model_loss(model, t, reduction, None).backward()
    for gradients in ranks(backend, size, f"{split}-{reduction}-parallel"):
        assert_same(gradients, [p.grad for p in model.parameters()])


# ---------------------------------------------------------------- a group of one


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    if dist.is_initialized():
        pytest.skip("needs a process group of its own")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", EACH_ROW | OF_ALL)
def test_a_world_of_one_is_this_process(name, backend, one_process):
    t, call = whole_batch(), (EACH_ROW | OF_ALL)[name]
    assert_same(call(rpp, t, process_group=one_process), call(rpp, t))


CONSTANTS = {
    "whiten": ("values",),
    "normalize_rewards": ("scores",),
    "reinforce_pp_advantages": ("scores", "old_logps", "ref_logps"),
    "group_advantages mean batch by id": ("scores",),
    "best_of_group by id": ("scores",),
    "informative_groups by size": ("scores",),
}


@pytest.mark.parametrize(("name", "learned"), [(name, x) for name, many in CONSTANTS.items() for x in many])
def test_the_gradient_through_other_ranks_is_refused(name, learned, backend, one_process):
    t = whole_batch()
    t[learned].requires_grad_()
    with pytest.raises(ValueError, match=rf"{learned}: want a constant \(pass .detach\(\)\) with process_group"):
        EACH_ROW[name](rpp, t, process_group=one_process)


@pytest.mark.parametrize("name", [*CONSTANTS, "num_items_in_batch token-mean padded", "sum_over_ranks policy"])
def test_what_is_no_process_group_is_refused(name, backend):
    with pytest.raises(ValueError, match=r"process_group: want a torch.distributed.ProcessGroup"):
        (EACH_ROW | OF_ALL)[name](rpp, whole_batch(), process_group="world")


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*CONSTANTS, "best_of_group by size", "num_items_in_batch token-mean padded"])
def test_compiled_into_one_graph_with_a_process_group(name, backend, one_process):
    torch._dynamo.reset()
    t, call = whole_batch(), (EACH_ROW | OF_ALL)[name]
    compiled = torch.compile(lambda t: call(rpp, t, process_group=one_process), fullgraph=True, backend="aot_eager")
    assert_same(compiled(t), call(rpp, t))
    torch._dynamo.reset()


def test_the_example_of_the_documentation_runs(backend, one_process):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), flags=re.S)
    t = whole_batch()
    names = {"torch": torch, "rpp": rpp, "model": torch.nn.parallel.DistributedDataParallel(model_of(t))}
    names |= {"inputs": torch.where(t["mask"][..., None], t["hidden_states"], 0.0), "prompt_ids": t["group_ids"]}
    names |= {k: t[k] for k in ("mask", "target_ids", "scores", "old_logps")}
    exec(example, names)
    assert names["stats"].num_tokens == t["mask"].sum()
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
