"""Communication volume of a sparse layer in closed form, and the choice of a dispatcher.

Inputs: the layer's numbers and the parallel layout. Outputs: bytes per token of one layer's forward
pass, with our dispatchers and with Megatron's.

Design notes: `dispatch/` sends exactly these bytes. What a run counts in its evaluations differs
only by the routing: the closed form takes it as uniform, or as uniform within the groups of
group-limited routing. Neither tensors nor Megatron are imported.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.parallel_layout import ParallelLayout

SCORE_BYTES = 4
"""Bytes of a score or a gate: fp32 whatever the dtype of the model."""

MASK_BYTES = 1
"""Bytes of an entry of Megatron's routing map: bool."""

ALL_GATHER_MARGIN = 1.05
"""The all-gather is chosen if it sends at most this many times the bytes of the all-to-all.

The all-gather sorts nothing and copies no rows, and the host waits while rows travel, not before.
The margin is not tuned: on CUDA it is yet to be timed. Both dispatchers sum in fp32, so that
precision does not decide."""


def id_bytes(num_blocks: int) -> int:
    """Bytes of a block id that is sent: int16 where all ids and their negatives fit, else int32.

    The all-gather sends ids of all B blocks. The all-to-all sends ids of the receiving rank's own
    blocks; each is a (row, block) pair, since its sign says whether a new row begins
    (`dispatch/messages.py`).
    """
    return 2 if num_blocks <= 2**15 else 4


def all_to_all_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Bytes sent per token in one layer's forward pass by `alltoall`: dispatch plus combine.

    The expectation under uniform routing. A rank that holds cells of any of the token's K blocks
    gets one row, as wide as a key, and a (row, block) pair with its gate for each of these blocks.
    It sends back one row of D numbers.
    """
    nodes = num_nodes(layout.expert_ranks, sffn.node_size)
    ranks_per_node = layout.expert_ranks // nodes
    # Within each node that the token reaches, rows go to the node's other ranks. Without a
    # hierarchy of nodes, all ranks are one node.
    rows = nodes * (ranks_per_node - 1) * visit_probability(sffn, layout)
    ep_per_node = layout.ep // nodes
    sent = rows * _row_bytes(sffn, hidden_size, layout)
    sent += (layout.etp - 1 / ep_per_node) * _pairs_bytes(sffn, layout.ep)
    if nodes > 1:
        sent += bytes_between_nodes_per_token(sffn, hidden_size, layout)
    return sent


def bytes_between_nodes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """The bytes of the all-to-all that cross nodes: one row per node that has a block of a token.

    The token's own node gets none.
    """
    nodes = num_nodes(layout.expert_ranks, sffn.node_size)
    node_layout = dataclasses.replace(layout, ep=nodes, etp=1)
    rows = (nodes - 1) * visit_probability(sffn, node_layout)
    sent = rows * _row_bytes(sffn, hidden_size, layout)
    return sent + (1 - 1 / nodes) * _pairs_bytes(sffn, nodes)


def _pairs_bytes(sffn: SparseFFNConfig, ep: int) -> int:
    """Bytes of all (row, block) pairs of a token with their gates, sent to `ep` shards."""
    gate_bytes = SCORE_BYTES if sffn.router.gated_output else 0
    return sffn.num_active_blocks * (id_bytes(sffn.num_blocks // ep) + gate_bytes)


def num_nodes(num_ranks: int, node_size: int) -> int:
    """Nodes of a grid of ranks where tokens cross to each node once; else 1."""
    if node_size < 2 or num_ranks % node_size:
        return 1
    return num_ranks // node_size


def visit_probability(sffn: SparseFFNConfig, layout: ParallelLayout) -> float:
    """The probability that an EP rank has a block of a token, under uniform routing.

    With group-limited routing, every choice of groups is equally likely, and so is every choice of
    K blocks within them. Where ranks and groups do not have the same bounds, ranks differ; the
    result is their mean.
    """
    assert sffn.num_blocks % layout.ep == 0, (sffn.num_blocks, layout)
    return _visit_probability(
        sffn.num_blocks,
        sffn.num_active_blocks,
        layout.ep,
        layout.router_groups,
        layout.router_group_topk,
    )


@functools.cache
def _visit_probability(blocks: int, active: int, ep: int, groups: int, group_topk: int) -> float:
    """`visit_probability` of its numbers; a plan asks for the same ones in thousands of layouts."""
    allowed = group_topk * (blocks // groups)
    # In integers: C(65536, 4096) has 6,600 digits, and Python still rounds the quotient correctly.
    missed = sum(
        ranks * choices * math.comb(allowed - own_blocks, active)
        for held_blocks, ranks in _ranks_by_held_blocks(blocks, ep, groups).items()
        for own_blocks, choices in _choices_by_own_blocks(held_blocks, groups, group_topk).items()
    )
    all_choices = math.comb(groups, group_topk) * math.comb(allowed, active)
    return 1 - missed / (ep * all_choices)


def _ranks_by_held_blocks(blocks: int, ep: int, groups: int) -> Counter[tuple[int, ...]]:
    """Blocks that a rank holds of each group of which it holds some -> number of such ranks."""
    local, size = blocks // ep, blocks // groups
    return Counter(
        tuple(
            sorted(
                min(first + local, (group + 1) * size) - max(first, group * size)
                for group in range(first // size, -(-(first + local) // size))
            )
        )
        for first in range(0, blocks, local)
    )


def _choices_by_own_blocks(
    blocks_per_group: tuple[int, ...], groups: int, group_topk: int
) -> Counter[int]:
    """Blocks of a rank that are in the chosen groups -> number of such choices of groups.

    Args:
        blocks_per_group: blocks that the rank holds of each group of which it holds some.
        groups: number of groups.
        group_topk: number of groups of a token.
    """
    # (chosen groups, the rank's blocks in them) -> choices; groups of equal size at once.
    choices_by_state = Counter({(0, 0): 1})
    for size, count in Counter(blocks_per_group).items():
        extended = Counter[tuple[int, int]]()
        for (num_chosen, own_blocks), choices in choices_by_state.items():
            for num_more in range(min(count, group_topk - num_chosen) + 1):
                extended[num_chosen + num_more, own_blocks + num_more * size] += (
                    choices * math.comb(count, num_more)
                )
        choices_by_state = extended
    choices_by_own = Counter[int]()
    for (num_chosen, own_blocks), choices in choices_by_state.items():
        choices_by_own[own_blocks] += choices * math.comb(
            groups - len(blocks_per_group), group_topk - num_chosen
        )
    return choices_by_own


def rows_per_token(sffn: SparseFFNConfig, layout: ParallelLayout) -> float:
    """R / T: rows that a rank gets, its own among them, over its tokens, under uniform routing."""
    gathers = layout.dispatcher == "allgather"
    return layout.expert_ranks * (1.0 if gathers else visit_probability(sffn, layout))


def regathers(sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout) -> bool:
    """True if the backward pass gathers the rows again instead of keeping R of them.

    The T rows of the rank's own tokens are kept instead (`--sffn-regather`). `auto` asks that this
    at least halves the bytes, since it costs one more exchange of rows beside the four of a step.
    """
    if layout.expert_ranks == 1 or not sffn.key_width(hidden_size):
        return False
    if sffn.regather == "auto":
        return rows_per_token(sffn, layout) >= 2
    return sffn.regather == "on"


def all_gather_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Bytes sent per token in one layer's forward pass by `allgather`, whatever the routing is.

    The row with its ids and gates goes to every rank, and a row of D numbers comes back from each.
    """
    block_bytes = id_bytes(sffn.num_blocks) + (SCORE_BYTES if sffn.router.gated_output else 0)
    row_bytes = _row_bytes(sffn, hidden_size, layout)
    return (layout.expert_ranks - 1) * (row_bytes + sffn.num_active_blocks * block_bytes)


