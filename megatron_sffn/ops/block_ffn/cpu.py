"""The backend `cpu`: `products.cpp` for fp32 and fp64, and a dtype rule for half precision.

`auto` is `cpu` or `torch`, whichever is faster on this machine for the sizes of a call
(`measured.py`).

Design notes: half precision takes the backend `torch`, whose matmuls use the CPU's matrix units, if
a block has `FEW_CELLS` cells or more. Smaller blocks would make too many calls, and converting to
fp32 and back is faster (benchmarks/NOTES.md). Without a C++ compiler everything falls back to
`torch`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_sffn.ops.block_ffn import torch_backend
from megatron_sffn.ops.block_ffn.autograd import Products
from megatron_sffn.ops.block_ffn.measured import loop_is_faster
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.compiled import kernels

FEW_CELLS = 64
"""Cells per block below which half precision is computed in fp32."""


def fastest(dtype: torch.dtype, cells: int, width: int) -> Products:
    """The products of the backend `auto` on a CPU for a dtype, cells per block and row width."""
    chosen = products(dtype, cells)
    # A measurement cannot be traced.
    if isinstance(chosen, _Compiled) and not torch.compiler.is_compiling():
        return torch_backend if loop_is_faster(chosen, dtype, cells, width) else chosen
    return chosen


def products(dtype: torch.dtype, cells: int) -> Products:
    """The products of the backend `cpu` for a dtype and a number of cells per block."""
    compiled = _compiled()
    if compiled is None:
        return torch_backend
    if dtype in (torch.float32, torch.float64):
        return compiled
    return _Widened(compiled) if cells < FEW_CELLS else torch_backend


@functools.cache
def _compiled() -> Products | None:
    """The C++ kernels, registered with torch's FLOP counter; None if they cannot be built."""
    compiled = kernels()
    if compiled is None:
        return None
    register_flop_formula([compiled.to_pairs, compiled.to_rows])(_flops_with_table)
    register_flop_formula(compiled.to_table)(_flops_to_table)
    return _Compiled(compiled)


def _flops_with_table(_: Any, table: Any, row: Any, *__: Any, **___: Any) -> int:
    """FLOPs of `to_pairs` and `to_rows` from the shapes of their arguments: 2·P·N·D."""
    flops: int = 2 * row[0] * table[1] * table[2]
    return flops


def _flops_to_table(pairs: Any, rows: Any, *_: Any, **__: Any) -> int:
    """FLOPs of `to_table` from the shapes of its arguments: 2·P·N·D."""
    flops: int = 2 * pairs[0] * pairs[1] * rows[1]
    return flops


class _Compiled:
    """The C++ operators as `Products`."""

    def __init__(self, kernels: Any) -> None:
        self.sort = kernels.sort_by_block
        self._kernels = kernels

    def to_pairs(self, rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
        result: Tensor = self._kernels.to_pairs(rows, table, pairs.rows, pairs.offsets)
        return result

    def to_rows(self, coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
        result: Tensor = self._kernels.to_rows(
            coefficients, table, pairs.rows, pairs.offsets, num_rows
        )
        return result

    def to_table(
        self, coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
    ) -> Tensor:
        result: Tensor = self._kernels.to_table(coefficients, rows, pairs.rows, pairs.offsets)
        return result if into is None else into.add_(result)


class _Widened:
    """Products of half-precision tensors, computed by fp32 products and rounded at the end."""

    def __init__(self, products: Products) -> None:
        self.sort = products.sort
        self._products = products

    def to_pairs(self, rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
        return self._products.to_pairs(rows.float(), table.float(), pairs).to(rows.dtype)

    def to_rows(self, coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
        result = self._products.to_rows(coefficients.float(), table.float(), pairs, num_rows)
        return result.to(table.dtype)

    def to_table(
        self, coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
    ) -> Tensor:
        result = self._products.to_table(coefficients.float(), rows.float(), pairs, into)
        return result if into is not None else result.to(rows.dtype)
