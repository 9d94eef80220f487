"""Log-prob, entropy and log-sum-exp of rows of logits, and their gradient. One read of the logits forward; one read and
one write backward.

A program takes a row, or one of the parts into which the vocabulary alone, never the number of rows, cuts it: a token
has the same bits in whatever batch it comes. It walks the row in blocks of (lanes, 16 bytes), each lane with a maximum
and sums of its own, so that threads meet once at the end rather than in every block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpp_kernels.backends.triton.launch import block_of, kernel, launch
from rpp_kernels.backends.triton.math import (
    add_terms,
    dlogits_of,
    merged_terms,
    number,
    row_gradient,
    row_results,
    row_sum_squares,
    softcapped,
)
from rpp_kernels.backends.triton.sums import is_last

__all__ = ["chunk_logps_bwd_out", "chunk_logps_fwd", "logps_bwd_out", "logps_fwd"]

PART = tl.constexpr(16)  # blocks of a row that one program takes
MOST_PARTS = tl.constexpr(256)


@triton.jit
def temperature_at(token_temperature, token, temperature):
    if token_temperature is None:
        out = number(temperature, tl.float64)
    else:
        out = tl.load(token_temperature + token).to(tl.float64)
    return out


@triton.jit
def begins_a_vector(pointer):
    """Whether 16 bytes may be read at once from here on."""
    return pointer.to(tl.int64) % 16 == 0


@triton.jit
def blocks_of(part, V, aligned, BLOCK: tl.constexpr):
    """The blocks of a part of a row: `whole` ones from `low` on, read without a mask, then others up to `high`. A row
    that does not begin at a multiple of 16 bytes has none of the former, whose addresses are those of vectors."""
    low = part * PART
    high = tl.minimum(low + PART, (V + BLOCK - 1) // BLOCK)
    return low, tl.where(aligned, tl.minimum(V // BLOCK, high), low), high


@triton.jit
def within(column, i, BLOCK: tl.constexpr):
    """Where block i has this column, -1 before it and BLOCK behind it: 32 bits, of which threads hold many."""
    return tl.minimum(tl.maximum(column - i * BLOCK, -1), BLOCK).to(tl.int32)


@kernel
def row_statistics_kernel(
    logits,  # rows of (V,), `inner` of them in each of those that are outer_stride apart
    logps,  # (T,), as all results
    entropy,
    lse,
    lse_rest,
    sum_squares,
    partials,  # (T, parts, 3 or 4): maximum and sums, where there are several parts
    arrived,  # (T,) zeros, of parts
    target_ids,  # (T,)
    mask,  # (T,)
    token_temperature,  # (T,)
    V: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    parts: tl.int64,
    temperature: tl.float64,
    softcap: tl.float64,
    with_softcap: tl.constexpr,
    with_squares: tl.constexpr,
    vector: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = logps.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // parts
    part = tl.program_id(0).to(tl.int64) % parts
    wanted = True
    if mask is not None:
        wanted = tl.load(mask + row) != 0
    if wanted:
        heat = temperature_at(token_temperature, row, temperature)
        rate = (1.4426950408889634 / heat).to(F)
        cap = number(softcap, F)
        offset = row // inner * outer_stride + row % inner * row_stride
        lanes: tl.constexpr = BLOCK // vector
        at = tl.arange(0, lanes)[:, None] * vector + tl.arange(0, vector)[None, :]
        top = tl.full([lanes], float("-inf"), F)
        sums = tl.full([lanes], 0.0, F)
        weighted = tl.full([lanes], 0.0, F)
        squares = tl.full([lanes], 0.0, F)
        low, whole, high = blocks_of(part, V, begins_a_vector(logits + offset), BLOCK)
        for i in range(low, whole):
            x = tl.load(tl.multiple_of(logits + offset + i * BLOCK + at, [1, 16])).to(F)
            if with_softcap:
                x = softcapped(x, cap)
            top, sums, weighted, squares = add_terms(x, top, sums, weighted, squares, rate, with_squares)
        for i in range(whole, high):
            inside = at < within(V, i, BLOCK)
            x = tl.load(logits + offset + i * BLOCK + at, mask=inside, other=float("-inf")).to(F)
            if with_softcap:
                x = tl.where(inside, softcapped(x, cap), float("-inf"))
            top, sums, weighted, squares = add_terms(x, top, sums, weighted, squares, rate, with_squares)
        merged = merged_terms(top, sums, weighted, squares, rate, with_squares)
        highest, total, total_weighted, total_squares = merged

        done = True
        if parts > 1:
            SUMS: tl.constexpr = 4 if with_squares else 3
            own = partials + (row * parts + part) * SUMS
            tl.store(own, highest.to(tl.float64))
            tl.store(own + 1, total)
            tl.store(own + 2, total_weighted)
            if with_squares:
                tl.store(own + 3, total_squares)
            done = is_last(arrived + row, parts)
        if done:
            if parts > 1:
                every = tl.arange(0, MOST_PARTS)
                theirs = partials + (row * parts + every) * SUMS
                tops = tl.load(theirs, mask=every < parts, other=float("-inf"), cache_modifier=".cg")
                each = tl.load(theirs + 1, mask=every < parts, other=0.0, cache_modifier=".cg")
                each_weighted = tl.load(theirs + 2, mask=every < parts, other=0.0, cache_modifier=".cg")
                each_squares = tl.zeros_like(each)
                if with_squares:
                    each_squares = tl.load(theirs + 3, mask=every < parts, other=0.0, cache_modifier=".cg")
                merged = merged_terms(tops, each, each_weighted, each_squares, 1.4426950408889634 / heat, with_squares)
                widest, total, total_weighted, total_squares = merged
                highest = widest.to(F)
            y = tl.load(target_ids + row)
            known = (y >= 0) & (y < V)  # another is a NaN, and no access beyond the row
            target = tl.load(logits + offset + y, mask=known, other=float("nan")).to(F)
            if with_softcap:
                target = softcapped(target, cap)
            target = tl.where(target > highest, highest, target)  # computed twice, a capped one may differ in a digit
            out = row_results(highest, total, total_weighted, target, heat, F)
            tl.store(logps + row, out[0])
            tl.store(entropy + row, out[1])
            tl.store(lse + row, out[2])
            tl.store(lse_rest + row, out[3])
            if with_squares:
                tl.store(sum_squares + row, row_sum_squares(highest, total, total_squares, F))
    elif part == 0:
        zero = tl.full([], 0.0, F)
        tl.store(logps + row, zero)
        tl.store(entropy + row, zero)
        tl.store(lse + row, zero)
        tl.store(lse_rest + row, zero)
        if with_squares:
            tl.store(sum_squares + row, zero)


@kernel
def dlogits_kernel(
    dlogits,  # (number of rows, V) of stride out_stride; may be the logits themselves
    logits,  # as above
    rows,  # which tokens, or all
    target_ids,  # (T,)
    mask,  # (T,)
    token_temperature,  # (T,)
    entropy,  # (T,)
    lse,  # (T,)
    lse_rest,  # (T,)
    dlogps,  # (T,)
    dentropy,  # (T,)
    dlse,  # (T,)
    V: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    row_stride: tl.int64,
    out_stride: tl.int64,
    parts: tl.int64,
    temperature: tl.float64,
    softcap: tl.float64,
    with_softcap: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F = lse.dtype.element_ty
    S = dlogits.dtype.element_ty
    index = tl.program_id(0).to(tl.int64) // parts
    part = tl.program_id(0).to(tl.int64) % parts
    token = index
    if rows is not None:
        token = tl.load(rows + index)
    d = tl.full([], 0.0, F)
    of_entropy = tl.full([], 0.0, F)
    of_lse = tl.full([], 0.0, F)
    if dlogps is not None:
        d = tl.load(dlogps + token)
    if dentropy is not None:
        of_entropy = tl.load(dentropy + token)
    if dlse is not None:
        of_lse = tl.load(dlse + token)
    wanted = (d != 0) | (of_entropy != 0) | (of_lse != 0)
    if mask is not None:
        wanted = wanted & (tl.load(mask + token) != 0)

    offset = token // inner * outer_stride + token % inner * row_stride
    out_offset = index * out_stride
    at = tl.arange(0, BLOCK)
    aligned = begins_a_vector(logits + offset) & begins_a_vector(dlogits + out_offset)
    low, whole, high = blocks_of(part, V, aligned, BLOCK)
    if wanted:
        heat = temperature_at(token_temperature, token, temperature)
        cap = number(softcap, F)
        own_entropy, own_lse, own_rest = tl.load(entropy + token), tl.load(lse + token), tl.load(lse_rest + token)
        g = row_gradient(own_lse, own_rest, own_entropy, heat, d, of_entropy, of_lse, F)
        y = tl.load(target_ids + token)
        for i in range(low, whole):
            x = tl.load(tl.multiple_of(logits + offset + i * BLOCK + at, 16)).to(F)
            dx = dlogits_of(x, at == within(y, i, BLOCK), g, d, cap, dentropy is not None, with_softcap)
            tl.store(tl.multiple_of(dlogits + out_offset + i * BLOCK + at, 16), dx.to(S))
        for i in range(whole, high):
            inside = at < within(V, i, BLOCK)
            x = tl.load(logits + offset + i * BLOCK + at, mask=inside, other=0.0).to(F)
            dx = dlogits_of(x, at == within(y, i, BLOCK), g, d, cap, dentropy is not None, with_softcap)
            tl.store(dlogits + out_offset + i * BLOCK + at, dx.to(S), mask=inside)
    else:  # exactly zero, and the logits are not read
        zeros = tl.full([BLOCK], 0.0, S)
        for i in range(low, whole):
            tl.store(tl.multiple_of(dlogits + out_offset + i * BLOCK + at, 16), zeros)
        for i in range(whole, high):
            tl.store(dlogits + out_offset + i * BLOCK + at, zeros, mask=at < within(V, i, BLOCK))


def _parts(kernel: Any, logits: Tensor) -> int:
    """Into how many parts each row is cut."""
    parts: int = triton.cdiv(logits.shape[-1], block_of(kernel, logits) * PART.value)
    return parts


def _layout(logits: Tensor) -> tuple[int, int, int, int]:
    """V, and where row i lies: i // inner * outer_stride + i % inner * row_stride."""
    outer_stride = logits.stride(0) if logits.dim() == 3 else 0
    return logits.shape[-1], max(logits.shape[-2], 1), outer_stride, logits.stride(-2)


