"""Bytes that a token costs between ranks, in closed form, and the way of exchange that follows.

Enters: the layer's numbers and the ranks that its cells are cut over. Leaves: bytes per token of
one sparse layer's forward, ours and Megatron's. `dispatch/` sends exactly these: what a run
counts in its evaluations differs by the routing alone, which is taken as uniform here, or as
uniform within the groups of group-limited routing.

Neither tensors nor Megatron are imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.parallel_layout import ParallelLayout

SCORE_BYTES = 4
"""A score or a gate: fp32 whatever the model's dtype."""

MASK_BYTES = 1
"""A block of a token in Megatron's routing map: bool."""

ALL_GATHER_MARGIN = 1.05
"""How much more than the all-to-all the all-gather may send and still be chosen: it sorts nothing
and copies no rows, and the host waits while rows travel, not before. Not tuned: on CUDA it is yet
to be timed. Both sum in fp32, so that precision does not decide."""


def id_bytes(num_blocks: int) -> int:
    """Bytes of a block id that travels: an int16 where all ids and their negatives fit, or int32.

    Of the all-gather an id of all B blocks. Of the all-to-all an id of a rank's own blocks: it is a
    (row, block) pair, since its sign says whether a new row begins (`dispatch/messages.py`).
    """
    return 2 if num_blocks <= 2**15 else 4


def all_to_all_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Bytes that a token costs in the forward of one layer, there and back, by `alltoall`.

    The expectation under uniform routing: a rank gets one row, as wide as a key, if it holds cells
    of any of the token's K blocks, and a (row, block) pair with its gate for each; a row of D
    numbers comes back.
    """
    nodes = num_nodes(layout.expert_ranks, sffn.node_size)
    ranks, slices = layout.expert_ranks // nodes, layout.etp
    # From each node that the token has reached, to the node's other ranks; without nodes, there is
    # one, of all ranks.
    rows = nodes * (ranks - 1) * chance_of_visit(sffn, layout)
    parts = layout.ep // nodes
    sent = rows * _row_bytes(sffn, hidden_size, layout)
    sent += (slices - 1 / parts) * _pairs_bytes(sffn, layout.ep)
    if nodes > 1:
        sent += bytes_between_nodes_per_token(sffn, hidden_size, layout)
    return sent


def bytes_between_nodes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Those of them that cross nodes: a row for each other node that has a block of the token."""
    nodes = num_nodes(layout.expert_ranks, sffn.node_size)
    across = dataclasses.replace(layout, ep=nodes, etp=1)
    rows = (nodes - 1) * chance_of_visit(sffn, across)
    sent = rows * _row_bytes(sffn, hidden_size, layout)
    return sent + (1 - 1 / nodes) * _pairs_bytes(sffn, nodes)


