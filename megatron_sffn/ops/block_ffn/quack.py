"""The backend `quack`: grouped products of the package quack-kernels, which read rows by index.

Inputs: contiguous tensors on a GPU of capability 8.0 or newer, in bf16 or fp16. Results are bitwise
reproducible.

Design notes:
- `to_pairs` and `to_table` read rows by index (`A_idx`), so no gathered copy exists, and the kernel
  itself adds gradients to `main_grad`. Partial rows of `to_rows` are summed as in `grouped`.
- `to_table` is computed transposed, because only the left operand can be read by index.
- There may be any number of blocks. An empty block is a group without terms, whose sum is zero.
- `tuned=False` takes the package's fixed tiles. Its tuner would compile and time many kernels in
  the first steps, on every rank.
- No GPU has run this. Tests compare the calls with the package's documented meaning.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.block_ffn import grouped
from megatron_sffn.ops.block_ffn.pairs import Sorted, sort_by_block
from megatron_sffn.utils.errors import ConfigError

CAPABILITY = (8, 0)

DTYPES = (torch.bfloat16, torch.float16)

MODULE = "quack.gemm_interface"
"""The module of the package with `gemm` and `gemm_add_inplace`."""


def refusal(tensor: Tensor, widths: dict[str, int]) -> str | None:
    """Why this backend cannot compute, as a clause; None if it can. Arguments as in `grouped`."""
    if not device.is_gpu(tensor):
        return "computes on a GPU, but the tensors are on a CPU"
    if tensor.dtype not in DTYPES:
        return f"computes in bfloat16 or float16, but the tensors are {tensor.dtype}"
    if device.capability(tensor) < CAPABILITY:
        major, minor = device.capability(tensor)
        name = device.name(tensor)
        return f"needs a GPU of capability 8.0 or newer, and {name} has {major}.{minor}"
    return grouped.refusal_of_widths(widths)


@functools.cache
def kernels() -> Any:
    """The package's module `MODULE`, imported at the first call.

    Raises:
        ConfigError: if the package is not installed.
    """
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backend quack needs the package quack-kernels, of which {error.name} is not "
            "installed; install megatron-sffn[quack], or use auto, grouped or masked"
        ) from None


def sort(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by block (`Products.sort`)."""
    return sort_by_block(blocks, num_blocks)


def to_pairs(rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
    """SDD: multiply each pair's row with its block's cells (`Products.to_pairs`)."""
    result = rows.new_empty(len(pairs.rows), table.shape[1])
    if len(result):
        kernels().gemm(
            grouped.aligned(rows),
            grouped.aligned(table).mT,
            out=result,
            cu_seqlens_m=pairs.offsets.int(),
            A_idx=pairs.rows,
            tuned=False,
        )
    return result


def to_rows(coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
    """DSD: sum each row's cells, weighted by its coefficients (`Products.to_rows`)."""
    width = table.shape[2]
    if not len(pairs.rows):
        return table.new_zeros(num_rows, width)
    coefficients, table = grouped.aligned(coefficients), grouped.aligned(table)
    by_row, offsets, sums = pairs.by_row(num_rows), pairs.offsets.int(), []
    for piece in grouped.columns(width, len(pairs.rows) * table.itemsize):
        partial_rows = table.new_empty(len(pairs.rows), piece.stop - piece.start)
        kernels().gemm(
            coefficients, table[:, :, piece], out=partial_rows, cu_seqlens_m=offsets, tuned=False
        )
        sums.append(grouped.sum_by_row(partial_rows, by_row))
    return grouped.joined(sums, sums[0], dim=1)


def to_table(
    coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
) -> Tensor:
    """DSᵀD: sum each cell's rows, weighted by its coefficients (`Products.to_table`)."""
    shape = len(pairs.offsets) - 1, coefficients.shape[1], rows.shape[1]
    if not len(pairs.rows):
        return rows.new_zeros(shape) if into is None else into
    result = rows.new_empty(shape) if into is None else into
    product = kernels().gemm if into is None else kernels().gemm_add_inplace
    product(
        grouped.aligned(rows).mT,
        grouped.aligned(coefficients),
        out=result.mT,
        cu_seqlens_k=pairs.offsets.int(),
        A_idx=pairs.rows,
        tuned=False,
    )
    return result
