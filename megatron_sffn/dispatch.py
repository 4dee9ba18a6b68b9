"""The exchange between ranks: a token travels once to each rank that holds cells of its blocks.

Enters: tokens `[T, D]` and their `Routing`. Leaves: the rows `[R, D]` that meet blocks of this
rank, the (row, block) pairs with their gates, and a plan, the frozen record that sends one summed
row per token and rank back.

Megatron's dispatchers send a copy per chosen expert, K of them; here rows do not multiply when
blocks shrink, only the pairs of small integers do. Two ways, named as in Megatron
(`--moe-token-dispatcher-type`; `traffic.cheapest_dispatcher` chooses):

- `alltoall`: exact counts, each row where it is needed. A rank may send or get none.
- `allgather`: every row everywhere, and sums back by a reduce-scatter. It sends more where some
  rank has no block of a token, and in return needs no counts, no sorting and no copies. All ranks
  must have equally many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_sffn.ops.block_ffn import Pairs, pairs_of_ids, sort_stably
from megatron_sffn.placement import Placement
from megatron_sffn.routers.base import Routing


class Plan(Protocol):
    """How one call's tokens were sent, and how their outputs come back."""

    @property
    def bytes_sent(self) -> int:
        """What this rank sends to others in the forward: tokens, pairs, gates, and the sums back.

        The fixed exchange of counts (16 bytes a rank) is left out.
        """

    def combine(self, y: Tensor) -> Tensor:
        """Send the rows' outputs back and add them up per token: `[R, D]` to `[T, D]`."""


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What arrived on this rank.

    Args:
        rows: `[R, D]`.
        pairs: which row meets which of this rank's blocks.
        gates: `[P]` in the order of `pairs`, or None.
        plan: takes the outputs back.
    """

    rows: Tensor
    pairs: Pairs
    gates: Tensor | None
    plan: Plan


def dispatch(x: Tensor, routing: Routing, placement: Placement, dispatcher: str) -> Dispatched:
    """Send each token, or its query, to the ranks that hold its blocks.

    Args:
        x: `[T, D]`; outputs that come back have its width and dtype.
        routing: of these tokens, with ids of all B blocks.
        placement: of the blocks.
        dispatcher: `alltoall` or `allgather`; nothing travels when the grid is one rank.
    """
    rows = x if routing.queries is None else routing.queries
    if placement.num_ranks == 1:
        return _stay(rows, routing)
    return DISPATCHERS[dispatcher](rows, routing, placement, x[:1].nbytes)


@dataclass(frozen=True, kw_only=True)
class Stay:
    """One rank holds everything."""

    bytes_sent: int = 0

    def combine(self, y: Tensor) -> Tensor:
        """See `Plan.combine`."""
        return y


def _stay(x: Tensor, routing: Routing) -> Dispatched:
    pairs, gates = pairs_of_ids(routing.block_ids, routing.gates, may_be_empty=routing.may_be_empty)
    return Dispatched(rows=x, pairs=pairs, gates=gates, plan=Stay())


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Rows go where they are needed.

    Args:
        group: of the ranks.
        num_tokens: T.
        tokens: `[S]` int32, the token behind each row sent, rank after rank.
        sent: rows sent to each rank.
        received: rows received from each rank; they sum to R.
        bytes_sent: see `Plan`.
    """

    group: Any
    num_tokens: int
    tokens: Tensor
    sent: list[int]
    received: list[int]
    bytes_sent: int

    def combine(self, y: Tensor) -> Tensor:
        """See `Plan.combine`; sums are in fp32 at least, in the order of the ranks."""
        back = all_to_all(self.group, y, self.sent, self.received)
        summed: Tensor = _SumPerToken.apply(back, self.tokens, self.sent, self.num_tokens)
        return summed


