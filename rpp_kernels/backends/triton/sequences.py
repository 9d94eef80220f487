"""How the program of a sequence walks it: in blocks of tokens, from either end, with a carry from block to block."""

import triton
import triton.language as tl

# What a masked token does to a sum that passes it, besides nothing, in the order of GAPS in ops/advantages.py
GAP_RESET = tl.constexpr(1)
GAP_STEP = tl.constexpr(2)


@triton.jit
def sequence_of(cu_seqlens):
    """The number of this program's sequence, where it begins and where it ends."""
    i = tl.program_id(0).to(tl.int64)
    return i, tl.load(cu_seqlens + i), tl.load(cu_seqlens + i + 1)


@triton.jit
def tokens(k, begin, end, forward: tl.constexpr, BLOCK: tl.constexpr):
    """The places of a block, k tokens from where the scan starts."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    return begin + k + lane if forward else end - BLOCK - k + lane


@triton.jit
def inside_and_valid(mask, at, begin, end):
    """Which places are of the sequence, and which of these count."""
    inside = (at >= begin) & (at < end)
    valid = inside if mask is None else inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return inside, valid


@triton.jit
def bounds_of(cu_seqlens, sequence, B):
    """Where a sequence begins and ends; that beyond the last, of the one program of an empty batch, is empty."""
    begin = tl.load(cu_seqlens + sequence, mask=sequence < B, other=0)
    return begin, tl.load(cu_seqlens + sequence + 1, mask=sequence < B, other=0)


@triton.jit
def valid_of(mask, at, end):
    valid = at < end
    if mask is not None:
        valid &= tl.load(mask + at, mask=valid, other=0) != 0
    return valid


# ---------------------------------------------------------------- scans: carry -> x + factor carry, token after token
#
# In float64, block by block. Places outside of the sequence are steps that change nothing, x = 0 and factor = 1.


@triton.jit
def two_steps(factor, x, next_factor, next_x):
    return factor * next_factor, next_x + next_factor * x


@triton.jit
def two_steps_or_resets(factor, x, next_factor, next_x):
    """As above; a step of a negative factor starts anew. Selected, not multiplied by 0: the sum may be NaN."""
    resets = (factor < 0) | (next_factor < 0)
    x = tl.where(next_factor < 0, next_x, next_x + next_factor * x)
    return tl.where(resets, -1.0, factor * next_factor).to(factor.dtype), x


@triton.jit
def discount_of(valid, inside, gamma, gap: tl.constexpr):
    """What a token multiplies the carry by; -1 where it resets it."""
    if gap == GAP_STEP:
        factor = tl.where(inside, gamma, 1.0)
    elif gap == GAP_RESET:
        factor = tl.where(valid, gamma, tl.where(inside, -1.0, 1.0))
    else:
        factor = tl.where(valid, gamma, 1.0)
    return factor.to(tl.float64)


@triton.jit
def scanned(x, factor, carry, resets: tl.constexpr, forward: tl.constexpr, BLOCK: tl.constexpr):
    """The carry behind each token of a block, and behind the block."""
    if resets:
        factor, x = tl.associative_scan((factor, x), 0, two_steps_or_resets, reverse=not forward)
        out = tl.where(factor < 0, x, x + factor * carry)
    else:
        factor, x = tl.associative_scan((factor, x), 0, two_steps, reverse=not forward)
        out = x + factor * carry
    end: tl.constexpr = BLOCK - 1 if forward else 0
    return out, tl.sum(tl.where(tl.arange(0, BLOCK) == end, out, 0.0))
