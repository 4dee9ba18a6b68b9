"""Where in the pairs a row meets a block, for kernels that pass over all rows and blocks.

Enters: pairs that are distinct. Leaves: a bit for each row and block, and the number of each word's
first pair; R·B/4 bytes. Made once for all products of a pass, without waiting for the device, and
not kept from forward to backward.
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
"""Rows whose bits share a word."""

TILES = Tiles(height=128, columns=1, inner=1, warps=4, stages=3)
"""Of the kernel that makes the index. Untuned."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the pair of row r and block b is, if they meet.

    Args:
        mask: `[R / 32, B]` int32, rounded up; bit r % 32 of word r // 32 is set if they meet.
        base: likewise, the first pair of a word's rows; not written where the word is 0.
    """

    mask: Tensor
    base: Tensor


def index_of(pairs: Sorted, num_rows: int) -> Index:
    """The index of the pairs, made at the first call."""
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
    """See `Index`. A program owns a block; a word is the same in whatever order its bits come."""
    i_b = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + i_b), tl.load(offsets + i_b + 1)
    for p in range(first, last, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < last
        b_r = tl.load(rows + o_p, mask=m_p, other=0)
        b_before = tl.load(rows + o_p - 1, mask=m_p & (o_p > first), other=-1)
        o_w = (b_r >> 5).to(tl.int64) * B + i_b
        tl.atomic_or(mask + o_w, 1 << (b_r & 31), mask=m_p, sem="relaxed")
        tl.store(base + o_w, o_p.to(tl.int32), mask=m_p & ((b_before >> 5) != (b_r >> 5)))


@triton.jit
def popcount(word: tl.tensor) -> tl.tensor:
    """The set bits of each uint32; LLVM knows the idiom, and the interpreter has no other."""
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
    """Of runs `[S]` and rows `[R]`: `[S, R]`, whether they meet and where in the pairs that lies.

    Rows are the faster index: the rows of a block are neighbours in the pairs.
    """
    o_b = o_s // per_block
    m_w = (o_b < B)[:, None] & (o_r < R)[None, :]
    o_w = (o_r >> 5).to(tl.int64)[None, :] * B + o_b[:, None]
    b_mask = tl.load(mask + o_w, mask=m_w, other=0).to(tl.uint32, bitcast=True)
    b_base = tl.load(base + o_w, mask=m_w, other=0)
    bit = (o_r & 31).to(tl.uint32)[None, :]
    met = ((b_mask >> bit) & 1) != 0
    below = b_mask & ((tl.full((1, 1), 1, tl.uint32) << bit) - 1)
    pair = (b_base + popcount(below).to(tl.int32)).to(tl.int64)
    return met, (pair * per_block + (o_s % per_block)[:, None]) * RUN
