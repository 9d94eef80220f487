"""How the program of a sequence walks it: in blocks of tokens, from either end."""

import triton
import triton.language as tl


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