class _SumPerToken(torch.autograd.Function):
    """Rows of all ranks, rank after rank, summed per token.

    Torch's `index_add` keeps the rows for its backward, which needs only their shape.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, tokens: Tensor, of_rank: list[int], num_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        wide = torch.promote_types(rows.dtype, torch.float32)
        summed = rows.new_zeros(num_tokens, rows.shape[1], dtype=wide)
        # A token is once in a rank's rows: adds do not collide, so that their order is fixed.
        for here, some in zip(tokens.split(of_rank), rows.split(of_rank), strict=True):
            summed.index_add_(0, here, some.to(wide))
        return summed.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return grads[0].index_select(0, tokens), None, None, None


def _all_to_all(x: Tensor, routing: Routing, placement: Placement, back_bytes: int) -> Dispatched:
    (pairs, flat_gates), group = pairs_of_ids(routing.block_ids, routing.gates), placement.group
    ranks, slices, tokens = placement.num_ranks, placement.cell_parts, len(x)
    # A block lies on `slices` ranks: `[P, slices]` owners of each pair.
    owners = (pairs.blocks // placement.num_local_blocks * slices)[:, None]
    owners = owners + torch.arange(slices, dtype=torch.int32, device=x.device)
    # One row per (rank, token) that meet, rank-major; `row_of` numbers them within their rank.
    meets = torch.zeros(ranks, tokens, dtype=torch.bool, device=x.device)
    meets[owners, pairs.rows[:, None]] = True
    row_of = meets.cumsum(dim=1) - 1
    order, offsets = sort_stably(owners.flatten(), ranks)

    to_send = torch.stack((meets.sum(dim=1), offsets.diff()), dim=1)
    to_receive = torch.empty_like(to_send)
    torch.distributed.all_to_all_single(to_receive, to_send, group=group)
    rows_sent, pairs_sent = to_send.T.tolist()
    rows_received, pairs_received = to_receive.T.tolist()

    sent_tokens = meets.nonzero()[:, 1].int()
    rows = all_to_all(group, x.index_select(0, sent_tokens), rows_received, rows_sent)
    blocks = (pairs.blocks % placement.num_local_blocks)[:, None].expand_as(owners)
    local = torch.stack((row_of[owners, pairs.rows[:, None]], blocks), dim=-1).flatten(0, 1)
    local = local[order].int()
    met = all_to_all(group, local, pairs_received, pairs_sent)
    pair_bytes, gates = local[0].nbytes if len(local) else 0, None
    if flat_gates is not None:
        to_send_gates = flat_gates.index_select(0, order // slices)
        gates = all_to_all(group, to_send_gates, pairs_received, pairs_sent)
        pair_bytes += flat_gates.itemsize
    # Rows of a later rank lie behind those of the earlier ones.
    starts = to_receive[:, 0].cumsum(0) - to_receive[:, 0]
    first = starts.int().repeat_interleave(to_receive[:, 1])
    here = group.rank()
    there = (sum(rows_sent) - rows_sent[here]) * x.shape[1] * x.itemsize
    back = (sum(rows_received) - rows_received[here]) * back_bytes
    plan = AllToAll(
        group=group,
        num_tokens=tokens,
        tokens=sent_tokens,
        sent=rows_sent,
        received=rows_received,
        bytes_sent=there + back + (sum(pairs_sent) - pairs_sent[here]) * pair_bytes,
    )
    return Dispatched(
        rows=rows, pairs=Pairs(rows=met[:, 0] + first, blocks=met[:, 1]), gates=gates, plan=plan
    )


@dataclass(frozen=True, kw_only=True)
class AllGather:
    """Every row goes everywhere.

    Args:
        group: of the ranks.
        bytes_sent: see `Plan`.
    """

    group: Any
    bytes_sent: int

    def combine(self, y: Tensor) -> Tensor:
        """See `Plan.combine`; ranks' sums are added in y's dtype, as they travel."""
        return reduce_scatter_to_sequence_parallel_region(y, group=self.group)


def _all_gather(x: Tensor, routing: Routing, placement: Placement, back_bytes: int) -> Dispatched:
    group, others = placement.group, placement.num_ranks - 1
    rows = gather_from_sequence_parallel_region(x, group=group)
    local_ids = routing.block_ids.int()
    ids = gather_from_sequence_parallel_region(local_ids, group=group)
    # An empty place, -1, is in no part.
    mine = ids // placement.num_local_blocks == placement.block_part
    pairs = Pairs(rows=mine.nonzero()[:, 0].int(), blocks=ids[mine] - placement.first_block)
    gates, gate_bytes = None, 0
    if routing.gates is not None:
        gates = gather_from_sequence_parallel_region(routing.gates, group=group)[mine]
        gate_bytes = routing.gates.nbytes
    plan = AllGather(
        group=group,
        bytes_sent=others * (x.nbytes + len(x) * back_bytes + local_ids.nbytes + gate_bytes),
    )
    return Dispatched(rows=rows, pairs=pairs, gates=gates, plan=plan)


DISPATCHERS: dict[str, Callable[[Tensor, Routing, Placement, int], Dispatched]] = {
    "alltoall": _all_to_all,
    "allgather": _all_gather,
}
"""Values of `--moe-token-dispatcher-type` that sparse layers have."""
