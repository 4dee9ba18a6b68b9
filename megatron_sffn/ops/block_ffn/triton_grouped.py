"""The grouped form of the Triton products: grouped GEMMs with one group per block.

Inputs: contiguous tensors. Results are bitwise reproducible.

Design notes:
- `to_pairs` and `to_table` are one grouped GEMM each: a program owns a tile of one block's pairs
  and a tile of columns. It reads rows by index, so gathered rows never exist in memory. The device
  computes which tile belongs to which block, so no product waits for the host.
- `to_rows` writes a partial row per pair in the input's dtype, which rounds as in `torch_backend`,
  then sums the partial rows of each row in fp32. Compared with fp32 atomics this moves fewer bytes
  (367/G against 585/G of a dense product's time, derived for an H200) and does not depend on the
  order of arrival. It proceeds by groups of columns, so that the partial rows never exceed the
  largest of R·D numbers, `PARTS_BYTES` and P times one tile of columns. Each group reads the
  coefficients again.
- A block of one cell needs no partial rows: each would be a row of the table times a number, so the
  sum reads the table itself.
- All operands are read through pointers, not TMA descriptors: rows are gathered, and a tile of
  coefficients must be zero after the block's last pair, which the fixed shape of a descriptor
  cannot express. For the table alone a descriptor would save issue slots of copies, which are not
  the bound, and need a second form of each kernel for tables that are not aligned to 16 bytes.
- `to_table` is in `triton_table.py`; `to_pairs` with activation and gates in `triton_fused.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.block_ffn import triton_table, triton_tiles
from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block
from megatron_sffn.ops.block_ffn.triton_epilogue import store_tile
from megatron_sffn.ops.block_ffn.triton_tiles import Tiles, launch, side

NARROW, WIDE = 32, 128
"""In `TILES` a block of at most 32 cells is narrow, and one of 128 cells or more is wide."""

LARGE = {"to_pairs": (9, 10), "to_pairs, backward": (9, 10), "to_table": (9,)}
"""Product -> major compute capabilities with large tiles for wide blocks in 16 bits. Elsewhere the
accumulators of a large tile leave too few registers, and the kernel spills."""

_LARGE = Tiles(height=128, columns=256, inner=64, warps=8, stages=3)
_WIDE = Tiles(height=128, columns=128, inner=64, warps=8, stages=3)
_NARROW = Tiles(height=128, columns=64, inner=64, warps=4, stages=3)
_FP32 = Tiles(height=64, columns=64, inner=16, warps=8, stages=3)
_NARROW_FP32 = Tiles(height=64, columns=32, inner=16, warps=4, stages=3)

_PAIRS = {"large": _LARGE, "wide": _WIDE, "middle": _WIDE, "narrow": _NARROW}
# The load of a row waits for the load of its index, so of 5 pipeline stages only 3 hold operands.
_TABLE = {
    "large": Tiles(height=128, columns=256, inner=64, warps=8, stages=5),
    "wide": Tiles(height=128, columns=128, inner=64, warps=8, stages=5),
    "middle": Tiles(height=64, columns=256, inner=64, warps=8, stages=3),
    "narrow": Tiles(height=32, columns=256, inner=64, warps=4, stages=3),
}
_ANY_FP32 = {"wide": _FP32, "middle": _FP32, "narrow": _NARROW_FP32}
_TABLE_FP32 = {
    "wide": _FP32,
    "middle": _FP32,
    "narrow": Tiles(height=32, columns=64, inner=16, warps=4, stages=3),
}

TILES: dict[tuple[str, torch.dtype, str], Tiles] = {
    ("any", dtype, f"{product}, {kind}"): tiles
    for product, in_16_bits, in_32_bits in (
        ("to_pairs", _PAIRS, _ANY_FP32),
        ("to_pairs, backward", _PAIRS, _ANY_FP32),
        ("to_rows", _PAIRS, _ANY_FP32),
        ("to_table", _TABLE, _TABLE_FP32),
    )
    for dtype, kinds in (
        (torch.bfloat16, in_16_bits),
        (torch.float16, in_16_bits),
        (torch.float32, in_32_bits),
    )
    for kind, tiles in kinds.items()
}
"""(Device, dtype, product and width of the blocks) -> tiles; "any" for devices without an entry.
The height counts cells in `to_table`, and pairs in the other products.

