"""The masked form of the Triton products: dense GEMMs under a mask, for blocks of few cells.

Inputs: contiguous tensors; distinct pairs. Results are bitwise reproducible.

Design notes:
- A dense GEMM multiplies every row with every cell, which is E = B·R/P times as many operations as
  needed. The sparse operand is in memory as pairs only: `to_rows` and `to_table` gather it on chip,
  with zeros outside the pairs; `to_pairs` stores only the pairs. No row is copied, no partial row
  is summed later, and an uneven load costs nothing.
- Cells are grouped in runs, whose length is the largest power of two that divides N (at most a
  tile). A run lies in one block, so that one look-up in the index serves the run, and its
  coefficients are contiguous in memory.
- Zero times NaN or infinity is NaN: a row or cell that is not finite spoils the results of rows and
  cells that it has no pair with. The grouped kernels spoil only those that it has a pair with.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sffn.ops.block_ffn import triton_tiles
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.block_ffn.triton_index import WORD, find, index_of
from megatron_sffn.ops.block_ffn.triton_tiles import Tiles, launch, side

_PAIRS = Tiles(height=128, columns=128, inner=64, warps=8, stages=3)
_PAIRS_SHORT = Tiles(height=64, columns=128, inner=64, warps=8, stages=3)
_SUMS = Tiles(height=128, columns=128, inner=32, warps=8, stages=3)
# Short runs need more instructions to gather, so a gathered tile serves as many columns as the
# registers allow.
_SUMS_SHORT = Tiles(height=64, columns=256, inner=32, warps=8, stages=3)
_FP32 = Tiles(height=64, columns=64, inner=16, warps=8, stages=3)

SHORT = 8
"""In `TILES` a run of fewer cells is short: in 16 bits its loads are of less than 16 bytes."""

TILES: dict[tuple[str, torch.dtype, str], Tiles] = {
    ("any", torch.bfloat16, "pairs"): _PAIRS,
    ("any", torch.bfloat16, "pairs, short runs"): _PAIRS_SHORT,
    ("any", torch.bfloat16, "sums"): _SUMS,
    ("any", torch.bfloat16, "sums, short runs"): _SUMS_SHORT,
    ("any", torch.float16, "pairs"): _PAIRS,
    ("any", torch.float16, "pairs, short runs"): _PAIRS_SHORT,
    ("any", torch.float16, "sums"): _SUMS,
    ("any", torch.float16, "sums, short runs"): _SUMS_SHORT,
    ("any", torch.float32, "pairs"): _FP32,
    ("any", torch.float32, "pairs, short runs"): _FP32,
    ("any", torch.float32, "sums"): _FP32,
    ("any", torch.float32, "sums, short runs"): _FP32,
}
"""(Device, dtype, product and kind of runs) -> tiles; "any" for devices without an entry.

Untuned: no GPU has timed them. They compile without spills for sm_80 and sm_90
(`benchmarks/triton_report.py`).
"""

GROUP = 8
"""Tiles of rows that pass over the cells together, so that they share cells in the L2. Untuned."""


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    num_rows, (num_blocks, cells, width) = len(rows), table.shape
    result = rows.new_empty(len(pairs.rows), cells)
    tiles = _tiles(rows, "pairs", cells)
    # In all three products the tile height is not reduced to a small R: every change of R would
    # then compile the kernel again.
    block_r, block_c = tiles.height, side(num_blocks * cells, tiles.columns)
    launch(
        to_pairs_kernel,
        triton.cdiv(num_rows, block_r) * triton.cdiv(num_blocks * cells, block_c),
        tiles,
        x=rows,
        table=table,
        result=result,
        **_index_arguments(pairs, num_rows, cells, block_c),
        D=width,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_D=side(width, tiles.inner),
        WORDS=triton.cdiv(block_r, WORD),
        GROUP=GROUP,
    )
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    num_blocks, cells, width = table.shape
    result = table.new_empty(num_rows, width)
    tiles = _tiles(table, "sums", cells)
    block_r, block_d = tiles.height, side(width, tiles.columns)
    block_c = side(num_blocks * cells, tiles.inner)
    launch(
        to_rows_kernel,
        triton.cdiv(num_rows, block_r) * triton.cdiv(width, block_d),
        tiles,
        coefficients=coefficients,
        table=table,
        result=result,
        **_index_arguments(pairs, num_rows, cells, block_c),
        D=width,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
    )
    return result


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    (num_rows, width), cells = rows.shape, coefficients.shape[1]
    num_blocks = len(pairs.offsets) - 1
    result = rows.new_empty(num_blocks, cells, width) if into is None else into
    # The kernel takes the table as contiguous.
    assert result.is_contiguous() and result.shape == (num_blocks, cells, width)
    tiles = _tiles(rows, "sums", cells)
    block_c, block_d = side(num_blocks * cells, tiles.height), side(width, tiles.columns)
    launch(
        to_table_kernel,
        triton.cdiv(num_blocks * cells, block_c) * triton.cdiv(width, block_d),
        tiles,
        coefficients=coefficients,
        x=rows,
        result=result,
        **_index_arguments(pairs, num_rows, cells, block_c),
        D=width,
        ADD=into is not None,
        BLOCK_R=tiles.inner,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
    )
    return result


def _tiles(tensor: Tensor, kind: str, cells: int) -> Tiles:
    """The tiles for a tensor's device and dtype, for long or short runs."""
    return triton_tiles.choose(TILES, tensor, kind if cells % SHORT == 0 else f"{kind}, short runs")


