"""`allgather`: every row everywhere, and the outputs back to their ranks, which add them up.

It sends more than `alltoall` where some rank has no block of a token; in return nothing is sorted
and no counts travel. All ranks must have equally many tokens.

The host waits once, for the number P of pairs that are of this rank: the up projections are of P
pairs, and room for all ranks' pairs would be EP times as much. While it waits, the rows travel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch import messages
from megatron_sffn.nn.dispatch.plan import Plan, TokenChunk
from megatron_sffn.nn.dispatch.records import DispatchInput
from megatron_sffn.nn.dispatch.row_exchange import (
    AllGatherRows,
    exchange_equally,
    gather,
    sum_equal_splits,
)
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.ops.block_ffn import Pairs
from megatron_sffn.ops.streams import HostCopy


def all_gather(tokens: DispatchInput, expert_grid: ExpertGrid) -> Plan:
    """Send every row to every rank, with all of its block ids and gates."""
    group, requests = expert_grid.group, tokens.requests
    num_rows = len(tokens.rows)
    ids = requests.pairs.blocks.to(messages.id_dtype(expert_grid.num_blocks))
    blocks, gates = _gather_pairs(ids, requests.gates, group)
    blocks = blocks.int()
    # An empty place, -1, is in no part.
    own = blocks // expert_grid.num_local_blocks == expert_grid.ep_rank
    number = own.cumsum(0, dtype=torch.int32)
    meetings = partial(
        _own_pairs,
        blocks,
        gates,
        own=own,
        number=number,
        count=HostCopy(number[-1:]),
        active=len(ids) // num_rows if num_rows else 1,
        first_block=expert_grid.first_block,
    )
    message_bytes = ids.nbytes + (0 if requests.gates is None else requests.gates.nbytes)
    return Plan(
        chunks=[
            TokenChunk(
                rows=tokens.rows,
                wires=(AllGatherRows(group=group),),
                meetings=meetings,
                keep=tokens.keep,
            )
        ],
        bytes_sent=(expert_grid.num_ranks - 1)
        * (tokens.rows.nbytes + num_rows * tokens.output_bytes + message_bytes),
    )


def _own_pairs(
    blocks: Tensor,
    gates: Tensor | None,
    *,
    own: Tensor,
    number: Tensor,
    count: HostCopy,
    active: int,
    first_block: int,
) -> tuple[Pairs, Tensor | None]:
    """The pairs of this rank among all, and their gates.

    Args:
        blocks: `[P]` of all ranks' pairs.
        gates: `[P]` or None.
        own: `[P]`, which are of this rank.
        number: `[P]` int32, how many of them are up to each.
        count: the last of these, on its way to the host.
        active: K.
        first_block: of this rank.
    """
    num_pairs = sum(count.wait())
    # Where the pairs of this rank are; one more place takes what all the others write.
    places = torch.arange(len(own), dtype=torch.int32, device=own.device)
    target = torch.where(own, number.long() - 1, num_pairs)
    kept = places.new_empty(num_pairs + 1).scatter_(0, target, places)[:num_pairs]
    pairs = Pairs(rows=kept // active, blocks=blocks.index_select(0, kept) - first_block)
    return pairs, None if gates is None else gates.index_select(0, kept)


def _gather_pairs(ids: Tensor, gates: Tensor | None, group: Any) -> tuple[Tensor, Tensor | None]:
    """`[P]` ids and gates of all ranks, rank after rank; differentiable in the gates."""
    if gates is None:
        message = gather(messages.pack(ids, None), group).land()
        return messages.unpack(message, ids.dtype, None)
    everywhere, arrived = _AllGatherPairs.apply(gates, ids, group)
    return everywhere, arrived


class _AllGatherPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, ids: Tensor, group: Any) -> tuple[Tensor, Tensor | None]:
        ctx.group = group
        message = gather(messages.pack(ids, gates), group).land()
        everywhere, arrived = messages.unpack(message, ids.dtype, gates.dtype)
        ctx.mark_non_differentiable(everywhere)
        return everywhere, arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = exchange_equally(grads[1], ctx.group).land()
        return sum_equal_splits(parts, ctx.group.size()), None, None
