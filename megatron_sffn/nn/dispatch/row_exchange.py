"""All-to-all and all-gather of token rows, in both directions: dispatch and combine.

A `RowExchange` dispatches this rank's rows `[T, C]` to the ranks that need them, where R rows
arrive, and combines the rows `[R, C]` that are sent back: it sums the copies of each token. C is
the width of a row, D or the key width.

Design notes:
- Dispatch and combine are each other's adjoint, so the backward pass of one is the other
  (`transfer.py`). A training step has four exchanges of rows and two implementations of them.
- Sums are accumulated in fp32 or wider, in rank order, and rounded once. Every run has the same
  bits, and the error is that of one rounding for any number of ranks.
- Both directions start an asynchronous collective, so the caller can queue other work before it
  waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AsyncCollective:
    """A collective that has been started.

    Args:
        send_buffer: it must not change before `wait`.
        recv_buffer: it may be read after `wait`.
        handle: torch's handle of the collective.
    """

    send_buffer: Tensor
    recv_buffer: Tensor
    handle: Any

    def wait(self) -> Tensor:
        """The received rows. The current stream waits for them; on a CPU the host does."""
        self.handle.wait()
        return self.recv_buffer


class RowExchange(Protocol):
    """Dispatch of token rows to other ranks, and combine, its adjoint."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """Tensors that the exchange needs until the backward pass."""

    def start_dispatch(self, rows_TC: Tensor) -> AsyncCollective:
        """Send rows `[T, C]`; the collective receives rows `[R, C]`."""

    def start_combine(self, rows_RC: Tensor) -> AsyncCollective:
        """Send rows `[R, C]` back; `sum_per_token` adds up the rows that arrive."""

    def sum_per_token(self, returned: Tensor) -> Tensor:
        """Add up the returned rows of each token, to `[T, C]`."""


@dataclass(frozen=True, kw_only=True)
class AllToAllRows:
    """Send each row only to the ranks that need it (`alltoall`).

    Args:
        group: process group of the ranks.
        num_tokens: T.
        row_to_token: `[sum(send_splits)]` int32, the token of each sent row, rank after rank.
        send_splits: number of rows sent to each rank.
        recv_splits: number of rows received from each rank; they sum to R.
    """

    group: Any
    num_tokens: int
    row_to_token: Tensor
    send_splits: list[int]
    recv_splits: list[int]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The token of each row."""
        return (self.row_to_token,)

    def start_dispatch(self, rows_TC: Tensor) -> AsyncCollective:
        """Send one copy of a token to each rank that needs it."""
        return start_all_to_all(
            rows_TC.index_select(0, self.row_to_token),
            self.group,
            send_splits=self.send_splits,
            recv_splits=self.recv_splits,
        )

    def start_combine(self, rows_RC: Tensor) -> AsyncCollective:
        """Send each row back to the rank of its token."""
        return start_all_to_all(
            rows_RC, self.group, send_splits=self.recv_splits, recv_splits=self.send_splits
        )

    def sum_per_token(self, returned: Tensor) -> Tensor:
        """Add up the returned copies of each token."""
        wide = torch.promote_types(returned.dtype, torch.float32)
        sums_TC = returned.new_zeros(self.num_tokens, returned.shape[1], dtype=wide)
        tokens_by_rank = self.row_to_token.split(self.send_splits)
        rows_by_rank = returned.split(self.send_splits)
        # One call per rank: no token occurs twice in a call, so its atomic adds never collide and
        # the order of additions is fixed.
        for tokens, rows in zip(tokens_by_rank, rows_by_rank, strict=True):
            sums_TC.index_add_(0, tokens, rows.to(wide))
        return sums_TC.to(returned.dtype)


@dataclass(frozen=True, kw_only=True)
class AllGatherRows:
    """Send every row to every rank (`allgather`); all ranks have the same number of rows.

    Args:
        group: process group of the ranks.
    """

    group: Any

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def start_dispatch(self, rows_TC: Tensor) -> AsyncCollective:
        """All-gather the rows, rank after rank."""
        return start_all_gather(rows_TC, self.group)

    def start_combine(self, rows_RC: Tensor) -> AsyncCollective:
        """Send every rank the rows of its own tokens.

        A reduce-scatter sends as many bytes, but it adds in the dtype of the rows and in an order
        of its own.
        """
        return start_all_to_all(rows_RC, self.group)

    def sum_per_token(self, returned: Tensor) -> Tensor:
        """Add up the rows that each rank returned for the same tokens."""
        return sum_equal_splits(returned, self.group.size())


def start_all_to_all(
    rows: Tensor,
    group: Any,
    *,
    send_splits: list[int] | None = None,
    recv_splits: list[int] | None = None,
) -> AsyncCollective:
    """All-to-all of rows, rank after rank; not differentiable.

    Args:
        rows: `[sum(send_splits), ...]`.
        group: process group of the ranks.
        send_splits: number of rows for each rank; None for equal splits, sent and received.
        recv_splits: number of rows from each rank; None with `send_splits`.
    """
    send_buffer = rows.contiguous()
    num_received = len(rows) if recv_splits is None else sum(recv_splits)
    recv_buffer = rows.new_empty(num_received, *rows.shape[1:])
    handle = torch.distributed.all_to_all_single(
        recv_buffer,
        send_buffer,
        output_split_sizes=recv_splits,
        input_split_sizes=send_splits,
        group=group,
        async_op=True,
    )
    return AsyncCollective(send_buffer=send_buffer, recv_buffer=recv_buffer, handle=handle)


def start_all_gather(rows: Tensor, group: Any) -> AsyncCollective:
    """All-gather of rows, rank after rank; not differentiable."""
    send_buffer = rows.contiguous()
    recv_buffer = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
    handle = torch.distributed.all_gather_into_tensor(
        recv_buffer, send_buffer, group=group, async_op=True
    )
    return AsyncCollective(send_buffer=send_buffer, recv_buffer=recv_buffer, handle=handle)


def sum_equal_splits(rows: Tensor, num_splits: int) -> Tensor:
    """Add up equal splits of the rows, in their order, in fp32 or wider."""
    first, *remaining = rows.chunk(num_splits)
    # A copy, because the first split is accumulated into.
    sums = first.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    for split in remaining:
        sums += split
    return sums.to(rows.dtype)
