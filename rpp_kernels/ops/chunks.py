"""The head of a language model over chunks of tokens: the one loop of linear_logps, linear_loss and linear_policy_loss.

The logits of one chunk exist at a time. A library's matrix products make them and take their gradient apart; what lies
between, log-probs and the gradient of logits, are kernels of the backend. A token outside the mask is never projected,
and one whose gradient is zero is left out of the products of the gradient: either way the result is the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rpp_kernels.backends import kernels
from rpp_kernels.distributed import named_group
from rpp_kernels.ops.checks import fail, may_read, result_dtype
from rpp_kernels.ops.head import Head, Needs, Numbers, Plan

# ---------------------------------------------------------------- sizes of chunks

# On CPU the gradient takes the place of the logits. The weight's gradient is a sum over tokens, which MKL makes in
# blocks of 384, reading and writing the gradient for each. Where the vocabulary is small, there is enough work to pay
# for the calls.
_CPU_TOKENS, _CPU_LEAST_BYTES, _CPU_MOST_BYTES = 384, 16 << 20, 256 << 20
INVARIANT_TOKENS = 256  # at most, where all products have one shape
# Elsewhere a chunk of float32 logits feeds a row kernel, and a chunk of gradients, in the operands' dtype and several
# times as many tokens, feeds the products. Modelled, not measured.
_BYTES, _LOGITS_IN_GRADIENTS = 2 << 30, 4


def chunk_tokens(
    side_by_side: bool, dtype: torch.dtype, operands: torch.dtype, V: int, H: int, plan: Plan
) -> tuple[int, int]:
    """How many tokens have logits at a time, and how many are multiplied together backward."""
    row = V * dtype.itemsize
    together = 1 if side_by_side else _LOGITS_IN_GRADIENTS
    if side_by_side:
        default = max(_CPU_TOKENS, _CPU_LEAST_BYTES // (row + 2 * H * dtype.itemsize))
        tokens = max(1, (plan.chunk_bytes or min(default * row, _CPU_MOST_BYTES)) // row)
    else:
        tokens = max(1, (plan.chunk_bytes or _BYTES) // (row + together * V * operands.itemsize))
    tokens = min(tokens, INVARIANT_TOKENS) if plan.batch_invariant else tokens
    return tokens, together * tokens


def balanced(n: int, most: int) -> list[slice]:
    """0 to n in as few parts as may have `most` tokens, of nearly one size: a multiple of 16, for the SIMD lanes."""
    if n == 0:
        return []
    parts = -(-n // most)
    size = min(most, -(-n // parts // 16) * 16)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# ---------------------------------------------------------------- the loop


class Statistics(NamedTuple):
    """Of each token; lse + lse_rest is the log-sum-exp in twice the precision."""

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    lse_rest: Tensor

    def at(self, which: Any) -> "Statistics":
        return Statistics(*(x[which] for x in self))

    def where(self, mask: Tensor) -> "Statistics":
        return Statistics(*(torch.where(mask, x, 0.0) for x in self))


class Slopes(NamedTuple):
    """The gradient of each token's results, at least one of them; None is zero."""

    logps: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def at(self, which: Any) -> "Slopes":
        return Slopes(*(None if x is None else x[which] for x in self))

    def where(self, mask: Tensor) -> "Slopes":
        return Slopes(*(None if x is None else torch.where(mask, x, 0.0) for x in self))

    def active(self) -> Tensor:
        """The indices of the tokens that have a gradient at all; NaN is one."""
        return torch.stack([x != 0 for x in self if x is not None]).any(0).nonzero().squeeze(1)


