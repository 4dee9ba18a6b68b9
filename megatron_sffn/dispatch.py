"""The exchange between ranks: a token travels once to each rank that holds one of its blocks.

Enters: tokens `[T, D]` and their `Routing`. Leaves: the rows `[R, D]` that meet blocks of this
rank, the (row, block) pairs with their gates, and a `Plan`, the frozen record with which `combine`
sends one summed row per token and rank back.

Megatron's dispatchers send a copy per chosen expert, K of them; here rows do not multiply when
blocks shrink, only the pairs of small integers do. Counts are exact; a rank may get no row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_sffn.ops.block_ffn import Pairs
from megatron_sffn.routers.base import Routing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one call's tokens were sent, and how their outputs come back.

    Args:
        group: the expert-parallel process group.
        num_tokens: T.
        tokens: `[S]` the token behind each row sent, rank after rank.
        sent: rows sent to each rank.
        received: rows received from each rank; they sum to R.
    """

    group: Any
    num_tokens: int
    tokens: Tensor
    sent: list[int]
    received: list[int]


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What arrived on this rank.

    Args:
        rows: `[R, D]`.
        pairs: which row meets which of this rank's blocks.
        gates: `[P]` in the order of `pairs`, or None.
        plan: for `combine`; None when nothing travelled.
    """

    rows: Tensor
    pairs: Pairs
    gates: Tensor | None
    plan: Plan | None


def dispatch(x: Tensor, routing: Routing, num_local_blocks: int, group: Any) -> Dispatched:
    """Send each token to the ranks that hold its blocks.

    Args:
        x: `[T, D]`.
        routing: of these tokens, with ids of all B blocks.
        num_local_blocks: B / ep; rank r holds blocks r·B/ep up to (r+1)·B/ep.
        group: the expert-parallel group.
    """
    pairs = Pairs.of_ids(routing.block_ids)
    gates = None if routing.gates is None else routing.gates.reshape(-1)
    ranks = group.size()
    if ranks == 1:
        return Dispatched(rows=x, pairs=pairs, gates=gates, plan=None)

    tokens = len(x)
    owner = pairs.blocks // num_local_blocks
    # One row per (rank, token) that meet, rank-major; `row_of` numbers them within their rank.
    meets = torch.zeros(ranks, tokens, dtype=torch.bool, device=x.device)
    meets[owner, pairs.rows] = True
    row_of = meets.cumsum(dim=1) - 1
    order = owner.argsort(stable=True)

    to_send = torch.stack((meets.sum(dim=1), torch.bincount(owner, minlength=ranks)), dim=1)
    to_receive = torch.empty_like(to_send)
    torch.distributed.all_to_all_single(to_receive, to_send, group=group)
    rows_sent, pairs_sent = to_send.T.tolist()
    rows_received, pairs_received = to_receive.T.tolist()

    plan = Plan(
        group=group,
        num_tokens=tokens,
        tokens=meets.nonzero()[:, 1],
        sent=rows_sent,
        received=rows_received,
    )
    rows = all_to_all(group, x[plan.tokens], rows_received, rows_sent)
    local = torch.stack((row_of[owner, pairs.rows], pairs.blocks % num_local_blocks), dim=1)
    met = all_to_all(group, local[order].int(), pairs_received, pairs_sent).long()
    if gates is not None:
        gates = all_to_all(group, gates[order], pairs_received, pairs_sent)
    # Rows of a later rank lie behind those of the earlier ones.
    starts = to_receive[:, 0].cumsum(0) - to_receive[:, 0]
    first = starts.repeat_interleave(to_receive[:, 1])
    return Dispatched(
        rows=rows, pairs=Pairs(rows=met[:, 0] + first, blocks=met[:, 1]), gates=gates, plan=plan
    )


def combine(y: Tensor, plan: Plan | None) -> Tensor:
    """Send the rows' outputs back and add them up per token.

    Args:
        y: `[R, D]`, each row summed over its blocks on this rank.
        plan: of the dispatch, or None if nothing travelled.

    Returns:
        `[T, D]`.
    """
    if plan is None:
        return y
    back = all_to_all(plan.group, y, plan.sent, plan.received)
    summed = back.new_zeros(
        plan.num_tokens, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32)
    )
    return summed.index_add(0, plan.tokens, back.to(summed.dtype)).to(y.dtype)
