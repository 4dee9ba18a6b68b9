"""Bytes that a sparse layer keeps for the backward pass of one microbatch on one rank.

Inputs: the sizes of the call (`LayerCall`). Outputs: bytes, under uniform routing as in
`nn/comm_volume.py`: a rank whose blocks are chosen more often keeps more.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_sffn.nn.comm_volume import num_nodes, regathers, rows_per_token
from megatron_sffn.nn.saved_bytes import FP32, INT32, INT64, LayerCall
from megatron_sffn.ops.block_ffn import choose_backend


def saved_by_sparse_layer(call: LayerCall) -> float:
    """Bytes of the router, the exchange and the blocks of one layer, without its shared blocks."""
    sffn, layout = call.sffn, call.layout
    key_width = sffn.key_width(call.hidden_size)
    row_width, router_width = (
        width(call.hidden_size) for width in (sffn.row_width, sffn.router_width)
    )
    router = sffn.router.saved_bytes(replace(call, hidden_size=router_width))
    rows, pairs = rows_and_pairs(call)
    local_blocks = sffn.num_blocks // layout.ep
    chunks = sffn.exchange_chunks if layout.expert_ranks > 1 else 1
    count = router.bytes + pairs * _per_pair(call)
    # Offsets of the pairs of each block, in each chunk.
    count += chunks * INT64 * (local_blocks + 1)
    count += _derived(backend_of(call), rows, pairs, local_blocks, chunks)
    # The blocks' input rows stay: this rank's own rows, or the rows that arrived.
    keeps_own_rows = layout.expert_ranks == 1 or regathers(sffn, call.hidden_size, layout)
    rows_are_tokens = keeps_own_rows and key_width == row_width
    if not rows_are_tokens:
        input_rows = call.tokens if keeps_own_rows else rows
        count += input_rows * key_width * layout.bytes_per_number
    if layout.expert_ranks > 1:
        count += _exchange(call)
    token_bytes = call.tokens * call.hidden_size * layout.bytes_per_number
    keeps_rows = rows_are_tokens or (router.tokens and sffn.router.scores_rows)
    if sffn.latent_size is None:
        keeps_tokens = keeps_rows or router.tokens or sffn.shared_blocks
        return count + (token_bytes if keeps_tokens else 0)
    # The projections keep their inputs: the tokens, and the sums of the blocks.
    latent_bytes = call.tokens * row_width * layout.bytes_per_number
    return count + token_bytes + latent_bytes + (latent_bytes if keeps_rows else 0)


def backend_of(call: LayerCall) -> str:
    """The backend of the blocks: on a GPU the choice of `auto`, for bf16 if half-precision."""
    sffn, layout = call.sffn, call.layout
    key_width = sffn.key_width(call.hidden_size)
    if sffn.backend == "masked" and not key_width:
        return "bags"
    if sffn.backend != "auto" or not call.cuda:
        return sffn.backend
    rows, pairs = rows_and_pairs(call)
    shape = choose_backend.Shape(
        rows=round(rows),
        pairs=round(pairs),
        blocks=sffn.num_blocks // layout.ep,
        cells=sffn.block_size // layout.etp,
        width=sffn.row_width(call.hidden_size),
        key_width=key_width,
    )
    dtype = torch.bfloat16 if layout.half_precision else torch.float32
    return choose_backend.choose_on_hopper(shape, dtype)


def _derived(backend: str, rows: float, pairs: float, blocks: int, chunks: int) -> float:
    """Index tensors that a backend derives from the pairs in the forward pass and keeps.

    Args:
        backend: backend of the blocks; for others, `Sorted.derived` is empty or not counted
            (`triton`).
        rows: R.
        pairs: P.
        blocks: number of blocks of this rank.
        chunks: number of chunks in which rows arrive.
    """
    block_of_pair = INT32 * pairs
    by_row = INT32 * (pairs + rows + chunks)  # the pairs' order by row, and offsets of rows
    match backend:
        case "masked":
            return block_of_pair
        case "bags":
            return block_of_pair + by_row
        case "grouped":
            return by_row + INT32 * blocks * chunks  # ends of groups
        case "quack":
            return by_row
        case _:
            return 0


def rows_and_pairs(call: LayerCall) -> tuple[float, float]:
    """R and P of a rank: rows that arrive, and (row, block) pairs among them."""
    pairs = call.tokens * call.sffn.num_active_blocks * call.layout.etp
    return call.tokens * rows_per_token(call.sffn, call.layout), pairs


def _per_pair(call: LayerCall) -> float:
    """Bytes of a (row, block) pair: row index, up projections, and a gate with its index."""
    router = call.sffn.router
    gate = INT32 + FP32
    if not call.sffn.key_width(call.hidden_size):
        return INT32 + gate
    cells = call.sffn.block_size // call.layout.etp
    up_projections = call.keys_per_cell * cells * call.layout.bytes_per_number
    return INT32 + up_projections + (gate if router.gated_output else 0)


def _exchange(call: LayerCall) -> float:
    """Index tensors that the exchange of rows, gates and sums keeps."""
    sffn, layout = call.sffn, call.layout
    rows, pairs = rows_and_pairs(call)
    gated = sffn.router.gated_output
    if layout.dispatcher == "allgather":
        # The index of each gate of this rank's blocks among the gates of all ranks.
        return pairs * INT32 if gated else 0
    nodes = num_nodes(layout.expert_ranks, sffn.node_size)
    if nodes > 1:
        # Rows that cross nodes travel twice: to the node, then within it.
        rows += call.tokens * rows_per_token(sffn, replace(layout, ep=nodes, etp=1))
        pairs += call.tokens * sffn.num_active_blocks
    # The token of each row, and the index of each gate.
    return rows * INT32 + (pairs * INT32 if gated else 0)
