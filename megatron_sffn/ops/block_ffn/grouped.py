"""The products of rows and blocks by `torch.nn.functional.grouped_mm`: a group for each block.

Inputs: contiguous tensors, bf16 on a GPU of capability 9.0 or newer; what torch serves on a CPU
(fp32, bf16, fp16), where this form exists for tests. Outputs: as `autograd.Products`, the same bits
every time.

Design notes:
- Rows are gathered per pair before a product, and parts per pair are summed after one: P·D numbers,
  in pieces of `SCRATCH_BYTES`. Cutting pairs at any place is right, since a group may be empty.
- Parts are summed by `embedding_bag`, a segment sum: one kernel, fp32 inside, no atomics.
- The kernel takes fewer than 1,024 groups. More blocks go in chunks of `MOST_GROUPS`, whose bounds
  the host reads, once for all products of a call. With fewer nothing waits for the device.
- A pair whose block does not exist is not computed, and its result is undefined.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.block_ffn.pairs import ByRow, Sorted, sort_by_block

MOST_GROUPS = 1023
"""Groups of one call. The kernel refuses 1,024."""

SCRATCH_BYTES = 1 << 31
"""Largest copy of rows, or of parts of rows, that exists at a time."""

MULTIPLE = 8
"""Numbers of which widths must be multiples: 16 bytes in bf16, as TMA wants its strides."""

CAPABILITY = (9, 0)
"""Below, torch loops over groups on the host, in place of one kernel."""

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(tensor: Tensor, widths: dict[str, int]) -> str | None:
    """Why this form cannot compute, as a clause with the value and the rule; None if it can.

    Args:
        tensor: of the dtype and on the device in question.
        widths: name -> numbers in a row of a table, or cells of a block.
    """
    if not hasattr(F, "grouped_mm"):
        return f"needs torch 2.10 or newer, and this is {torch.__version__}"
    served = (torch.bfloat16,) if device.is_gpu(tensor) else CPU_DTYPES
    if tensor.dtype not in served:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in served)
        return f"computes in {names}, but the tensors are {tensor.dtype}"
    if device.is_gpu(tensor) and device.capability(tensor) < CAPABILITY:
        major, minor = device.capability(tensor)
        name = device.name(tensor)
        return f"needs a GPU of capability 9.0 or newer, and {name} has {major}.{minor}"
    return refusal_of_widths(widths)


def refusal_of_widths(widths: dict[str, int], multiple: int = MULTIPLE) -> str | None:
    """The part of `refusal` that sizes alone decide."""
    wrong = (f"{name} is {width}" for name, width in widths.items() if width % multiple)
    first = next(wrong, None)
    return None if first is None else f"needs multiples of {multiple}, and {first}"


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The stable order of blocks, and their offsets, as `autograd.Products.sort`."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """Each row times the cells of each of its blocks, as `autograd.Products.to_pairs`."""
    table, longest = aligned(table), _count(rows.shape[1] * rows.itemsize)
    products = []
    for chunk in _chunks(pairs):
        for first in range(chunk.first, chunk.last, longest):
            last = min(first + longest, chunk.last)
            gathered = rows.index_select(0, pairs.rows[first:last])
            ends = (chunk.ends - first).clamp(0, last - first)
            products.append(F.grouped_mm(gathered, table[chunk.blocks].mT, offs=ends))
    return joined(products, rows.new_empty(0, table.shape[1]))


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """The sum of each row's weighted cells, as `autograd.Products.to_rows`."""
    width = table.shape[2]
    if not len(pairs.rows):
        return table.new_zeros(num_rows, width)
    coefficients, table, by_row = aligned(coefficients), aligned(table), pairs.by_row(num_rows)
    sums = []
    for piece in columns(width, len(pairs.rows) * table.itemsize):
        parts = [
            F.grouped_mm(
                coefficients[chunk.first : chunk.last],
                table[chunk.blocks, :, piece],
                offs=chunk.ends - chunk.first,
            )
            for chunk in _chunks(pairs)
            if chunk.first < chunk.last
        ]
        sums.append(sum_parts(joined(parts, parts[0]), by_row))
    return joined(sums, sums[0], dim=1)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """The sum of each cell's weighted rows, as `autograd.Products.to_table`."""
    blocks, (count, cells), width = len(pairs.offsets) - 1, coefficients.shape, rows.shape[1]
    if not count:
        return rows.new_zeros(blocks, cells, width) if into is None else into
    coefficients = aligned(coefficients)
    pieces, chunks = list(columns(width, count * rows.itemsize)), list(_chunks(pairs))
    if into is None and len(pieces) == len(chunks) == 1:
        return _chunk_to_table(coefficients, rows, pairs, chunks[0], pieces[0])
    result = rows.new_empty(blocks, cells, width) if into is None else into
    for chunk in chunks:
        for piece in pieces:
            product = _chunk_to_table(coefficients, rows, pairs, chunk, piece)
            target = result[chunk.blocks, :, piece]
            if into is None:
                target.copy_(product)
            else:
                target.add_(product)
    return result