Untuned: no GPU has timed them. The sizes are derived. A tile of 128 x 128 does 64 operations per
byte from the L2 cache, which feeds 60 % of the tensor cores of an H100; a tile of 128 x 256 does
85. A large tile leaves no room for a second program on a multiprocessor, so nothing hides its first
loads and its stores; `to_rows`, whose loop over N is short, keeps to smaller ones. Tiles are wide
in `to_table`, because the coefficients are read once per tile of columns. In bf16 all compile
without spills for sm_80, 90, 100 and 120 (`benchmarks/triton_report.py`).
"""

PARTS_BYTES = 1 << 30
"""Bytes that the partial rows of `to_rows` may take at any size."""

ROWS_PARTS = 8
"""Partial rows that a program of `sum_kernel` loads at a time. Untuned."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Tiles of consecutive pairs, each within one block.

    The host knows only the largest number of tiles that the pairs can need. A superfluous tile is
    assigned to the last block and begins after its last pair; its programs return at once.

    Args:
        blocks: the block of each tile, int64.
        firsts: the first pair of each tile, int64.
    """

    blocks: Tensor
    firsts: Tensor


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    cells = table.shape[1]
    result = rows.new_empty(len(pairs.rows), cells)
    _multiply(rows, table.mT, result, pairs, tiles_of(table, "to_pairs", cells), gather=True)
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    num_pairs, (_, cells, width) = len(pairs.rows), table.shape
    if not num_pairs:
        return table.new_zeros(num_rows, width)
    result = table.new_empty(num_rows, width)
    tiles = tiles_of(table, "to_rows", cells)
    by_row = pairs.by_row(num_rows)
    order, offsets = by_row.order, by_row.offsets
    if cells == 1:
        # A partial row would be `coefficient · table[block]`: sum those without writing them.
        blocks = torch.arange(len(table), dtype=torch.int32, device=table.device)
        blocks = blocks.repeat_interleave(pairs.offsets.diff(), output_size=num_pairs)
        weights = coefficients.index_select(0, order)
        _sum(table[:, 0], blocks.index_select(0, order), weights, offsets, result, tiles)
        return result
    numbers = max(width * num_rows, PARTS_BYTES // table.itemsize)
    group = max(1, numbers // num_pairs // tiles.columns) * tiles.columns
    scratch = table.new_empty(num_pairs, min(group, width))
    for first in range(0, width, group):
        columns = slice(first, min(first + group, width))
        partial_rows = scratch[:, : columns.stop - first]
        _multiply(coefficients, table[:, :, columns], partial_rows, pairs, tiles, gather=False)
        _sum(partial_rows, order, None, offsets, result[:, columns], tiles)
    return result


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    tiles = tiles_of(rows, "to_table", coefficients.shape[1])
    return triton_table.to_table(coefficients, rows, pairs, into, tiles)


def _multiply(
    source: Tensor, table: Tensor, result: Tensor, pairs: Sorted, tiles: Tiles, *, gather: bool
) -> None:
    """`result[p] = source[row of p if gather else p] @ table[block of p]` for every pair p.

    Args:
        source: `[R, I]` with `gather`, else `[P, I]`.
        table: `[B, I, O]`, with any strides.
        result: `[P, O]`, with any row stride.
        pairs: sorted by block.
        tiles: the tile sizes.
        gather: True to read rows of `source` by index.
    """
    if not len(pairs.rows):
        return
    schedule = schedule_of(pairs, tiles.height)
    inner, outer = table.shape[1:]
    block_o = side(outer, tiles.columns)
    launch(
        multiply_kernel,
        len(schedule.blocks) * triton.cdiv(outer, block_o),
        tiles,
        source=source,
        table=table,
        result=result,
        rows=pairs.rows,
        offsets=pairs.offsets,
        blocks=schedule.blocks,
        firsts=schedule.firsts,
        inner=inner,
        outer=outer,
        source_row=source.stride(0),
        table_block=table.stride(0),
        table_inner=table.stride(1),
        table_outer=table.stride(2),
        result_row=result.stride(0),
        GATHER=gather,
        BLOCK_P=tiles.height,
        BLOCK_I=side(inner, tiles.inner),
        BLOCK_O=block_o,
    )


def _sum(
    source: Tensor,
    index: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    result: Tensor,
    tiles: Tiles,
) -> None:
    """`result[r]`: the sum of `weights[q] · source[index[q]]` for q in [offsets[r], offsets[r+1]).

    Without weights each is 1.
    """
    block_d = side(result.shape[1], tiles.columns)
    launch(
        sum_kernel,
        len(result) * triton.cdiv(result.shape[1], block_d),
        # A row's partial rows are few bytes: many narrow programs hide more latency than wide ones.
        Tiles(height=1, columns=block_d, inner=ROWS_PARTS, warps=1, stages=tiles.stages),
        source=source,
        index=index,
        weights=weights,
        offsets=offsets,
        result=result,
        width=result.shape[1],
        source_row=source.stride(0),
        result_row=result.stride(0),
        BLOCK_Q=ROWS_PARTS,
        BLOCK_D=block_d,
    )


def schedule_of(pairs: Sorted, height: int) -> Schedule:
    """The schedule for tiles of `height` pairs, computed once for all products with these pairs."""
    if (Schedule, height) not in pairs.derived:
        offsets = pairs.offsets
        num_blocks, num_pairs = len(offsets) - 1, len(pairs.rows)
        tiles_per_block = (offsets.diff() + (height - 1)) // height
        ends = tiles_per_block.cumsum(0)
        # Every block with pairs can have one tile that is not full.
        max_tiles = num_pairs // height + min(num_blocks, num_pairs)
        tiles = torch.arange(max_tiles, device=offsets.device)
        blocks = torch.searchsorted(ends, tiles, right=True).clamp(max=num_blocks - 1)
        tile_in_block = tiles - (ends - tiles_per_block).index_select(0, blocks)
        firsts = offsets.index_select(0, blocks) + tile_in_block * height
        pairs.derived[Schedule, height] = Schedule(blocks=blocks, firsts=firsts)
    schedule: Schedule = pairs.derived[Schedule, height]
    return schedule


def tiles_of(tensor: Tensor, product: str, cells: int) -> Tiles:
    """The tiles of a product, for a tensor's device and dtype and a number of cells per block."""
    kind = "narrow" if cells <= NARROW else "middle" if cells < WIDE else "wide"
    major = device.capability(tensor)[0]
    if kind == "wide" and tensor.itemsize == 2 and major in LARGE.get(product, ()):
        kind = "large"
    return triton_tiles.choose(TILES, tensor, f"{product}, {kind}")


