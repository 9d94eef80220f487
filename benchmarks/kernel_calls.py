"""Every function of a backend in every variant that is another kernel, as one table of calls: what aot.py compiles.

Arguments have the names and the order of csrc/registration.cpp. Sizes are known at run time: none has its own kernel.
"""

import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

Variants = dict[str, tuple[Any, ...]]  # by what is different: the arguments of a function


class Sizes(NamedTuple):
    T: int = 64  # a multiple of B
    B: int = 4
    V: int = 256
    device: str = "cpu"

    def new(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Numbers from 1/2 to 3/2: values, weights and temperatures."""
        return torch.rand(shape, device=self.device).add(0.5).to(dtype)


def variants(base: dict[str, Any], *changes: dict[str, Any]) -> Variants:
    """The call with these arguments, in their order, and with each change."""
    calls = {_label(change): tuple({**base, **change}.values()) for change in ({}, *changes)}
    assert len(calls) == 1 + len(changes), "two calls of one name"
    return calls


def _label(change: dict[str, Any]) -> str:
    def said(name: str, value: Any) -> str:
        if value is None or value is False:
            return f"no {name}"
        if isinstance(value, torch.Tensor):
            return f"{name} {value.dtype}".replace("torch.", "") if name == "dlogits" else name
        return name if value is True else f"{name} {value}"

    return ", ".join(said(name, value) for name, value in change.items() if name not in ("beta", "entropy_coef"))


def each(name: str, values: Iterable[Any]) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


def workload(
    sizes: Sizes = Sizes(),  # noqa: B008, it is a constant
    *,
    cuda: bool = False,
) -> Iterator[tuple[str, torch.dtype, Variants]]:
    """Everything that is compiled: a function, the dtype it works in, its calls; with `cuda` those too that are in CUDA
    alone."""
    for dtype in (torch.float32, torch.float64):
        for table in (of_tokens, of_sequences, of_losses, of_chunks):
            for name, calls in table(dtype, sizes).items():
                yield name, dtype, calls
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for name, calls in of_logits(dtype, sizes).items():
            yield name, dtype, calls
        if cuda:
            yield "chunk_policy_out", dtype, chunk_policy(dtype, sizes)


def arguments(dtype: torch.dtype, sizes: Sizes) -> SimpleNamespace:
    """t of tokens, b of sequences, and the others by their names."""
    return SimpleNamespace(
        t=sizes.new(sizes.T, dtype=dtype),
        b=sizes.new(sizes.B, dtype=dtype),
        mask=sizes.new(sizes.T, dtype=torch.float32) > 0.7,
        cu=torch.arange(0, sizes.T + 1, sizes.T // sizes.B, device=sizes.device),
        moments=sizes.new(3, dtype=torch.float64),
        ids=torch.arange(sizes.T, device=sizes.device),
    )


NO_MASK = {"mask": None}


def of_tokens(dtype: torch.dtype, sizes: Sizes) -> dict[str, Variants]:
    from rpp_kernels.ops.advantages import EPS_MODES
    from rpp_kernels.ops.kl import ESTIMATORS

    x = arguments(dtype, sizes)
    kl = {"logps": x.t, "ref_logps": x.t, "mask": x.mask, "estimator": 3, "log_ratio_clamp": 20.0, "kl_clamp": 1.0}
    estimators = each("estimator", ESTIMATORS.values())
    whiten = {
        "values": x.t,
        "mask": x.mask,
        "moments": x.moments,
        "shift_mean": True,
        "unbiased": False,
        "eps": 1e-8,
        "eps_mode": 0,
    }
    modes = [NO_MASK, {"shift_mean": False}, {"unbiased": True}, *each("eps_mode", EPS_MODES.values())]
    return {
        "kl_fwd": variants(kl, NO_MASK, *estimators),
        "kl_bwd": variants(dict(dkl=x.t, **kl), NO_MASK, *estimators),
        "moments": variants({"values": x.t, "mask": x.mask}, NO_MASK),
        "whiten_out": variants(dict(out=x.t, **whiten), *modes),
        "whiten_bwd": variants(dict(dout=x.t, **whiten), *modes),
    }


def of_sequences(dtype: torch.dtype, sizes: Sizes) -> dict[str, Variants]:
    from rpp_kernels.ops.advantages import GAPS
    from rpp_kernels.ops.groups import BASELINES, STDS
    from rpp_kernels.ops.kl import ESTIMATORS
    from rpp_kernels.ops.rollout import LEVELS

    x = arguments(dtype, sizes)
    place = {"mask": x.mask, "cu_seqlens": x.cu}
    gaps = each("gap", GAPS.values())
    pipeline = dict(scores=x.b, old_logps=x.t, ref_logps=x.t, **place, beta=0.1, gamma=0.9)
    rollout = dict(old_logps=x.t, sampling_logps=x.t, **place, level=0, truncate=True, low=0.5, high=2.0, clamp=20.0)
    lengths = sizes.new(sizes.B, dtype=torch.float64)
    options = {
        "group_size": 2,
        "num_groups": sizes.B // 2,
        "baseline": 0,
        "std": 1,
        "unbiased": True,
        "eps": 1e-6,
        "keep_singletons": False,
    }
    groups = {"scores": x.b, "group_index": None, "lengths": None}
    weighted = {"lengths": lengths, "baseline": BASELINES["length-weighted"]}
    ids = {"group_index": torch.arange(sizes.B, device=sizes.device) // 2, "group_size": 0, "num_groups": sizes.B}
    of_groups = [
        *each("std", STDS.values()),
        *({"baseline": BASELINES["leave-one-out"], "std": s} for s in STDS.values() if s),
        *(weighted | {"std": s} for s in STDS.values() if s),
        *(ids | {"std": s} for s in STDS.values() if s),
        ids | weighted,
        {"unbiased": False},
        {"keep_singletons": True},
    ]
    return {
        "token_rewards_fwd": variants(dict(scores=x.b, kl=x.t, **place, beta=0.1), NO_MASK),
        "token_rewards_bwd": variants(dict(drewards=x.t, **place, beta=0.1), NO_MASK),
        "returns_fwd": variants(dict(rewards=x.t, **place, gamma=0.9, gap=0), NO_MASK, *gaps),
        "returns_bwd": variants(dict(dreturns=x.t, **place, gamma=0.9, gap=0), NO_MASK, *gaps),
        "gae_fwd": variants(dict(rewards=x.t, values=x.t, **place, gamma=0.9, gae_lambda=0.8, gap=0), NO_MASK, *gaps),
        "gae_bwd": variants(dict(da=x.t, dreturns=x.t, **place, gamma=0.9, gae_lambda=0.8, gap=0), NO_MASK, *gaps),
        "reinforce_pp_fwd": variants(
            pipeline | {"estimator": 1, "log_ratio_clamp": 20.0, "kl_clamp": math.inf},
            NO_MASK,
            {"ref_logps": None},
            *each("estimator", ESTIMATORS.values()),
        ),
        "rollout_weights_fwd": variants(rollout, NO_MASK, {"truncate": False}, *each("level", LEVELS.values())),
        "group_advantages_fwd": variants(
            groups | {"moments": None} | options, *of_groups, {"moments": x.moments, "std": STDS["batch"]}
        ),
        "group_advantages_bwd": variants({"dadvantages": x.b} | groups | options, *of_groups),
    }


def of_losses(dtype: torch.dtype, sizes: Sizes) -> dict[str, Variants]:
    from rpp_kernels.ops.preference import LOSS_TYPES

    x = arguments(dtype, sizes)
    place = {"mask": x.mask, "cu_seqlens": x.cu}
    value = dict(values=x.t, old_values=x.t, returns=x.t, **place, epsilon=0.2, sequence_mean=False, per_token=False)
    pairs = dict(logps=x.t, ref_logps=x.t, **place, loss_type=0, beta=0.1, label_smoothing=0.0, margin=0.0)
    groups = dict(logps=x.t, ref_logps=x.t, scores=x.b, **place, group_size=2, beta=0.1, per_group=False)
    return {
        "policy_loss_fwd": policy(dtype, sizes),
        "value_loss_fwd": variants(value, NO_MASK, {"sequence_mean": True}, {"per_token": True}),
        "dpo_loss_fwd": variants(
            pairs | {"length_normalized": False, "per_pair": False},
            NO_MASK,
            {"ref_logps": None},
            {"length_normalized": True},
            {"per_pair": True},
            *each("loss_type", LOSS_TYPES.values()),
        ),
        "copg_loss_fwd": variants(groups, NO_MASK, {"per_group": True}),
        "preference_loss_bwd": variants(dict(each=x.b, **place, num_tokens=sizes.T), NO_MASK),
    }


def policy(dtype: torch.dtype, sizes: Sizes) -> Variants:
    """Every surrogate and every level, alone and with all that can be added; each addition alone."""
    from rpp_kernels.ops.kl import ESTIMATORS
    from rpp_kernels.ops.policy_loss import LEVELS, SURROGATES, PolicyModes, PolicyNumbers

    x = arguments(dtype, sizes)
    numbers = PolicyNumbers(0.2, 0.2, math.inf, 0.0, 20.0, 0.0, math.inf, 0.0)
    k3 = ESTIMATORS["k3"]
    base = {
        "logps": x.t,
        "old_logps": x.t,
        "advantages": x.t,
        "mask": x.mask,
        "cu_seqlens": x.cu,
        "weights": None,
        "ref_logps": None,
    }
    base |= dict(entropy=None, dloss=None, **numbers._asdict(), **PolicyModes(0, 0, k3, k3, 0)._asdict())
    kl, entropy = {"ref_logps": x.t, "beta": 0.1}, {"entropy": x.t, "entropy_coef": 0.1}
    all_of_it = kl | entropy | {"weights": x.t, "kl_bias_correction": 1}
    each_of_sequence = {"advantages": x.b, "sequence_advantages": 1, "sequence_mean": 1}
    surrogates = [
        {"surrogate": number, "level": LEVELS.index(level)}
        for number, surrogate in enumerate(SURROGATES.values())
        for level in surrogate.levels
    ]
    first = [LEVELS.index(surrogate.levels[0]) for surrogate in SURROGATES.values()]
    alone = [s for s in surrogates if s["surrogate"] == 0 or s["level"] == first[s["surrogate"]]]
    many = [s for s in surrogates if s["surrogate"] == 0 or LEVELS[s["level"]] == "sequence"]
    across = [s for s in many if LEVELS[s["level"]] in ("sequence", "sequence-sum")]
    return variants(
        base,
        NO_MASK,
        *alone,
        *(s | all_of_it | each_of_sequence for s in many),
        *(s | all_of_it | {"per_token": 1} for s in across[:2]),
        *(s | all_of_it | {"entropy": None, "dloss": x.t} for s in across),  # the backward of those
        *(kl | {"kl_estimator": e, "kl_gradient": e} for e in ESTIMATORS.values() if e),
        kl | {"kl_gradient": ESTIMATORS["none"]},
        kl | {"kl_gradient": ESTIMATORS["k2"]},
        kl | {"kl_bias_correction": 1},
        entropy,
        {"weights": x.t},
        {"sequence_advantages": 1, "advantages": x.b},
        {"sequence_mean": 1},
        {"per_token": 1},
    )


def of_chunks(dtype: torch.dtype, sizes: Sizes) -> dict[str, Variants]:
    """Logits of a chunk are float32 or float64; their gradient has the dtype of the operands."""
    x = arguments(dtype, sizes)
    head = {"target_ids": x.ids, "temperature": 0.7, "token_temperature": None, "softcap": 0.0}
    changes = [{"token_temperature": x.t}, {"softcap": 30.0}]
    statistics = {"entropy": x.t, "lse": x.t, "lse_rest": x.t, "dlogps": x.t, "dentropy": None, "dlse": None}
    logits = sizes.new(sizes.T, sizes.V, dtype=dtype)
    half = [torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    return {
        "chunk_logps_fwd": variants(dict(logits=logits, **head), *changes),
        "chunk_logps_bwd_out": variants(
            dict(dlogits=logits, logits=logits, rows=None, **head, **statistics),
            *changes,
            {"rows": x.ids},
            {"dentropy": x.t},
            {"dlogps": None, "dlse": x.t},
            *({"dlogits": sizes.new(sizes.T, sizes.V, dtype=d), "dentropy": x.t, "dlse": x.t} for d in (dtype, *half)),
        ),
    }


def of_logits(dtype: torch.dtype, sizes: Sizes) -> dict[str, Variants]:
    x = arguments(torch.float64 if dtype == torch.float64 else torch.float32, sizes)
    logits, dlogits = (sizes.new(sizes.T, sizes.V, dtype=dtype) for _ in range(2))
    view = sizes.new(sizes.B, sizes.T // sizes.B + 1, sizes.V, dtype=dtype)[:, :-1]
    rows = {"target_ids": x.ids, "mask": x.mask, "temperature": 0.7, "token_temperature": None}
    changes = [NO_MASK, {"token_temperature": x.t}, {"logits": view}]
    statistics = {"entropy": x.t, "lse": x.t, "lse_rest": x.t, "dlogps": x.t, "dentropy": None, "dlse": None}
    return {
        "logps_fwd": variants(
            dict(logits=logits, **rows, sum_squares=False),
            *changes,
            *({"sum_squares": True} | change for change in ({}, {"token_temperature": x.t})),
        ),
        "logps_bwd_out": variants(
            dict(dlogits=dlogits, logits=logits, **rows, **statistics),
            *changes,
            {"dentropy": x.t},
            {"dlogps": None, "dentropy": x.t},
            {"dlogps": None, "dlse": x.t},
            {"dentropy": x.t, "dlse": x.t, "token_temperature": x.t},
        ),
    }


def chunk_policy(dtype: torch.dtype, sizes: Sizes) -> Variants:
    """In place, and into operands of half the width."""
    from rpp_kernels.ops.policy_loss import SURROGATES, PolicyNumbers

    own = torch.float64 if dtype == torch.float64 else torch.float32
    x, logits = arguments(own, sizes), sizes.new(sizes.T, sizes.V, dtype=dtype)
    of_tokens = [{"surrogate": i} for i, surrogate in enumerate(SURROGATES.values()) if "token" in surrogate.levels]
    head = {"target_ids": x.ids, "mask": x.mask, "temperature": 0.7, "token_temperature": None, "softcap": 0.0}
    tokens = {"old_logps": x.t, "advantages": x.t, "weights": None, "ref_logps": None}
    base = {"dlogits": logits, "logits": logits, **head, **tokens, "scale": sizes.new(1, dtype=torch.float64)}
    base |= PolicyNumbers(0.2, 0.2, math.inf, 0.0, 20.0, 0.0, math.inf, 0.0)._asdict()
    half = [torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    return variants(
        base | {"surrogate": 0, "kl_estimator": 3, "kl_gradient": 3, "kl_bias_correction": False},
        NO_MASK,
        {"old_logps": None, "token_temperature": x.t},
        {"ref_logps": x.t, "beta": 0.1, "weights": x.t, "entropy_coef": 0.1, "kl_bias_correction": True},
        {"scale": sizes.new(sizes.T, dtype=torch.float64)},
        *of_tokens,
        *([{"softcap": 30.0}] if dtype == own else []),
        *({"dlogits": sizes.new(sizes.T, sizes.V, dtype=d)} for d in half),
    )
