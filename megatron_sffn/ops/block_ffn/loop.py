"""The products of rows and blocks in plain torch: a loop over blocks, on any device, in any dtype.

Gathered rows live in one piece of scratch that is used again and again. Outputs are summed in fp32
when the inputs are narrower. A row meets a block at most once, so the adds of one block never
collide: results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from megatron_sffn.ops.block_ffn.pairs import Sorted

SCRATCH_BYTES = 1 << 20
"""Size of the piece of gathered rows: it should stay in a core's L2 cache."""

SMALLEST_PIECE = 64
"""Rows below which the products would be too small, however wide a row is."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """See `function.Products`."""
    # Narrow keys sort several times faster than int64 ones.
    narrow = torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32
    order = blocks.to(narrow).argsort(stable=True).int()
    counts = torch.bincount(blocks, minlength=num_blocks)
    return order, torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """See `function.Products`."""
    result = rows.new_empty(len(pairs.rows), table.shape[1])
    for block, at, some in _pieces(rows, pairs):
        torch.mm(some, table[block].T, out=result[at])
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """See `function.Products`."""
    wide = torch.promote_types(table.dtype, torch.float32)
    result = table.new_zeros(num_rows, table.shape[2], dtype=wide)
    for block, at in _blocks(pairs, _longest(table.shape[2], table.itemsize)):
        result.index_add_(0, pairs.rows[at], (coefficients[at] @ table[block]).to(wide))
    return result.to(table.dtype)


def to_table(coefficients: Tensor, rows: Tensor, pairs: Sorted) -> Tensor:
    """See `function.Products`."""
    blocks = len(pairs.offsets) - 1
    result = rows.new_zeros(blocks, coefficients.shape[1], rows.shape[1])
    for block, at, some in _pieces(rows, pairs):
        result[block].addmm_(coefficients[at].T, some)
    return result


def _pieces(rows: Tensor, pairs: Sorted) -> Iterator[tuple[int, slice, Tensor]]:
    """As `_blocks`, with the rows of the pairs, gathered in scratch."""
    scratch = rows.new_empty(_longest(rows.shape[1], rows.itemsize), rows.shape[1])
    for block, at in _blocks(pairs, len(scratch)):
        here = pairs.rows[at]
        yield block, at, torch.index_select(rows, 0, here, out=scratch[: len(here)])


def _blocks(pairs: Sorted, longest: int) -> Iterator[tuple[int, slice]]:
    """Each block with its pairs, at most `longest` at a time; empty blocks do not appear."""
    offsets = pairs.offsets.tolist()
    for block, (first, last) in enumerate(pairwise(offsets)):
        for start in range(first, last, longest):
            yield block, slice(start, min(start + longest, last))


def _longest(width: int, itemsize: int) -> int:
    """Rows that fit the scratch."""
    return max(SMALLEST_PIECE, SCRATCH_BYTES // (width * itemsize))
