"""`allgather`: every row goes to every rank, and all ranks return their partial outputs.

It sends more than `alltoall` if some rank has no block of a token. In return nothing is permuted
and no counts are exchanged. All ranks must have the same number of tokens.

Design notes: the host waits for the device once, for the number of pairs of this rank. Without it,
the up projections would need memory for the pairs of all ranks, EP times as much. The rows travel
while the host waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch import messages
from megatron_sffn.nn.dispatch.plan import Plan, TokenChunk
from megatron_sffn.nn.dispatch.records import DispatchInput
from megatron_sffn.nn.dispatch.row_exchange import (
    AllGatherRows,
    start_all_gather,
    start_all_to_all,
    sum_equal_splits,
)
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.ops.block_ffn import Pairs
from megatron_sffn.ops.streams import HostCopy


def all_gather(tokens: DispatchInput, expert_grid: ExpertGrid) -> Plan:
    """Send every row to every rank, with all of its block ids and gates."""
    group, routed, num_tokens = expert_grid.group, tokens.routed, len(tokens.rows)
    ids = routed.pairs.blocks.to(messages.id_dtype(expert_grid.num_blocks))
    blocks, gates = _gather_pairs(ids, routed.gates, group)
    received_pairs = _LocalPairs(
        blocks.int(),
        gates,
        expert_grid,
        num_active=len(ids) // num_tokens if num_tokens else 1,
    ).wait
    chunk = TokenChunk(
        rows=tokens.rows,
        exchanges=(AllGatherRows(group=group),),
        received_pairs=received_pairs,
        regather=tokens.regather,
    )
    pair_bytes = ids.nbytes + (0 if routed.gates is None else routed.gates.nbytes)
    output_bytes = num_tokens * tokens.output_bytes
    bytes_per_rank = tokens.rows.nbytes + output_bytes + pair_bytes
    return Plan(chunks=[chunk], bytes_sent=(expert_grid.num_ranks - 1) * bytes_per_rank)


class _LocalPairs:
    """Selection of this rank's pairs among the pairs of all ranks.

    Args:
        blocks: `[P]` int32 block ids of all ranks' pairs; negative for an empty place.
        gates: `[P]` or None.
        expert_grid: the grid of the blocks.
        num_active: K.
    """

    def __init__(
        self, blocks: Tensor, gates: Tensor | None, expert_grid: ExpertGrid, *, num_active: int
    ) -> None:
        self.blocks, self.gates, self.num_active = blocks, gates, num_active
        self.first_block = expert_grid.first_block
        # Rounded down, the quotient of an empty place is -1, which is no rank.
        self.is_local = blocks // expert_grid.num_local_blocks == expert_grid.ep_rank
        self.local_so_far = self.is_local.cumsum(0, dtype=torch.int32)
        self._num_local = HostCopy(self.local_so_far[-1:])

    def wait(self) -> tuple[Pairs, Tensor | None]:
        """Wait for the number of local pairs, and return these pairs and their gates."""
        num_local = sum(self._num_local.wait())
        index = torch.arange(len(self.blocks), dtype=torch.int32, device=self.blocks.device)
        # A scatter rather than `nonzero`, which would make the host wait again. Pairs of other
        # ranks all write to one more element at the end.
        target = torch.where(self.is_local, self.local_so_far.long() - 1, num_local)
        local = index.new_empty(num_local + 1).scatter_(0, target, index)[:num_local]
        pairs = Pairs(
            rows=local // self.num_active,
            blocks=self.blocks.index_select(0, local) - self.first_block,
        )
        return pairs, None if self.gates is None else self.gates.index_select(0, local)


def _gather_pairs(ids: Tensor, gates: Tensor | None, group: Any) -> tuple[Tensor, Tensor | None]:
    """`[P]` ids and gates of all ranks, rank after rank; differentiable in the gates."""
    if gates is None:
        message = start_all_gather(messages.pack(ids, None), group).wait()
        return messages.unpack(message, ids.dtype, None)
    all_ids, all_gates = _AllGatherPairs.apply(gates, ids, group)
    return all_ids, all_gates


class _AllGatherPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, ids: Tensor, group: Any) -> tuple[Tensor, Tensor | None]:
        ctx.group = group
        message = start_all_gather(messages.pack(ids, gates), group).wait()
        all_ids, all_gates = messages.unpack(message, ids.dtype, gates.dtype)
        ctx.mark_non_differentiable(all_ids)
        return all_ids, all_gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank has gradients of all gates: send each rank its own, and add them up.
        dgates = start_all_to_all(grads[1], ctx.group).wait()
        return sum_equal_splits(dgates, ctx.group.size()), None, None
