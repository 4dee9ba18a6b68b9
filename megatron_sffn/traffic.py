"""Bytes that a token costs between ranks, in closed form, and the way of exchange that follows.

Enters: the layer's numbers and the ranks that its cells are cut over. Leaves: bytes per token of
one sparse layer's forward, ours and Megatron's. `dispatch.py` sends exactly these: what a run
counts in its evaluations differs by the routing alone, which is taken as uniform here.

Neither tensors nor Megatron are imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sffn.config import Exchange, SparseFFNConfig

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
    sffn: SparseFFNConfig, hidden_size: int, exchange: Exchange
) -> float:
    """Bytes that a token costs in the forward of one layer, there and back, by `alltoall`.

    The expectation under uniform routing: a rank gets one row, as wide as a key, if it holds cells
    of any of the token's K blocks, and a (row, block) pair with its gate for each; a row of D
    numbers comes back.
    """
    blocks, active = sffn.num_blocks, sffn.num_active_blocks
    assert blocks % exchange.expert_parallel_size == 0, (blocks, exchange)
    elsewhere = blocks - blocks // exchange.expert_parallel_size
    # In integers: C(65536, 4096) has 6,600 digits, and Python still rounds the quotient correctly.
    missed = math.comb(elsewhere, active) / math.comb(blocks, active)
    rows = (exchange.num_ranks - 1) * (1 - missed)
    pairs = active * (exchange.expert_tensor_parallel_size - 1 / exchange.expert_parallel_size)
    pair_bytes = id_bytes(blocks - elsewhere) + (SCORE_BYTES if sffn.router.gated_output else 0)
    return rows * _row_bytes(sffn, hidden_size, exchange) + pairs * pair_bytes


def all_gather_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, exchange: Exchange
) -> float:
    """The same by `allgather`, whatever the routing is: the row, its ids and gates, everywhere."""
    block_bytes = id_bytes(sffn.num_blocks) + (SCORE_BYTES if sffn.router.gated_output else 0)
    row_bytes = _row_bytes(sffn, hidden_size, exchange)
    return (exchange.num_ranks - 1) * (row_bytes + sffn.num_active_blocks * block_bytes)


def _row_bytes(sffn: SparseFFNConfig, hidden_size: int, exchange: Exchange) -> int:
    """What meets the keys of a block, and the sum of values that comes back."""
    return (sffn.router.key_width(hidden_size) + hidden_size) * exchange.bytes_per_number


DISPATCHERS: dict[str, Callable[[SparseFFNConfig, int, Exchange], float]] = {
    "alltoall": all_to_all_bytes_per_token,
    "allgather": all_gather_bytes_per_token,
}
"""Value of `--moe-token-dispatcher-type` -> bytes per token of a layer's exchange."""


def cheapest_dispatcher(sffn: SparseFFNConfig, hidden_size: int, exchange: Exchange) -> str:
    """The way to exchange tokens: `allgather` where almost every rank is hit, else `alltoall`.

    Not over gloo: there the all-to-all was as fast or faster on 2 and 4 ranks, when sums came back
    by gloo's reduce-scatter, which sends twice the bytes (benchmarks/README.md). Today they come
    back by an all-to-all of equal parts, and this is yet to be timed again.
    """
    if exchange.backend == "gloo":
        return "alltoall"
    exact = all_to_all_bytes_per_token(sffn, hidden_size, exchange)
    everything = all_gather_bytes_per_token(sffn, hidden_size, exchange)
    return "allgather" if everything <= ALL_GATHER_MARGIN * exact else "alltoall"


def exchanged_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, exchange: Exchange, dispatcher: str
) -> float:
    """Bytes that a token costs in the forward of one sparse layer: its blocks, and its selection.

    The backward sends the rows once more, and the gates' gradients.
    """
    if exchange.num_ranks == 1:
        return 0.0
    selection = sffn.router.exchanged_bytes(sffn, hidden_size, exchange)
    return DISPATCHERS[dispatcher](sffn, hidden_size, exchange) + selection


def megatron_bytes_per_token(
    sffn: SparseFFNConfig, hidden_size: int, exchange: Exchange, dispatcher: str
) -> float:
    """The same with Megatron's dispatchers, which gather what they send over ETP ranks once more.

    `alltoall` sends a copy of the token for each remote block (the probability that goes with each,
    4 bytes, is left out); `allgather` the token once to each rank, with a mask and a probability
    for every block, chosen or not.
    """
    width, slices = hidden_size * exchange.bytes_per_number, exchange.expert_tensor_parallel_size
    if dispatcher == "allgather":
        per_block = MASK_BYTES + SCORE_BYTES
        return (exchange.num_ranks - 1) * (2 * width + sffn.num_blocks * per_block)
    remote = 1 - 1 / exchange.expert_parallel_size
    return 2 * sffn.num_active_blocks * (remote + slices - 1) * width
