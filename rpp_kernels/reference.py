"""The specification: every public function in plain PyTorch, same name, same arguments.

A kernel is right when it agrees with this file in value and in gradient (this file's autograd is the gradient).
Nothing here checks its input or tries to be fast; `rpp_kernels.ops` does the first, `rpp_kernels.backends` the second.

Dims: T packed tokens, B sequences, S padded length, H hidden, V vocabulary, R rank of a LoRA, G group size.
Layout: with `cu_seqlens` (B+1,) token tensors are packed `(T,)`, without it they are padded `(B, S)`.
Masked positions may hold anything, NaN included: masking selects (`torch.where`), it never multiplies. Their results
are 0 and so are their gradients. Arithmetic and results are float32, or float64 where the input is float64.

Papers: [R++] REINFORCE++ 2501.03262; [B2B] Back to Basics 2402.14740; [PPO] 1707.06347; [GAE] 1506.02438;
[GRPO] 2402.03300; [GSPO] 2507.18071; [dual] dual clip 1912.09729; [KL] joschu.net/blog/kl-approx.html.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # some builds of torch have no torch.distributed
    from torch.distributed import ProcessGroup


class TokenLogps(NamedTuple):
    """Per-token results of the head: `logps` of the target, `entropy` of the distribution, `lse` its log-sum-exp."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor


class GAE(NamedTuple):
    """Generalised advantage estimates and the critic's targets, `returns = advantages + values`."""

    advantages: Tensor
    returns: Tensor


class PolicyStats(NamedTuple):
    """Sums over the valid tokens of one call, as 0-dim float64 tensors on the device of the loss.

    They add: `a + b`, or `sum(list)`, is what one call over all the batches had given, so micro-batches and ranks sum
    theirs before anyone divides. `clipped_low`: advantage < 0 and ratio < 1 - epsilon_low; `clipped_high`:
    advantage > 0 and ratio > 1 + epsilon_high; `dual_clipped`: advantage < 0 and ratio > dual_clip; `approx_kl`:
    old_logps - logps.
    """

    num_tokens: Tensor
    num_sequences: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor
    ratio: Tensor
    approx_kl: Tensor

    def __add__(self, other: "PolicyStats") -> "PolicyStats":  # type: ignore[override]
        return PolicyStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "PolicyStats":  # sum() starts from 0
        return self


class PolicyLoss(NamedTuple):
    loss: Tensor
    stats: PolicyStats


class LinearLoss(NamedTuple):
    """The `loss`, summed over tokens, and each token's `logps` and `entropy`, through which no gradient flows."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor


class LinearPolicyLoss(NamedTuple):
    """`loss` and `stats` of `policy_loss`, and each token's `logps` and `entropy`, through which no gradient flows."""

    loss: Tensor
    stats: PolicyStats
    logps: Tensor
    entropy: Tensor


class ValueStats(NamedTuple):
    """Sums over the valid tokens of one call, which add as `PolicyStats` do; `squared_error` is that of `values`."""

    num_tokens: Tensor
    num_sequences: Tensor
    clipped: Tensor
    squared_error: Tensor

    def __add__(self, other: "ValueStats") -> "ValueStats":  # type: ignore[override]
        return ValueStats(*(a + b for a, b in zip(self, other, strict=True)))

    def __radd__(self, zero: int) -> "ValueStats":
        return self


class ValueLoss(NamedTuple):
    loss: Tensor
    stats: ValueStats


# ---------------------------------------------------------------- log-probs