def _index_arguments(pairs: Sorted, num_rows: int, cells: int, block_c: int) -> dict[str, Any]:
    """The kernels' arguments for the index.

    Args:
        pairs: distinct, sorted by block.
        num_rows: R.
        cells: N, cells per block.
        block_c: cells per tile.
    """
    index, num_blocks = index_of(pairs, num_rows), len(pairs.offsets) - 1
    run = 1
    while run < block_c and cells % (2 * run) == 0:
        run *= 2
    return {
        "mask": index.mask,
        "base": index.base,
        "R": num_rows,
        "B": num_blocks,
        "per_block": cells // run,
        "RUN": run,
    }


@triton.jit(do_not_specialize=["R"])
def to_pairs_kernel(
    x: tl.tensor,
    table: tl.tensor,
    result: tl.tensor,
    mask: tl.tensor,
    base: tl.tensor,
    R: tl.tensor,
    B: tl.tensor,
    per_block: tl.tensor,
    D: tl.tensor,
    RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """SDD: a program owns BLOCK_R rows and BLOCK_C cells, and stores only the pairs."""
    RUNS: tl.constexpr = BLOCK_C // RUN
    C = B * per_block * RUN
    num_r, num_c = tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C)
    # GROUP tiles of rows visit the same tile of cells in turn, while it is in the L2 cache.
    i_r, i_c = tl.swizzle2d(
        tl.program_id(0) // num_c, tl.program_id(0) % num_c, num_r, num_c, GROUP
    )
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_s = i_c * RUNS + tl.arange(0, RUNS)
    o_w = i_r * WORDS + tl.arange(0, WORDS)
    o_b = o_s // per_block
    m_w = (o_w < tl.cdiv(R, 32))[:, None] & (o_b < B)[None, :]
    p_w = mask + o_w.to(tl.int64)[:, None] * B + o_b[None, :]
    # A tile without a pair skips the GEMM.
    if tl.sum((tl.load(p_w, mask=m_w, other=0) != 0).to(tl.int32)) == 0:
        return
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < R, o_c < C
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    p_t = table + o_c.to(tl.int64)[None, :] * D + o_d[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        m_d = o_d < D - d
        # [BLOCK_R, BLOCK_D] and [BLOCK_D, BLOCK_C]
        b_x = tl.load(p_x, mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_t = tl.load(p_t, mask=m_d[:, None] & m_c[None, :], other=0.0)
        acc = tl.dot(b_x, b_t, acc, input_precision="ieee")
        p_x += BLOCK_D
        p_t += BLOCK_D
    is_pair, first = find(mask, base, o_r, o_s, R, B, per_block, RUN)
    # From [BLOCK_R, RUNS * RUN] to [RUNS, BLOCK_R, RUN], the order of `first`, so that the rows of
    # a block are stored to neighbouring addresses.
    b_y = tl.reshape(acc.to(result.dtype.element_ty), (BLOCK_R, RUNS, RUN))
    p_y = result + first[:, :, None] + tl.arange(0, RUN)[None, None, :]
    tl.store(p_y, tl.permute(b_y, (1, 0, 2)), mask=is_pair[:, :, None])


@triton.jit(do_not_specialize=["R"])
def to_rows_kernel(
    coefficients: tl.tensor,
    table: tl.tensor,
    result: tl.tensor,
    mask: tl.tensor,
    base: tl.tensor,
    R: tl.tensor,
    B: tl.tensor,
    per_block: tl.tensor,
    D: tl.tensor,
    RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """DSD: a program owns BLOCK_R rows and BLOCK_D columns, and loops over all cells.

    Programs of the same rows are neighbours in the grid: they gather the same coefficients.
    """
    RUNS: tl.constexpr = BLOCK_C // RUN
    num_d = tl.cdiv(D, BLOCK_D)
    o_r = (tl.program_id(0) // num_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = (tl.program_id(0) % num_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < R, o_d < D
    o_v = tl.arange(0, RUN)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for s in range(0, B * per_block, RUNS):
        is_pair, first = find(mask, base, o_r, s + tl.arange(0, RUNS), R, B, per_block, RUN)
        # The coefficients, from [RUNS, BLOCK_R, RUN] to [BLOCK_R, BLOCK_C], zero outside the pairs;
        # then the cells, [BLOCK_C, BLOCK_D].
        p_h = coefficients + first[:, :, None] + o_v[None, None, :]
        b_h = tl.load(p_h, mask=is_pair[:, :, None], other=0.0)
        if RUN < 8:
            # Through fp32, which is exact: Triton 3.7.1 moves a permute of 16-bit numbers past
            # the copy to shared memory, and for sm_100 finds no layout for runs that short.
            b_h = b_h.to(tl.float32)
        b_h = tl.reshape(tl.permute(b_h, (1, 0, 2)), (BLOCK_R, BLOCK_C)).to(table.dtype.element_ty)
        o_c = s * RUN + tl.arange(0, BLOCK_C)
        p_t = table + o_c.to(tl.int64)[:, None] * D + o_d[None, :]
        b_t = tl.load(p_t, mask=(o_c < B * per_block * RUN)[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(b_h, b_t, acc, input_precision="ieee")
    p_y = result + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_y, acc.to(result.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["R"])
def to_table_kernel(
    coefficients: tl.tensor,
    x: tl.tensor,
    result: tl.tensor,
    mask: tl.tensor,
    base: tl.tensor,
    R: tl.tensor,
    B: tl.tensor,
    per_block: tl.tensor,
    D: tl.tensor,
    ADD: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """DSᵀD: a program owns BLOCK_C cells and BLOCK_D columns, and loops over all rows.

    Programs of the same cells are neighbours in the grid: they gather the same coefficients.
    """
    RUNS: tl.constexpr = BLOCK_C // RUN
    num_d = tl.cdiv(D, BLOCK_D)
    i_c = tl.program_id(0) // num_d
    o_d = (tl.program_id(0) % num_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_s = i_c * RUNS + tl.arange(0, RUNS)
    m_d = o_d < D
    o_v = tl.arange(0, RUN)
    acc = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        is_pair, first = find(mask, base, o_r, o_s, R, B, per_block, RUN)
        # The coefficients, from [RUNS, BLOCK_R, RUN] to [BLOCK_C, BLOCK_R], zero outside the pairs;
        # then the rows, [BLOCK_R, BLOCK_D].
        p_h = coefficients + first[:, :, None] + o_v[None, None, :]
        b_h = tl.load(p_h, mask=is_pair[:, :, None], other=0.0)
        b_h = tl.reshape(tl.permute(b_h, (0, 2, 1)), (BLOCK_C, BLOCK_R))
        p_x = x + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x, mask=(o_r < R)[:, None] & m_d[None, :], other=0.0)
        acc = tl.dot(b_h, b_x, acc, input_precision="ieee")
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_y = result + o_c.to(tl.int64)[:, None] * D + o_d[None, :]
    m_c = o_c < B * per_block * RUN
    if ADD:
        acc += tl.load(p_y, mask=m_c[:, None] & m_d[None, :], other=0.0)
    tl.store(p_y, acc.to(result.dtype.element_ty), mask=m_c[:, None] & m_d[None, :])
