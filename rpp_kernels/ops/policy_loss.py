"""The surrogates of the policy and the clipped loss of the critic."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rpp_kernels import reference
from rpp_kernels.backends import backend_of, kernels
from rpp_kernels.ops import kernel_op, register_gradient
from rpp_kernels.ops.checks import (
    check_choice,
    check_constant,
    check_count,
    check_floats,
    check_like,
    check_mask,
    check_number,
    describe,
    fail,
    flat,
    flat_mask,
    may_read,
    result_dtype,
    sequence_starts,
)
from rpp_kernels.ops.kl import ESTIMATORS, check_clamps
from rpp_kernels.reference import PolicyLoss, PolicyStats, ValueLoss, ValueStats

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none")
INFINITY = float("inf")
LARGEST = sys.float_info.max


LEVELS = ("token", "sequence", "sequence-token", "sequence-sum")  # csrc/cpu/losses.h, enum Level


class Option(NamedTuple):
    """A number that a surrogate takes; None is its default."""

    default: float
    wanted: str
    low: float = 0.0
    high: float = INFINITY
    open_low: bool = False


class Surrogate(NamedTuple):
    options: dict[str, Option]  # in the order in which its formula takes them, at most four
    levels: tuple[str, ...] = LEVELS


_FROM_0_TO_1 = "a number from 0 to 1"
_FROM_0 = "a number from 0"
_POSITIVE = "a positive finite number"

# In the order of enum Surrogate in csrc/formulas.h. Options and defaults are those of the spec.
SURROGATES = {
    "clip": Surrogate(
        {
            "epsilon_low": Option(0.2, _FROM_0_TO_1, high=1),
            "epsilon_high": Option(0.2, _FROM_0),
            "dual_clip": Option(INFINITY, "a number above 1, or None", low=1, open_low=True),
        }
    ),
    "reinforce": Surrogate({}),
    "cispo": Surrogate(
        {"epsilon_low": Option(1.0, _FROM_0_TO_1, high=1), "epsilon_high": Option(4.0, _FROM_0)},
    ),
    "sapo": Surrogate(
        {
            "tau_positive": Option(1.0, _POSITIVE, high=LARGEST, open_low=True),
            "tau_negative": Option(1.05, _POSITIVE, high=LARGEST, open_low=True),
        }
    ),
    "gmpo": Surrogate(
        {"epsilon_low": Option(0.4, _FROM_0), "epsilon_high": Option(0.4, _FROM_0)},
        levels=("sequence",),
    ),
}


OPTIONS = sorted({name for surrogate in SURROGATES.values() for name in surrogate.options})


class PolicyOptions(NamedTuple):
    """The options of the public functions that say what each token's loss is."""

    surrogate: str
    epsilon_low: float | None
    epsilon_high: float | None
    dual_clip: float | None
    tau_positive: float | None
    tau_negative: float | None
    importance_sampling_level: str
    beta: float
    kl_estimator: str
    kl_gradient: str | None
    kl_clamp: float | None
    kl_bias_correction: bool
    entropy_coef: float
    log_ratio_clamp: float

    def by_name(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))


class PolicyNumbers(NamedTuple):
    """The same as ops take them: first the floats."""

    option_0: float  # of the surrogate
    option_1: float
    option_2: float
    option_3: float
    log_ratio_clamp: float
    beta: float
    kl_clamp: float  # infinite for none
    entropy_coef: float


class PolicyModes(NamedTuple):
    """Then the integers."""

    surrogate: int
    level: int
    kl_estimator: int
    kl_gradient: int
    kl_bias_correction: int
    sequence_advantages: int = False
    sequence_mean: int = False
    per_token: int = False

    @property
    def of_sequences(self) -> bool:
        """The ratio of a token is known when its whole sequence is."""
        return LEVELS[self.level] != "token"

    @property
    def across_tokens(self) -> bool:
        """Each token moves the losses of its whole sequence."""
        return LEVELS[self.level] in ("sequence", "sequence-sum")


# ---------------------------------------------------------------- policy