def logps_from_logits(
    logits: Tensor,  # (T, V) or (B, S, V)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    temperature: float | Tensor = 1.0,  # scalar, or one for each token
) -> TokenLogps:
    """z = logits / temperature, lse = log sum_j exp z_j, logps = z_y - lse, entropy = -sum_j p_j log p_j.

    A logit of -inf has probability 0 and adds nothing to the entropy.
    """
    z = logits.to(_result_dtype(logits))
    if isinstance(temperature, Tensor):
        if completion_mask is not None:
            temperature = torch.where(completion_mask, temperature, 1.0)
        temperature = temperature.to(z.dtype)[..., None]
    if completion_mask is not None:
        z = torch.where(completion_mask[..., None], z, 0.0)
        target_ids = torch.where(completion_mask, target_ids, 0)
    z = z / temperature
    lse = torch.logsumexp(z, dim=-1)
    logps = z.gather(-1, target_ids[..., None]).squeeze(-1) - lse
    all_logps = z - lse[..., None]
    entropy = -(all_logps.exp() * torch.where(all_logps == -torch.inf, 0.0, all_logps)).sum(-1)
    return TokenLogps(*(_select(x, completion_mask) for x in (logps, entropy, lse)))


def linear_logps(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,  # scalar, or one for each token
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> TokenLogps:
    """`logps_from_logits` of the logits of a head, which are never rounded to a half type:

        s = logit_scale * (h W^T + bias + lora_scaling * (h A^T) B^T)     logits = softcap * tanh(s / softcap), or s

    With `process_group` each rank has the rows of W, bias and B from `vocab_start` on, in the order of ranks, and the
    same of all else.
    """
    dtype = _result_dtype(hidden_states)
    hidden_states = hidden_states.to(dtype)
    if completion_mask is not None:
        hidden_states = torch.where(completion_mask[..., None], hidden_states, 0.0)
    logits = hidden_states @ _all_shards(weight.to(dtype), process_group).T
    if bias is not None:
        logits = logits + _all_shards(bias.to(dtype), process_group)
    if lora_A is not None and lora_B is not None:
        adapted = hidden_states @ lora_A.to(dtype).T
        logits = logits + lora_scaling * (adapted @ _all_shards(lora_B.to(dtype), process_group).T)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logps_from_logits(logits, target_ids, completion_mask, temperature=temperature)


# ---------------------------------------------------------------- KL and rewards


def kl_penalty(
    logps: Tensor,  # (B, S) or (T,)
    ref_logps: Tensor,  # same
    completion_mask: Tensor | None = None,  # same, bool
    *,
    estimator: str = "k1",
    gradient: str | None = None,
    log_ratio_clamp: float = 20.0,
    kl_clamp: float | None = None,
) -> Tensor:
    """Per-token KL(pi || ref) from samples of pi, with d = logps - ref_logps [KL], [R++ v9, App. B.1]:

        k1 = d    k2 = d^2 / 2    k3 = exp(-d) - 1 + d    abs = |d|

    d is clamped to +-log_ratio_clamp in k3 only (it is exponentiated there), and the value to +-kl_clamp. `gradient`
    names an estimator that is differentiated, without kl_clamp, while `estimator` gives the value ("none": no
    gradient).
    """
    dtype = _result_dtype(logps)
    d = _select(logps.to(dtype) - ref_logps.to(dtype), completion_mask)

    def estimate(name: str) -> Tensor:
        x = d.clamp(-log_ratio_clamp, log_ratio_clamp) if name == "k3" else d
        return {"k1": lambda: x, "k2": lambda: 0.5 * x * x, "k3": lambda: torch.expm1(-x) + x, "abs": x.abs}[name]()

    value = estimate(estimator)
    if kl_clamp is not None:
        value = value.clamp(-kl_clamp, kl_clamp)
    if gradient is None or gradient == estimator:
        return value
    if gradient == "none":
        return value.detach()
    differentiated = estimate(gradient)
    return value.detach() + (differentiated - differentiated.detach())


def token_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, S) or (T,)
    completion_mask: Tensor | None = None,  # same, bool
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """r_t = 1[t is the last valid token] * score - beta * kl_t [R++ eq. 4-5]. An empty sequence has no token to pay."""
    dtype = _result_dtype(kl)
    kl, mask, packed_at = _padded(kl.to(dtype), completion_mask, cu_seqlens)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    rewards = -beta * kl + torch.where(last, scores.to(dtype)[:, None], 0.0)
    return _unpadded(_select(rewards, mask), packed_at)


