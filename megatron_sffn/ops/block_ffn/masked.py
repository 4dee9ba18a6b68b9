"""The backend `masked`: dense products of all rows with all cells, by torch's matmul.

Inputs: contiguous tensors on any device, in any dtype.

Design notes:
- It computes E = B·R/P times as many products as needed, but at the full speed of a dense matmul
  and without moving rows. So it is the fastest if both the blocks and E are small.
- `to_pairs` gathers the pairs' numbers from a dense matrix `[rows, cells]`; `to_rows` and
  `to_table` scatter them into one that is zero elsewhere. Nothing is multiplied by a mask, so NaN
  or infinity in a row leaves the outputs and gradients of other rows finite. But NaN or infinity in
  a cell reaches all rows in `to_rows`, and in a row all cells in `to_table`, because zero times it
  is NaN.
- The dense matrix is computed in slices of `SCRATCH_BYTES`: of rows, or of blocks in `to_table`, so
  that no sum is split. Each slice looks at all pairs and skips by index those of other slices,
  because only the device knows which they are, and the host does not wait for it.
- If a row can have a block twice (values without keys), the backend `bags` computes instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sffn.ops.block_ffn import bags
from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block

SCRATCH_BYTES = 1 << 31
"""Most bytes of the dense matrix of rows and cells that exist at a time."""

SPARE = 1024
"""Entries behind a slice to which the pairs of other slices are written. There are many of them, so
that the writes do not all contend for one address."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    if not pairs.distinct:
        return bags.to_pairs(rows, table, pairs)
    blocks, cells, _ = table.shape
    result = rows.new_empty(len(pairs.rows), cells)
    if not len(result):
        return result
    for row_slice, is_only_slice in _slices(len(rows), blocks * cells * rows.itemsize):
        dense = (rows[row_slice] @ table.flatten(0, 1).T).view(-1, cells)
        index, inside = _dense_index(pairs, row_slice, slice(0, blocks))
        if is_only_slice:
            return dense.index_select(0, index)
        # Pairs of other slices gather a wrong number, which `where` drops.
        gathered = dense.index_select(0, index.clamp(0, len(dense) - 1))
        torch.where(inside[:, None], gathered, result, out=result)
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    if not pairs.distinct:
        return bags.to_rows(coefficients, table, pairs, num_rows)
    blocks, cells, width = table.shape
    result = table.new_empty(num_rows, width)
    if not len(pairs.rows):
        return result.zero_()
    for row_slice, _ in _slices(num_rows, blocks * cells * table.itemsize):
        dense = _scattered(coefficients, pairs, row_slice, slice(0, blocks))
        torch.mm(dense, table.flatten(0, 1), out=result[row_slice])
    return result


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    if not pairs.distinct:
        return bags.to_table(coefficients, rows, pairs, into)
    blocks, cells, width = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    result = rows.new_empty(blocks, cells, width) if into is None else into
    if not len(pairs.rows):
        return result.zero_() if into is None else into
    for block_slice, _ in _slices(blocks, len(rows) * cells * rows.itemsize):
        dense = _scattered(coefficients, pairs, slice(0, len(rows)), block_slice)
        target = result[block_slice].view(-1, width)
        if into is None:
            torch.mm(dense.T, rows, out=target)
        else:
            target.add_(dense.T @ rows)
    return result


def _scattered(coefficients: Tensor, pairs: Sorted, rows: slice, blocks: slice) -> Tensor:
    """A dense `[rows, blocks · N]` with the coefficients of the pairs in it, else zeros."""
    cells = coefficients.shape[1]
    num_rows, num_blocks = rows.stop - rows.start, blocks.stop - blocks.start
    count = num_rows * num_blocks
    dense = coefficients.new_zeros(count + SPARE, cells)
    index, inside = _dense_index(pairs, rows, blocks)
    spare = torch.arange(len(index), device=index.device) % SPARE + count
    dense.index_copy_(0, torch.where(inside, index, spare), coefficients)
    return dense[:count].view(num_rows, num_blocks * cells)


def _dense_index(pairs: Sorted, rows: slice, blocks: slice) -> tuple[Tensor, Tensor]:
    """The position of each pair in a matrix `[rows, blocks]`.

    Returns:
        `[P]` int64 positions, and `[P]` bool: False for a pair outside the matrix.
    """
    row = pairs.rows.long() - rows.start
    block = bags.blocks_of(pairs) - blocks.start
    num_rows, num_blocks = rows.stop - rows.start, blocks.stop - blocks.start
    inside = (row >= 0) & (row < num_rows) & (block >= 0) & (block < num_blocks)
    return row * num_blocks + block, inside


def _slices(count: int, bytes_each: int) -> Iterator[tuple[slice, bool]]:
    """Slices of `count` rows or blocks that fit in `SCRATCH_BYTES`; True if there is only one."""
    step = max(1, SCRATCH_BYTES // bytes_each)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count)), step >= count