class Chunks:
    """A head applied to one chunk of tokens after another, and the gradients that come back.

    A chunk is given by its `rows`, the ascending indices of its tokens. `project` fills a buffer that its next call
    overwrites; `add_gradient` may overwrite it too.
    """

    def __init__(self, head: Head, needs: Needs, *, wide_dhidden: bool = False) -> None:
        self.head, self.needs = head, needs
        self.plan, self.numbers = Plan(*head.plan), Numbers(*head.numbers)
        self.kernels, self.group = kernels(head.backend), named_group(head.group_name)
        x = head.hidden_states
        self.dtype = result_dtype(x)  # of logits, sums and results
        # The libraries of a CPU round what they make of half operands to half. And before a loss scale has brought them
        # into its range, gradients of logits underflow in float16.
        self.operands = self.dtype if x.device.type == "cpu" or x.dtype == torch.float16 else x.dtype
        self.weight = head.weight.to(self.operands)
        self.bias, self.lora_A, self.lora_B = (None if p is None else p.to(self.operands) for p in head.learned[2:])
        self.vocab = self.weight.shape[0]
        self.widest = self._widest_shard()
        # On a CPU the tokens of a chunk lie side by side, which makes all three products faster, and are gone through
        # in order, so that a gradient may take the place of logits. Kernels of a GPU have a row for each token.
        self.side_by_side = head.backend == "native" and x.device.type == "cpu"
        sizes = self.widest, x.shape[1]
        self.tokens, self.gradient_tokens = chunk_tokens(
            self.side_by_side, self.dtype, self.operands, *sizes, self.plan
        )
        # Of a loss of tokens one kernel may make statistics, slopes and gradient, for one read of the logits. It leaves
        # out no rows, and a shard's rows have other ranks to wait for.
        one_read = hasattr(self.kernels, "chunk_policy_out") and not self.side_by_side
        self.reads_once = one_read and self.group is None and not self.plan.skip_rows
        self.in_place = self.side_by_side and self.tokens == self.gradient_tokens and self.operands == self.dtype
        if head.mask is not None and self.plan.skip_rows:
            self.rows, self.mask = head.mask.nonzero().squeeze(1), None
        else:
            self.rows, self.mask = torch.arange(x.shape[0], device=x.device), head.mask
        if not self.side_by_side:
            self.gradient_tokens = min(self.gradient_tokens, self.rows.shape[0])  # no room for more than there are
        self._logits = self._dlogits = x.new_empty(0)  # flat
        self._waiting: list[tuple[Tensor, Tensor]] = []  # rows and dlogits that are to be multiplied
        # Summed over shards, or multiplied later, it must not be rounded now.
        wide = wide_dhidden or self.group is not None or x.dtype == torch.float16
        self.dhidden = x.new_zeros(x.shape if needs.hidden_states else 0, dtype=self.dtype if wide else x.dtype)
        self.dweight = x.new_empty(self.weight.shape if needs.weight else 0, dtype=self.dtype)
        self.dbias, self.dlora_A, self.dlora_B = (
            x.new_zeros(p.shape if p is not None and needed else 0, dtype=self.dtype)
            for p, needed in ((self.bias, needs.bias), (self.lora_A, needs.lora), (self.lora_B, needs.lora))
        )
        self._begun = False

    def widen(self, lengths: Sequence[int]) -> None:
        """Larger chunks for what is to lie in one, of these lengths, unless someone has said how large they are. That
        costs a few percent of the best size's speed; logits that are made again are a fourth product beside three."""
        if self.side_by_side and not self.plan.chunk_bytes and not self.plan.batch_invariant:
            most = _CPU_MOST_BYTES // (self.widest * self.dtype.itemsize)
            self.tokens = self.gradient_tokens = max(self.tokens, *(n for n in lengths if n <= most), 0)

    # ---- forward

    def split(self, rows: Tensor) -> list[slice]:
        """Which of the rows make each chunk."""
        n = rows.shape[0]
        if self.plan.batch_invariant:
            return [slice(start, min(start + self.tokens, n)) for start in range(0, n, self.tokens)]
        return balanced(n, self.tokens)

    def project(self, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        """The logits of a chunk, (n, V), before softcap and temperature: in the buffer, or as `kept` made room for."""
        x = self._hidden_states(rows)
        if self.plan.batch_invariant:  # products of one shape only
            x = torch.nn.functional.pad(x, (0, 0, 0, self.tokens - rows.shape[0]))
        if logits is None:
            logits = self._block(self._buffer(x.shape[0]), x.shape[0])
        scale = self.numbers.logit_scale
        multiply(x, self.weight.T, logits, plus=self.bias, beta=scale, alpha=scale)
        if self.lora_A is not None and self.lora_B is not None:
            multiply(self._adapted(x), self.lora_B.T, logits, plus=logits, alpha=scale * self.numbers.lora_scaling)
        return logits[: rows.shape[0]]

    def kept(self, memory: Tensor, part: slice) -> Tensor | None:
        """The place of a whole chunk of logits in flat memory, chunk behind chunk; None where it ends too soon."""
        tokens = self.tokens if self.plan.batch_invariant else part.stop - part.start
        piece = memory[part.start * self.vocab : (part.start + tokens) * self.vocab]
        return self._block(piece, tokens) if piece.numel() == tokens * self.vocab else None

    def statistics(self, rows: Tensor, logits: Tensor) -> Statistics:
        ids, here = self._ids(rows)
        numbers, temperature = self.numbers, self._temperature(rows)
        parts = self.kernels.chunk_logps_fwd(logits, ids, numbers.temperature, temperature, numbers.softcap)
        valid = None if self.mask is None else self.mask[rows]
        statistics = Statistics(*parts) if here is None else self._over_shards(Statistics(*parts), here, valid)
        return statistics if valid is None else statistics.where(valid)

    def _hidden_states(self, rows: Tensor) -> Tensor:
        x = self.head.hidden_states.index_select(0, rows).to(self.operands)
        # A NaN under the mask must not reach the gradient of the weight.
        return x if self.mask is None else torch.where(self.mask[rows, None], x, 0.0)

    def _adapted(self, x: Tensor) -> Tensor:
        assert self.lora_A is not None
        return multiply(x, self.lora_A.T, x.new_empty(x.shape[0], self.lora_A.shape[0]))

    def _buffer(self, tokens: int) -> Tensor:
        if self._logits.numel() < tokens * self.vocab:
            self._logits = self._logits.new_empty(tokens * self.vocab, dtype=self.dtype)
        return self._logits

    def _block(self, memory: Tensor, tokens: int) -> Tensor:
        """(tokens, V) of flat memory."""
        memory = memory[: tokens * self.vocab]
        return memory.view(self.vocab, tokens).T if self.side_by_side else memory.view(tokens, self.vocab)

    def _temperature(self, rows: Tensor) -> Tensor | None:
        if self.head.token_temperature is None:
            return None
        each = self.head.token_temperature[rows]
        return each if self.mask is None else torch.where(self.mask[rows], each, 1.0)

    # ---- a vocabulary in shards

    def _widest_shard(self) -> int:
        """Ranks exchange something for each chunk: they must all cut the same ones."""
        if self.group is None:
            return self.vocab
        widest = torch.tensor(self.vocab, device=self.weight.device)
        torch.distributed.all_reduce(widest, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(widest)

    def _ids(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Targets as rows of this weight; of a shard also which targets lie in it, and 0 for the others."""
        start = self.plan.vocab_start
        ids = self.head.target_ids[rows] - start
        if self.mask is not None:
            ids = torch.where(self.mask[rows], ids, 0)
        if self.group is None:
            return ids, None
        here = (ids >= 0) & (ids < self.vocab)
        return torch.where(here, ids, 0), here

    def _over_shards(self, own: Statistics, here: Tensor, valid: Tensor | None) -> Statistics:
        """Of the whole vocabulary, by one small all-reduce; in float64, so that cutting it costs no accuracy."""
        nothing = own.lse == -torch.inf  # a shard of padding, whose lse_rest is no number
        lse = torch.where(nothing, own.lse.double(), own.lse.double() + own.lse_rest)
        target = torch.where(nothing, lse, own.logps + lse)
        everyone = lse.new_zeros(self.group.size(), 4, lse.shape[0])
        everyone[self.group.rank()] = torch.stack([lse, own.entropy.double(), target, here.double()])
        torch.distributed.all_reduce(everyone, group=self.group)
        lses, entropies, targets, owned = everyone.unbind(1)
        wrong = owned.sum(0) != 1
        if may_read(wrong) and bool((wrong if valid is None else wrong & valid).any()):
            fail("target_ids", "ids that lie in one shard of the vocabulary each (see vocab_start)", "others")
        lse = lses.logsumexp(0)
        share = (lses - lse).exp()
        entropy = (share * torch.where(share == 0, 0.0, entropies - lses)).sum(0) + lse
        logps = torch.where(owned == 1, targets, 0.0).sum(0) - lse
        logps, entropy, rounded = (x.to(self.dtype) for x in (logps, entropy, lse))
        return Statistics(logps, entropy, rounded, (lse - rounded).to(self.dtype))

    # ---- backward

    def add_policy_gradient(self, rows: Tensor, logits: Tensor, *policy: Any) -> Statistics:
        """Of a chunk of a policy loss of tokens, where `reads_once`, with the statistics. `policy` is as
        chunk_policy_out in csrc/ops.h takes it, from old_logps on."""
        dlogits = self._room(rows.shape[0], logits)
        valid = None if self.mask is None else self.mask[rows]
        numbers, temperature = self.numbers, self._temperature(rows)
        head = self._ids(rows)[0], valid, numbers.temperature, temperature, numbers.softcap
        statistics = self.kernels.chunk_policy_out(dlogits, logits, *head, *policy)
        self._waiting.append((rows, dlogits))
        return Statistics(*statistics)

    def add_gradient(self, rows: Tensor, logits: Tensor, statistics: Statistics, slopes: Slopes) -> None:
        """Of a chunk whose logits are there."""
        which, slopes = self._active(rows, slopes)
        self._add_gradient(rows, logits, which, statistics, slopes)

    def recompute_gradient(self, rows: Tensor, statistics: Statistics, slopes: Slopes) -> None:
        """Of any number of tokens whose logits are gone."""
        which, slopes = self._active(rows, slopes)
        if which is not None:
            rows, statistics, slopes = rows[which], statistics.at(which), slopes.at(which)
        for part in self.split(rows):
            logits = self.project(rows[part])
            self._add_gradient(rows[part], logits, None, statistics.at(part), slopes.at(part))

    def _active(self, rows: Tensor, slopes: Slopes) -> tuple[Tensor | None, Slopes]:
        """Which of the tokens have a gradient, None for all of them; and slopes that are 0 under the mask."""
        if self.mask is not None:
            slopes = slopes.where(self.mask[rows])
        which = slopes.active() if self.plan.skip_rows else None
        return None if which is None or which.shape[0] == rows.shape[0] else which, slopes

    def _add_gradient(
        self, rows: Tensor, logits: Tensor, which: Tensor | None, statistics: Statistics, slopes: Slopes
    ) -> None:
        wanted = rows if which is None else rows[which]
        if wanted.shape[0] == 0:
            return
        dlogits = self._room(wanted.shape[0], logits)
        ids, here = self._ids(rows)
        dlogps, dentropy, dlse = slopes
        if here is not None and dlogps is not None:  # a target elsewhere moves this shard through the lse alone
            elsewhere = torch.where(here, 0.0, dlogps)
            dlogps, dlse = dlogps - elsewhere, -elsewhere if dlse is None else dlse - elsewhere
        self.kernels.chunk_logps_bwd_out(
            dlogits,
            logits,
            which,
            ids,
            self.numbers.temperature,
            self._temperature(rows),
            self.numbers.softcap,
            *statistics[1:],
            *(None if d is None else d.contiguous() for d in (dlogps, dentropy, dlse)),
        )
        self._waiting.append((wanted, dlogits))
        if self.in_place:
            self._multiply_waiting()

    def gradients(self, *, scaled: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of hidden states, weight, bias, lora_A and lora_B, each in its dtype, or in that of `unscaled_dtype` for a
        loss that is yet to be scaled; empty where not needed."""
        a, b, c, d, e = (
            total if p is None else total.to(p.dtype if scaled else unscaled_dtype(p))
            for total, p in zip(self.sums(), self.head.learned, strict=True)
        )
        return a, b, c, d, e

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same before they are rounded."""
        self._multiply_waiting()
        if not self._begun:
            self.dweight.zero_()
        if self.group is not None:
            for replicated in (self.dhidden, self.dlora_A):
                torch.distributed.all_reduce(replicated, group=self.group)
        return self.dhidden, self.dweight, self.dbias, self.dlora_A, self.dlora_B

    def _room(self, n: int, logits: Tensor) -> Tensor:
        """Where the gradient of n tokens' logits goes: into the logits, or behind the gradients that wait."""
        if self.in_place:
            kept = logits.data_ptr() != self._logits.data_ptr()
            return self._block(self._buffer(n), n) if kept else logits[:n]
        filled = sum(rows.shape[0] for rows, _ in self._waiting)
        if filled + n > self.gradient_tokens:
            self._multiply_waiting()
            filled = 0
        if self._dlogits.numel() == 0:
            self._dlogits = self._logits.new_empty(self.gradient_tokens * self.vocab, dtype=self.operands)
        return self._block(self._dlogits, self.gradient_tokens)[filled : filled + n]

    def _multiply_waiting(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat([rows for rows, _ in self._waiting])
        dlogits = self._waiting[0][1]
        if len(self._waiting) > 1:
            dlogits = self._block(self._dlogits, self.gradient_tokens)[: rows.shape[0]]
        self._waiting = []
        x, scale = self._hidden_states(rows), self.numbers.logit_scale
        if self.needs.weight:
            multiply(dlogits.T, x, self.dweight, plus=self.dweight, beta=float(self._begun), alpha=scale)
        if self.dbias.numel():
            self.dbias.add_(dlogits.sum(0, dtype=self.dtype), alpha=scale)
        dx = x.new_empty(x.shape if self.needs.hidden_states else 0, dtype=self.dtype)
        if self.needs.hidden_states:
            multiply(dlogits, self.weight, dx, alpha=scale)
        if self.lora_A is not None and self.lora_B is not None:
            scale *= self.numbers.lora_scaling
            through = multiply(dlogits, self.lora_B, x.new_empty(x.shape[0], self.lora_A.shape[0]), alpha=scale)
            if self.needs.hidden_states:
                multiply(through, self.lora_A, dx, plus=dx)
            if self.needs.lora:
                multiply(through.T, x, self.dlora_A, plus=self.dlora_A)
                multiply(dlogits.T, self._adapted(x), self.dlora_B, plus=self.dlora_B, alpha=scale)
        if self.needs.hidden_states:
            self.dhidden.index_copy_(0, rows, dx.to(self.dhidden.dtype))
        self._begun = True


def unscaled_dtype(x: Tensor) -> torch.dtype:
    """Of a gradient that a loss scale is yet to bring into the range of float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def multiply(
    a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """out = beta * plus + alpha * a @ b; half operands give float32 where `out` is float32, and are never rounded."""
    start, beta = (out, 0.0) if plus is None else (plus, beta)
    wide = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(start, a, b, beta=beta, alpha=alpha, out=out, **wide)
