"""`to_rows` with a stationary result: a program owns a tile of it and passes over the blocks.

Inputs and outputs are those of `Products.to_rows`; results are bitwise reproducible. As a command
it prints how the compiler compiles the kernel for sm_90: `python -m
benchmarks.prototypes.token_stationary`.

Design notes:
- A program owns TOKENS rows and COLUMNS columns of the result. Pairs are sorted by block, and by
  row within a block, so the pairs of a block and a tile of rows are one range. Partial rows never
  exist in memory, and the order of their sum is fixed.
- A partial row has to be added to a row of the tile that only the device knows. Triton cannot
  address rows of a tile in registers or in shared memory. Of what it can express, a second product
  is the cheapest by estimate: `onehot[TOKENS, PAIRS] @ parts[PAIRS, COLUMNS]`, in which each row
  has at most one term. Partial rows are first rounded to the dtype of the table, as in
  `triton_grouped`.
- Not chosen: `tl.gather` of a row's partial row, which reads TOKENS · COLUMNS numbers of shared
  memory per block, however few pairs it has; and sums in the program's own rows of global memory
  with a barrier after each block, which move 8 bytes per number through the L2 cache.
- Zero times a number that is not finite is NaN: a partial row that is not finite spoils its tile of
  rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.triton_report import Launch, instruction, resources, specialised
from megatron_sffn.ops import triton_launch
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.utils.errors import run_command


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The tile sizes of the kernel.

    Args:
        tokens: rows of the result per program.
        columns: columns of the result per program.
        pairs: pairs that are multiplied at a time.
        cells: cells that are multiplied at a time.
        warps: warps per program.
    """

    tokens: int
    columns: int
    pairs: int
    cells: int
    warps: int


TILES = [
    Tile(tokens=tokens, columns=64, pairs=pairs, cells=64, warps=warps)
    for tokens, warps in ((128, 4), (128, 8), (256, 8), (512, 8), (512, 16))
    for pairs in (16, 32, 64)
]
"""The tiles that the command compiles."""


def to_rows(
    coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int, tile: Tile
) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    result = table.new_empty(num_rows, table.shape[2])
    programs, arguments = _start(coefficients, table, pairs, result, tile)
    triton_launch.launch(to_rows_kernel, programs, warps=tile.warps, stages=2, **arguments)
    return result


def _start(
    coefficients: Tensor, table: Tensor, pairs: Sorted, result: Tensor, tile: Tile
) -> tuple[int, dict[str, Any]]:
    """The number of programs and the arguments of the kernel."""
    (num_rows, width), (num_blocks, cells, _) = result.shape, table.shape
    return triton.cdiv(num_rows, tile.tokens) * triton.cdiv(width, tile.columns), {
        "coefficients": coefficients,
        "table": table,
        "result": result,
        "rows": pairs.rows,
        "starts": starts(pairs, num_rows, tile.tokens),
        "R": num_rows,
        "B": num_blocks,
        "N": cells,
        "D": width,
        "TOKENS": tile.tokens,
        "COLUMNS": tile.columns,
        "PAIRS": tile.pairs,
        "CELLS": tile.cells,
    }


def starts(pairs: Sorted, num_rows: int, tokens: int) -> Tensor:
    """`[tiles + 1, B]` int32: the first pair of each block at or after each tile of rows."""
    num_blocks, tiles = len(pairs.offsets) - 1, triton.cdiv(num_rows, tokens)
    device, stride = pairs.rows.device, tiles * tokens
    blocks = torch.arange(num_blocks, device=device)
    of_pairs = blocks.repeat_interleave(pairs.offsets.diff(), output_size=len(pairs.rows))
    bounds = blocks * stride + torch.arange(tiles + 1, device=device)[:, None] * tokens
    return torch.searchsorted(of_pairs * stride + pairs.rows, bounds).int()


@triton.jit
def to_rows_kernel(
    coefficients: tl.tensor,
    table: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    R: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    CELLS: tl.constexpr,
) -> None:
    """`to_rows`. Programs of the same columns are neighbours, so that they share the table."""
    num_t = tl.cdiv(R, TOKENS)
    i_t = tl.program_id(0) % num_t
    o_t = i_t * TOKENS + tl.arange(0, TOKENS)
    o_d = (tl.program_id(0) // num_t) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for b in range(B):
        first = tl.load(starts + i_t * B + b)
        last = tl.load(starts + (i_t + 1) * B + b)
        for p in range(first, last, PAIRS):
            o_p = (p + tl.arange(0, PAIRS)).to(tl.int64)
            m_p = o_p < last
            b_part = tl.zeros((PAIRS, COLUMNS), dtype=tl.float32)
            for n in range(0, N, CELLS):
                o_n = n + tl.arange(0, CELLS)
                m_n = o_n < N
                # [PAIRS, CELLS] and [CELLS, COLUMNS]
                p_h = coefficients + o_p[:, None] * N + o_n[None, :]
                b_h = tl.load(p_h, mask=m_p[:, None] & m_n[None, :], other=0.0)
                p_v = table + (b * N + o_n).to(tl.int64)[:, None] * D + o_d[None, :]
                b_v = tl.load(p_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
                b_part = tl.dot(b_h, b_v, b_part, input_precision="ieee")
            b_r = tl.load(rows + o_p, mask=m_p, other=-1)
            dtype = result.dtype.element_ty
            b_one = (o_t[:, None] == b_r[None, :]).to(dtype)
            acc = tl.dot(b_one, b_part.to(dtype), acc, input_precision="ieee")
    p_y = result + o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_y, acc.to(result.dtype.element_ty), mask=(o_t < R)[:, None] & m_d[None, :])


def report(cells: int) -> Iterator[str]:
    """One line per tile of `TILES`, compiled for sm_90 in bf16.

    Args:
        cells: G, cells per block.
    """
    num_rows, num_blocks, width = 1024, 4, 512
    target = GPUTarget("cuda", 90, 32)
    pairs = Sorted(
        rows=torch.arange(num_rows, dtype=torch.int32).repeat(num_blocks),
        offsets=torch.arange(num_blocks + 1) * num_rows,
    )
    h = torch.zeros(num_rows * num_blocks, cells, dtype=torch.bfloat16)
    table = torch.zeros(num_blocks, cells, width, dtype=torch.bfloat16)
    for tile in TILES:
        _, arguments = _start(h, table, pairs, table.new_empty(num_rows, width), tile)
        launch = Launch(
            op="token-stationary to_rows",
            cells=cells,
            kernel=to_rows_kernel,
            warps=tile.warps,
            stages=2,
            arguments=arguments,
        )
        special = specialised(launch, target)
        size = f"{tile.tokens:6} x {tile.columns:3} {tile.pairs:6} {tile.warps:6}"
        try:
            compiled = triton.compile(special.source, target=target, options=special.options)
        except Exception as error:  # from the compiler: a failure is a result
            yield f"{size}   {type(error).__name__}: {str(error).splitlines()[-1]}"
            continue
        used = resources(compiled.asm["cubin"])
        spills = used["STACK"] + used["LOCAL"]
        yield (
            f"{size} {used['REG']:10} {spills:7} {compiled.metadata.shared:8}  "
            f"{instruction(compiled.asm['ptx'])}"
        )


def main(argv: list[str] | None = None) -> int:
    """Print how the compiler compiles the kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prototypes.token_stationary", allow_abbrev=False
    )
    parser.add_argument("--cells", type=int, default=64, help="G of a block (default: 64)")
    args = parser.parse_args(argv)
    print("tokens x columns  pairs  warps  registers  spills   shared  instruction")
    for line in report(args.cells):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