def _row_bytes(sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout) -> int:
    """Bytes of one dispatched query row plus one combined output row."""
    row = sffn.key_width(hidden_size) + sffn.row_width(hidden_size)
    return row * layout.bytes_per_number


DISPATCHERS: dict[str, Callable[[SparseFFNConfig, int, ParallelLayout], float]] = {
    "alltoall": all_to_all_bytes_per_token,
    "allgather": all_gather_bytes_per_token,
}
"""Value of `--moe-token-dispatcher-type` -> bytes per token of a layer's dispatch and combine."""


def cheapest_dispatcher(sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout) -> str:
    """The dispatcher to use: `allgather` where almost every rank is visited, else `alltoall`.

    Not over gloo: there the all-to-all was as fast or faster on 2 and 4 ranks, when sums came back
    by gloo's reduce-scatter, which sends twice the bytes (benchmarks/README.md). Today they come
    back by an all-to-all of equal splits, and this is yet to be timed again.
    """
    # Only the all-to-all crosses to each of several nodes once, and only it sends chunks.
    hierarchical = num_nodes(layout.expert_ranks, sffn.node_size) > 1
    if layout.comm_backend == "gloo" or hierarchical or sffn.exchange_chunks > 1:
        return "alltoall"
    all_to_all = all_to_all_bytes_per_token(sffn, hidden_size, layout)
    all_gather = all_gather_bytes_per_token(sffn, hidden_size, layout)
    return "allgather" if all_gather <= ALL_GATHER_MARGIN * all_to_all else "alltoall"


def exchanged_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Bytes sent per token in one sparse layer's forward pass: its blocks, and its selection.

    The backward pass sends the rows once more, and the gates' gradients.
    """
    if layout.expert_ranks == 1:
        return 0.0
    selection = sffn.router.exchanged_bytes(sffn, sffn.router_width(hidden_size), layout)
    return DISPATCHERS[layout.dispatcher](sffn, hidden_size, layout) + selection


def megatron_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
) -> float:
    """Bytes sent per token in one layer's forward pass by Megatron's dispatchers.

    `alltoall` sends a copy of the token for each remote block (the probability that goes with each
    copy, 4 bytes, is left out); `allgather` sends the token once to each rank, with a mask and a
    probability for every block, chosen or not. What is sent over EP ranks is gathered once more
    over ETP ranks.
    """
    row = sffn.row_width(hidden_size) * layout.bytes_per_number
    if layout.dispatcher == "allgather":
        per_block = MASK_BYTES + SCORE_BYTES
        return (layout.expert_ranks - 1) * (2 * row + sffn.num_blocks * per_block)
    remote = 1 - 1 / layout.ep
    return 2 * sffn.num_active_blocks * (remote + layout.etp - 1) * row
