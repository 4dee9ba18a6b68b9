"""Ways for rows between ranks, each with its adjoint.

A `RowExchange` carries `[T, C]` rows of this rank `out` to the ranks that need them, and `[R, C]`
rows `back`, where what comes from several ranks is summed per token. The two are each other's
adjoint, so that the backward of the one is the other (`transfer.py`): four exchanges of rows in a
step, and two pieces of code. All sums are in fp32 at least, in the order of the ranks, and rounded
once: the same bits in every run, and the error of one rounding on any number of ranks.

Both ways begin with a collective that nobody waits for yet, an `AsyncCollective`, so that whoever
has other work queues it before `land`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AsyncCollective:
    """A message on its way.

    Args:
        message: what is sent; it must not change before `land`.
        arriving: where it arrives; to be read after `land`.
        work: torch's handle of the collective.
    """

    message: Tensor
    arriving: Tensor
    work: Any

    def land(self) -> Tensor:
        """What has arrived. The current stream waits for it; on a CPU, the host does."""
        self.work.wait()
        return self.arriving


class RowExchange(Protocol):
    """A way for rows."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it needs of the device's memory until the backward."""

    def start_out(self, rows: Tensor) -> AsyncCollective:
        """Send `[T, C]` rows; `[R, C]` arrive."""

    def start_back(self, rows: Tensor) -> AsyncCollective:
        """Send `[R, C]` rows; what arrives is for `sum_per_token`."""

    def sum_per_token(self, returned: Tensor) -> Tensor:
        """What came back from all ranks to `[T, C]` sums."""


@dataclass(frozen=True, kw_only=True)
class AllToAllRows:
    """Each row goes where it is needed (`alltoall`).

    Args:
        group: of the ranks.
        num_tokens: T.
        tokens: `[S]` int32, the token behind each row sent, rank after rank.
        sent: rows sent to each rank.
        received: rows received from each rank; they sum to R.
    """

    group: Any
    num_tokens: int
    tokens: Tensor
    sent: list[int]
    received: list[int]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Which token each row is of."""
        return (self.tokens,)

    def start_out(self, rows: Tensor) -> AsyncCollective:
        """A token is copied for each rank that it visits."""
        copies = rows.index_select(0, self.tokens)
        return exchange(copies, self.group, sent=self.sent, received=self.received)

    def start_back(self, rows: Tensor) -> AsyncCollective:
        """Each row to the rank that it came from."""
        return exchange(rows, self.group, sent=self.received, received=self.sent)

    def sum_per_token(self, returned: Tensor) -> Tensor:
        """The sum of a token's copies."""
        wide = torch.promote_types(returned.dtype, torch.float32)
        summed = returned.new_zeros(self.num_tokens, returned.shape[1], dtype=wide)
        # A token is once in a rank's rows: adds do not collide, so that their order is fixed.
        pieces = zip(self.tokens.split(self.sent), returned.split(self.sent), strict=True)
        for tokens, piece in pieces:
            summed.index_add_(0, tokens, piece.to(wide))
        return summed.to(returned.dtype)


@dataclass(frozen=True, kw_only=True)
class AllGatherRows:
    """Every row goes to every rank (`allgather`), which have equally many.

    Args:
        group: of the ranks.
    """

    group: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def start_out(self, rows: Tensor) -> AsyncCollective:
        """All ranks' rows, rank after rank."""
        return gather(rows, self.group)

    def start_back(self, rows: Tensor) -> AsyncCollective:
        """Each rank gets its rows from all others.

        A reduce-scatter sends as many bytes, but adds in the rows' dtype, in an order of its own.
        """
        return exchange_equally(rows, self.group)

    def sum_per_token(self, returned: Tensor) -> Tensor:
        """The sum of all ranks' parts."""
        return sum_equal_splits(returned, self.group.size())


def exchange(rows: Tensor, group: Any, *, sent: list[int], received: list[int]) -> AsyncCollective:
    """All-to-all of rows, rank after rank; not differentiable.

    Args:
        rows: `[sum(sent), ...]`.
        group: of the ranks.
        sent: rows for each rank.
        received: rows from each rank.
    """
    message, arriving = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
    work = torch.distributed.all_to_all_single(
        arriving,
        message,
        output_split_sizes=received,
        input_split_sizes=sent,
        group=group,
        async_op=True,
    )
    return AsyncCollective(message=message, arriving=arriving, work=work)


def gather(rows: Tensor, group: Any) -> AsyncCollective:
    """All-gather of rows, rank after rank; not differentiable."""
    message = rows.contiguous()
    arriving = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
    work = torch.distributed.all_gather_into_tensor(arriving, message, group=group, async_op=True)
    return AsyncCollective(message=message, arriving=arriving, work=work)


def exchange_equally(rows: Tensor, group: Any) -> AsyncCollective:
    """All-to-all of equally many rows for each rank, rank after rank; not differentiable."""
    message = rows.contiguous()
    arriving = torch.empty_like(message)
    work = torch.distributed.all_to_all_single(arriving, message, group=group, async_op=True)
    return AsyncCollective(message=message, arriving=arriving, work=work)


def sum_equal_splits(rows: Tensor, num_parts: int) -> Tensor:
    """The sum of equal parts of rows, in their order, in fp32 at least."""
    first, *others = rows.chunk(num_parts)
    summed = first.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    for part in others:
        summed += part
    return summed.to(rows.dtype)