@triton.jit
def multiply_kernel(
    source: tl.tensor,
    table: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    blocks: tl.tensor,
    firsts: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    source_row: tl.tensor,
    table_block: tl.tensor,
    table_inner: tl.tensor,
    table_outer: tl.tensor,
    result_row: tl.tensor,
    GATHER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """`_multiply`: a program owns BLOCK_P pairs of one block and BLOCK_O columns.

    Columns are the fast index of the grid, so that neighbouring programs share rows in the L2.
    """
    num_columns = tl.cdiv(outer, BLOCK_O)
    i_t, i_o = tl.program_id(0) // num_columns, tl.program_id(0) % num_columns
    # Block ids and first pairs are int64, and so are all offsets computed from them: B·N·D and P·D
    # can exceed 2^31.
    i_b = tl.load(blocks + i_t)
    first, last = tl.load(firsts + i_t), tl.load(offsets + i_b + 1)
    if first >= last:
        return
    o_p = first + tl.arange(0, BLOCK_P)
    m_p = o_p < last
    # After the last pair the tile reads row 0, which needs no mask in the loop; the store has one.
    o_r = tl.where(m_p, o_p, 0)
    if GATHER:
        o_r = tl.load(rows + o_p, mask=m_p, other=0).to(tl.int64)
    o_i = tl.arange(0, BLOCK_I)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < outer
    p_x = source + o_r[:, None] * source_row + o_i[None, :]
    p_w = table + i_b * table_block + o_i[:, None] * table_inner + o_o[None, :] * table_outer
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    for i in range(0, inner, BLOCK_I):
        m_i = o_i < inner - i
        # [BLOCK_P, BLOCK_I] and [BLOCK_I, BLOCK_O]
        b_x = tl.load(p_x, mask=m_i[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_i[:, None] & m_o[None, :], other=0.0)
        # For fp32 operands "ieee" forbids TF32, which would keep 10 bits of the mantissa.
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
        p_x += BLOCK_I
        p_w += BLOCK_I * table_inner
    store_tile(acc, result + o_p * result_row, m_p, i_o * BLOCK_O, outer, False)


@triton.jit
def sum_kernel(
    source: tl.tensor,
    index: tl.tensor,
    weights: tl.tensor,
    offsets: tl.tensor,
    result: tl.tensor,
    width: tl.tensor,
    source_row: tl.tensor,
    result_row: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """`_sum`: a program owns one row and BLOCK_D columns of the result."""
    num_columns = tl.cdiv(width, BLOCK_D)
    i_r = (tl.program_id(0) // num_columns).to(tl.int64)
    o_d = (tl.program_id(0) % num_columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    first, last = tl.load(offsets + i_r), tl.load(offsets + i_r + 1)
    # BLOCK_Q running sums, so that as many loads are in flight. The order of the sum depends on
    # BLOCK_Q alone, not on when programs run.
    acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for q in range(first, last, BLOCK_Q):
        o_q = q + tl.arange(0, BLOCK_Q)
        m_q = o_q < last
        o_s = tl.load(index + o_q, mask=m_q, other=0).to(tl.int64)
        # [BLOCK_Q, BLOCK_D]
        p_s = source + o_s[:, None] * source_row + o_d[None, :]
        b_s = tl.load(p_s, mask=m_q[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            b_s *= tl.load(weights + o_q, mask=m_q, other=0.0).to(tl.float32)[:, None]
        acc += b_s
    total = tl.sum(acc, axis=0).to(result.dtype.element_ty)
    tl.store(result + i_r * result_row + o_d, total, mask=m_d)
