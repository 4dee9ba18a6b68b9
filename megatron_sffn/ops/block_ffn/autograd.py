"""`block_ffn` as three products of rows and blocks, with hand-written backward passes.

`Products` is the interface of a backend. The forward pass is `h = f(to_pairs(x, K)) · gates`,
`y = to_rows(h, V)`; the backward pass uses the same products and `to_table` for the gradients of
the tables.

Design notes:
- The up projections are saved for the backward pass in block order: P·N numbers, as many as a dense
  FFN of equal compute saves. The coefficients h are recomputed from them.
- Slicing the tables under autograd would allocate a gradient of the whole table per block. The
  hand-written backward pass writes each block's slice of one gradient, or adds it to Megatron's
  gradient buffer (`main_grad.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sffn.ops.activation import AnyActivation
from megatron_sffn.ops.block_ffn import epilogue, main_grad
from megatron_sffn.ops.block_ffn.pairs import Pairs, Sorted


class Products(Protocol):
    """A backend: the products of rows `[R, D]` and blocks of a table `[B, N, D]`.

    Think of a matrix of R rows and B·N cells that is zero outside the given (row, block) pairs. Its
    nonzero numbers are stored as `[P, N]`, pair by pair. In the words of MegaBlocks (arXiv
    2211.15841, S for sparse and D for dense) `to_pairs` is SDD, its sparse result sampled from a
    dense product; `to_rows` is DSD, sparse times dense; and `to_table` is DSᵀD, the DSD of the
    transposed sparse matrix.

    Results have the dtype of the table or rows that enter. Sums are in fp32 at least.

    A backend may also have fused forms, which are used if they exist:

    - `up_activated(x, keys, pairs, gates, activation) -> (ups, h)` with `ups = to_pairs(x, keys)`
      and `h = f(ups) · gates`, `[P, G]`;
    - `down_backward_activated(dy, values, pairs, ups, gates, activation) -> (h, dups, dgates)`,
      which is `epilogue.backward` of `dh = to_pairs(dy, values)`.
    """

    def sort(self, blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Sort pairs by block.

        Args:
            blocks: `[P]` int32 block ids in [0, num_blocks).
            num_blocks: B.

        Returns:
            The stable order `[P]` int32, and `[B + 1]` int64: where each block begins in it.
        """

    def to_pairs(self, rows: Tensor, table: Tensor, pairs: Sorted) -> Tensor:
        """SDD, `[P, N]`: row p is `rows[row of p] @ table[block of p].T`."""

    def to_rows(self, coefficients: Tensor, table: Tensor, pairs: Sorted, num_rows: int) -> Tensor:
        """DSD, `[R, D]`: row r is the sum of `coefficients[p] @ table[block of p]` over its pairs.

        A row without a pair is zero.
        """

    def to_table(
        self, coefficients: Tensor, rows: Tensor, pairs: Sorted, into: Tensor | None = None
    ) -> Tensor:
        """DSᵀD, `[B, N, D]`: `coefficients[p].T @ rows[row of p]` summed over a block's pairs.

        With `into`, an fp32 `[B, N, D]`, the product is added to it, and it is returned.
        """


def block_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None,
    activation: AnyActivation,
    products: Products,
    rows_again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`op.block_ffn_pairs`, computed by a backend's products."""
    by_block, gates = _by_block(pairs, gates, values, products, distinct=True)
    y: Tensor = _BlockFFN.apply(
        x.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        gates,
        by_block,
        activation,
        products,
        rows_again,
    )
    return y


