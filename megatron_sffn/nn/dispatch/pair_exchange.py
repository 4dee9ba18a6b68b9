"""All-to-all of (row, block) pairs and their gates: one message for all token chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch import messages
from megatron_sffn.nn.dispatch.row_exchange import start_all_to_all


@dataclass(frozen=True, kw_only=True)
class PairExchange:
    """The all-to-all of the pairs of one call.

    Args:
        group: process group of the ranks.
        order: `[sum(send_splits)]` int32, the index in `[P, etp_size]` of each sent pair. Pairs lie
            rank after rank and, for each rank, chunk after chunk.
        etp_size: number of ranks that each pair goes to.
        send_splits: number of pairs sent to each rank.
        recv_counts: number of pairs received, `recv_counts[rank][chunk]`.
    """

    group: Any
    order: Tensor
    etp_size: int
    send_splits: list[int]
    recv_counts: list[list[int]]

    @property
    def recv_splits(self) -> list[int]:
        """Number of pairs received from each rank."""
        return [sum(by_chunk) for by_chunk in self.recv_counts]

    def dispatch(self, codes: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Send the pairs and their gates.

        Args:
            codes: `[sum(send_splits)]`, see `messages.encode`.
            gates: `[P]` of all pairs, or None.

        Returns:
            The received codes, chunk after chunk, and their gates, differentiable.
        """
        if gates is None:
            return self.send_pairs(codes, None)
        recv_codes, recv_gates = _AllToAllPairs.apply(gates, codes, self)
        return recv_codes, recv_gates

    def send_pairs(self, codes: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The forward pass of `dispatch`, not differentiable."""
        dtype = None if gates is None else gates.dtype
        if gates is not None:
            gates = gates.index_select(0, self.order // self.etp_size)
        message = messages.pack(codes, gates)
        received = self._all_to_all(message, self.send_splits, self.recv_splits)
        received = transpose_splits(received, self.recv_counts)
        return messages.unpack(received, codes.dtype, dtype)

    def send_back_gradients(self, dgates: Tensor, num_pairs: int) -> Tensor:
        """The backward pass: gradients `[P]` of the gates, summed over the ETP ranks of a pair.

        Args:
            dgates: gradients of the received gates, chunk after chunk.
            num_pairs: P.
        """
        counts_by_chunk = [list(by_rank) for by_rank in zip(*self.recv_counts, strict=True)]
        dgates = transpose_splits(dgates, counts_by_chunk)
        returned = self._all_to_all(dgates, self.recv_splits, self.send_splits)
        # Pairs that were not sent, those of empty places, have a gradient of zero.
        unpermuted = returned.new_zeros(num_pairs * self.etp_size)
        unpermuted.index_copy_(0, self.order.long(), returned)
        if self.etp_size == 1:
            return unpermuted
        wide = torch.promote_types(dgates.dtype, torch.float32)
        return unpermuted.view(-1, self.etp_size).sum(dim=1, dtype=wide).to(dgates.dtype)

    def _all_to_all(self, rows: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        collective = start_all_to_all(
            rows, self.group, send_splits=send_splits, recv_splits=recv_splits
        )
        return collective.wait()


class _AllToAllPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, codes: Tensor, exchange: PairExchange
    ) -> tuple[Tensor, Tensor | None]:
        # Saved through autograd so that activation offloading and accounting see this tensor.
        ctx.save_for_backward(exchange.order)
        ctx.exchange, ctx.num_pairs = exchange, len(gates)
        recv_codes, recv_gates = exchange.send_pairs(codes, gates)
        ctx.mark_non_differentiable(recv_codes)
        return recv_codes, recv_gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.send_back_gradients(grads[1], ctx.num_pairs), None, None


def transpose_splits(rows: Tensor, counts: list[list[int]]) -> Tensor:
    """Reorder splits of rows from (i, j) to (j, i), for example (rank, chunk) to (chunk, rank).

    Args:
        rows: splits of `counts[i][j]` rows in the order (0, 0), (0, 1), ...
        counts: their lengths.
    """
    if len(counts) == 1 or len(counts[0]) == 1:
        return rows
    splits = iter(rows.split([count for row in counts for count in row]))
    grid = [[next(splits) for _ in row] for row in counts]
    return torch.cat([split for column in zip(*grid, strict=True) for split in column])
