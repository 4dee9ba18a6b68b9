"""The products of rows and single cells by `torch.nn.functional.embedding_bag`.

Inputs: contiguous tensors on any device, in any dtype. Outputs: as `autograd.Products`, the same
bits every time.

Design notes:
- A sum of a row's cells with coefficients is what `embedding_bag` computes with weights per sample,
  and so is a sum of a cell's rows: one kernel each, fp32 inside, no parts, no atomics, no wait. A
  row may meet a cell more than once.
- Each number of a row is multiplied once for each number read, so that memory bounds it. That is
  worth while for a memory of values alone, or for single cells of which a token uses very few.
- Blocks of N cells are right, too; `to_table` then takes N calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block

SCRATCH_BYTES = 1 << 29
"""Size of a piece of gathered rows in `to_pairs`, in fp32."""


@dataclass(frozen=True)
class _Blocks:
    """`[P]` int32, the block of each sorted pair."""

    blocks: Tensor


def blocks_of(pairs: Sorted) -> Tensor:
    """`[P]` int32: the block of each pair; made once, and kept for all products with the pairs."""
    if (kept := pairs.derived.get(_Blocks)) is None:
        count = len(pairs.offsets) - 1
        ids = torch.arange(count, dtype=torch.int32, device=pairs.offsets.device)
        blocks = ids.repeat_interleave(pairs.offsets.diff(), output_size=len(pairs.rows))
        kept = pairs.derived[_Blocks] = _Blocks(blocks)
    blocks_of_pairs: Tensor = kept.blocks
    return blocks_of_pairs


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The stable order of blocks, and their offsets, as `autograd.Products.sort`."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """Each row times the cells of each of its blocks, as `autograd.Products.to_pairs`."""
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
    """The sum of each row's weighted cells, as `autograd.Products.to_rows`."""
    cells, width = table.shape[1:]
    if not len(pairs.rows):
        return table.new_zeros(num_rows, width)
    by_row = pairs.by_row(num_rows)
    weights = coefficients.index_select(0, by_row.order)
    first = blocks_of(pairs).index_select(0, by_row.order) * cells
    cell = first[:, None] + torch.arange(cells, dtype=torch.int32, device=first.device)
    return _bags(cell.flatten(), table.flatten(0, 1), by_row.offsets * cells, weights.flatten())


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """The sum of each cell's weighted rows, as `autograd.Products.to_table`."""
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
    """Sums of rows of `source` `[*, D]`, each times its weight, from offset to offset."""
    return F.embedding_bag(
        index, source, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
