"""An index from (row, block) to pair, for kernels that pass over all rows and blocks.

Inputs: distinct pairs, sorted by block. Outputs: a bit per row and block, and the first pair of
each word of 32 bits; R·B/4 bytes. It is computed once for all products of a forward or backward
pass, without waiting for the device, and not kept from forward to backward.

Design notes: within a block the pairs ascend by row, so the pair of (row, block) is the first pair
of the word plus the number of bits that are set below the row's bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.block_ffn.triton_tiles import Tiles, launch

WORD = 32
"""Rows per word of the mask."""

TILES = Tiles(height=128, columns=1, inner=1, warps=4, stages=3)
"""Tiles of `index_kernel`. Untuned."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """The index of the pairs.

    Args:
        mask: `[ceil(R / 32), B]` int32. Bit r % 32 of word r // 32 is set if (r, b) is a pair.
        base: `[ceil(R / 32), B]` int32, the first pair of a word's rows; undefined if the word is
            0.
    """

    mask: Tensor
    base: Tensor


def index_of(pairs: Sorted, num_rows: int) -> Index:
    """The index of the pairs, computed at the first call of a pass."""
    if Index not in pairs.of_pass:
        num_blocks = len(pairs.offsets) - 1
        words = (triton.cdiv(num_rows, WORD), num_blocks)
        mask = torch.zeros(words, dtype=torch.int32, device=pairs.rows.device)
        index = Index(mask=mask, base=torch.empty_like(mask))
        launch(
            index_kernel,
            num_blocks,
            TILES,
            writes=("mask", "base"),
            rows=pairs.rows,
            offsets=pairs.offsets,
            mask=index.mask,
            base=index.base,
            B=num_blocks,
            BLOCK_P=TILES.height,
        )
        pairs.of_pass[Index] = index
    return pairs.of_pass[Index]


@triton.jit
def index_kernel(
    rows: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    base: tl.tensor,
    B: tl.tensor,
    BLOCK_P: tl.constexpr,
) -> None:
    """Write an `Index`: a program owns a block and passes over its pairs.

    Several pairs set bits of one word, hence the atomic `or`, whose result does not depend on the
    order. Words of different blocks are different words.
    """
    i_b = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + i_b), tl.load(offsets + i_b + 1)
    for p in range(first, last, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < last
        b_r = tl.load(rows + o_p, mask=m_p, other=0)
        b_previous = tl.load(rows + o_p - 1, mask=m_p & (o_p > first), other=-1)
        o_w = (b_r >> 5).to(tl.int64) * B + i_b
        tl.atomic_or(mask + o_w, 1 << (b_r & 31), mask=m_p, sem="relaxed")
        # Rows ascend: a pair is the first of its word if the previous row is in another word.
        tl.store(base + o_w, o_p.to(tl.int32), mask=m_p & ((b_previous >> 5) != (b_r >> 5)))


@triton.jit
def popcount(word: tl.tensor) -> tl.tensor:
    """The number of set bits of each uint32.

    LLVM turns this idiom into one instruction; Triton's interpreter has no popcount of its own.
    """
    # Counts in fields of 2 bits, then of 4 and 8 bits; the product adds up the four bytes.
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def find(
    mask: tl.tensor,
    base: tl.tensor,
    o_r: tl.tensor,
    o_s: tl.tensor,
    R: tl.tensor,
    B: tl.tensor,
    per_block: tl.tensor,
    RUN: tl.constexpr,
) -> tl.tensor:
    """Look up runs `[S]` and rows `[R]`; a run is RUN consecutive cells of one block.

    Returns:
        `[S, R]` bool, whether the row and the run's block are a pair; `[S, R]` int64, where the
        run's RUN numbers begin in a `[P, N]` tensor. Rows are the fast index, because the pairs of
        a block are neighbours in memory.
    """
    o_b = o_s // per_block
    m_w = (o_b < B)[:, None] & (o_r < R)[None, :]
    o_w = (o_r >> 5).to(tl.int64)[None, :] * B + o_b[:, None]
    b_mask = tl.load(mask + o_w, mask=m_w, other=0).to(tl.uint32, bitcast=True)
    b_base = tl.load(base + o_w, mask=m_w, other=0)
    bit = (o_r & 31).to(tl.uint32)[None, :]
    is_pair = ((b_mask >> bit) & 1) != 0
    lower_bits = b_mask & ((tl.full((1, 1), 1, tl.uint32) << bit) - 1)
    pair = (b_base + popcount(lower_bits).to(tl.int32)).to(tl.int64)
    return is_pair, (pair * per_block + (o_s % per_block)[:, None]) * RUN
