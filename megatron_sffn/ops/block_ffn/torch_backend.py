"""The backend `torch`: a loop over blocks in plain torch, on any device, in any dtype.

Design notes:
- On a CPU the gathered rows of a block go in slices through a scratch tensor that stays in a core's
  cache. On a GPU a block is one slice, because the launch of each call costs microseconds whatever
  its size.
- Sums are in fp32 if the inputs are narrower. A row has a block at most once, so the additions of
  one block never collide, and results do not depend on the number of threads.
- The host has to know where each block's pairs begin. It reads the offsets once for all products of
  a call, forward and backward: the only wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block

SCRATCH_BYTES = 1 << 20
"""Most bytes of gathered rows at a time on a CPU; they should stay in a core's L2 cache."""

SMALLEST_PIECE = 64
"""Least rows of a slice, however wide a row is: smaller products would be inefficient."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    result = rows.new_empty(len(pairs.rows), table.shape[1])
    for block, piece, gathered in _gathered(pairs, rows):
        torch.mm(gathered, table[block].T, out=result[piece])
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    sum_dtype = torch.promote_types(table.dtype, torch.float32)
    result = table.new_zeros(num_rows, table.shape[2], dtype=sum_dtype)
    for block, piece in _pieces(pairs, table.flatten(0, 1)):
        product = coefficients[piece] @ table[block]
        result.index_add_(0, pairs.rows[piece], product.to(sum_dtype))
    return result.to(table.dtype)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    shape = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    result = rows.new_zeros(shape) if into is None else into
    # The sum over the slices of one block, so that slices are never added up in 16 bits.
    block_sum = rows.new_empty(shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
    offsets = _host_offsets(pairs)
    for block, piece, gathered in _gathered(pairs, rows):
        product = coefficients[piece].T @ gathered
        if into is not None:
            into[block] += product
            continue
        is_first, is_last = piece.start == offsets[block], piece.stop == offsets[block + 1]
        if is_first and is_last:
            result[block] = product
        elif is_first:
            block_sum.copy_(product)
        else:
            block_sum += product
            if is_last:
                result[block] = block_sum
    return result


def _gathered(pairs: Sorted, rows: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """`_pieces` with the gathered rows of each, which on a CPU the next slice overwrites."""
    if device.is_gpu(rows):
        for block, piece in _pieces(pairs, rows):
            yield block, piece, rows.index_select(0, pairs.rows[piece])
        return
    scratch = rows.new_empty(_longest(rows), rows.shape[1])
    for block, piece in _pieces(pairs, rows):
        index = pairs.rows[piece]
        yield block, piece, torch.index_select(rows, 0, index, out=scratch[: len(index)])


def _pieces(pairs: Sorted, rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each block with slices of its pairs; on a GPU one slice. Empty blocks are left out.

    Args:
        pairs: sorted by block.
        rows: `[*, D]`, any tensor of the rows' width, dtype and device.
    """
    longest = len(pairs.rows) if device.is_gpu(rows) else _longest(rows)
    for block, (first, last) in enumerate(pairwise(_host_offsets(pairs))):
        for start in range(first, last, longest):
            yield block, slice(start, min(start + longest, last))


def _longest(rows: Tensor) -> int:
    """How many rows fit in `SCRATCH_BYTES`."""
    return max(SMALLEST_PIECE, SCRATCH_BYTES // (rows.shape[1] * rows.itemsize))


@dataclass(frozen=True)
class _HostOffsets:
    """The record that `Sorted.derived` keeps for `_host_offsets`."""

    values: list[int]


def _host_offsets(pairs: Sorted) -> list[int]:
    """The offsets `[B + 1]` on the host; waits for the device at the first call with these pairs.

    Raises:
        IndexError: if a pair has a block that does not exist.
    """
    if (cached := pairs.derived.get(_HostOffsets)) is None:
        count = len(pairs.rows)
        values = pairs.offsets.tolist() if count else [0] * len(pairs.offsets)
        if values[0] != 0 or values[-1] != count:
            raise IndexError(
                f"{values[0] + count - values[-1]} of {count} pairs have a block id that is not in "
                f"[0, {len(values) - 1}); correct what chose them"
            )
        cached = pairs.derived[_HostOffsets] = _HostOffsets(values)
    offsets: list[int] = cached.values
    return offsets