def weighted_values(
    num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor, products: Products
) -> Tensor:
    """Values without keys: the sum of each row's values, weighted by the gates.

    Args:
        num_rows: R.
        values: `[B, 1, D]`; a block is one cell.
        pairs: the (row, cell) pairs; a row may have a cell more than once.
        gates: `[P]`.
        products: the backend.

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
    """Pairs and their gates sorted by block; the gates in fp32 (fp64 for fp64)."""
    order, offsets = products.sort(pairs.blocks, len(values))
    if gates is not None:
        wide = torch.promote_types(values.dtype, torch.float32)
        gates = gates.index_select(0, order).to(wide)
    rows = pairs.rows.index_select(0, order)
    return Sorted(rows=rows, offsets=offsets, order=order, distinct=distinct), gates


class _BlockFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor | None,
        pairs: Sorted,
        activation: AnyActivation,
        products: Products,
        rows_again: Callable[[], Tensor] | None,
    ) -> Tensor:
        fused = getattr(products, "up_activated", None)
        if fused is not None:
            ups, h = fused(x, keys, pairs, gates, activation)
        else:
            ups = products.to_pairs(x, keys, pairs)
            h = epilogue.activated(ups, gates, activation)
        kept_x = x if rows_again is None else None
        ctx.rows_again, ctx.num_rows = rows_again, len(x)
        ctx.save_for_backward(kept_x, keys, values, gates, ups, pairs.rows, pairs.offsets)
        ctx.derived, ctx.activation, ctx.products = pairs.derived, activation, products
        # `save_for_backward` returns other tensor objects. Only the parameters themselves have the
        # attribute `main_grad`.
        ctx.tables = keys, values
        return products.to_rows(h, values, pairs, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, values, gates, ups, rows, offsets = ctx.saved_tensors
        activation, products = ctx.activation, ctx.products
        # A copy of the dict, because torch.compile forbids a backward pass to mutate an object of
        # the forward pass.
        pairs = Sorted(rows=rows, offsets=offsets, derived=dict(ctx.derived))
        # Autograd may pass an expanded tensor, such as the gradient of a sum.
        dy = grads[0].contiguous()
        fused = getattr(products, "down_backward_activated", None)
        if fused is not None:
            h, dups, dgates = fused(dy, values, pairs, ups, gates, activation)
        else:
            dh = products.to_pairs(dy, values, pairs)
            h, dups, dgates = epilogue.backward(ups, dh, gates, activation)
            del dh  # here and below: `[P, G]` is among the largest tensors of a step
        dkeys = dvalues = dx = None
        if ctx.needs_input_grad[2]:
            dvalues = _table_gradient(ctx.tables[1], h, dy, pairs, products)
        del h
        if ctx.needs_input_grad[1]:
            if ctx.rows_again is not None:
                x = ctx.rows_again()
            dkeys = _table_gradient(ctx.tables[0], dups, x, pairs, products)
        if ctx.needs_input_grad[0]:
            dx = products.to_rows(dups, keys, pairs, ctx.num_rows)
        return dx, dkeys, dvalues, dgates, None, None, None, None


class _WeightedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        values: Tensor,
        pairs: Sorted,
        num_rows: int,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(gates, values, pairs.rows, pairs.offsets)
        ctx.derived, ctx.products, ctx.table = pairs.derived, products, values
        return products.to_rows(gates.to(values.dtype), values, pairs, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gates, values, rows, offsets = ctx.saved_tensors
        pairs = Sorted(rows=rows, offsets=offsets, distinct=False, derived=dict(ctx.derived))
        dy = grads[0].contiguous()
        dgates = dvalues = None
        if ctx.needs_input_grad[0]:
            dgates = ctx.products.to_pairs(dy, values, pairs).to(gates.dtype)
        if ctx.needs_input_grad[1]:
            coefficients = gates.to(values.dtype)
            dvalues = _table_gradient(ctx.table, coefficients, dy, pairs, ctx.products)
        return dgates, dvalues, None, None, None


def _table_gradient(
    table: Tensor, coefficients: Tensor, rows: Tensor, pairs: Sorted, products: Products
) -> Tensor | None:
    """The gradient of a table for autograd, or a placeholder if it went to `main_grad`."""
    buffer = main_grad.buffer_of(table)
    if buffer is None:
        return products.to_table(coefficients, rows, pairs)
    products.to_table(coefficients, rows, pairs, into=buffer.view(table.shape))
    return main_grad.placeholder(table)