def _statistics(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    sum_squares: bool,
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = target_ids.numel()
    results = tuple(logits.new_empty(n, dtype=dtype) for n in (rows, rows, rows, rows, rows if sum_squares else 0))
    parts = _parts(row_statistics_kernel, logits)
    several = rows if parts > 1 else 0
    launch(
        row_statistics_kernel,
        rows * parts,
        *(logits, *results),
        logits.new_empty(several, parts, 4 if sum_squares else 3, dtype=torch.float64),
        logits.new_zeros(several, dtype=torch.int32),
        *(target_ids, mask, token_temperature),
        *(*_layout(logits), parts, temperature, softcap),
        like=logits,
        with_softcap=softcap != 0,
        with_squares=sum_squares,
        vector=16 // logits.itemsize,
    )
    return results


def _gradient(
    dlogits: Tensor,
    logits: Tensor,
    rows: Tensor | None,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    statistics: tuple[Tensor, Tensor, Tensor],
    slopes: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    count = target_ids.numel() if rows is None else rows.numel()
    parts = _parts(dlogits_kernel, logits)
    launch(
        dlogits_kernel,
        count * parts,
        *(dlogits, logits, rows, target_ids, mask, token_temperature, *statistics, *slopes),
        *(*_layout(logits), dlogits.stride(-2), parts, temperature, softcap),
        like=logits,
        with_softcap=softcap != 0,
    )


def logps_fwd(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    sum_squares: bool,
) -> tuple[Tensor, ...]:
    return _statistics(logits, target_ids, mask, temperature, token_temperature, 0.0, sum_squares)


def logps_bwd_out(
    dlogits: Tensor,
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    token_temperature: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
) -> None:
    statistics, slopes = (entropy, lse, lse_rest), (dlogps, dentropy, dlse)
    _gradient(dlogits, logits, None, target_ids, mask, temperature, token_temperature, 0.0, statistics, slopes)


def chunk_logps_fwd(
    logits: Tensor, target_ids: Tensor, temperature: float, token_temperature: Tensor | None, softcap: float
) -> tuple[Tensor, ...]:
    return _statistics(logits, target_ids, None, temperature, token_temperature, softcap, False)[:4]


def chunk_logps_bwd_out(
    dlogits: Tensor,
    logits: Tensor,
    rows: Tensor | None,
    target_ids: Tensor,
    temperature: float,
    token_temperature: Tensor | None,
    softcap: float,
    entropy: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
) -> None:
    statistics, slopes = (entropy, lse, lse_rest), (dlogps, dentropy, dlse)
    _gradient(dlogits, logits, rows, target_ids, None, temperature, token_temperature, softcap, statistics, slopes)
