"""The gradient of a table as a grouped GEMM with split-K: the grouped form of `to_table`.

Inputs: coefficients `[P, N]` and rows `[R, D]`. Outputs: `[B, N, D]`, bitwise reproducible.

Design notes:
- A program owns a tile of a block's cells and columns, and loops over the block's pairs. An even
  load keeps a GPU busy that way. But if one block has most of the pairs, its few programs would run
  long after all others have finished.
- So there is a cut at every multiple of a chunk length. A block of two chunk lengths or more is
  split at its cuts into chunks of pairs, each with programs of its own, which write their sums to
  fp32 scratch. A second kernel adds the chunks of a block in the order of its pairs, without
  atomics. The host does not wait: each cut has programs whether its block is split or not, and
  superfluous programs return at once.
- The chunk length is chosen so that a block with all pairs gives at least `PROGRAMS` programs.
  Scratch is less than 2 · `PROGRAMS` fp32 tiles, 64 MB at most, and none if one block has that many
  tiles. Chunks come first in the grid, because they take longest.
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
"""Programs that keep a GPU busy: nearly two per multiprocessor of an H100 or H200 (132)."""

CHUNK = 1024
"""Least pairs per chunk; with fewer, the scratch would cost more than it saves. Derived."""

SUMMED = 4096
"""Numbers of a block that one program of `sum_chunks_kernel` adds up."""


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None, tiles: Tiles
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`).

    Args:
        coefficients: `[P, N]`.
        rows: `[R, D]`.
        pairs: sorted by block.
        into: fp32 `[B, N, D]` to add to, or None.
        tiles: the tile sizes.

    Returns:
        `into`, or a new `[B, N, D]` in the dtype of rows.
    """
    num_blocks, cells, width = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    result = rows.new_empty(num_blocks, cells, width) if into is None else into
    # The kernels address the table as contiguous.
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
    """The chunk length, and the block at each cut, computed once per length for these pairs.

    Returns:
        The length, a multiple of `multiple`; `[cuts]` int64, entry c is one more than the block of
        pair c · length. It is empty if all pairs fit in one chunk.
    """
    num_pairs = len(pairs.rows)
    least = triton.cdiv(num_pairs, triton.cdiv(PROGRAMS, tiles_of_block))
    length = triton.cdiv(max(CHUNK, least), multiple) * multiple
    if ("cuts", length) not in pairs.derived:
        end = num_pairs if num_pairs > length else 0
        cuts = torch.arange(0, end, length, device=pairs.offsets.device)
        # `right=True` skips empty blocks, which begin at the same pair as the next block.
        owners = torch.searchsorted(pairs.offsets, cuts, right=True)
        pairs.derived["cuts", length] = owners
    return length, pairs.derived["cuts", length]


@triton.jit
def cuts_of(begin: tl.tensor, end: tl.tensor, length: tl.tensor) -> tl.tensor:
    """True if the block with pairs [begin, end) is split; the indices of its first and last cut."""
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
    """Sum a tile of cells and columns over the pairs of one chunk, or of one unsplit block.

    The grid has the tiles of all chunks, then the tiles of all blocks. Tiles of one chunk or block
    are neighbours, so that they share its rows in the L2 cache.
    """
    num_n, num_d = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    i = (tl.program_id(0) // (num_n * num_d)).to(tl.int64)
    i_tile = tl.program_id(0) % (num_n * num_d)
    is_chunk = i < chunks
    i_b = i - chunks
    if is_chunk:
        i_b = tl.load(owners + i) - 1
    first, last = tl.load(offsets + i_b), tl.load(offsets + i_b + 1)
    split, first_cut, _ = cuts_of(first, last, length)
    # The programs of its chunks compute a split block, and its own programs any other block.
    if split != is_chunk:
        return
    if is_chunk:
        # The pairs before a block's first cut belong to its first chunk.
        first = tl.where(i == first_cut, first, i * length)
        last = tl.minimum(last, (i + 1) * length)
    d_first = (i_tile % num_d) * BLOCK_D
    o_n = (i_tile // num_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = d_first + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for p in range(first, last, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        m_p = o_p < last
        o_r = tl.load(rows + o_p, mask=m_p, other=0).to(tl.int64)
        # [BLOCK_P, BLOCK_N] and [BLOCK_P, BLOCK_D]. Both are masked after the last pair, because
        # zero times a number that is not finite is NaN.
        p_h = coefficients + o_p[:, None] * N + o_n[None, :]
        b_h = tl.load(p_h, mask=m_p[:, None] & m_n[None, :], other=0.0)
        p_x = x + o_r[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x, mask=m_p[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_h), b_x, acc, input_precision="ieee")
    if is_chunk:
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
    """Add up the chunks of each split block, in order: a program owns BLOCK of `size` numbers."""
    num_pieces = tl.cdiv(size, BLOCK)
    i_c = (tl.program_id(0) // num_pieces).to(tl.int64)
    i_b = tl.load(owners + i_c) - 1
    first, last = tl.load(offsets + i_b), tl.load(offsets + i_b + 1)
    split, first_cut, last_cut = cuts_of(first, last, length)
    # The programs of a block's first cut add up all its chunks; those of other cuts return.
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