def normalize_rewards(
    scores: Tensor,  # (B,)
    *,
    zscore: bool = True,
    clip: tuple[float, float] | None = (-10.0, 10.0),
    scale: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """scale * clip((scores - mean) / std, low, high) [R++ 3.4]; population std with variance floored at eps."""
    scores = whiten(scores, eps=eps) if zscore else scores.to(_result_dtype(scores))
    if clip is not None:
        scores = scores.clamp(*clip)
    return scale * scores


# ---------------------------------------------------------------- returns and advantages


def returns(
    rewards: Tensor,  # (B, S) or (T,)
    completion_mask: Tensor | None = None,  # same, bool
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} [R++ eq. 7], t counting valid tokens only: a hole in the mask (tool output) neither
    pays, nor discounts, nor resets."""
    rewards, mask, packed_at = _padded(rewards.to(_result_dtype(rewards)), completion_mask, cu_seqlens)
    carry = rewards.new_zeros(rewards.shape[0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        carry = torch.where(mask[:, t], rewards[:, t] + gamma * carry, carry)
        columns.append(carry)
    return _unpadded(_select(_stacked(columns, rewards), mask), packed_at)


def gae(
    rewards: Tensor,  # (B, S) or (T,)
    values: Tensor,  # same
    completion_mask: Tensor | None = None,  # same, bool
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> GAE:
    """delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lambda A_{t+1}, returns_t = A_t + V_t [GAE eq. 11, 16].

    t counts valid tokens only, as in `returns`; beyond the last one V and A are 0.
    """
    dtype = _result_dtype(rewards)
    values, *_ = _padded(values.to(dtype), completion_mask, cu_seqlens)
    rewards, mask, packed_at = _padded(rewards.to(dtype), completion_mask, cu_seqlens)
    next_value = advantage = rewards.new_zeros(rewards.shape[0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = _select(_stacked(columns, rewards), mask)
    targets = _select(advantages + values, mask)
    return GAE(_unpadded(advantages, packed_at), _unpadded(targets, packed_at))


def whiten(
    values: Tensor,  # any shape
    completion_mask: Tensor | None = None,  # same, bool
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    eps_mode: str = "floor",
) -> Tensor:
    """(x - mu) / sigma over all valid elements of the batch [R++ eq. 8; v9 eq. 5]; `shift_mean=False` puts mu back.

    1 / sigma = rsqrt(max(var, eps)) ("floor"), rsqrt(var + eps) ("add_var") or 1 / (sqrt(var) + eps) ("add_std").
    `unbiased` divides the squares by n - 1 (by 1 where n = 1).
    """
    x = _select(values.to(_result_dtype(values)), completion_mask)
    mask = torch.ones_like(x, dtype=torch.bool) if completion_mask is None else completion_mask
    count = mask.sum()
    mean = x.sum() / count.clamp(min=1)
    centered = _select(x - mean, mask)
    variance = centered.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = _select(centered * _inverse_std(variance, eps, eps_mode), mask)
    return whitened if shift_mean else _select(whitened + mean, mask)


def group_advantages(
    scores: Tensor,  # (B,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B,) int64, any values
    baseline: str = "mean",
    std: str = "none",
    unbiased: bool = True,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """Advantage of each sequence over its group, the samples of one prompt: (s_i - b_i) / (std + eps).

        baseline "mean": b = mean of the group, i included [GRPO; R++ v9 eq. 6]
        baseline "leave-one-out": b = mean of the others, (n s_i - sum) / (n - 1) [B2B, RLOO]
        std "none": no division; "group": of the group's scores [GRPO]; "batch": of all scores

    A group of one has no baseline to speak of: its advantage is 0 (`singleton="zero"`) or its score ("keep").
    """
    scores = scores.to(_result_dtype(scores))
    if group_ids is None:
        assert group_size is not None
        group_ids = torch.arange(scores.shape[0], device=scores.device) // group_size
    dtype, scores = scores.dtype, scores.double()
    same = group_ids[:, None] == group_ids[None, :]  # (B, B): quadratic, and plain
    count = same.sum(1)
    mean = torch.where(same, scores[None, :], 0.0).sum(1) / count
    advantages = scores - mean
    if baseline == "leave-one-out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    advantages = torch.where(count == 1, scores if singleton == "keep" else 0.0, advantages)
    if std == "none":
        return advantages.to(dtype)
    if std == "batch":
        variance = (scores - scores.mean()).square().sum() / max(scores.shape[0] - int(unbiased), 1)
        return (advantages / (_safe_sqrt(variance) + eps)).to(dtype)
    squares = torch.where(same, (scores[None, :] - mean[:, None]).square(), 0.0).sum(1)
    variance = squares / (count - int(unbiased)).clamp(min=1)
    return torch.where(count == 1, advantages, advantages / (_safe_sqrt(variance) + eps)).to(dtype)


def reinforce_pp_advantages(
    scores: Tensor,  # (B,)
    old_logps: Tensor,  # (B, S) or (T,)
    ref_logps: Tensor | None,  # same; None where beta is 0
    completion_mask: Tensor | None = None,  # same, bool
    *,
    beta: float = 0.01,
    gamma: float = 1.0,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> Tensor:
    """REINFORCE++ [R++ eq. 4-8]: A = whiten(returns(token_rewards(scores, kl_penalty(old_logps, ref_logps)))).

    With gamma = 1 and k1: A_t = normalise(score - beta * sum_{i >= t} (old_logps_i - ref_logps_i)) over valid tokens.
    """
    if ref_logps is None or beta == 0:
        ref_logps = old_logps.detach()
    kl = kl_penalty(old_logps, ref_logps, completion_mask, estimator=kl_estimator, kl_clamp=kl_clamp)
    rewards = token_rewards(scores, kl, completion_mask, beta=beta, cu_seqlens=cu_seqlens)
    return whiten(returns(rewards, completion_mask, gamma=gamma, cu_seqlens=cu_seqlens), completion_mask, eps=eps)


# ---------------------------------------------------------------- losses


def policy_loss(
    logps: Tensor,  # (B, S) or (T,)
    old_logps: Tensor,  # same, constant
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    importance_sampling_level: str = "token",
    log_ratio_clamp: float = 20.0,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
) -> PolicyLoss:
    """Clipped surrogate: minimise l_t = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) [PPO eq. 7; R++ eq. 6].

        r_t = exp(D_t), D = clamp(logps - old_logps, +-log_ratio_clamp)      importance_sampling_level "token"
        r_i = exp(mean of the sequence's unclamped D, then clamped)          "sequence" [GSPO eq. 7]
        where A < 0 and dual_clip is given: l_t = min(l_t, -dual_clip * A)   [dual eq. 5]

    N = num_items_in_batch, or the count of this call: valid tokens for "token-mean", else sequences with a valid token.

        "token-mean"             sum_t l_t / N                        "seq-mean-token-mean"  sum_i mean_t l_t / N
        "seq-mean-token-sum"     sum_i sum_t l_t / N                  "none"                 l_t
        "seq-mean-token-sum-norm"  sum_i sum_t l_t / (max_completion_length * N)  [Dr. GRPO 2503.20783]
    """
    dtype = _result_dtype(logps)
    advantages, *_ = _padded(_per_token(advantages.to(dtype), logps, cu_seqlens), completion_mask, cu_seqlens)
    d, mask, packed_at = _padded(logps.to(dtype) - old_logps.detach().to(dtype), completion_mask, cu_seqlens)
    d, advantages = _select(d, mask), _select(advantages.detach(), mask)
    log_ratio = d
    if importance_sampling_level == "sequence":
        log_ratio = (d.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(d)
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    low, high = 1 - epsilon_low, 1 + epsilon_high
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        dual_clipped = mask & (advantages < 0) & (ratio > dual_clip)
        loss = torch.where(dual_clipped, -dual_clip * advantages, loss)
    loss = _select(loss, mask)
    stats = PolicyStats(
        num_tokens=mask.sum().double(),
        num_sequences=mask.any(1).sum().double(),
        clipped_low=(mask & (advantages < 0) & (ratio < low)).sum().double(),
        clipped_high=(mask & (advantages > 0) & (ratio > high)).sum().double(),
        dual_clipped=dual_clipped.sum().double(),
        ratio=_select(ratio, mask).detach().double().sum(),
        approx_kl=-d.detach().double().sum(),
    )
    return PolicyLoss(_reduced(loss, mask, reduction, num_items_in_batch, max_completion_length, packed_at), stats)


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
    """l_t = max((V - R)^2, (V_clip - R)^2) / 2, V_clip = old + clamp(V - old, +-epsilon); `None`: (V - R)^2 / 2.

    The clipped critic loss of [PPO]'s reference implementation. Reductions as in `policy_loss`.
    """
    dtype = _result_dtype(values)
    old_values, *_ = _padded(old_values.detach().to(dtype), completion_mask, cu_seqlens)
    returns, *_ = _padded(returns.detach().to(dtype), completion_mask, cu_seqlens)
    values, mask, packed_at = _padded(values.to(dtype), completion_mask, cu_seqlens)
    values, old_values, returns = (_select(x, mask) for x in (values, old_values, returns))
    error = (values - returns).square()
    squares, clipped = error, torch.zeros_like(mask)
    if epsilon is not None:
        clipped_values = old_values + (values - old_values).clamp(-epsilon, epsilon)
        clipped_error = (clipped_values - returns).square()
        clipped = mask & ((values - old_values).abs() > epsilon) & (clipped_error > error)
        squares = torch.maximum(error, clipped_error)
    stats = ValueStats(
        num_tokens=mask.sum().double(),
        num_sequences=mask.any(1).sum().double(),
        clipped=clipped.sum().double(),
        squared_error=error.detach().double().sum(),
    )
    loss = _reduced(0.5 * squares, mask, reduction, num_items_in_batch, max_completion_length, packed_at)
    return ValueLoss(loss, stats)


# ---------------------------------------------------------------- losses from hidden states


def linear_loss(
    hidden_states: Tensor,  # (T, H) or (B, S, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (T,) or (B, S) int64
    token_loss: Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor],
    completion_mask: Tensor | None = None,  # (T,) or (B, S) bool
    *,
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> LinearLoss:
    """`token_loss(logps[rows], entropy[rows], rows).sum()`, `rows` the indices of the valid tokens."""
    logps, entropy, _ = linear_logps(
        hidden_states,
        weight,
        target_ids,
        completion_mask,
        bias=bias,
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scaling=lora_scaling,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    valid = torch.ones_like(target_ids, dtype=torch.bool) if completion_mask is None else completion_mask
    rows = valid.nonzero(as_tuple=True)
    loss = token_loss(logps[rows], entropy[rows], rows).sum()
    return LinearLoss(loss, logps.detach(), entropy.detach())


def linear_policy_loss(
    hidden_states: Tensor,  # (B, S, H) or (T, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (B, S) or (T,) int64
    old_logps: Tensor | None,  # same, constant; None: the log-probs of this very call
    advantages: Tensor,  # same, or one for each sequence: (B, 1), and (B,) beside (B, S); constant
    completion_mask: Tensor | None = None,  # (B, S) or (T,) bool
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    importance_sampling_level: str = "token",
    log_ratio_clamp: float = 20.0,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    cu_seqlens: Tensor | None = None,  # (B+1,)
    bias: Tensor | None = None,  # (V,)
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> LinearPolicyLoss:
    """`policy_loss` of `linear_logps`."""
    logps, entropy, _ = linear_logps(
        hidden_states,
        weight,
        target_ids,
        completion_mask,
        bias=bias,
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scaling=lora_scaling,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    loss, stats = policy_loss(
        logps,
        logps.detach() if old_logps is None else old_logps,
        advantages,
        completion_mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        importance_sampling_level=importance_sampling_level,
        log_ratio_clamp=log_ratio_clamp,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        max_completion_length=max_completion_length,
        cu_seqlens=cu_seqlens,
    )
    return LinearPolicyLoss(loss, stats, logps.detach(), entropy.detach())


# ---------------------------------------------------------------- shared pieces


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _select(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def _all_shards(x: Tensor, process_group: "ProcessGroup | None") -> Tensor:
    """The rows of all ranks in their order; differentiable in this rank's own."""
    if process_group is None:
        return x
    lengths: list[int] = [0] * process_group.size()
    torch.distributed.all_gather_object(lengths, x.shape[0], group=process_group)
    shards = [x.new_zeros(max(lengths), *x.shape[1:]) for _ in lengths]
    own = torch.cat([x.detach(), shards[0][x.shape[0] :]])
    torch.distributed.all_gather(shards, own, group=process_group)
    parts = [shard[:length] for shard, length in zip(shards, lengths, strict=True)]
    parts[process_group.rank()] = x
    return torch.cat(parts)


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt whose gradient at 0 is 0 rather than infinite: a group of equal scores must not poison the others."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _inverse_std(variance: Tensor, eps: float, eps_mode: str) -> Tensor:
    if eps_mode == "floor":
        return variance.clamp(min=eps).rsqrt()
    if eps_mode == "add_var":
        return (variance + eps).rsqrt()
    return 1 / (_safe_sqrt(variance) + eps)


def _stacked(columns_from_the_end: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(columns_from_the_end[::-1], dim=1) if columns_from_the_end else like


def _padded(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Padded view of x, its mask, and where each packed token went (rows, columns), for `_unpadded`."""
    if cu_seqlens is None:
        return x, torch.ones_like(x, dtype=torch.bool) if mask is None else mask, None
    lengths = cu_seqlens.diff().long()
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=x.device), lengths)
    columns = torch.arange(x.shape[0], device=x.device) - cu_seqlens[:-1].long()[rows]
    shape = (lengths.numel(), int(lengths.max()) if lengths.numel() else 0)
    padded = x.new_zeros(shape).index_put((rows, columns), x)
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return padded, valid.new_zeros(shape).index_put((rows, columns), valid), (rows, columns)


def _unpadded(x: Tensor, packed_at: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if packed_at is None else x[packed_at]


def _per_token(advantages: Tensor, logps: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:  # (T,) beside sequences is never mistaken for (B,): theirs is (B, 1)
        return (
            torch.repeat_interleave(advantages[:, 0], cu_seqlens.diff().long()) if advantages.dim() == 2 else advantages
        )
    return (advantages[:, None] if advantages.dim() == 1 else advantages).expand_as(logps)


def _reduced(
    loss: Tensor,  # (B, S), 0 where masked
    mask: Tensor,  # (B, S) bool
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
    packed_at: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if reduction == "none":
        return _unpadded(loss, packed_at)
    local_count = mask.sum() if reduction == "token-mean" else mask.any(1).sum()
    if reduction == "seq-mean-token-mean":
        loss = loss.sum(1) / mask.sum(1).clamp(min=1)
    count = local_count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    divisor = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
    if reduction == "seq-mean-token-sum-norm":
        assert max_completion_length is not None
        divisor = divisor * max_completion_length
    return (loss.sum() / divisor).to(loss.dtype)
