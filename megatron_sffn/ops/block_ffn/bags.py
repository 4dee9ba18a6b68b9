"""The backend `bags`: products of rows and single cells by `torch.nn.functional.embedding_bag`.

Inputs: contiguous tensors on any device, in any dtype. Results are bitwise reproducible.

Design notes:
- A weighted sum of a row's cells is `embedding_bag` with `per_sample_weights`, and so is a weighted
  sum of a cell's rows. Each is one kernel, sums in fp32, uses no atomics and does not wait. A row
  may have a cell more than once.
- Each number that is read is multiplied once, so memory bandwidth bounds the speed. That pays for
  values without keys, and for single cells of which a token uses very few.
- Blocks of several cells are correct too, but `to_table` then takes one call per cell of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block

SCRATCH_BYTES = 1 << 29
"""Most bytes of gathered fp32 rows that `to_pairs` has at a time."""


@dataclass(frozen=True)
class _Blocks:
    """The record that `Sorted.derived` keeps for `blocks_of`."""

    blocks: Tensor


def blocks_of(pairs: Sorted) -> Tensor:
    """`[P]` int32: the block of each sorted pair; computed once for all products with the pairs."""
    if (cached := pairs.derived.get(_Blocks)) is None:
        count = len(pairs.offsets) - 1
        ids = torch.arange(count, dtype=torch.int32, device=pairs.offsets.device)
        blocks = ids.repeat_interleave(pairs.offsets.diff(), output_size=len(pairs.rows))
        cached = pairs.derived[_Blocks] = _Blocks(blocks)
    blocks_of_pairs: Tensor = cached.blocks
    return blocks_of_pairs


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    _, cells, width = table.shape
    result = rows.new_empty(len(pairs.rows), cells)
    wide, blocks = torch.promote_types(rows.dtype, torch.float32), blocks_of(pairs)
    step = max(1, SCRATCH_BYTES // (cells * width * wide.itemsize))
    for first in range(0, len(result), step):
        piece = slice(first, first + step)
        gathered = rows.index_select(0, pairs.rows[piece]).to(wide)
        products = table.index_select(0, blocks[piece]) * gathered[:, None]
        result[piece] = products.sum(dim=2)
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    cells, width = table.shape[1:]
    if not len(pairs.rows):
        return table.new_zeros(num_rows, width)
    by_row = pairs.by_row(num_rows)
    weights = coefficients.index_select(0, by_row.order)
    # A bag of `embedding_bag` is a row here, and its samples are the cells of all its blocks.
    first = blocks_of(pairs).index_select(0, by_row.order) * cells
    cell_ids = first[:, None] + torch.arange(cells, dtype=torch.int32, device=first.device)
    return _bags(cell_ids.flatten(), table.flatten(0, 1), by_row.offsets * cells, weights.flatten())


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    blocks, cells = len(pairs.offsets) - 1, coefficients.shape[1]
    result = rows.new_zeros(blocks, cells, rows.shape[1]) if into is None else into
    if not len(pairs.rows):
        return result
    offsets = pairs.offsets.int()
    for cell in range(cells):
        sums = _bags(pairs.rows, rows, offsets, coefficients[:, cell].contiguous())
        result[:, cell].add_(sums)
    return result


def _bags(index: Tensor, source: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """For each bag, from offset to offset, the sum of `source[index] · weights`, `[bags, D]`."""
    return F.embedding_bag(
        index, source, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
