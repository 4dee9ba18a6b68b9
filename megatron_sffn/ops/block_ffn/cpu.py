"""The products of rows and blocks on a CPU: `products.cpp`, for fp32 and fp64."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_sffn.ops.block_ffn import loop
from megatron_sffn.ops.block_ffn.function import Products
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.compiled import kernels


def products(dtype: torch.dtype) -> Products:
    """The fastest for a dtype: half precision is left to torch, whose products use matrix units."""
    compiled = _compiled() if dtype in (torch.float32, torch.float64) else None
    return loop if compiled is None else compiled


@functools.cache
def _compiled() -> Products | None:
    """The C++ kernels, known to torch's FLOP counter; None where there are none."""
    compiled = kernels()
    if compiled is None:
        return None
    register_flop_formula([compiled.to_pairs, compiled.to_rows])(_flops_with_table)
    register_flop_formula(compiled.to_table)(_flops_to_table)
    return _Compiled(compiled)


def _flops_with_table(pairs: Any, table: Any, row: Any, *_: Any, **__: Any) -> int:
    """Of shapes: each pair meets a block."""
    flops: int = 2 * row[0] * table[1] * table[2]
    return flops


def _flops_to_table(pairs: Any, rows: Any, *_: Any, **__: Any) -> int:
    flops: int = 2 * pairs[0] * pairs[1] * rows[1]
    return flops


class _Compiled:
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

    def to_table(self, coefficients: Tensor, rows: Tensor, pairs: Sorted) -> Tensor:
        result: Tensor = self._kernels.to_table(coefficients, rows, pairs.rows, pairs.offsets)
        return result