def _policy_fake(logps: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy, modes = arguments[6], PolicyModes(*arguments[8])
    loss = torch.empty_like(logps) if modes.per_token else logps.new_empty(())
    stats = logps.new_empty(len(PolicyStats._fields), dtype=torch.float64)
    return loss, torch.empty_like(logps), logps.new_empty(0 if entropy is None else logps.shape), stats


@kernel_op(_policy_fake)
def policy_loss_fwd(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    numbers: Sequence[float],
    modes: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, slope, entropy_slope, stats): each token's loss or their weighted sum; d(sum of losses) / d(logps), and
    / d(entropy), empty without one; sums as in PolicyStats."""
    loss, slope, entropy_slope, stats = kernels(backend).policy_loss_fwd(
        logps, old_logps, advantages, mask, cu_seqlens, weights, ref_logps, entropy, None, *numbers, *modes
    )
    return loss, slope, entropy_slope, stats


@kernel_op(lambda dloss, logps, *_: torch.empty_like(logps))
def policy_loss_bwd(
    dloss: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    ref_logps: Tensor | None,
    numbers: Sequence[float],
    modes: Sequence[int],
    backend: str,
) -> Tensor:
    """Of unreduced losses of a sequence-level ratio, each of which moves with the whole sequence: the slope of the sum
    of dloss * loss."""
    inputs = logps, old_logps, advantages, mask, cu_seqlens, weights, ref_logps
    reduced = PolicyModes(*modes)._replace(per_token=False)
    _, slope, _, _ = kernels(backend).policy_loss_fwd(*inputs, None, dloss.contiguous(), *numbers, *reduced)
    result: Tensor = slope
    return result


@kernel_op(lambda slope, dloss: torch.empty_like(slope))
def slope_bwd(slope: Tensor, dloss: Tensor) -> Tensor:
    """The chain rule, with a slope that the forward kept. An op only so that a second derivative is refused."""
    return slope * dloss


def _policy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, numbers, modes, backend = inputs
    ctx.across_tokens = PolicyModes(*modes).across_tokens and PolicyModes(*modes).per_token
    ctx.options = numbers, modes, backend
    ctx.save_for_backward(output[1], output[2], *(tensors if ctx.across_tokens else ()))
    ctx.set_materialize_grads(False)


def _policy_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 11
    slope, entropy_slope, *inputs = ctx.saved_tensors
    if dloss is not None and ctx.needs_input_grad[0]:
        across = ctx.across_tokens
        gradients[0] = policy_loss_bwd(dloss, *inputs, *ctx.options) if across else slope_bwd(slope, dloss)
    if dloss is not None and ctx.needs_input_grad[7]:
        gradients[7] = slope_bwd(entropy_slope, dloss)
    return tuple(gradients)


register_gradient(policy_loss_fwd, _policy_backward, _policy_setup)


def policy_loss(
    logps: Tensor,  # (B, S) or (T,)
    old_logps: Tensor | None,  # same, constant; None: logps.detach(), an exactly on-policy step
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    surrogate: str = "clip",
    epsilon_low: float | None = None,  # None: the surrogate's own
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    tau_positive: float | None = None,
    tau_negative: float | None = None,
    importance_sampling_level: str = "token",
    weights: Tensor | None = None,  # shape of logps, constant
    ref_logps: Tensor | None = None,  # shape of logps, constant
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_clamp: float | None = None,
    kl_bias_correction: bool = False,
    entropy: Tensor | None = None,  # shape of logps
    entropy_coef: float = 0.0,
    log_ratio_clamp: float = 20.0,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> PolicyLoss:
    """`-torch.min(r * A, r.clamp(1 - epsilon_low, 1 + epsilon_high) * A)` with r = exp(logps - old_logps), reduced.

    PPO's clipped surrogate (1707.06347 eq. 7), as REINFORCE++ (2501.03262 eq. 6), GRPO, DAPO and others use it, and the
    others of the family: l = weights * surrogate + beta * KL - entropy_coef * entropy for each token. Loss, gradient
    and statistics come from one kernel.

        surrogate    loss of a token                                               options and their defaults
        "clip"       -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)       epsilon_low .2, epsilon_high .2
                     and where A < 0 at most -dual_clip * A (1912.09729 eq. 5)     dual_clip None
        "reinforce"  -A logp
        "cispo"      -sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A logp        epsilon_low 1 (no lower bound),
                     (MiniMax-M1, 2506.13585)                                epsilon_high 4
        "sapo"       -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_positive         tau_positive 1, tau_negative 1.05
                     where A > 0, else tau_negative (2511.20347)
        "gmpo"       -A r, where each log-ratio of the mean that makes r is        epsilon_low .4, epsilon_high .4
                     clipped at epsilon_high if A > 0, at -epsilon_low if A < 0,
                     and 0 if A = 0 (2507.20673); level "sequence" only

    sg: no gradient flows. With D = logps - old_logps the ratio r is that of `importance_sampling_level`:

        "token"           exp(D_t)
        "sequence"        exp(mean D), one for each sequence, through which every token's loss moves every token of it
                          (GSPO, 2507.18071 eq. 7)
        "sequence-sum"    exp(sum D), the ratio of whole completions; a loss has it once for each with the reduction
                          "seq-mean-token-mean" (RLOO in TRL)
        "sequence-token"  that of "sequence", but each token's loss moves that token alone (GSPO-token, ibid.)

    Args:
        logps: of the policy that learns. The loss is differentiable in them and in `entropy`, and in nothing else.
        old_logps: of the policy that sampled; None for an exactly on-policy step, whose ratio is 1 with its gradient.
            "reinforce" uses them for statistics and `kl_bias_correction` only.
        advantages: what each token is worth, or each sequence.
        completion_mask: bool; elsewhere nothing counts, and gradients are exactly 0.
        surrogate, epsilon_low, epsilon_high, dual_clip, tau_positive, tau_negative: see above. An option that the
            surrogate does not have is refused. A dual_clip c > 1 bounds the loss of a token of negative advantage; the
            two-sided clip `delta` of TRL is dual_clip = delta for delta >= 1 + epsilon_high.
        weights: finite, from 0; multiply each token's surrogate, not its KL nor its entropy.
        ref_logps, beta: adds beta * `kl_penalty(logps, ref_logps)` to each token's loss (GRPO, 2402.03300 eq. 3, 4).
        kl_estimator, kl_gradient, kl_clamp: `estimator`, `gradient` and `kl_clamp` of `kl_penalty`.
        kl_bias_correction: multiplies each KL estimate by the ratio of the level, before any clipping: samples of the
            old policy then estimate the KL of the new one. The gradient is exact, through both factors.
        entropy, entropy_coef: subtracts entropy_coef * entropy from each token's loss.
        log_ratio_clamp: log-ratios are clamped to +-this before exp, in the KL as well; beyond it the gradient is 0.
            Infinite for no clamp.
        reduction: with N = `num_items_in_batch`,

            "token-mean"               sum of all tokens / N
            "seq-mean-token-mean"      sum over sequences of their token mean / N
            "seq-mean-token-sum"       sum over sequences of their token sum / N
            "seq-mean-token-sum-norm"  the same / (max_completion_length * N), as in Dr. GRPO (2503.20783)
            "none"                     each token's loss, in the shape of `logps`

        num_items_in_batch: how many items (valid tokens for "token-mean", sequences for the others) the mean is over; a
            number, or a 0-dim tensor on the device. None counts those of this call, sequences without a valid token
            left out. Pass the count of the whole batch when a batch is split over calls or processes, and add the
            losses: gradients are then those of one call.
        max_completion_length: for "seq-mean-token-sum-norm" only.
        cu_seqlens: int32 or int64, where sequences start among packed tokens; without it log-probs are padded (B, S).

    Returns:
        PolicyLoss(loss, stats): a 0-dim loss or each token's, float64 for float64 `logps`, else float32; `PolicyStats`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; a constant that requires grad.
    """
    options = PolicyOptions(
        surrogate,
        epsilon_low,
        epsilon_high,
        dual_clip,
        tau_positive,
        tau_negative,
        importance_sampling_level,
        beta,
        kl_estimator,
        kl_gradient,
        kl_clamp,
        kl_bias_correction,
        entropy_coef,
        log_ratio_clamp,
    )
    mean = reduction, num_items_in_batch, max_completion_length
    constants = {"old_logps": old_logps, "weights": weights, "ref_logps": ref_logps}
    starts = check_loss("logps", logps, constants, completion_mask, *mean, cu_seqlens)
    check_advantages(advantages, logps, starts.shape[0] - 1, cu_seqlens)
    check_weights(weights, completion_mask)
    numbers, modes = check_options(options, ref_logps is not None)
    if entropy is not None:
        check_like("entropy", entropy, "logps", logps)
    elif entropy_coef != 0:
        fail("entropy_coef", "0 without entropy", entropy_coef)
    backend = backend_of(logps, "policy_loss")
    if backend == "reference":
        return reference.policy_loss(
            logps,
            old_logps,
            advantages,
            completion_mask,
            weights=weights,
            ref_logps=ref_logps,
            entropy=entropy,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            max_completion_length=max_completion_length,
            cu_seqlens=cu_seqlens,
            **options.by_name(),
        )
    dtype = result_dtype(logps)
    flat_logps = flat(logps, dtype)
    loss, _, _, stats = policy_loss_fwd(
        flat_logps,
        flat_logps.detach() if old_logps is None else flat(old_logps, dtype),
        flat(advantages, dtype),
        flat_mask(completion_mask),
        starts,
        *(None if x is None else flat(x, dtype) for x in (weights, ref_logps, entropy)),
        numbers,
        modes._replace(
            sequence_advantages=advantages.shape != logps.shape,
            sequence_mean=reduction == "seq-mean-token-mean",
            per_token=reduction == "none",
        ),
        backend,
    )
    named = PolicyStats(*stats.detach().unbind())
    if reduction == "none":
        return PolicyLoss(loss.view(logps.shape), named)
    return PolicyLoss(divided(loss, items(named, reduction), num_items_in_batch, max_completion_length), named)


def check_options(options: PolicyOptions, with_ref: bool) -> tuple[PolicyNumbers, PolicyModes]:
    """The options as kernels take them."""
    check_choice("surrogate", options.surrogate, tuple(SURROGATES))
    known, levels = SURROGATES[options.surrogate]
    for name in OPTIONS:
        value = getattr(options, name)
        if value is not None and name not in known:
            wanted = f"None with surrogate {options.surrogate!r}, whose options are {', '.join(known) or 'none'}"
            fail(name, wanted, value)
        if value is not None:
            _, wanted, low, high, open_low = known[name]
            check_number(name, value, wanted, low, high, open_low=open_low)
    given = (getattr(options, name) for name in known)
    numbers = [known[name].default if x is None else x for name, x in zip(known, given, strict=True)]
    check_choice("importance_sampling_level", options.importance_sampling_level, LEVELS)
    if options.importance_sampling_level not in levels:
        wanted = f"{' or '.join(map(repr, levels))} with surrogate {options.surrogate!r}"
        fail("importance_sampling_level", wanted, repr(options.importance_sampling_level))
    check_number("beta", options.beta, "a finite number from 0", 0, LARGEST)
    check_number("entropy_coef", options.entropy_coef, "a finite number", -LARGEST, LARGEST)
    _check_kl(options, with_ref)
    floats = options.log_ratio_clamp, options.beta, INFINITY if options.kl_clamp is None else options.kl_clamp
    return (
        PolicyNumbers._make([*numbers, *[0.0] * (4 - len(numbers)), *floats, options.entropy_coef]),
        PolicyModes(
            list(SURROGATES).index(options.surrogate),
            LEVELS.index(options.importance_sampling_level),
            ESTIMATORS[options.kl_estimator],
            ESTIMATORS[options.kl_gradient or options.kl_estimator],
            options.kl_bias_correction,
        ),
    )


WITHOUT_KL: dict[str, Any] = {
    "beta": 0,
    "kl_estimator": "k3",
    "kl_gradient": None,
    "kl_clamp": None,
    "kl_bias_correction": False,
}


def _check_kl(options: PolicyOptions, with_ref: bool) -> None:
    check_choice("kl_estimator", options.kl_estimator, [name for name in ESTIMATORS if name != "none"])
    if options.kl_gradient is not None:
        check_choice("kl_gradient", options.kl_gradient, list(ESTIMATORS))
    check_clamps(options.log_ratio_clamp, options.kl_clamp)
    if not isinstance(options.kl_bias_correction, bool):
        fail("kl_bias_correction", "a bool", repr(options.kl_bias_correction))
    if not with_ref:
        for name, default in WITHOUT_KL.items():
            if getattr(options, name) != default:
                fail(name, f"{default!r} without ref_logps", repr(getattr(options, name)))


def check_weights(weights: Tensor | None, mask: Tensor | None) -> None:
    if weights is None or not may_read(weights) or not weights.numel():
        return
    low, high = (weights if mask is None else torch.where(mask, weights, 0.0)).aminmax()
    if not (low >= 0 and high < INFINITY):
        wanted = "finite numbers from 0 wherever completion_mask is true"
        fail("weights", wanted, f"numbers from {float(low)} to {float(high)}")


def check_advantages(advantages: Tensor, logps: Tensor, batch: int, cu_seqlens: Tensor | None) -> None:
    check_floats("advantages", advantages, (1, 2), like=logps)
    check_constant("advantages", advantages)
    shapes = [tuple(logps.shape), (batch, 1)] + ([] if cu_seqlens is not None else [(batch,)])
    if tuple(advantages.shape) not in shapes:
        wanted = f"{shapes[0]}, one for each token, or " + " or ".join(map(str, shapes[1:])) + ", one for each sequence"
        fail("advantages", wanted, describe(advantages))


# ---------------------------------------------------------------- critic


def _value_fake(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    per_token, stats = arguments[-2], values.new_empty(len(ValueStats._fields), dtype=torch.float64)
    return torch.empty_like(values) if per_token else values.new_empty(()), torch.empty_like(values), stats


@kernel_op(_value_fake)
def value_loss_fwd(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    epsilon: float,
    sequence_mean: bool,
    per_token: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, stats): each token's loss or their weighted sum, d(loss) / d(values), sums as in ValueStats."""
    loss, slope, stats = kernels(backend).value_loss_fwd(
        values, old_values, returns, mask, cu_seqlens, epsilon, sequence_mean, per_token
    )
    return loss, slope, stats


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _value_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return None if dloss is None else slope_bwd(ctx.saved_tensors[0], dloss), *(None,) * 8


