"""Rows on their way, for autograd: a start and a finish, with other work between them.

In the forward a leg goes along its wire, out or back; in the backward its finish starts the other
way and its start finishes it. Autograd runs backwards in the reverse of the forward's order, so
that work which the forward queued between start and finish lies between them in the backward, too.

An empty tensor connects the two in autograd's graph. The rows themselves are in the leg, since
those that are sent and those that arrive differ in number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch.row_exchange import AsyncCollective, RowExchange


class Transfer:
    """One way of one wire.

    Args:
        wire: the way.
        back: whether the forward goes back.
    """

    def __init__(self, wire: RowExchange, *, back: bool = False) -> None:
        self.wire, self.back = wire, back
        self._flight: AsyncCollective | None = None

    def start(self, rows: Tensor, *, keep: bool = False) -> Tensor:
        """Send the rows.

        Args:
            rows: `[T, C]`, or `[R, C]` on the way back.
            keep: whether they stay for the backward, because somebody will send them again.

        Returns:
            What `finish` has to get.
        """
        token: Tensor = _StartTransfer.apply(rows, self, keep)
        return token

    def finish(self, token: Tensor) -> Tensor:
        """What has arrived: `[R, C]`, or `[T, C]` on the way back; differentiable in the rows."""
        rows: Tensor = _WaitForTransfer.apply(token, self)
        return rows

    def launch(self, rows: Tensor, *, back: bool) -> None:
        """Send rows one way; see `land`."""
        assert self._flight is None, "rows are on their way already"
        self._flight = self.wire.start_back(rows) if back else self.wire.start_out(rows)

    def land(self, *, back: bool) -> Tensor:
        """What arrives of the rows launched last."""
        assert self._flight is not None, "no rows are on their way"
        arrived, self._flight = self._flight.land(), None
        return self.wire.sum_per_token(arrived) if back else arrived


class _StartTransfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, leg: Transfer, keep: bool) -> Tensor:
        # Saved for those who count or offload what autograd keeps.
        ctx.save_for_backward(*leg.wire.tensors, *([rows] if keep else []))
        ctx.leg = leg
        leg.launch(rows, back=leg.back)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.leg.land(back=not ctx.leg.back), None, None


class _WaitForTransfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, leg: Transfer) -> Tensor:
        ctx.leg = leg
        return leg.land(back=leg.back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.leg.launch(grads[0], back=not ctx.leg.back)
        return grads[0].new_empty(0), None
