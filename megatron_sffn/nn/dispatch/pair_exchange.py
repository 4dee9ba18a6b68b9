"""The way of pairs and their gates under `alltoall`: one message for all chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch import messages
from megatron_sffn.nn.dispatch.row_exchange import exchange


@dataclass(frozen=True, kw_only=True)
class PairExchange:
    """A way for pairs and their gates.

    Args:
        group: of the ranks.
        order: `[S]` int32, the place among `[P, slices]` of each pair that is sent, rank after
            rank, chunk after chunk for each.
        slices: ranks that each pair goes to.
        sent: pairs sent to each rank.
        received: of each rank, pairs received of each chunk.
    """

    group: Any
    order: Tensor
    slices: int
    sent: list[int]
    received: list[list[int]]

    def send(self, codes: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The pairs that arrive, chunk after chunk, and their gates, differentiably.

        Args:
            codes: `[S]`, see `messages.encode`.
            gates: `[P]` of all pairs, or None.
        """
        if gates is None:
            return self.out(codes, None)
        arrived, arrived_gates = _AllToAllPairs.apply(gates, codes, self)
        return arrived, arrived_gates

    def out(self, codes: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Not differentiable; arguments and result as `send`."""
        dtype = None if gates is None else gates.dtype
        if gates is not None:
            gates = gates.index_select(0, self.order // self.slices)
        message = messages.pack(codes, gates)
        totals = [sum(counts) for counts in self.received]
        arrived = exchange(message, self.group, sent=self.sent, received=totals).land()
        arrived = transpose_splits(arrived, self.received)
        return messages.unpack(arrived, codes.dtype, dtype)

    def back(self, dgates: Tensor, num_pairs: int) -> Tensor:
        """`[P]` gradients of the gates: each is the sum over the slices, in their order."""
        by_chunk = [list(counts) for counts in zip(*self.received, strict=True)]
        dgates = transpose_splits(dgates, by_chunk)
        totals = [sum(counts) for counts in self.received]
        returned = exchange(dgates, self.group, sent=totals, received=self.sent).land()
        parts = returned.new_zeros(num_pairs * self.slices)
        parts.index_copy_(0, self.order.long(), returned)
        if self.slices == 1:
            return parts
        wide = torch.promote_types(dgates.dtype, torch.float32)
        return parts.view(-1, self.slices).sum(dim=1, dtype=wide).to(dgates.dtype)


class _AllToAllPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, codes: Tensor, wire: PairExchange
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(wire.order)
        ctx.wire, ctx.num_pairs = wire, len(gates)
        arrived, arrived_gates = wire.out(codes, gates)
        ctx.mark_non_differentiable(arrived)
        return arrived, arrived_gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.back(grads[1], ctx.num_pairs), None, None


def transpose_splits(rows: Tensor, counts: list[list[int]]) -> Tensor:
    """Rows that lie in the order (i, j), `counts[i][j]` of each, in the order (j, i)."""
    if len(counts[0]) == 1 or len(counts) == 1:
        return rows
    parts = iter(rows.split([count for of_i in counts for count in of_i]))
    grid = [[next(parts) for _ in of_i] for of_i in counts]
    return torch.cat([part for of_j in zip(*grid, strict=True) for part in of_j])
