"""The exchange between ranks: a token travels once to each rank that holds cells of its blocks.

Inputs: tokens `[T, D]` and their `Routing`. Outputs: the rows `[R, D]` that meet blocks of this
rank, the (row, block) pairs with their gates, and a plan, the frozen record that sends one summed
row per token and rank back.

Design notes: Megatron's dispatchers send a copy per chosen expert, K of them; ours sends a row per
rank, so that rows do not multiply when blocks shrink, only the pairs of small integers do. Two
ways, named as in Megatron (`--moe-token-dispatcher-type`; `traffic.cheapest_dispatcher` chooses):
`all_to_all.py`, which `once_per_node.py` does in two steps on several nodes, and `all_gather.py`.
`wires.py` has the rows' ways out and back, `messages.py` the bytes of pairs and gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_sffn.dispatch.all_gather import all_gather
from megatron_sffn.dispatch.all_to_all import all_to_all
from megatron_sffn.dispatch.once_per_node import once_per_node
from megatron_sffn.dispatch.records import Dispatched, Plan, Tokens
from megatron_sffn.ops.block_ffn import pairs_of_ids
from megatron_sffn.placement import Placement
from megatron_sffn.routers.base import Routing

__all__ = ["DISPATCHERS", "Dispatched", "Plan", "dispatch"]


def dispatch(
    x: Tensor,
    routing: Routing,
    placement: Placement,
    dispatcher: str,
    *,
    regather: bool = False,
) -> Dispatched:
    """Send each token, or its query, to the ranks that hold its blocks.

    Args:
        x: `[T, D]`; outputs that come back have its width and dtype.
        routing: of these tokens, with ids of all B blocks.
        placement: of the blocks.
        dispatcher: `alltoall` or `allgather`; nothing travels when the grid is one rank.
        regather: whether to keep `x` for `Dispatched.rows_again`, so that nobody has to keep the
            rows for the backward.
    """
    rows = x if routing.queries is None else routing.queries
    if placement.num_ranks == 1:
        return _stay(rows, routing)
    output_bytes = x.shape[1] * x.itemsize
    tokens = Tokens.of(rows, routing, output_bytes=output_bytes, keep=regather)
    if dispatcher == "alltoall" and placement.node_groups is not None:
        return once_per_node(tokens, placement)
    return DISPATCHERS[dispatcher](tokens, placement)


@dataclass(frozen=True, kw_only=True)
class Stay:
    """One rank holds everything."""

    bytes_sent: int = 0

    def combine(self, y: Tensor) -> Tensor:
        """The outputs, which are where they are needed."""
        return y


def _stay(x: Tensor, routing: Routing) -> Dispatched:
    pairs, gates = pairs_of_ids(routing.block_ids, routing.gates, may_be_empty=routing.may_be_empty)
    return Dispatched(rows=x, pairs=pairs, gates=gates, plan=Stay())


DISPATCHERS: dict[str, Callable[[Tokens, Placement], Dispatched]] = {
    "alltoall": all_to_all,
    "allgather": all_gather,
}
"""Values of `--moe-token-dispatcher-type` that sparse layers have."""
