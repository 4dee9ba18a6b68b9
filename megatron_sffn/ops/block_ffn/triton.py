"""The products of rows and blocks on a GPU, in Triton, for fp32, bf16 and fp16.

Enters: contiguous tensors on a GPU; on a CPU only where `TRITON_INTERPRET=1` was set before the
import. Leaves: the results of `autograd.Products`, the same bits every time.

Choices
- Two forms of each product: grouped, which moves rows, and masked, which multiplies all rows with
  all cells. Each product takes the form that should be faster.
- What should be faster is derived, not measured. The unit is a dense product of as many rows and
  cells as meet, 2·P·N·D operations. Masked takes E = B·R/P units. Grouped takes 1, and moves D
  numbers per pair: `to_pairs` and `to_table` read rows from the L2 cache, which in 16 bits on an
  H200 is 144/N units; `to_rows` writes parts to memory and reads them back, 367/N. Blocks of one
  cell have no parts.
- Products of fp32 are IEEE, not TF32, whatever torch is set to, and so use no matrix units. They
  take 12 times as long, and grouped wins from fewer cells on.
- A memory of values alone stays grouped: a row may meet a cell twice there, and a mask has one bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import epilogue, triton_fused, triton_grouped, triton_masked
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.triton_launch import INTERPRETED

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "down_backward_activated",
    "sort",
    "to_pairs",
    "to_rows",
    "to_table",
    "up_activated",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MULTIPLIES = {torch.float32: 67e12, torch.bfloat16: 790e12, torch.float16: 790e12}
"""Operations an H200 does in a second: measured in 16 bits, of its data sheet in 32."""

L2, MEMORY = 5.5e12, 4.3e12
"""Bytes that it moves in a second: derived, and measured."""

MOVES = {"to_pairs": 1 / L2, "to_rows": 2 / MEMORY, "to_table": 1 / L2}
"""Seconds in which the grouped form of a product moves a byte of a row."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """See `autograd.Products`."""
    return triton_grouped.sort(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """See `autograd.Products`."""
    form = choose("to_pairs", rows.dtype, pairs, len(rows), table.shape[1])
    return form.to_pairs(rows, table, pairs)


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """See `autograd.Products`."""
    form = choose("to_rows", table.dtype, pairs, num_rows, table.shape[1])
    return form.to_rows(coefficients, table, pairs, num_rows)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """See `autograd.Products`; with `into`, fp32 `[B, N, D]`, the product is added to it."""
    form = choose("to_table", rows.dtype, pairs, len(rows), coefficients.shape[1])
    return form.to_table(coefficients, rows, pairs, into)


def up_activated(
    x: Tensor, keys: Tensor, pairs: Sorted, gates: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """See `autograd.Products`; the masked form has no fused kernel, and the epilogue follows it."""
    form = choose("to_pairs", keys.dtype, pairs, len(x), keys.shape[1])
    if form is triton_grouped:
        return triton_fused.up_activated(x, keys, pairs, gates, activation)
    ups = form.to_pairs(x, keys, pairs)
    return ups, epilogue.activated(ups, gates, activation)


def down_backward_activated(
    dy: Tensor,
    values: Tensor,
    pairs: Sorted,
    ups: Tensor,
    gates: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `autograd.Products` and `up_activated`."""
    form = choose("to_pairs", values.dtype, pairs, len(dy), values.shape[1])
    if form is triton_grouped:
        return triton_fused.down_backward_activated(dy, values, pairs, ups, gates, activation)
    dh = form.to_pairs(dy, values, pairs)
    return epilogue.backward(ups, dh, gates, activation)


def choose(product: str, dtype: torch.dtype, pairs: Sorted, num_rows: int, cells: int) -> Any:
    """The module that computes a product; does not wait for the device.

    Args:
        product: a key of `MOVES`.
        dtype: of the table.
        pairs: who meets.
        num_rows: R.
        cells: N of a block.
    """
    moves = 1 / L2 if cells == 1 else MOVES[product]
    moving = dtype.itemsize * moves * MULTIPLIES[dtype] / (2 * cells)
    num_blocks, num_pairs = len(pairs.offsets) - 1, len(pairs.rows)
    masked = pairs.distinct and num_blocks * num_rows < (1 + moving) * num_pairs
    return triton_masked if masked else triton_grouped
