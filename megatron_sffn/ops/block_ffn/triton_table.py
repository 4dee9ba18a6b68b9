"""The gradient of a table on a GPU as a grouped GEMM: `Products.to_table` of `triton_grouped`.

Inputs: coefficients `[P, N]` and rows `[R, D]`. Outputs: `[B, N, D]`, the same bits every time.

Design notes
- A program owns a tile of a block's cells and columns, and loops over the block's pairs. Where the
  load is even that keeps a GPU busy; a block that has most of the pairs would be one long chain
  for a few programs while the others are done.
- So the pairs are cut at every multiple of a chunk length. A block of two chunk lengths or more is
  split there: each cut has programs of its own, which write their sum to fp32 scratch, and a second
  kernel adds a block's sums in the order of its pairs. No atomics, and nothing waits for the host:
  each cut has its programs whether its block is split or not, and those not needed return at once.
- The chunk length is such that a block with all pairs gives at least `PROGRAMS` programs. Scratch
  is less than 2 · `PROGRAMS` tiles in fp32, 64 MB at most, and none where one block has that many
  tiles. Chunks come first in the grid, since they take longest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.block_ffn.triton_epilogue import store_tile
from megatron_sffn.ops.block_ffn.triton_tiles import Tiles, launch, side

PROGRAMS = 256
"""Programs that keep a GPU busy: two for each multiprocessor of an H100 or H200, nearly."""

CHUNK = 1024
"""Least pairs of a chunk: with fewer, scratch would cost more than it saves. Derived."""

SUMMED = 4096
"""Numbers of a block that a program of `sum_chunks_kernel` adds."""


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None, tiles: Tiles
) -> Tensor:
    """See `autograd.Products.to_table`.

    Args:
        coefficients: `[P, N]`.
        rows: `[R, D]`.
        pairs: in the order of the blocks.
        into: fp32 `[B, N, D]` to add to, or None.
        tiles: how it is cut.

    Returns:
        into, or a table of the dtype of rows.
    """
    num_blocks, cells, width = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    result = rows.new_empty(num_blocks, cells, width) if into is None else into
    # The kernels take the table as contiguous.
    assert result.is_contiguous() and result.shape == (num_blocks, cells, width)
    block_n, block_d = side(cells, tiles.height), side(width, tiles.columns)
    tiles_of_block = triton.cdiv(cells, block_n) * triton.cdiv(width, block_d)
    length, owners = _cuts(pairs, tiles_of_block, tiles.inner)
    chunks = len(owners)
    scratch = rows.new_empty(chunks, cells, width, dtype=torch.float32)
    launch(
        to_table_kernel,
        (chunks + num_blocks) * tiles_of_block,
        tiles,
        writes=("result", "scratch"),
        coefficients=coefficients,
        x=rows,
        result=result,
        scratch=scratch,
        rows=pairs.rows,
        offsets=pairs.offsets,
        owners=owners,
        length=length,
        chunks=chunks,
        N=cells,
        D=width,
        ADD=into is not None,
        BLOCK_P=tiles.inner,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    if chunks:
        launch(
            sum_chunks_kernel,
            chunks * triton.cdiv(cells * width, SUMMED),
            Tiles(height=1, columns=SUMMED, inner=1, warps=4, stages=1),
            scratch=scratch,
            result=result,
            offsets=pairs.offsets,
            owners=owners,
            length=length,
            size=cells * width,
            ADD=into is not None,
            BLOCK=SUMMED,
        )
    return result


def _cuts(pairs: Sorted, tiles_of_block: int, multiple: int) -> tuple[int, Tensor]:
    """The length of the chunks, and the cuts, none if there is one chunk.

    Made once for all products with these pairs and this length: `[chunks]` int64, of chunk c one
    more than the block that has pair c · length.
    """
    num_pairs = len(pairs.rows)
    least = triton.cdiv(num_pairs, triton.cdiv(PROGRAMS, tiles_of_block))
    length = triton.cdiv(max(CHUNK, least), multiple) * multiple
    if ("cuts", length) not in pairs.derived:
        most = num_pairs if num_pairs > length else 0
        cuts = torch.arange(0, most, length, device=pairs.offsets.device)
        owners = torch.searchsorted(pairs.offsets, cuts, right=True)
        pairs.derived["cuts", length] = owners
    return length, pairs.derived["cuts", length]


@triton.jit
def cuts_of(begin: tl.tensor, end: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Of a block: whether it is split, the number of its first cut and that of its last."""
    return end - begin >= 2 * length, tl.cdiv(begin, length), (end - 1) // length


@triton.jit(do_not_specialize=["length", "chunks"])
def to_table_kernel(
    coefficients: tl.tensor,
    x: tl.tensor,
    result: tl.tensor,
    scratch: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    owners: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """See `to_table`. Tiles of one chunk or block are neighbours: they share its rows."""
    num_n, num_d = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    i = (tl.program_id(0) // (num_n * num_d)).to(tl.int64)
    within = tl.program_id(0) % (num_n * num_d)
    of_chunk = i < chunks
    i_b = i - chunks
    if of_chunk:
        i_b = tl.load(owners + i) - 1
    first, last = tl.load(offsets + i_b), tl.load(offsets + i_b + 1)
    split, first_cut, _ = cuts_of(first, last, length)
    if split != of_chunk:
        return
    if of_chunk:
        # What lies before a block's first cut goes with its first chunk.
        first = tl.where(i == first_cut, first, i * length)
        last = tl.minimum(last, (i + 1) * length)
    d_first = (within % num_d) * BLOCK_D
    o_n = (within // num_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = d_first + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for p in range(first, last, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < last
        o_r = tl.load(rows + o_p, mask=m_p, other=0).to(tl.int64)
        # [BLOCK_P, BLOCK_N] and [BLOCK_P, BLOCK_D]; zeros behind the last pair, in both, since
        # zero times what is not finite is not zero.
        p_h = coefficients + o_p[:, None] * N + o_n[None, :]
        b_h = tl.load(p_h, mask=m_p[:, None] & m_n[None, :], other=0.0)
        p_x = x + o_r[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x, mask=m_p[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_h), b_x, acc, input_precision="ieee")
    if of_chunk:
        store_tile(acc, scratch + (i * N + o_n) * D, m_n, d_first, D, False)
    else:
        store_tile(acc, result + (i_b * N + o_n) * D, m_n, d_first, D, ADD)


@triton.jit(do_not_specialize=["length"])
def sum_chunks_kernel(
    scratch: tl.tensor,
    result: tl.tensor,
    offsets: tl.tensor,
    owners: tl.tensor,
    length: tl.tensor,
    size: tl.tensor,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The sums of the chunks of each block that is split, in order; of `size` numbers each."""
    num_pieces = tl.cdiv(size, BLOCK)
    i_c = (tl.program_id(0) // num_pieces).to(tl.int64)
    i_b = tl.load(owners + i_c) - 1
    first, last = tl.load(offsets + i_b), tl.load(offsets + i_b + 1)
    split, first_cut, last_cut = cuts_of(first, last, length)
    if not (split & (i_c == first_cut)):
        return
    o = (tl.program_id(0) % num_pieces) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for c in range(first_cut, last_cut + 1):
        acc += tl.load(scratch + c * size + o, mask=o < size, other=0.0)
    p_y = result + i_b * size + o
    if ADD:
        acc += tl.load(p_y, mask=o < size, other=0.0)
    tl.store(p_y, acc.to(result.dtype.element_ty), mask=o < size)