@dataclass(frozen=True)
class _Chunk:
    """Consecutive blocks that one call takes.

    Args:
        blocks: which.
        first: their first pair.
        last: the pair after their last.
        ends: `[blocks]` int32, where in all pairs each block ends.
    """

    blocks: slice
    first: int
    last: int
    ends: Tensor


@dataclass(frozen=True)
class _Chunks:
    """All blocks, in chunks of at most `MOST_GROUPS`; chunks without a pair are among them."""

    chunks: list[_Chunk]


def _chunks(pairs: Sorted) -> Iterator[_Chunk]:
    """Chunks of blocks; waits for the device where there are several, at the first call."""
    if (kept := pairs.derived.get(_Chunks)) is None:
        blocks, ends = len(pairs.offsets) - 1, pairs.offsets[1:].int()
        starts = list(range(0, blocks, MOST_GROUPS))
        bounds = [0, len(pairs.rows)]
        if len(starts) > 1:
            bounds[1:1] = pairs.offsets[MOST_GROUPS:blocks:MOST_GROUPS].tolist()
        kept = pairs.derived[_Chunks] = _Chunks(
            [
                _Chunk(slice(start, start + MOST_GROUPS), first, last, ends[start:][:MOST_GROUPS])
                for start, first, last in zip(starts, bounds, bounds[1:], strict=False)
            ]
        )
    chunks: list[_Chunk] = kept.chunks
    return iter(chunks)


def _chunk_to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, chunk: _Chunk, piece: slice
) -> Tensor:
    """`[blocks of the chunk, N, columns of the piece]` of `to_table`."""
    span = slice(chunk.first, chunk.last)
    gathered = rows[:, piece].index_select(0, pairs.rows[span])
    if not len(gathered):
        blocks = len(chunk.ends)
        return gathered.new_zeros(blocks, coefficients.shape[1], gathered.shape[1])
    return F.grouped_mm(coefficients[span].mT, gathered, offs=chunk.ends - chunk.first)


def sum_parts(parts: Tensor, by_row: ByRow) -> Tensor:
    """`[P, D]` parts of rows, a part for each sorted pair, to their sums `[R, D]`, made in fp32."""
    return F.embedding_bag(
        by_row.order, parts, by_row.offsets, mode="sum", include_last_offset=True
    )


def columns(width: int, bytes_per_column: int) -> Iterator[slice]:
    """Columns whose scratch fits, in multiples of 64, which is a line of memory in bf16."""
    step = max(64, _count(bytes_per_column) // 64 * 64)
    return (slice(first, min(first + step, width)) for first in range(0, width, step))


def _count(size: int) -> int:
    """How many pieces of so many bytes fit the scratch."""
    return max(MULTIPLE, SCRATCH_BYTES // size)


def joined(pieces: list[Tensor], otherwise: Tensor, dim: int = 0) -> Tensor:
    """The concatenation of pieces; without a copy if there is one, or none."""
    if len(pieces) > 1:
        return torch.cat(pieces, dim)
    return pieces[0] if pieces else otherwise


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not begin at a multiple of 16 bytes, as TMA wants it."""
    offset = tensor.storage_offset() * tensor.itemsize
    return tensor.clone() if offset % 16 else tensor
