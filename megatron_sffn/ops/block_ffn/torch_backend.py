"""The products of rows and blocks in plain torch: a loop over blocks, on any device, in any dtype.

On a CPU the gathered rows of a block go in pieces through scratch that stays in a core's cache. On
a GPU a block is one piece: there each call costs microseconds, whatever its size, and these would
be most of the time. Sums are in fp32 when the inputs are narrower. A row meets a block at most
once, so the adds of one block never collide: results do not depend on the number of threads.

The host has to know where each block's pairs begin. It reads the offsets once for all products of a
call, forward and backward: the only time that it waits for the device.
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
"""Size of a piece of gathered rows on a CPU: it should stay in a core's L2 cache."""

SMALLEST_PIECE = 64
"""Rows below which the products would be too small, however wide a row is."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The stable order of blocks, and their offsets, as `autograd.Products.sort`."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """Each row times the cells of each of its blocks, as `autograd.Products.to_pairs`."""
    result = rows.new_empty(len(pairs.rows), table.shape[1])
    for block, piece, gathered in _gathered(pairs, rows):
        torch.mm(gathered, table[block].T, out=result[piece])
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """The sum of each row's weighted cells, as `autograd.Products.to_rows`."""
    wide = torch.promote_types(table.dtype, torch.float32)
    result = table.new_zeros(num_rows, table.shape[2], dtype=wide)
    for block, piece in _pieces(pairs, table.flatten(0, 1)):
        part = coefficients[piece] @ table[block]
        result.index_add_(0, pairs.rows[piece], part.to(wide))
    return result.to(table.dtype)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """The sum of each cell's weighted rows, as `autograd.Products.to_table`."""
    shape = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    result = rows.new_zeros(shape) if into is None else into
    # Of one block, so that pieces are never summed in 16 bits.
    wide = rows.new_empty(shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
    offsets = _host_offsets(pairs)
    for block, piece, gathered in _gathered(pairs, rows):
        part = coefficients[piece].T @ gathered
        if into is not None:
            into[block] += part
            continue
        begins, ends = piece.start == offsets[block], piece.stop == offsets[block + 1]
        if begins and ends:
            result[block] = part
        elif begins:
            wide.copy_(part)
        else:
            wide += part
            if ends:
                result[block] = wide
    return result


def _gathered(pairs: Sorted, rows: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """As `_pieces`, with the rows of the pairs; on a CPU they lie in scratch that is used again."""
    if device.is_gpu(rows):
        for block, piece in _pieces(pairs, rows):
            yield block, piece, rows.index_select(0, pairs.rows[piece])
        return
    scratch = rows.new_empty(_longest(rows), rows.shape[1])
    for block, piece in _pieces(pairs, rows):
        index = pairs.rows[piece]
        yield block, piece, torch.index_select(rows, 0, index, out=scratch[: len(index)])


def _pieces(pairs: Sorted, rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Each block with its pairs, all at once on a GPU; empty blocks do not appear.

    Args:
        pairs: by block.
        rows: `[*, D]` a tensor of the rows' width and dtype, on their device.
    """
    longest = len(pairs.rows) if device.is_gpu(rows) else _longest(rows)
    for block, (first, last) in enumerate(pairwise(_host_offsets(pairs))):
        for start in range(first, last, longest):
            yield block, slice(start, min(start + longest, last))


def _longest(rows: Tensor) -> int:
    """Rows that fit the scratch."""
    return max(SMALLEST_PIECE, SCRATCH_BYTES // (rows.shape[1] * rows.itemsize))


@dataclass(frozen=True)
class _HostOffsets:
    """The offsets of `Sorted`, as the host knows them."""

    values: list[int]


def _host_offsets(pairs: Sorted) -> list[int]:
    """The offsets `[B + 1]`; waits for the device at the first call with these pairs.

    Raises:
        IndexError: if there is a pair of a block that does not exist.
    """
    if (kept := pairs.derived.get(_HostOffsets)) is None:
        count = len(pairs.rows)
        values = pairs.offsets.tolist() if count else [0] * len(pairs.offsets)
        if values[0] != 0 or values[-1] != count:
            raise IndexError(
                f"{values[0] + count - values[-1]} of {count} pairs have a block id that is not in "
                f"[0, {len(values) - 1}); correct what chose them"
            )
        kept = pairs.derived[_HostOffsets] = _HostOffsets(values)
    offsets: list[int] = kept.values
    return offsets
