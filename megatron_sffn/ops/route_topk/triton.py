"""Exact top-K on a GPU, in Triton: a radix select per row, for fp32, bf16 and fp16.

Inputs: scores on a GPU; on a CPU only if `TRITON_INTERPRET=1` was set before the import. The host
does not wait for the device.

Design notes:
- A program owns a row. Scores become unsigned keys of the same order. Each pass makes a histogram
  of the next 8 bits of those keys that share the bits known so far, until the K-th largest key is
  known. A last pass writes the ids of larger keys, and the lowest ids of equal keys, up to K.
- Every pass reads the row again, in tiles: it comes from the L2 cache, and B has no upper bound.
- A NaN is greater than infinity, or less than -infinity if its sign bit is set. So a row with NaN
  still gets K distinct ids; the router itself reports scores that are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sffn.ops import triton_launch
from megatron_sffn.ops.triton_launch import INTERPRETED

__all__ = ["DTYPES", "INTERPRETED", "route_topk"]

DIGITS = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}
"""Number of 8-bit digits that can differ between numbers of a dtype after conversion to fp32.

bf16 has 16 leading bits, fp16 numbers use the sign, 8 bits of exponent and 10 bits of mantissa."""

DTYPES = tuple(DIGITS)

SHORTEST, LONGEST = 128, 4096
"""Least and most scores per tile of a row. Untuned: no GPU has timed them."""

PER_WARP = 512
"""Least scores per warp. Untuned."""


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """The ids `[T, K]` int64 of the largest of `[T, B]` scores; ascending, ties to the lowest."""
    tokens, blocks = scores.shape
    ids = torch.empty(tokens, num_active, dtype=torch.int64, device=scores.device)
    if not tokens:
        return ids
    tile = triton_launch.power_of_2(blocks, SHORTEST, LONGEST)
    triton_launch.launch(
        select_kernel,
        tokens,
        warps=max(tile // PER_WARP, 1),
        stages=1,
        writes=("ids",),
        scores=scores.contiguous(),
        ids=ids,
        B=blocks,
        K=num_active,
        DIGITS=DIGITS[scores.dtype],
        BLOCK_B=tile,
    )
    return ids


@triton.jit
def load_keys(scores: tl.tensor, o_b: tl.tensor, m_b: tl.tensor) -> tl.tensor:
    """Scores as uint32 keys of the same order; -0 equals 0, NaN is above inf or below -inf."""
    bits = tl.load(scores + o_b, mask=m_b, other=0.0).to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    # Floats of the same sign order like their bits, negative ones in reverse: flip all bits of
    # negative numbers, and the sign bit of the others.
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def select_kernel(
    scores: tl.tensor,
    ids: tl.tensor,
    B: tl.tensor,
    K: tl.tensor,
    DIGITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """`route_topk` for one row per program."""
    i_t = tl.program_id(0).to(tl.int64)
    scores += i_t * B
    ids += i_t * K
    # The leading digits of the K-th largest key, zeros after them; how many of the K ids belong to
    # keys with these leading digits.
    least, places = tl.full((), 0, tl.uint32), K
    for i in range(DIGITS):
        shift = 24 - 8 * i
        counts = tl.zeros((256,), dtype=tl.int32)
        for b in range(0, B, BLOCK_B):
            o_b = b + tl.arange(0, BLOCK_B)
            b_key = load_keys(scores, o_b, o_b < B)
            # Keys with the same leading digits. Two shifts, because a shift by 32 is undefined.
            m_key = (o_b < B) & (((b_key ^ least) >> 8 >> shift) == 0)
            counts += tl.histogram(((b_key >> shift) & 255).to(tl.int32), 256, mask=m_key)
        # The digit of the K-th largest key: the last one from which on there are enough keys.
        digit = tl.sum((tl.cumsum(counts, reverse=True) >= places).to(tl.int32)) - 1
        places -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0))
        least |= digit.to(tl.uint32) << shift
    # The lower bits are the same for all keys with these digits, so they are dropped.
    REST: tl.constexpr = 32 - 8 * DIGITS
    least = least >> REST
    chosen, equal = 0, 0
    for b in range(0, B, BLOCK_B):
        o_b = b + tl.arange(0, BLOCK_B)
        m_b = o_b < B
        b_key = load_keys(scores, o_b, m_b) >> REST
        m_equal = m_b & (b_key == least)
        m_first = m_equal & (equal + tl.cumsum(m_equal.to(tl.int32)) <= places)
        m_chosen = (m_b & (b_key > least)) | m_first
        o_k = chosen + tl.cumsum(m_chosen.to(tl.int32)) - 1
        tl.store(ids + o_k, o_b.to(tl.int64), mask=m_chosen)
        chosen += tl.sum(m_chosen.to(tl.int32))
        equal += tl.sum(m_equal.to(tl.int32))