def _pairs_bytes(sffn: SparseFFNConfig, parts: int) -> int:
    """All pairs of a token and their gates, as they are sent to `parts` parts of the blocks."""
    gate_bytes = SCORE_BYTES if sffn.router.gated_output else 0
    return sffn.num_active_blocks * (id_bytes(sffn.num_blocks // parts) + gate_bytes)


def num_nodes(num_ranks: int, node_size: int) -> int:
    """Nodes that a grid of ranks lies on, where tokens cross to each node once; else 1."""
    if node_size < 2 or num_ranks % node_size:
        return 1
    return num_ranks // node_size


def chance_of_visit(sffn: SparseFFNConfig, layout: ParallelLayout) -> float:
    """The probability that a rank has a block of a token, under uniform routing.

    With group-limited routing: every choice of groups is equally likely, and so is every choice of
    K blocks within them; the mean over ranks, where these do not have the groups' bounds.
    """
    blocks, active, parts = sffn.num_blocks, sffn.num_active_blocks, layout.ep
    assert blocks % parts == 0, (blocks, layout)
    groups, chosen = layout.router_groups, layout.router_group_topk
    allowed = chosen * (blocks // groups)
    # In integers: C(65536, 4096) has 6,600 digits, and Python still rounds the quotient correctly.
    missed = sum(
        ranks * choices * math.comb(allowed - own, active)
        for held, ranks in _held_of_groups(blocks, parts, groups).items()
        for own, choices in _chosen_of(held, groups, chosen).items()
    )
    return 1 - missed / (parts * math.comb(groups, chosen) * math.comb(allowed, active))


def _held_of_groups(blocks: int, parts: int, groups: int) -> Counter[tuple[int, ...]]:
    """How many of `parts` ranks hold so many blocks of each group of which they hold some."""
    local, size = blocks // parts, blocks // groups
    return Counter(
        tuple(
            sorted(
                min(first + local, (group + 1) * size) - max(first, group * size)
                for group in range(first // size, -(-(first + local) // size))
            )
        )
        for first in range(0, blocks, local)
    )


def _chosen_of(held: tuple[int, ...], groups: int, chosen: int) -> Counter[int]:
    """Blocks of a rank in the chosen groups -> in how many choices of groups.

    Args:
        held: blocks of the rank in each group of which it holds some.
        groups: of all blocks.
        chosen: groups of a token.
    """
    # Of so many groups, with so many blocks of the rank -> choices; groups of equal size at once.
    ways = Counter({(0, 0): 1})
    for size, count in Counter(held).items():
        taken = Counter[tuple[int, int]]()
        for (number, own), choices in ways.items():
            for more in range(min(count, chosen - number) + 1):
                taken[number + more, own + more * size] += choices * math.comb(count, more)
        ways = taken
    result = Counter[int]()
    for (number, own), choices in ways.items():
        result[own] += choices * math.comb(groups - len(held), chosen - number)
    return result


def rows_per_token(sffn: SparseFFNConfig, layout: ParallelLayout) -> float:
    """R / T: rows that a rank gets, its own among them, over its tokens, under uniform routing."""
    visits = 1.0 if layout.dispatcher == "allgather" else chance_of_visit(sffn, layout)
    return layout.expert_ranks * visits


def regathers(sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout) -> bool:
    """Whether the backward sends the rows again (`--sffn-regather`) rather than keep R of them.

    What is kept instead are the T rows of the rank's own tokens. `auto` asks that this halves the
    bytes at least, since it costs one more exchange of rows beside the four of a step.
    """
    if layout.expert_ranks == 1 or not sffn.router.key_width(hidden_size):
        return False
    if sffn.regather == "auto":
        return rows_per_token(sffn, layout) >= 2
    return sffn.regather == "on"


def all_gather_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """The same by `allgather`, whatever the routing is: the row, its ids and gates, everywhere."""
    block_bytes = id_bytes(sffn.num_blocks) + (SCORE_BYTES if sffn.router.gated_output else 0)
    row_bytes = _row_bytes(sffn, hidden_size, layout)
    return (layout.expert_ranks - 1) * (row_bytes + sffn.num_active_blocks * block_bytes)


def _row_bytes(sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout) -> int:
    """What meets the keys of a block, and the sum of values that comes back."""
    return (sffn.router.key_width(hidden_size) + hidden_size) * layout.bytes_per_number


DISPATCHERS: dict[str, Callable[[SparseFFNConfig, int, ParallelLayout], float]] = {
    "alltoall": all_to_all_bytes_per_token,
    "allgather": all_gather_bytes_per_token,
}
"""Value of `--moe-token-dispatcher-type` -> bytes per token of a layer's exchange."""


def cheapest_dispatcher(sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout) -> str:
    """The way to exchange tokens: `allgather` where almost every rank is hit, else `alltoall`.

    Not over gloo: there the all-to-all was as fast or faster on 2 and 4 ranks, when sums came back
    by gloo's reduce-scatter, which sends twice the bytes (benchmarks/README.md). Today they come
    back by an all-to-all of equal parts, and this is yet to be timed again.
    """
    # Only the all-to-all crosses to each of several nodes once, and only it sends chunks.
    on_nodes = num_nodes(layout.expert_ranks, sffn.node_size) > 1
    if layout.comm_backend == "gloo" or on_nodes or sffn.exchange_chunks > 1:
        return "alltoall"
    exact = all_to_all_bytes_per_token(sffn, hidden_size, layout)
    everything = all_gather_bytes_per_token(sffn, hidden_size, layout)
    return "allgather" if everything <= ALL_GATHER_MARGIN * exact else "alltoall"


def exchanged_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Bytes that a token costs in the forward of one sparse layer: its blocks, and its selection.

    The backward sends the rows once more, and the gates' gradients.
    """
    if layout.expert_ranks == 1:
        return 0.0
    selection = sffn.router.exchanged_bytes(sffn, hidden_size, layout)
    return DISPATCHERS[layout.dispatcher](sffn, hidden_size, layout) + selection


def megatron_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """The same with Megatron's dispatchers, which gather what they send over ETP ranks once more.

    `alltoall` sends a copy of the token for each remote block (the probability that goes with each,
    4 bytes, is left out); `allgather` the token once to each rank, with a mask and a probability
    for every block, chosen or not.
    """
    width, slices = hidden_size * layout.bytes_per_number, layout.etp
    if layout.dispatcher == "allgather":
        per_block = MASK_BYTES + SCORE_BYTES
        return (layout.expert_ranks - 1) * (2 * width + sffn.num_blocks * per_block)
    remote = 1 - 1 / layout.ep
    return 2 * sffn.num_active_blocks * (remote + slices - 1) * width
