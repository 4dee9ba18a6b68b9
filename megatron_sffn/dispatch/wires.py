"""Ways for rows between ranks, each with its adjoint, and how autograd passes along them.

A `Wire` carries `[T, C]` rows of this rank `out` to the ranks that need them, and `[R, C]` rows
`back`, where what comes from several ranks is summed per token. The two are each other's adjoint,
so that the backward of the one is the other: four exchanges of rows in a step, and two pieces of
code. All sums are in fp32 at least, in the order of the ranks, and rounded once: the same bits in
every run, and the error of one rounding on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Wire(Protocol):
    """A way for rows."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it needs of the device's memory until the backward."""

    def out(self, rows: Tensor) -> Tensor:
        """`[T, C]` to `[R, C]`."""

    def back(self, rows: Tensor) -> Tensor:
        """`[R, C]` to `[T, C]`, summed per token."""


@dataclass(frozen=True, kw_only=True)
class ExactWire:
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

    def out(self, rows: Tensor) -> Tensor:
        """A token is copied for each rank that it visits."""
        copies = rows.index_select(0, self.tokens)
        return exchange(copies, self.group, sent=self.sent, received=self.received)

    def back(self, rows: Tensor) -> Tensor:
        """Sums per token."""
        returned = exchange(rows, self.group, sent=self.received, received=self.sent)
        wide = torch.promote_types(rows.dtype, torch.float32)
        summed = rows.new_zeros(self.num_tokens, rows.shape[1], dtype=wide)
        # A token is once in a rank's rows: adds do not collide, so that their order is fixed.
        pieces = zip(self.tokens.split(self.sent), returned.split(self.sent), strict=True)
        for tokens, piece in pieces:
            summed.index_add_(0, tokens, piece.to(wide))
        return summed.to(rows.dtype)


@dataclass(frozen=True, kw_only=True)
class WholeWire:
    """Every row goes to every rank (`allgather`), which have equally many.

    Args:
        group: of the ranks.
    """

    group: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def out(self, rows: Tensor) -> Tensor:
        """All ranks' rows, rank after rank."""
        return gather(rows, self.group)

    def back(self, rows: Tensor) -> Tensor:
        """Each rank gets its rows from all others, and adds them up.

        A reduce-scatter sends as many bytes, but adds in the rows' dtype, in an order of its own.
        """
        ranks = self.group.size()
        parts = torch.empty_like(rows)
        torch.distributed.all_to_all_single(parts, rows.contiguous(), group=self.group)
        first, *others = parts.chunk(ranks)
        summed = first.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        for part in others:
            summed += part
        return summed.to(rows.dtype)


def send(rows: Tensor, wire: Wire, *, keep: bool = False) -> Tensor:
    """`wire.out`, differentiable.

    Args:
        rows: `[T, C]`.
        wire: the way.
        keep: whether the rows stay for the backward, because somebody will send them again.
    """
    arrived: Tensor = _Send.apply(rows, wire, keep)
    return arrived


def send_back(rows: Tensor, wire: Wire) -> Tensor:
    """`wire.back`, differentiable."""
    summed: Tensor = _SendBack.apply(rows, wire)
    return summed


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wire: Wire, keep: bool) -> Tensor:
        # Saved for those who count or offload what autograd keeps.
        ctx.save_for_backward(*wire.tensors, *([rows] if keep else []))
        ctx.wire = wire
        return wire.out(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.back(grads[0]), None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wire: Wire) -> Tensor:
        ctx.save_for_backward(*wire.tensors)
        ctx.wire = wire
        return wire.back(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.out(grads[0]), None


def exchange(rows: Tensor, group: Any, *, sent: list[int], received: list[int]) -> Tensor:
    """All-to-all of rows, rank after rank; not differentiable.

    Args:
        rows: `[sum(sent), ...]`.
        group: of the ranks.
        sent: rows for each rank.
        received: rows from each rank.
    """
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    torch.distributed.all_to_all_single(
        arrived,
        rows.contiguous(),
        output_split_sizes=received,
        input_split_sizes=sent,
        group=group,
    )
    return arrived


def gather(rows: Tensor, group: Any) -> Tensor:
    """All-gather of rows, rank after rank; not differentiable."""
    arrived = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(arrived, rows.contiguous(), group=group)
    return arrived
