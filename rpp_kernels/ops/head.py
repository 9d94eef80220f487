"""The head of a language model, as the linear functions take it and as their ops do."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from rpp_kernels.backends import backend_of
from rpp_kernels.distributed import group_name
from rpp_kernels.ops import kernel_op
from rpp_kernels.ops.checks import (
    check_floats,
    check_integer,
    check_mask,
    check_number,
    check_process_group,
    check_shape,
    check_target_ids,
    check_temperature,
    describe,
    fail,
    flat,
    flat_mask,
    result_dtype,
)

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class Options(NamedTuple):
    """What a public function and that of the reference take by these keywords."""

    bias: Tensor | None  # (V,)
    lora_A: Tensor | None  # (R, H)
    lora_B: Tensor | None  # (V, R)
    lora_scaling: float
    temperature: float | Tensor  # or (T,) or (B, S)
    softcap: float | None
    logit_scale: float
    process_group: "ProcessGroup | None"
    vocab_start: int | None


class Execution(NamedTuple):
    """The keywords that only say how a call is carried out."""

    chunk_bytes: int | None
    skip_rows: bool
    batch_invariant: bool


class Numbers(NamedTuple):
    """The floats of a head, in the order in which ops take them."""

    temperature: float  # 1 where each token has its own
    lora_scaling: float
    logit_scale: float
    softcap: float  # 0 for none


class Plan(NamedTuple):
    """How an op is carried out: integers, in the order in which it takes them."""

    vocab_start: int
    chunk_bytes: int  # 0: the default of the device
    skip_rows: int
    batch_invariant: int


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden_states: bool = False
    weight: bool = False
    bias: bool = False
    lora: bool = False

    @property
    def frozen(self) -> bool:
        """Hidden states learn and the head does not."""
        return self.hidden_states and not (self.weight or self.bias or self.lora)


class Head(NamedTuple):
    """The arguments with which every linear op begins (`head_op`). Tokens are flat."""

    hidden_states: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_A: Tensor | None  # (R, H)
    lora_B: Tensor | None  # (V, R)
    target_ids: Tensor  # (T,)
    mask: Tensor | None  # (T,)
    token_temperature: Tensor | None  # (T,)
    numbers: Sequence[float]
    plan: Sequence[int]
    group_name: str  # "" where the whole vocabulary is here
    backend: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self[:5]

    @property
    def needs(self) -> Needs:
        if not torch.is_grad_enabled():
            return Needs()
        hidden_states, weight, bias, a, b = (x is not None and x.requires_grad for x in self.learned)
        return Needs(hidden_states, weight, bias, a or b)


def head_op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`kernel_op` for a function whose first argument is a Head, of which the op takes the fields one by one."""
    fields = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)
        for name, hint in get_type_hints(Head).items()
    ]

    def with_head(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(Head(*arguments[: len(fields)]), *arguments[len(fields) :])

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def flat(*arguments: Any) -> Any:
            with torch.autocast(arguments[0].device.type, enabled=False):
                return with_head(function)(*arguments)

        signature = inspect.signature(function)
        others = list(signature.parameters.values())[1:]
        flat.__signature__ = signature.replace(parameters=fields + others)  # type: ignore[attr-defined]
        return kernel_op(with_head(fake))(flat)

    return register


def checked_head(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    completion_mask: Tensor | None,
    options: Options,
    execution: Execution,
) -> tuple[Head, dict[str, Any]]:
    """The arguments of a public function as those of an op, and as those of the reference; or a ValueError that names
    one."""
    bias, lora_A, lora_B, lora_scaling, temperature, softcap, logit_scale, process_group, vocab_start = options
    chunk_bytes, skip_rows, batch_invariant = execution
    tensors = {"hidden_states": hidden_states, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    for name, x in tensors.items():
        if x is not None or name in ("hidden_states", "weight"):
            _check_plain(name, x)
    hidden_states, weight, bias, lora_A, lora_B = _autocast(hidden_states, weight, bias, lora_A, lora_B)
    check_floats("hidden_states", hidden_states, (2, 3))
    H = hidden_states.shape[-1]
    if H == 0:
        fail("hidden_states", "at least one feature, the last dimension", describe(hidden_states))
    _check_matrix("weight", weight, hidden_states, f"(V, {H}), the last dimension of hidden_states", columns=H)
    V = weight.shape[0]
    _check_dtype("weight", weight, hidden_states.dtype)
    if bias is not None:
        check_floats("bias", bias, (1,), like=hidden_states)
        check_shape("bias", bias, (V,), "of one for each row of weight")
        _check_dtype("bias", bias, hidden_states.dtype, torch.float32)
    if (lora_A is None) != (lora_B is None):
        fail("lora_A" if lora_A is None else "lora_B", "a tensor, as the other one of the pair is given", None)
    if lora_A is not None and lora_B is not None:
        _check_matrix("lora_A", lora_A, hidden_states, f"(rank, {H}), the last dimension of hidden_states", columns=H)
        R = lora_A.shape[0]
        _check_matrix("lora_B", lora_B, hidden_states, f"({V}, {R}), the rows of weight and of lora_A", V, R)
        _check_dtype("lora_A", lora_A, hidden_states.dtype, torch.float32)
        _check_dtype("lora_B", lora_B, hidden_states.dtype, torch.float32)
    check_number("lora_scaling", lora_scaling, "a finite number", *_FINITE)
    if lora_A is None and lora_scaling != 1:
        fail("lora_scaling", "1 without lora_A and lora_B, which it would scale", lora_scaling)
    check_number("logit_scale", logit_scale, "a finite number", *_FINITE)
    if softcap is not None:
        check_number("softcap", softcap, "a number from 1e-30 to 1e30, or None", 1e-30, 1e30)
    shape = hidden_states.shape[:-1]
    check_mask(completion_mask, "the tokens of hidden_states", shape, hidden_states)
    if process_group is not None:
        check_process_group(process_group)
        check_integer("vocab_start", vocab_start, "the id of this shard's first row, beside process_group", 0)
    elif vocab_start is not None:
        fail("vocab_start", "None without a process_group", vocab_start)
    # Of a shard only the loop knows, together with the others, which ids lie in none.
    vocab = V if process_group is None else torch.iinfo(torch.int64).max
    check_target_ids(target_ids, completion_mask, shape, vocab, hidden_states)
    check_temperature(temperature, completion_mask, shape, hidden_states)
    if chunk_bytes is not None:
        check_integer("chunk_bytes", chunk_bytes, "a positive integer, or None", 1)
    for name, flag in {"skip_rows": skip_rows, "batch_invariant": batch_invariant}.items():
        if not isinstance(flag, bool):
            fail(name, "True or False", repr(flag))
    each = isinstance(temperature, Tensor)
    head = Head(
        hidden_states.reshape(-1, H),
        weight,
        bias,
        lora_A,
        lora_B,
        target_ids.reshape(-1).contiguous(),
        flat_mask(completion_mask),
        flat(temperature, result_dtype(hidden_states)) if isinstance(temperature, Tensor) else None,
        Numbers(1.0 if each else float(temperature), float(lora_scaling), float(logit_scale), float(softcap or 0)),
        Plan(vocab_start or 0, chunk_bytes or 0, int(skip_rows), int(batch_invariant)),
        group_name(process_group),
        backend_of(hidden_states, "linear"),
    )
    operands = {"hidden_states": hidden_states, "weight": weight}
    ids = {"target_ids": target_ids, "completion_mask": completion_mask}
    return head, operands | ids | options._replace(bias=bias, lora_A=lora_A, lora_B=lora_B)._asdict()


_FINITE = (-3e38, 3e38)


def _check_plain(name: str, x: Any) -> None:
    """Refuses what is not there as a whole: shards of FSDP, ZeRO-3 and tensor parallelism, tensors in disguise."""
    if not isinstance(x, Tensor):
        fail(name, "a float32, float64, bfloat16 or float16 tensor", describe(x))
    if type(x).__name__ == "DTensor":
        wanted = (
            "a plain tensor: call this inside the forward of the module that fully_shard wraps, where parameters are "
            "whole, or pass .full_tensor()"
        )
        fail(name, wanted, f"a DTensor of shape {tuple(x.shape)}")
    if type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
        fail(name, "a plain tensor", type(x).__name__)
    if x.numel() == 0 and name != "hidden_states":
        wanted = (
            "the whole parameter: sharded by FSDP or ZeRO-3 it is empty outside the forward of its module, so call "
            "this inside, or gather it (FSDP: summon_full_params; ZeRO-3: deepspeed.zero.GatheredParameters)"
        )
        fail(name, wanted, describe(x))


def _check_matrix(
    name: str, x: Tensor, hidden_states: Tensor, wanted: str, rows: int | None = None, columns: int | None = None
) -> None:
    check_floats(name, x, (1, 2), like=hidden_states)
    if x.dim() != 2 or x.shape[1] != columns or (rows is not None and x.shape[0] != rows):
        fail(name, wanted, describe(x))


def _check_dtype(name: str, x: Tensor, of_hidden_states: torch.dtype, *others: torch.dtype) -> None:
    if x.dtype not in (of_hidden_states, *others):
        wanted = " or ".join([f"the dtype of hidden_states, {of_hidden_states}", *map(str, others)])
        fail(name, wanted, describe(x))


def _autocast(*tensors: Any) -> Any:
    """Under autocast the operands of a linear layer have its dtype, and so have ours."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        x if x is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) else x.to(dtype)
        for x in tensors
    ]
