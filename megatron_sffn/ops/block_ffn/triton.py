"""The backend `triton`: products of rows and blocks on a GPU, for fp32, bf16 and fp16.

Inputs: contiguous tensors on a GPU; on a CPU only if `TRITON_INTERPRET=1` was set before the
import. Results are bitwise reproducible.

Design notes:
- Each product has two forms: grouped (`triton_grouped.py`), which moves rows, and masked
  (`triton_masked.py`), which multiplies all rows with all cells. `choose` takes the form that
  should be faster.
- The estimates are derived, not measured. Their unit is a dense product of 2·P·N·D operations.
  Masked takes E = B·R/P units. Grouped takes 1, plus the time to move D numbers per pair:
  `to_pairs` and `to_table` read rows from the L2 cache, 144/N units in 16 bits on an H200;
  `to_rows` writes partial rows to memory and reads them back, 367/N. Blocks of one cell need no
  partial rows.
- fp32 products are IEEE, not TF32, whatever torch is set to, and so do not use tensor cores. They
  take 12 times as long, so that grouped pays from fewer cells on.
- Values without keys always take grouped: a row may have a cell twice, but a mask has one bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation, AnyActivation
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

FLOPS = {torch.float32: 67e12, torch.bfloat16: 790e12, torch.float16: 790e12}
"""Operations per second of an H200: measured in 16 bits, from its data sheet in 32."""

L2, MEMORY = 5.5e12, 4.3e12
"""Bytes per second of an H200: the L2 cache (derived) and the memory (measured)."""

SECONDS_PER_BYTE = {"to_pairs": 1 / L2, "to_rows": 2 / MEMORY, "to_table": 1 / L2}
"""Time that the grouped form of a product takes to move a byte of a row."""


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return triton_grouped.sort(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    form = choose("to_pairs", rows.dtype, pairs, len(rows), table.shape[1])
    return form.to_pairs(rows, table, pairs)


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    form = choose("to_rows", table.dtype, pairs, num_rows, table.shape[1])
    return form.to_rows(coefficients, table, pairs, num_rows)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    form = choose("to_table", rows.dtype, pairs, len(rows), coefficients.shape[1])
    return form.to_table(coefficients, rows, pairs, into)


def up_activated(
    x: Tensor, keys: Tensor, pairs: Sorted, gates: Tensor | None, activation: AnyActivation
) -> tuple[Tensor, Tensor]:
    """Up projections and activated coefficients, `[P, N]` and `[P, G]`.

    Only the grouped form has a fused kernel, without clamped activations; otherwise this calls
    `epilogue.activated`.
    """
    form = choose("to_pairs", keys.dtype, pairs, len(x), keys.shape[1])
    if form is triton_grouped and isinstance(activation, Activation):
        return triton_fused.up_activated(x, keys, pairs, gates, activation)
    ups = form.to_pairs(x, keys, pairs)
    return ups, epilogue.activated(ups, gates, activation)


def down_backward_activated(
    dy: Tensor,
    values: Tensor,
    pairs: Sorted,
    ups: Tensor,
    gates: Tensor | None,
    activation: AnyActivation,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coefficients, and the gradients of ups and gates, as `epilogue.backward` returns them.

    Only the grouped form has a fused kernel, without clamped activations; otherwise this calls
    `epilogue.backward`.
    """
    form = choose("to_pairs", values.dtype, pairs, len(dy), values.shape[1])
    if form is triton_grouped and isinstance(activation, Activation):
        return triton_fused.down_backward_activated(dy, values, pairs, ups, gates, activation)
    dh = form.to_pairs(dy, values, pairs)
    return epilogue.backward(ups, dh, gates, activation)


def choose(product: str, dtype: torch.dtype, pairs: Sorted, num_rows: int, cells: int) -> Any:
    """The module that computes a product; the host does not wait for the device.

    Args:
        product: a key of `SECONDS_PER_BYTE`.
        dtype: dtype of the table.
        pairs: sorted by block.
        num_rows: R.
        cells: N, cells per block.

    Returns:
        `triton_masked` or `triton_grouped`.
    """
    seconds_per_byte = 1 / L2 if cells == 1 else SECONDS_PER_BYTE[product]
    moving = dtype.itemsize * seconds_per_byte * FLOPS[dtype] / (2 * cells)
    num_blocks, num_pairs = len(pairs.offsets) - 1, len(pairs.rows)
    masked = pairs.distinct and num_blocks * num_rows < (1 + moving) * num_pairs
    return triton_masked if masked else triton_grouped
