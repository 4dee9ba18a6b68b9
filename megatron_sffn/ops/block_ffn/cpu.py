"""`block_ffn` as a loop over blocks, with a hand-written backward.

For each block: gather its rows, up, activation, down, add to the rows' outputs. What makes it fast
(measured ratios over a dense FFN are in benchmarks/):

- nothing of size T·K·D ever exists: gathered rows live in one piece of scratch that is used again
  and again, and the backward gathers them anew instead of saving them;
- the up projections are saved in block order, P·G numbers, which is what a dense FFN saves too;
- slicing the tables under autograd would make each block's backward allocate a gradient of the
  whole table; here each block writes its own slice of one gradient.

Outputs are summed in fp32 when the inputs are narrower. A row meets a block at most once, so the
adds of one block never collide: results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn.pairs import Pairs

SCRATCH_BYTES = 1 << 20
"""Size of the piece of gathered rows: it should stay in a core's L2 cache."""

SMALLEST_PIECE = 64
"""Rows below which the products would be too small, however wide a row is."""


def block_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Arguments and result as `op.block_ffn_pairs`."""
    order, offsets = pairs.by_block(keys.shape[0])
    rows = pairs.rows[order]
    if gates is not None:
        gates = gates[order].to(x.dtype)
    return _BlockFFN.apply(x, keys, values, gates, rows, offsets, activation)


class _BlockFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Tensor | None,
        rows: Tensor,
        offsets: list[int],
        activation: Activation,
    ) -> Tensor:
        ups = x.new_empty(len(rows), keys.shape[1])
        y = x.new_zeros(len(x), values.shape[2], dtype=_sum_dtype(x))
        scratch = x.new_empty(_piece(x), x.shape[1])
        for block, at in _pieces(offsets, len(scratch)):
            here = rows[at]
            x_here = torch.index_select(x, 0, here, out=scratch[: len(here)])
            up = torch.mm(x_here, keys[block].T, out=ups[at])
            h = activation(up)
            if gates is not None:
                h = h * gates[at, None]
            y.index_add_(0, here, (h @ values[block]).to(y.dtype))
        ctx.save_for_backward(x, keys, values, gates, rows, ups)
        ctx.offsets, ctx.activation = offsets, activation
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, values, gates, rows, ups = ctx.saved_tensors
        (dy,) = grads
        dx = x.new_zeros(x.shape, dtype=_sum_dtype(x))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        dgates = None if gates is None else torch.empty_like(gates)
        x_scratch = x.new_empty(_piece(x), x.shape[1])
        dy_scratch = dy.new_empty(len(x_scratch), dy.shape[1])
        for block, at in _pieces(ctx.offsets, len(x_scratch)):
            here, up = rows[at], ups[at]
            x_here = torch.index_select(x, 0, here, out=x_scratch[: len(here)])
            dy_here = torch.index_select(dy, 0, here, out=dy_scratch[: len(here)])
            h = ctx.activation(up)
            dh = dy_here @ values[block].T
            if gates is not None and dgates is not None:
                torch.sum(dh * h, dim=1, out=dgates[at])
                dh = dh * gates[at, None]
                h = h * gates[at, None]
            dvalues[block].addmm_(h.T, dy_here)
            dup = ctx.activation.backward(dh, up)
            dkeys[block].addmm_(dup.T, x_here)
            dx.index_add_(0, here, (dup @ keys[block]).to(dx.dtype))
        return dx.to(x.dtype), dkeys, dvalues, dgates, None, None, None


def _pieces(offsets: list[int], longest: int) -> Iterator[tuple[int, slice]]:
    """Each block with its pairs, at most `longest` at a time; empty blocks do not appear."""
    for block in range(len(offsets) - 1):
        for start in range(offsets[block], offsets[block + 1], longest):
            yield block, slice(start, min(start + longest, offsets[block + 1]))


def _piece(x: Tensor) -> int:
    """Rows of x that fit the scratch."""
    return max(SMALLEST_PIECE, SCRATCH_BYTES // (x.shape[1] * x.element_size()))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which outputs are summed: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)
