"""Bytes that a sparse layer keeps for the backward of one microbatch on one rank.

Enters: the numbers of the call (`Call`) and how the blocks lie on ranks. Leaves: bytes. Under
uniform routing, as `traffic.py` has it: a rank whose blocks are wanted more keeps more.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_sffn.accounting.ranks import RankLayout
from megatron_sffn.accounting.selection import FP32, INT32, INT64, Call, kept_by_router
from megatron_sffn.nn.comm_volume import num_nodes, regathers, rows_per_token
from megatron_sffn.nn.config import Exchange
from megatron_sffn.ops.block_ffn import choose_backend


def kept_by_blocks(call: Call, layout: RankLayout) -> float:
    """The router, the exchange and the blocks of one layer, without its shared blocks.

    Args:
        call: of the layer.
        layout: of the ranks; blocks are cut over EP, cells over ETP.
    """
    sffn, width = call.sffn, call.sffn.router.key_width(call.hidden_size)
    router = kept_by_router(call)
    rows, pairs = rows_and_pairs(call, layout)
    tokens_kept = router.tokens
    count = router.bytes + pairs * _per_pair(call, layout)
    # Where the pairs of each block begin, of each chunk.
    blocks = sffn.num_blocks // layout.expert
    chunks = sffn.exchange_chunks if layout.exchanging > 1 else 1
    count += chunks * INT64 * (blocks + 1)
    count += _derived(backend_of(call, layout), rows, pairs, blocks, chunks)
    # What meets the keys is kept: this rank's own rows, or those that arrived.
    exchange = _exchange_of(call, layout)
    own = layout.exchanging == 1 or regathers(sffn, call.hidden_size, exchange, layout.dispatcher)
    if own and width == call.hidden_size:
        tokens_kept = True
    else:
        rows = call.tokens if own else rows
        count += rows * width * call.number_bytes
    if layout.exchanging > 1:
        count += _exchange(call, layout)
    if tokens_kept or sffn.shared_blocks:
        count += call.tokens * call.hidden_size * call.number_bytes
    return count


def backend_of(call: Call, layout: RankLayout) -> str:
    """Who computes the blocks: on a GPU what `auto` is there, in bf16 if it is half precision."""
    sffn = call.sffn
    key_width = sffn.router.key_width(call.hidden_size)
    if sffn.backend == "masked" and not key_width:
        return "bags"
    if sffn.backend != "auto" or not call.cuda:
        return sffn.backend
    rows, pairs = rows_and_pairs(call, layout)
    shape = choose_backend.Shape(
        rows=round(rows),
        pairs=round(pairs),
        blocks=sffn.num_blocks // layout.expert,
        cells=sffn.block_size // layout.expert_tensor,
        width=call.hidden_size,
        key_width=key_width,
    )
    return choose_backend.choose_on_hopper(shape, torch.bfloat16 if call.half else torch.float32)


def _derived(backend: str, rows: float, pairs: float, blocks: int, chunks: int) -> float:
    """What a backend makes of the pairs in the forward and keeps for the backward.

    Args:
        backend: `Sorted.derived` of others has nothing, or nothing that is counted (`triton`).
        rows: R.
        pairs: P.
        blocks: of this rank.
        chunks: in which they arrive.
    """
    of_pairs = INT32 * pairs  # the block of each
    by_row = INT32 * (pairs + rows + chunks)  # their order by row, and where rows begin
    match backend:
        case "masked":
            return of_pairs
        case "bags":
            return of_pairs + by_row
        case "grouped":
            return by_row + INT32 * blocks * chunks  # where groups end
        case "quack":
            return by_row
        case _:
            return 0


def rows_and_pairs(call: Call, layout: RankLayout) -> tuple[float, float]:
    """R and P of a rank: rows that arrive, and (row, block) pairs among them."""
    sffn = call.sffn
    pairs = call.tokens * sffn.num_active_blocks * layout.expert_tensor
    rows = rows_per_token(sffn, _exchange_of(call, layout), layout.dispatcher)
    return call.tokens * rows, pairs


def _exchange_of(call: Call, layout: RankLayout) -> Exchange:
    """What the tokens travel over, as far as rows are counted."""
    return Exchange(
        expert_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        router_groups=call.router_groups,
        router_group_topk=call.router_group_topk,
    )


def _per_pair(call: Call, layout: RankLayout) -> float:
    """Of a (row, block) pair: the row's index, its up projections, its gate and that's place."""
    router, numbers = call.sffn.router, call.number_bytes
    gate = INT32 + FP32
    if not router.key_width(call.hidden_size):
        return INT32 + gate
    cells = call.sffn.block_size // layout.expert_tensor
    ups = call.keys_per_cell * cells * numbers
    return INT32 + ups + (gate if router.gated_output else 0)


def _exchange(call: Call, layout: RankLayout) -> float:
    """What sending rows, gates and sums keeps."""
    rows, pairs = rows_and_pairs(call, layout)
    gated = call.sffn.router.gated_output
    if layout.dispatcher == "allgather":
        # Where the gates of this rank's blocks are among all.
        return pairs * INT32 if gated else 0
    nodes = num_nodes(layout.exchanging, call.sffn.node_size)
    if nodes > 1:
        # What crosses nodes is on its way twice.
        across = replace(
            _exchange_of(call, layout), expert_parallel_size=nodes, expert_tensor_parallel_size=1
        )
        rows += call.tokens * rows_per_token(call.sffn, across, "alltoall")
        pairs += call.tokens * call.sffn.num_active_blocks
    # The token behind each row, and the place of each gate.
    return rows * INT32 + (pairs * INT32 if gated else 0)
