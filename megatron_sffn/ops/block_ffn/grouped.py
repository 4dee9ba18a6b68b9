"""The backend `grouped`: `torch.nn.functional.grouped_mm` with one group per block.

Inputs: contiguous tensors, bf16 on a GPU of capability 9.0 or newer; fp32, bf16 or fp16 on a CPU,
where this backend exists for tests. Results are bitwise reproducible.

Design notes:
- `to_pairs` and `to_table` gather a row per pair before the product; `to_rows` computes a partial
  row per pair and sums them afterwards. That is P·D numbers, in slices of `SCRATCH_BYTES`. A slice
  may begin and end anywhere in a group, because a group may be empty.
- Partial rows are summed by `embedding_bag`: one kernel, sums in fp32, no atomics.
- The kernel takes fewer than 1,024 groups. More blocks go in ranges of `MOST_GROUPS` blocks. The
  host waits for the bounds of the ranges, once for all products of a call; with one range it does
  not wait.
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
"""Most groups per call; the kernel refuses 1,024."""

SCRATCH_BYTES = 1 << 31
"""Most bytes of gathered or partial rows that exist at a time."""

MULTIPLE = 8
"""Widths must be multiples of 8: 16 bytes in bf16, the alignment of TMA's strides."""

CAPABILITY = (9, 0)
"""On older GPUs torch loops over the groups on the host instead of one kernel."""

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(tensor: Tensor, widths: dict[str, int]) -> str | None:
    """Why this backend cannot compute, as a clause with the value and the rule; None if it can.

    Args:
        tensor: a tensor on the device and in the dtype to compute in.
        widths: name -> width of a table, or cells per block.
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
    """The part of `refusal` that depends on sizes alone."""
    wrong = (f"{name} is {width}" for name, width in widths.items() if width % multiple)
    first = next(wrong, None)
    return None if first is None else f"needs multiples of {multiple}, and {first}"


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    table, longest = aligned(table), _count(rows.shape[1] * rows.itemsize)
    products = []
    for blocks in _block_ranges(pairs):
        for first in range(blocks.first, blocks.last, longest):
            last = min(first + longest, blocks.last)
            gathered = rows.index_select(0, pairs.rows[first:last])
            # Clamped, the blocks outside this slice of pairs become empty groups.
            ends = (blocks.ends - first).clamp(0, last - first)
            products.append(F.grouped_mm(gathered, table[blocks.ids].mT, offs=ends))
    return joined(products, rows.new_empty(0, table.shape[1]))


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    width = table.shape[2]
    if not len(pairs.rows):
        return table.new_zeros(num_rows, width)
    coefficients, table, by_row = aligned(coefficients), aligned(table), pairs.by_row(num_rows)
    sums = []
    for piece in columns(width, len(pairs.rows) * table.itemsize):
        partial_rows = [
            F.grouped_mm(
                coefficients[blocks.first : blocks.last],
                table[blocks.ids, :, piece],
                offs=blocks.ends - blocks.first,
            )
            for blocks in _block_ranges(pairs)
            if blocks.first < blocks.last
        ]
        sums.append(sum_by_row(joined(partial_rows, partial_rows[0]), by_row))
    return joined(sums, sums[0], dim=1)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    num_blocks, (num_pairs, cells), width = (
        len(pairs.offsets) - 1,
        coefficients.shape,
        rows.shape[1],
    )
    if not num_pairs:
        return rows.new_zeros(num_blocks, cells, width) if into is None else into
    coefficients = aligned(coefficients)
    pieces, ranges = list(columns(width, num_pairs * rows.itemsize)), list(_block_ranges(pairs))
    if into is None and len(pieces) == len(ranges) == 1:
        return _range_to_table(coefficients, rows, pairs, ranges[0], pieces[0])
    result = rows.new_empty(num_blocks, cells, width) if into is None else into
    for blocks in ranges:
        for piece in pieces:
            product = _range_to_table(coefficients, rows, pairs, blocks, piece)
            target = result[blocks.ids, :, piece]
            if into is None:
                target.copy_(product)
            else:
                target.add_(product)
    return result


@dataclass(frozen=True)
class _BlockRange:
    """Consecutive blocks that one call of the kernel takes.

    Args:
        ids: the blocks.
        first: the first pair of these blocks.
        last: the pair after their last one.
        ends: `[blocks]` int32, where each block ends, counted from the first of all pairs.
    """

    ids: slice
    first: int
    last: int
    ends: Tensor


@dataclass(frozen=True)
class _BlockRanges:
    """The record that `Sorted.derived` keeps for `_block_ranges`."""

    ranges: list[_BlockRange]


def _block_ranges(pairs: Sorted) -> Iterator[_BlockRange]:
    """All blocks in ranges of at most `MOST_GROUPS`; a range may have no pair.

    The first call waits for the device if there are several ranges.
    """
    if (cached := pairs.derived.get(_BlockRanges)) is None:
        num_blocks, ends = len(pairs.offsets) - 1, pairs.offsets[1:].int()
        starts = list(range(0, num_blocks, MOST_GROUPS))
        bounds = [0, len(pairs.rows)]
        if len(starts) > 1:
            bounds[1:1] = pairs.offsets[MOST_GROUPS:num_blocks:MOST_GROUPS].tolist()
        cached = pairs.derived[_BlockRanges] = _BlockRanges(
            [
                _BlockRange(
                    slice(start, start + MOST_GROUPS), first, last, ends[start:][:MOST_GROUPS]
                )
                for start, first, last in zip(starts, bounds, bounds[1:], strict=False)
            ]
        )
    ranges: list[_BlockRange] = cached.ranges
    return iter(ranges)


def _range_to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, blocks: _BlockRange, piece: slice
) -> Tensor:
    """`to_table` for a range of blocks and a slice of columns: `[blocks, N, columns]`."""
    span = slice(blocks.first, blocks.last)
    gathered = rows[:, piece].index_select(0, pairs.rows[span])
    if not len(gathered):
        return gathered.new_zeros(len(blocks.ends), coefficients.shape[1], gathered.shape[1])
    return F.grouped_mm(coefficients[span].mT, gathered, offs=blocks.ends - blocks.first)


def sum_by_row(partial_rows: Tensor, by_row: ByRow) -> Tensor:
    """Sum `[P, D]`, a partial row per sorted pair, to the rows `[R, D]`, in fp32."""
    return F.embedding_bag(
        by_row.order, partial_rows, by_row.offsets, mode="sum", include_last_offset=True
    )


def columns(width: int, bytes_per_column: int) -> Iterator[slice]:
    """Slices of columns that fit in `SCRATCH_BYTES`.

    Slices are multiples of 64 columns, a cache line of 128 bytes in bf16.
    """
    step = max(64, _count(bytes_per_column) // 64 * 64)
    return (slice(first, min(first + step, width)) for first in range(0, width, step))


def _count(bytes_each: int) -> int:
    """How many items of a size fit in `SCRATCH_BYTES`."""
    return max(MULTIPLE, SCRATCH_BYTES // bytes_each)


def joined(pieces: list[Tensor], if_empty: Tensor, dim: int = 0) -> Tensor:
    """The concatenation of pieces, without a copy if there is one; `if_empty` if there is none."""
    if len(pieces) > 1:
        return torch.cat(pieces, dim)
    return pieces[0] if pieces else if_empty


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not begin at a multiple of 16 bytes, as TMA requires."""
    offset = tensor.storage_offset() * tensor.itemsize
    return tensor.clone() if offset % 16 else tensor
