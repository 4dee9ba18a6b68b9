"""`alltoall`: exact counts, each row where it is needed. A rank may send or get none.

Three collectives in the forward carry everything out: the counts of rows and of pairs, the rows,
and the pairs with their gates. How long a message is must be known on the host, so that the host
waits once, for the counts: everything that needs no counts is queued before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.dispatch import messages
from megatron_sffn.dispatch.records import Dispatched, Tokens
from megatron_sffn.dispatch.wires import ExactWire, exchange, send, send_back
from megatron_sffn.ops.block_ffn import sort_stably
from megatron_sffn.ops.streams import HostCopy
from megatron_sffn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """The way back.

    Args:
        wire: on which the rows came.
        bytes_sent: see `Plan`.
    """

    wire: ExactWire
    bytes_sent: int

    def combine(self, y: Tensor) -> Tensor:
        """Send the rows' outputs back and add them up per token."""
        return send_back(y, self.wire)


@dataclass(frozen=True, kw_only=True)
class _Departures:
    """What this rank sends, rank after rank, before anybody knows how much that is.

    Args:
        counts: `[ranks, 2]` int64, rows and pairs for each rank.
        tokens: int32, the token behind each row; more places than rows.
        order: `[P · ETP]` int32, pair and slice behind each pair that is sent.
        codes: `[P · ETP]`, see `messages.encode`.
    """

    counts: Tensor
    tokens: Tensor
    order: Tensor
    codes: Tensor


def all_to_all(tokens: Tokens, placement: Placement) -> Dispatched:
    """Send each row once to each rank that holds cells of its blocks."""
    return send_exactly(tokens, placement)[0]


def send_exactly(tokens: Tokens, placement: Placement) -> tuple[Dispatched, ExactWire]:
    """`all_to_all`, and the wire on which the rows came."""
    group, slices = placement.group, placement.cell_parts
    departures = _departures(tokens, placement)
    arrivals = torch.empty_like(departures.counts)
    torch.distributed.all_to_all_single(arrivals, departures.counts, group=group)
    counts = HostCopy(torch.stack((departures.counts.T, arrivals.T))).wait()
    (rows_sent, pairs_sent), (rows_received, pairs_received) = counts

    wire = ExactWire(
        group=group,
        num_tokens=len(tokens.rows),
        # A copy of the part that is used, so that the rest is not kept.
        tokens=departures.tokens[: sum(rows_sent)].clone(),
        sent=rows_sent,
        received=rows_received,
    )
    rows = send(tokens.rows, wire, keep=tokens.keep)
    pair_wire = _PairWire(
        group=group,
        codes=departures.codes[: sum(pairs_sent)],
        order=departures.order[: sum(pairs_sent)],
        slices=slices,
        sent=pairs_sent,
        received=pairs_received,
    )
    codes, gates = pair_wire.send(tokens.gates)
    rank, row_bytes = group.rank(), tokens.rows.shape[1] * tokens.rows.itemsize
    bytes_sent = (
        (sum(rows_sent) - rows_sent[rank]) * row_bytes
        + (sum(pairs_sent) - pairs_sent[rank]) * pair_wire.pair_bytes(tokens.gates)
        + (sum(rows_received) - rows_received[rank]) * tokens.output_bytes
    )
    own = tokens.rows.detach()
    dispatched = Dispatched(
        rows=rows,
        pairs=messages.decode(codes),
        gates=gates,
        plan=AllToAll(wire=wire, bytes_sent=bytes_sent),
        rows_again=(lambda: wire.out(own)) if tokens.keep else None,
    )
    return dispatched, wire


def _departures(tokens: Tokens, placement: Placement) -> _Departures:
    """Sort the pairs by the ranks that hold their blocks; nobody waits for the device."""
    ranks, slices, pairs = placement.num_ranks, placement.cell_parts, tokens.pairs
    # A block lies on `slices` ranks: `[P, slices]` owners of each pair. Empty places go to one
    # more rank, which does not exist, behind the others.
    owners = (pairs.blocks // placement.num_local_blocks * slices)[:, None]
    owners = owners + torch.arange(slices, dtype=torch.int32, device=owners.device)
    if tokens.may_be_empty:
        owners = owners.masked_fill((pairs.blocks < 0)[:, None], ranks)
    destinations = ranks + int(tokens.may_be_empty)
    order, offsets = sort_stably(owners.flatten(), destinations)
    owners = owners.flatten().index_select(0, order)
    behind = order // slices
    rows = pairs.rows.index_select(0, behind)
    blocks = pairs.blocks.index_select(0, behind) % placement.num_local_blocks

    # Pairs of a rank are in the order of their rows: a row begins where row or rank change.
    begins_row = torch.ones_like(rows, dtype=torch.bool)
    begins_row[1:] = (rows[1:] != rows[:-1]) | (owners[1:] != owners[:-1])
    row_number = begins_row.cumsum(0, dtype=torch.int32)
    rows_before = torch.cat((row_number.new_zeros(1), row_number)).index_select(0, offsets)
    places = min(len(rows), len(tokens.rows) * destinations)
    # All pairs of a row write the same number to the same place.
    sent_tokens = rows.new_empty(places).scatter_(0, row_number.long() - 1, rows)
    counts = torch.stack((rows_before.diff(), offsets.diff()), dim=1)
    return _Departures(
        counts=counts[:ranks].contiguous(),
        tokens=sent_tokens,
        order=order,
        codes=messages.encode(blocks, begins_row, placement.num_local_blocks),
    )


@dataclass(frozen=True, kw_only=True)
class _PairWire:
    """A way for pairs and their gates.

    Args:
        group: of the ranks.
        codes: `[S]` pairs to send, rank after rank.
        order: `[S]` int32, the place of each among `[P, slices]`.
        slices: ranks that each pair goes to.
        sent: pairs sent to each rank.
        received: pairs received from each rank.
    """

    group: Any
    codes: Tensor
    order: Tensor
    slices: int
    sent: list[int]
    received: list[int]

    def pair_bytes(self, gates: Tensor | None) -> int:
        """Of a pair with its gate."""
        return self.codes.itemsize + (0 if gates is None else gates.itemsize)

    def send(self, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The pairs that arrive, and their gates, differentiably."""
        if gates is None:
            return self.out(None)
        codes, arrived = _SendGates.apply(gates, self)
        return codes, arrived

    def out(self, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pairs, and `[P]` gates of all pairs, to what arrives."""
        dtype = None if gates is None else gates.dtype
        if gates is not None:
            gates = gates.index_select(0, self.order // self.slices)
        message = messages.pack(self.codes, gates)
        arrived = exchange(message, self.group, sent=self.sent, received=self.received)
        return messages.unpack(arrived, self.codes.dtype, dtype)

    def back(self, dgates: Tensor, num_pairs: int) -> Tensor:
        """`[P]` gradients of the gates: each is the sum over the slices, in their order."""
        returned = exchange(dgates, self.group, sent=self.received, received=self.sent)
        parts = returned.new_zeros(num_pairs * self.slices)
        parts.index_copy_(0, self.order.long(), returned)
        if self.slices == 1:
            return parts
        wide = torch.promote_types(dgates.dtype, torch.float32)
        return parts.view(-1, self.slices).sum(dim=1, dtype=wide).to(dgates.dtype)


class _SendGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, wire: _PairWire) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(wire.order)
        ctx.wire, ctx.num_pairs = wire, len(gates)
        codes, arrived = wire.out(gates)
        ctx.mark_non_differentiable(codes)
        return codes, arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.back(grads[1], ctx.num_pairs), None
