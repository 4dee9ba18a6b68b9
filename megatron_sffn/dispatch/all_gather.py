"""`allgather`: every row everywhere, and the outputs back to their ranks, which add them up.

It sends more than `alltoall` where some rank has no block of a token; in return nothing is sorted
and no counts travel. All ranks must have equally many tokens.

The host waits once, for the number P of pairs that are of this rank: the up projections are of P
pairs, and room for all ranks' pairs would be EP times as much. While it waits, the rows travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.dispatch import messages
from megatron_sffn.dispatch.records import Dispatched, Tokens
from megatron_sffn.dispatch.wires import WholeWire, gather, send, send_back
from megatron_sffn.ops.block_ffn import Pairs
from megatron_sffn.ops.streams import HostCopy
from megatron_sffn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class AllGather:
    """The way back.

    Args:
        wire: on which the rows came.
        bytes_sent: see `Plan`.
    """

    wire: WholeWire
    bytes_sent: int

    def combine(self, y: Tensor) -> Tensor:
        """Send each rank's rows back to it, which adds them up."""
        return send_back(y, self.wire)


def all_gather(tokens: Tokens, placement: Placement) -> Dispatched:
    """Send every row to every rank, with all of its block ids and gates."""
    wire = WholeWire(group=placement.group)
    num_rows = len(tokens.rows) * placement.num_ranks
    ids = tokens.pairs.blocks.to(messages.id_dtype(placement.num_blocks))
    all_ids, all_gates = _gather_pairs(ids, tokens.gates, wire)
    blocks = all_ids.int()
    # An empty place, -1, is in no part.
    own = blocks // placement.num_local_blocks == placement.block_part
    number = own.cumsum(0, dtype=torch.int32)
    count = HostCopy(number[-1:])
    rows = send(tokens.rows, wire, keep=tokens.keep)
    num_pairs = sum(count.wait())

    # Where the pairs of this rank are; one more place takes what all the others write.
    places = torch.arange(len(own), dtype=torch.int32, device=own.device)
    target = torch.where(own, number.long() - 1, num_pairs)
    kept = places.new_empty(num_pairs + 1).scatter_(0, target, places)[:num_pairs]
    active = len(own) // num_rows if num_rows else 1
    pairs = Pairs(
        rows=kept // active,
        blocks=blocks.index_select(0, kept) - placement.first_block,
    )
    gates = None if all_gates is None else all_gates.index_select(0, kept)
    message_bytes = ids.nbytes + (0 if tokens.gates is None else tokens.gates.nbytes)
    own_rows = tokens.rows.detach()
    plan = AllGather(
        wire=wire,
        bytes_sent=(placement.num_ranks - 1)
        * (tokens.rows.nbytes + len(tokens.rows) * tokens.output_bytes + message_bytes),
    )
    return Dispatched(
        rows=rows,
        pairs=pairs,
        gates=gates,
        plan=plan,
        rows_again=(lambda: wire.out(own_rows)) if tokens.keep else None,
    )


def _gather_pairs(
    ids: Tensor, gates: Tensor | None, wire: WholeWire
) -> tuple[Tensor, Tensor | None]:
    """`[P]` ids and gates of all ranks, rank after rank; differentiable in the gates."""
    if gates is None:
        message = gather(messages.pack(ids, None), wire.group)
        return messages.unpack(message, ids.dtype, None)
    everywhere, arrived = _GatherGates.apply(gates, ids, wire)
    return everywhere, arrived


class _GatherGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, ids: Tensor, wire: WholeWire
    ) -> tuple[Tensor, Tensor | None]:
        ctx.wire = wire
        message = gather(messages.pack(ids, gates), wire.group)
        everywhere, arrived = messages.unpack(message, ids.dtype, gates.dtype)
        ctx.mark_non_differentiable(everywhere)
        return everywhere, arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.back(grads[1]), None, None