register_gradient(value_loss_fwd, _value_backward, _value_setup)


def value_loss(
    values: Tensor,  # (B, S) or (T,)
    old_values: Tensor,  # same, constant
    returns: Tensor,  # same, constant
    completion_mask: Tensor | None = None,  # same, bool
    *,
    epsilon: float | None = 0.2,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> ValueLoss:
    """`0.5 * torch.max((V - R)**2, (V_clip - R)**2)`, V_clip = V_old + (V - V_old).clamp(-epsilon, epsilon), reduced.

    The clipped critic loss of PPO's reference implementation; `epsilon=None` is the plain squared error over 2.

    Args:
        values: of the critic that learns. The loss is differentiable in them and in nothing else.
        old_values: of the critic when it sampled.
        returns: its targets, `gae(...).returns`.
        completion_mask: bool; elsewhere nothing counts, and the gradient is exactly 0.
        reduction, num_items_in_batch, max_completion_length, cu_seqlens: as in `policy_loss`.

    Returns:
        ValueLoss(loss, stats): a 0-dim loss or each token's, float64 for float64 `values`, else float32; `ValueStats`.

    Raises:
        ValueError: a shape, dtype, device, option or range that is not as above; constants that require grad.
    """
    constants: dict[str, Tensor | None] = {"old_values": old_values, "returns": returns}
    starts = check_loss(
        "values", values, constants, completion_mask, reduction, num_items_in_batch, max_completion_length, cu_seqlens
    )
    if epsilon is not None:
        check_number("epsilon", epsilon, "a positive number, or None", 0, open_low=True)
    backend = backend_of(values, "value_loss")
    if backend == "reference":
        return reference.value_loss(
            values,
            old_values,
            returns,
            completion_mask,
            epsilon=epsilon,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            max_completion_length=max_completion_length,
            cu_seqlens=cu_seqlens,
        )
    dtype = result_dtype(values)
    loss, _, stats = value_loss_fwd(
        flat(values, dtype),
        flat(old_values, dtype),
        flat(returns, dtype),
        flat_mask(completion_mask),
        starts,
        INFINITY if epsilon is None else epsilon,
        reduction == "seq-mean-token-mean",
        reduction == "none",
        backend,
    )
    named = ValueStats(*stats.detach().unbind())
    if reduction == "none":
        return ValueLoss(loss.view(values.shape), named)
    return ValueLoss(divided(loss, items(named, reduction), num_items_in_batch, max_completion_length), named)


# ---------------------------------------------------------------- shared


def check_loss(
    name: str,
    learned: Tensor,
    constants: dict[str, Tensor | None],
    completion_mask: Tensor | None,
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Where sequences start."""
    check_floats(name, learned, (1, 2))
    for other, x in constants.items():
        if x is not None:
            check_like(other, x, name, learned)
            check_constant(other, x)
    starts = sequence_starts(learned, name, cu_seqlens)
    check_mask(completion_mask, name, learned.shape, learned)
    check_choice("reduction", reduction, REDUCTIONS)
    check_count("num_items_in_batch", num_items_in_batch, reduction, learned)
    if (reduction == "seq-mean-token-sum-norm") != (max_completion_length is not None):
        wanted = "a positive integer" if max_completion_length is None else "None"
        fail("max_completion_length", f"{wanted} with reduction {reduction!r}", max_completion_length)
    if max_completion_length is not None and not isinstance(max_completion_length, int):
        fail("max_completion_length", "a positive integer", max_completion_length)
    if max_completion_length is not None:
        check_number("max_completion_length", max_completion_length, "a positive integer", 1)
    return starts


def divided(
    loss: Tensor, counted: Tensor, num_items_in_batch: float | Tensor | None, max_completion_length: int | None = None
) -> Tensor:
    """A sum over the items that it is the mean of: as many as were `counted`, unless the caller says."""
    divisor = counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, Tensor):  # of any dtype: in few bits the product below overflows
        divisor = divisor.double()
    if max_completion_length is not None:
        divisor = divisor * max_completion_length
    return (loss / divisor).to(loss.dtype)


def items(stats: PolicyStats | ValueStats, reduction: str) -> Tensor:
    return stats.num_tokens if reduction == "token-mean" else stats.num_sequences
