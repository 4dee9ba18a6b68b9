"""`block_ffn` from three products of rows and blocks, with hand-written backwards.

The up projections are saved in block order, P·G numbers, which is what a dense FFN saves too;
nothing of size P·D ever exists. Slicing the tables under autograd would make each block's backward
allocate a gradient of the whole table; here each block writes its own slice of one gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn.pairs import Pairs, Sorted


class Products(Protocol):
    """A backend: how rows meet blocks. `table` is `[B, N, D]`; results have its dtype.

    Sums are in fp32 at least.
    """

    def sort(self, blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """`[P]` int32 ids to their stable order `[P]`, int32, and the blocks' offsets."""

    def to_pairs(self, rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
        """`[R, D]` to `[P, N]`: each row times the cells of each of its blocks."""

    def to_rows(self, coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
        """`[P, N]` to `[R, D]`: the sum of a row's cells, each times its coefficient."""

    def to_table(self, coefficients: Tensor, rows: Tensor, pairs: Sorted) -> Tensor:
        """`[P, N]` and `[R, D]` to `[B, N, D]`: the sum of a cell's rows, likewise."""


def block_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None,
    activation: Activation,
    products: Products,
) -> Tensor:
    """Arguments and result as `op.block_ffn_pairs`."""
    by_block, gates = _by_block(pairs, gates, values, products, distinct=True)
    y: Tensor = _BlockFFN.apply(
        x.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        gates,
        by_block,
        activation,
        products,
    )
    return y


def weighted_values(
    num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor, products: Products
) -> Tensor:
    """A memory of values alone: the sum of each row's cells, whose coefficients are given.

    Args:
        num_rows: R.
        values: `[B, 1, D]`.
        pairs: which row meets which cell, also more than once.
        gates: `[P]`.
        products: who computes.

    Returns:
        `[R, D]` of the values' dtype, differentiable in values and gates.
    """
    by_block, coefficients = _by_block(pairs, gates, values, products, distinct=False)
    assert coefficients is not None
    y: Tensor = _WeightedValues.apply(
        coefficients[:, None], values.contiguous(), by_block, num_rows, products
    )
    return y


def _by_block(
    pairs: Pairs, gates: Tensor | None, values: Tensor, products: Products, *, distinct: bool
) -> tuple[Sorted, Tensor | None]:
    """Pairs and their gates in the order of the blocks, the gates in the values' dtype."""
    order, offsets = products.sort(pairs.blocks, len(values))
    if gates is not None:
        gates = gates.index_select(0, order).to(values.dtype)
    rows = pairs.rows.index_select(0, order)
    return Sorted(rows=rows, offsets=offsets, distinct=distinct), gates


class _BlockFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor | None,
        pairs: Sorted,
        activation: Activation,
        products: Products,
    ) -> Tensor:
        ups = products.to_pairs(x, keys, pairs)
        h = activation(ups)
        if gates is not None:
            h *= gates[:, None]
        ctx.save_for_backward(x, keys, values, gates, ups, pairs.rows, pairs.offsets)
        ctx.activation, ctx.products = activation, products
        return products.to_rows(h, values, pairs, len(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, values, gates, ups, rows, offsets = ctx.saved_tensors
        activation, products = ctx.activation, ctx.products
        pairs = Sorted(rows=rows, offsets=offsets)
        dy = grads[0].contiguous()
        h, dh = activation(ups), products.to_pairs(dy, values, pairs)
        dgates = None
        if gates is not None:
            dgates = (h * dh).sum(dim=1)
            h *= gates[:, None]
            dh *= gates[:, None]
        dvalues = products.to_table(h, dy, pairs)
        dups = activation.backward(dh, ups)
        dkeys = products.to_table(dups, x, pairs)
        return (
            products.to_rows(dups, keys, pairs, len(x)),
            dkeys,
            dvalues,
            dgates,
            None,
            None,
            None,
        )


class _WeightedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        values: Tensor,
        pairs: Sorted,
        num_rows: int,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(coefficients, values, pairs.rows, pairs.offsets)
        ctx.products = products
        return products.to_rows(coefficients, values, pairs, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, values, rows, offsets = ctx.saved_tensors
        pairs = Sorted(rows=rows, offsets=offsets, distinct=False)
        dy = grads[0].contiguous()
        dcoefficients = ctx.products.to_pairs(dy, values, pairs)
        return dcoefficients, ctx.products.to_table(coefficients, dy, pairs), None, None, None
