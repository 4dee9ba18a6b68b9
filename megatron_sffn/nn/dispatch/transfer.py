"""Differentiable dispatch or combine whose start and wait are separate, for overlap with compute.

In the forward pass `start` starts the collective and `wait` waits for it. In the backward pass the
order is reversed: the backward of `wait` starts the adjoint collective, and the backward of `start`
waits for it. Autograd runs the backward pass in reverse order of the forward pass, so work that was
queued between start and wait in the forward pass also runs between them in the backward pass.

Design notes: an empty tensor, the handle, connects `start` and `wait` in autograd's graph. The rows
cannot connect them: `wait` returns another number of rows than `start` takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch.row_exchange import AsyncCollective, RowExchange


class Transfer:
    """One direction of a row exchange; an object serves one forward and its backward pass.

    Args:
        exchange: the row exchange.
        combine: True to combine in the forward pass, False to dispatch.
    """

    def __init__(self, exchange: RowExchange, *, combine: bool = False) -> None:
        self.exchange, self.combine = exchange, combine
        self._collective: AsyncCollective | None = None

    def start(self, rows: Tensor, *, save_rows: bool = False) -> Tensor:
        """Start to send the rows.

        Args:
            rows: `[T, C]` to dispatch, `[R, C]` to combine.
            save_rows: True to keep the rows until the backward pass, which dispatches them again.

        Returns:
            A handle, the argument of `wait`.
        """
        handle: Tensor = _StartTransfer.apply(rows, self, save_rows)
        return handle

    def wait(self, handle: Tensor) -> Tensor:
        """Wait for the dispatched rows `[R, C]` or the combined rows `[T, C]`; differentiable."""
        rows: Tensor = _WaitForTransfer.apply(handle, self)
        return rows

    def start_collective(self, rows: Tensor, *, combine: bool) -> None:
        """Start the collective of one direction; see `wait_for_collective`."""
        assert self._collective is None, "a collective of this transfer is running already"
        exchange = self.exchange
        self._collective = (
            exchange.start_combine(rows) if combine else exchange.start_dispatch(rows)
        )

    def wait_for_collective(self, *, combine: bool) -> Tensor:
        """Wait for the collective that was started last, and return its rows."""
        assert self._collective is not None, "no collective of this transfer is running"
        received, self._collective = self._collective.wait(), None
        return self.exchange.sum_per_token(received) if combine else received


class _StartTransfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer, save_rows: bool) -> Tensor:
        # Saved through autograd so that activation offloading and accounting see these tensors.
        ctx.save_for_backward(*transfer.exchange.saved_tensors, *([rows] if save_rows else []))
        ctx.transfer = transfer
        transfer.start_collective(rows, combine=transfer.combine)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.transfer.wait_for_collective(combine=not ctx.transfer.combine), None, None


class _WaitForTransfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait_for_collective(combine=transfer.combine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.transfer.start_collective(grads[0], combine=not ctx.transfer.combine)
        return grads[0].new_empty(0), None
