"""The products of rows and blocks as dense products of all rows with all cells, by torch's matmul.

Inputs: contiguous tensors on any device, in any dtype. Outputs: as `autograd.Products`.

Design notes:
- It computes E = B·R/P times as much as is asked for, at the full speed of a dense product, and
  moves no rows. So it is the fastest where blocks are small and E is, too.
- Between a dense matrix `[rows, cells]` and the pairs, numbers are gathered and scattered; nothing
  is multiplied by a mask. A row with a number that is not finite leaves the others' outputs and
  gradients alone. What remains: such a number in a cell reaches all rows (`to_rows`), and such a
  row all cells' gradients (`to_table`), because zeros are multiplied with it.
- Matrices go in pieces of `SCRATCH_BYTES`: of rows, or of blocks in `to_table`, so that no sum is
  cut. Where there are several pieces, each looks at all pairs, and those of other pieces are left
  out by index: which they are only the device knows, and the host does not wait for it.
- Where a row meets a block twice (a memory of values alone), `bags` computes instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sffn.ops.block_ffn import bags
from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block

SCRATCH_BYTES = 1 << 31
"""Largest piece of a matrix of rows and cells."""

SPARE = 1024
"""Places behind a piece that take what belongs to other pieces: many, so that no two writers meet
at one address all the time."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The stable order of blocks, and their offsets, as `autograd.Products.sort`."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """Each row times the cells of each of its blocks, as `autograd.Products.to_pairs`."""
    if not pairs.distinct:
        return bags.to_pairs(rows, table, pairs)
    blocks, cells, _ = table.shape
    result = rows.new_empty(len(pairs.rows), cells)
    if not len(result):
        return result
    for rows_of, whole in _pieces(len(rows), blocks * cells * rows.itemsize):
        dense = (rows[rows_of] @ table.flatten(0, 1).T).view(-1, cells)
        index, inside = _places(pairs, rows_of, slice(0, blocks))
        if whole:
            return dense.index_select(0, index)
        gathered = dense.index_select(0, index.clamp(0, len(dense) - 1))
        torch.where(inside[:, None], gathered, result, out=result)
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """The sum of each row's weighted cells, as `autograd.Products.to_rows`."""
    if not pairs.distinct:
        return bags.to_rows(coefficients, table, pairs, num_rows)
    blocks, cells, width = table.shape
    result = table.new_empty(num_rows, width)
    if not len(pairs.rows):
        return result.zero_()
    for rows_of, _ in _pieces(num_rows, blocks * cells * table.itemsize):
        dense = _scattered(coefficients, pairs, rows_of, slice(0, blocks))
        torch.mm(dense, table.flatten(0, 1), out=result[rows_of])
    return result


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """The sum of each cell's weighted rows, as `autograd.Products.to_table`."""
    if not pairs.distinct:
        return bags.to_table(coefficients, rows, pairs, into)
    blocks, cells, width = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    result = rows.new_empty(blocks, cells, width) if into is None else into
    if not len(pairs.rows):
        return result.zero_() if into is None else into
    for blocks_of, _ in _pieces(blocks, len(rows) * cells * rows.itemsize):
        dense = _scattered(coefficients, pairs, slice(0, len(rows)), blocks_of)
        target = result[blocks_of].view(-1, width)
        if into is None:
            torch.mm(dense.T, rows, out=target)
        else:
            target.add_(dense.T @ rows)
    return result


def _scattered(coefficients: Tensor, pairs: Sorted, rows: slice, blocks: slice) -> Tensor:
    """`[rows, blocks · N]` with the coefficients of the pairs in these, and zeros."""
    cells = coefficients.shape[1]
    num_rows, num_blocks = rows.stop - rows.start, blocks.stop - blocks.start
    count = num_rows * num_blocks
    dense = coefficients.new_zeros(count + SPARE, cells)
    index, inside = _places(pairs, rows, blocks)
    spare = torch.arange(len(index), device=index.device) % SPARE + count
    dense.index_copy_(0, torch.where(inside, index, spare), coefficients)
    return dense[:count].view(num_rows, num_blocks * cells)


def _places(pairs: Sorted, rows: slice, blocks: slice) -> tuple[Tensor, Tensor]:
    """Where the pairs are in a matrix `[rows, blocks]`: `[P]` int64; and whether in it, `[P]`."""
    row = pairs.rows.long() - rows.start
    block = bags.blocks_of(pairs) - blocks.start
    num_rows, num_blocks = rows.stop - rows.start, blocks.stop - blocks.start
    inside = (row >= 0) & (row < num_rows) & (block >= 0) & (block < num_blocks)
    return row * num_blocks + block, inside


def _pieces(count: int, size: int) -> Iterator[tuple[slice, bool]]:
    """Slices of `count` rows or blocks of so many bytes, and whether there is one slice only."""
    step = max(1, SCRATCH_BYTES // size)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count)), step >= count
