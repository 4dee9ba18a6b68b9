"""The exchange between ranks: a token travels once to each rank that holds cells of its blocks.

Inputs: tokens `[T, D]` and their `Routing`. Outputs: a `Plan`, which takes a function from the rows
`[R, D]` that arrive, with the (row, block) pairs of this rank and their gates, to their outputs; it
sends the rows out, one summed row per token and rank back, and returns `[T, D]`.

Design notes: Megatron's dispatchers send a copy per chosen expert, K of them; ours sends a row per
rank, so that rows do not multiply when blocks shrink, only the pairs of small integers do. Two
ways, named as in Megatron (`--moe-token-dispatcher-type`; `traffic.cheapest_dispatcher` chooses):
`all_to_all.py`, in two steps on several nodes, and `all_gather.py`. `row_exchange.py` has the rows'
ways out and back, `transfer.py` their backward, `plan.py` the order of chunks; `pair_exchange.py`
and `messages.py` carry pairs and gates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron_sffn.nn.dispatch.all_gather import all_gather
from megatron_sffn.nn.dispatch.all_to_all import all_to_all
from megatron_sffn.nn.dispatch.plan import Plan, TokenChunk
from megatron_sffn.nn.dispatch.records import DispatchedTokens, DispatchInput
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.ops.block_ffn import pairs_of_ids

__all__ = ["DISPATCHERS", "DispatchedTokens", "Plan", "dispatch"]


def dispatch(
    x: Tensor,
    routing: Routing,
    expert_grid: ExpertGrid,
    dispatcher: str,
    *,
    regather: bool = False,
    num_chunks: int = 1,
) -> Plan:
    """Plan how each token, or its query, goes to the ranks that hold its blocks.

    Args:
        x: `[T, D]`; outputs that come back have its width and dtype.
        routing: of these tokens, with ids of all B blocks.
        expert_grid: of the blocks.
        dispatcher: `alltoall` or `allgather`; nothing travels when the grid is one rank.
        regather: whether to keep `x` for `DispatchedTokens.rows_again`, so that nobody has to keep
            the rows for the backward.
        num_chunks: how many chunks of tokens `alltoall` sends one after the other, the same on all
            ranks.
    """
    rows = x if routing.queries is None else routing.queries
    if expert_grid.num_ranks == 1:
        return _stay(rows, routing)
    assert num_chunks == 1 or dispatcher == "alltoall", (num_chunks, dispatcher)
    output_bytes = x.shape[1] * x.itemsize
    tokens = DispatchInput.of(
        rows, routing, output_bytes=output_bytes, keep=regather, num_chunks=num_chunks
    )
    return DISPATCHERS[dispatcher](tokens, expert_grid)


def _stay(rows: Tensor, routing: Routing) -> Plan:
    """One rank holds everything."""
    meetings = partial(
        pairs_of_ids, routing.block_ids, routing.gates, may_be_empty=routing.may_be_empty
    )
    return Plan(
        chunks=[TokenChunk(rows=rows, wires=(), meetings=meetings, keep=False)], bytes_sent=0
    )


DISPATCHERS: dict[str, Callable[[DispatchInput, ExpertGrid], Plan]] = {
    "alltoall": all_to_all,
    "allgather": all_gather,
}
"""Values of `--moe-token-dispatcher-type` that sparse layers have."""
