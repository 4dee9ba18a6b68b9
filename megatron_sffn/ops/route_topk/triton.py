"""Exact top-K on a GPU, in Triton: a radix select of every row, for fp32, bf16 and fp16.

Enters: scores on a GPU; on a CPU only where `TRITON_INTERPRET=1` was set before the import.
Leaves: ids. Nothing waits for the device.

Choices
- A program owns a row. Scores become unsigned keys of the same order. Each pass counts the next 8
  bits of the keys that share the bits found so far, until the K-th largest key is known. A last
  pass writes the ids of larger keys, and of its equals the first, as many as there are places.
- A row is read in pieces, in every pass anew: it comes from the L2 cache, and B has no bound.
- A NaN counts as larger than infinity, or as smaller than -infinity if its sign bit is set: a row
  with NaN still gets K distinct ids. Who must refuse NaN looks at the scores.
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
"""Digits of 8 bits that can differ between numbers of a dtype, once they are fp32."""

DTYPES = tuple(DIGITS)

SHORTEST, LONGEST = 128, 4096
"""Scores of a piece. Untuned: no GPU has timed them."""

PER_WARP = 512
"""Scores of a piece that a warp owns, at least. Untuned."""


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """`[T, B]` scores to `[T, K]` int64 ids as `naive.route_topk`."""
    tokens, blocks = scores.shape
    ids = torch.empty(tokens, num_active, dtype=torch.int64, device=scores.device)
    if not tokens:
        return ids
    piece = triton_launch.power_of_2(blocks, SHORTEST, LONGEST)
    triton_launch.launch(
        select_kernel,
        tokens,
        warps=max(piece // PER_WARP, 1),
        stages=1,
        writes=("ids",),
        scores=scores.contiguous(),
        ids=ids,
        B=blocks,
        K=num_active,
        DIGITS=DIGITS[scores.dtype],
        BLOCK_B=piece,
    )
    return ids


@triton.jit
def load_keys(scores: tl.tensor, o_b: tl.tensor, m_b: tl.tensor) -> tl.tensor:
    """Scores as uint32 of the same order; -0 equals 0, NaN is above inf or below -inf."""
    bits = tl.load(scores + o_b, mask=m_b, other=0.0).to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
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
    """See `route_topk`."""
    i_t = tl.program_id(0).to(tl.int64)
    scores += i_t * B
    ids += i_t * K
    # The K-th largest key, as far as it is known, and the places for keys that begin like it.
    least, places = tl.full((), 0, tl.uint32), K
    for i in range(DIGITS):
        shift = 24 - 8 * i
        counts = tl.zeros((256,), dtype=tl.int32)
        for b in range(0, B, BLOCK_B):
            o_b = b + tl.arange(0, BLOCK_B)
            b_key = load_keys(scores, o_b, o_b < B)
            # Two shifts: 32 bits at once are not defined.
            m_key = (o_b < B) & (((b_key ^ least) >> 8 >> shift) == 0)
            counts += tl.histogram(((b_key >> shift) & 255).to(tl.int32), 256, mask=m_key)
        digit = tl.sum((tl.cumsum(counts, reverse=True) >= places).to(tl.int32)) - 1
        places -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0))
        least |= digit.to(tl.uint32) << shift
    # Bits behind the last digit follow from the others.
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
