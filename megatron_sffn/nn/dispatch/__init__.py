"""Token dispatch: send each token once to every rank that holds cells of its blocks, and combine.

`dispatch` takes tokens `[T, D]` and their `Routing` and returns a `Plan`. `Plan.run(compute)`
dispatches the rows, calls `compute` with the rows that arrive on this rank and their pairs and
gates, sends one summed output row per token and rank back, and returns `[T, D]`.

Design notes: Megatron's dispatchers send K copies of a token, one per chosen expert. Here a token
is one row per destination rank, with a small integer for each of its (row, block) pairs, so the
rows do not multiply when blocks shrink.

The two dispatchers have Megatron's names (`--moe-token-dispatcher-type`;
`comm_volume.cheapest_dispatcher` chooses the default):

    all_to_all.py     permute, exchange of counts and pairs; two levels on several nodes
    all_gather.py     every row on every rank
    row_exchange.py   the collectives of rows: dispatch, and combine, its adjoint
    transfer.py       their autograd functions, with start and wait apart
    pair_exchange.py  the collective of pairs and gates
    messages.py       pairs and gates as bytes
    plan.py           chunks of tokens, overlapped with compute
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
    """Prepare the dispatch of each token, or of its query, to the ranks of its blocks.

    Args:
        x: `[T, D]` tokens; the combined outputs have their width and dtype.
        routing: the routing of these tokens, with ids of all B blocks.
        expert_grid: the ranks of the blocks.
        dispatcher: `alltoall` or `allgather`; a grid of one rank sends nothing.
        regather: True to give `DispatchedTokens.regather`, so that the backward pass can dispatch
            the rows again and nothing has to keep the R dispatched rows.
        num_chunks: number of chunks of tokens that `alltoall` sends one after the other, the same
            on all ranks.
    """
    rows = x if routing.queries is None else routing.queries
    if expert_grid.num_ranks == 1:
        return _local_plan(rows, routing)
    assert num_chunks == 1 or dispatcher == "alltoall", (num_chunks, dispatcher)
    tokens = DispatchInput.of(
        rows,
        routing,
        output_bytes=x.shape[1] * x.itemsize,
        regather=regather,
        num_chunks=num_chunks,
    )
    return DISPATCHERS[dispatcher](tokens, expert_grid)


def _local_plan(rows: Tensor, routing: Routing) -> Plan:
    """The plan of a rank that holds all blocks."""
    received_pairs = partial(
        pairs_of_ids, routing.block_ids, routing.gates, may_be_empty=routing.may_be_empty
    )
    chunk = TokenChunk(rows=rows, exchanges=(), received_pairs=received_pairs, regather=False)
    return Plan(chunks=[chunk], bytes_sent=0)


DISPATCHERS: dict[str, Callable[[DispatchInput, ExpertGrid], Plan]] = {
    "alltoall": all_to_all,
    "allgather": all_gather,
}
"""Value of `--moe-token-dispatcher-type` -> the function that prepares the dispatch."""
