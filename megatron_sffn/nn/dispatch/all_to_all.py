"""`alltoall`: each row goes only to the ranks that need it, by exact counts.

On every level of the exchange the steps are Megatron's: permute the pairs by destination rank,
exchange the counts, exchange the pairs and gates of all chunks in one message, then exchange the
rows chunk by chunk (`plan.py`). A rank may send or receive nothing.

Design notes:
- The host must know the splits of an all-to-all, so it waits for the device once per level, for
  the counts. Everything that needs no counts is queued before.
- A grid on several nodes has two levels, so the host waits twice. With a single level, a token
  would cross the network once for each rank of a remote node that has one of its blocks. With two,
  it crosses once per node, to the rank at the sender's own position in that node, together with its
  pairs for all blocks of the node; that rank is the sender of the exchange within its node. The
  combine sums within the node first, so one row per node returns. Sums are then rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch import messages
from megatron_sffn.nn.dispatch.pair_exchange import PairExchange
from megatron_sffn.nn.dispatch.plan import Plan, TokenChunk
from megatron_sffn.nn.dispatch.records import DispatchInput, RoutedPairs
from megatron_sffn.nn.dispatch.row_exchange import AllToAllRows
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.ops.block_ffn import Pairs, sort_stably
from megatron_sffn.ops.streams import HostCopy


@dataclass(frozen=True, kw_only=True)
class ExchangeLevel:
    """One level of the exchange: its pairs have arrived, its rows have not been sent yet.

    Args:
        row_exchanges: the row exchange of each chunk.
        codes: `[P]` received pairs, chunk after chunk; see `messages.decode`.
        gates: `[P]` or None.
        pair_counts: number of received pairs of each chunk.
        pair_bytes_sent: bytes of pairs and gates sent to other ranks.
    """

    row_exchanges: list[AllToAllRows]
    codes: Tensor
    gates: Tensor | None
    pair_counts: list[int]
    pair_bytes_sent: int

    def routed_pairs(self) -> RoutedPairs:
        """The pairs of the received rows, as the input of the next level."""
        return RoutedPairs(
            pairs=messages.decode(self.codes),
            gates=self.gates,
            may_be_empty=False,
            row_counts=[sum(exchange.recv_splits) for exchange in self.row_exchanges],
            pair_counts=self.pair_counts,
        )

    def pairs_by_chunk(self) -> list[partial[tuple[Pairs, Tensor | None]]]:
        """`TokenChunk.received_pairs` of each chunk."""
        codes = self.codes.split(self.pair_counts)
        gates: tuple[Tensor | None, ...] = (None,) * len(codes)
        if self.gates is not None:
            gates = self.gates.split(self.pair_counts)
        return [partial(_decode, *chunk) for chunk in zip(codes, gates, strict=True)]

    def bytes_sent(self, row_bytes: int, output_bytes: int) -> int:
        """Bytes sent to other ranks: pairs, gates, rows, and the outputs of received rows."""
        num_bytes = self.pair_bytes_sent
        for exchange in self.row_exchanges:
            rank = exchange.group.rank()
            num_bytes += (sum(exchange.send_splits) - exchange.send_splits[rank]) * row_bytes
            num_bytes += (sum(exchange.recv_splits) - exchange.recv_splits[rank]) * output_bytes
        return num_bytes


def all_to_all(tokens: DispatchInput, expert_grid: ExpertGrid) -> Plan:
    """Dispatch each row once to each rank that holds cells of its blocks.

    On several nodes a row goes once to each node that has one of its blocks, then to the ranks of
    the node.
    """
    grids = (expert_grid,) if expert_grid.node_groups is None else expert_grid.levels()
    levels = [_exchange_pairs(tokens.routed, grids[0])]
    for grid in grids[1:]:
        levels.append(_exchange_pairs(levels[-1].routed_pairs(), grid))

    rows_by_chunk = tokens.rows.split(tokens.routed.row_counts)
    exchanges_by_chunk = zip(*(level.row_exchanges for level in levels), strict=True)
    row_bytes = tokens.rows.shape[1] * tokens.rows.itemsize
    return Plan(
        chunks=[
            TokenChunk(
                rows=rows, exchanges=exchanges, received_pairs=pairs, regather=tokens.regather
            )
            for rows, exchanges, pairs in zip(
                rows_by_chunk, exchanges_by_chunk, levels[-1].pairs_by_chunk(), strict=True
            )
        ],
        bytes_sent=sum(level.bytes_sent(row_bytes, tokens.output_bytes) for level in levels),
    )


def _decode(codes: Tensor, gates: Tensor | None) -> tuple[Pairs, Tensor | None]:
    return messages.decode(codes), gates


def _exchange_pairs(routed: RoutedPairs, grid: ExpertGrid) -> ExchangeLevel:
    """Exchange counts and pairs on one level; the host waits once, for the counts."""
    permuted = _permute_pairs(routed, grid)
    counts = _exchange_counts(permuted.counts, grid.group)
    row_exchanges = _row_exchanges(permuted.row_to_token, counts, routed.row_counts, grid.group)
    send_splits = [sum(by_chunk) for by_chunk in counts.pairs_sent]
    num_sent = sum(send_splits)
    pair_exchange = PairExchange(
        group=grid.group,
        order=permuted.order[:num_sent],
        etp_size=grid.etp_size,
        send_splits=send_splits,
        recv_counts=counts.pairs_received,
    )
    codes, gates = pair_exchange.dispatch(permuted.codes[:num_sent], routed.gates)
    bytes_per_pair = codes.itemsize + (0 if gates is None else gates.itemsize)
    return ExchangeLevel(
        row_exchanges=row_exchanges,
        codes=codes,
        gates=gates,
        pair_counts=[sum(by_rank) for by_rank in zip(*counts.pairs_received, strict=True)],
        pair_bytes_sent=(num_sent - send_splits[grid.group.rank()]) * bytes_per_pair,
    )


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """Number of rows and pairs of each rank and chunk, `counts[rank][chunk]`, on the host."""

    rows_sent: list[list[int]]
    rows_received: list[list[int]]
    pairs_sent: list[list[int]]
    pairs_received: list[list[int]]


def _exchange_counts(send_counts: Tensor, group: Any) -> _Counts:
    """Exchange the counts `[ranks, chunks, 2]` of rows and pairs, and wait for them on the host."""
    recv_counts = torch.empty_like(send_counts)
    torch.distributed.all_to_all_single(recv_counts, send_counts, group=group)
    # One copy to the host, as [sent or received, rows or pairs, rank, chunk].
    counts = torch.stack((send_counts, recv_counts)).permute(0, 3, 1, 2)
    (rows_sent, pairs_sent), (rows_received, pairs_received) = HostCopy(counts).wait()
    return _Counts(
        rows_sent=rows_sent,
        rows_received=rows_received,
        pairs_sent=pairs_sent,
        pairs_received=pairs_received,
    )


def _row_exchanges(
    row_to_token: Tensor, counts: _Counts, tokens_per_chunk: list[int], group: Any
) -> list[AllToAllRows]:
    """The row exchange of each chunk.

    Args:
        row_to_token: `_PermutedPairs.row_to_token`.
        counts: the exchanged counts.
        tokens_per_chunk: number of this rank's tokens in each chunk.
        group: process group of the ranks.
    """
    # Rows lie rank after rank and, for each rank, chunk after chunk.
    splits = [count for by_chunk in counts.rows_sent for count in by_chunk]
    tokens_by_split = row_to_token[: sum(splits)].split(splits)
    exchanges, first_token = [], 0
    for chunk, num_tokens in enumerate(tokens_per_chunk):
        # The concatenation copies, so autograd does not keep the unused tail alive.
        chunk_tokens = torch.cat(tokens_by_split[chunk :: len(tokens_per_chunk)])
        exchanges.append(
            AllToAllRows(
                group=group,
                num_tokens=num_tokens,
                row_to_token=chunk_tokens - first_token,
                send_splits=[by_chunk[chunk] for by_chunk in counts.rows_sent],
                recv_splits=[by_chunk[chunk] for by_chunk in counts.rows_received],
            )
        )
        first_token += num_tokens
    return exchanges


@dataclass(frozen=True, kw_only=True)
class _PermutedPairs:
    """Pairs sorted by destination rank and chunk, before the host knows how many are sent.

    The tensors of rows and pairs are upper bounds: their unused tails hold no valid entries.

    Args:
        counts: `[ranks, chunks, 2]` int64, number of rows and of pairs to send.
        row_to_token: int32, the token of each row to send.
        order: `[P · etp_size]` int32, index in `[P, etp_size]` of each pair to send.
        codes: `[P · etp_size]`, see `messages.encode`.
    """

    counts: Tensor
    row_to_token: Tensor
    order: Tensor
    codes: Tensor


def _permute_pairs(routed: RoutedPairs, grid: ExpertGrid) -> _PermutedPairs:
    """Sort the pairs by destination rank and chunk, without a device sync."""
    num_chunks = len(routed.row_counts)
    # Pairs of empty places go to one more rank, which does not exist. Sorting moves them to the
    # end, where they are cut off; removing them here would need their number on the host.
    num_destinations = grid.num_ranks + int(routed.may_be_empty)
    buckets = _destination_buckets(routed, grid)
    order, pair_offsets = sort_stably(buckets, num_destinations * num_chunks)
    pair_index = order // grid.etp_size
    rows = routed.pairs.rows.index_select(0, pair_index)
    local_blocks = routed.pairs.blocks.index_select(0, pair_index) % grid.num_local_blocks
    # The sort is stable, so the pairs of a bucket are still in row order. A row to send begins
    # where the row or the bucket changes.
    buckets = buckets.index_select(0, order)
    begins_row = _differs_from_previous(rows) | _differs_from_previous(buckets)
    max_rows = min(len(rows), sum(routed.row_counts) * num_destinations)
    row_to_token, row_offsets = _rows_to_send(rows, begins_row, pair_offsets, max_rows)
    counts = torch.stack((row_offsets.diff(), pair_offsets.diff()), dim=1)
    return _PermutedPairs(
        counts=counts.view(num_destinations, num_chunks, 2)[: grid.num_ranks].contiguous(),
        row_to_token=row_to_token,
        order=order,
        codes=messages.encode(local_blocks, begins_row, grid.num_local_blocks),
    )


def _destination_buckets(routed: RoutedPairs, grid: ExpertGrid) -> Tensor:
    """`[P · etp_size]` int32: destination rank · num_chunks + chunk, of each copy of a pair."""
    blocks, num_chunks = routed.pairs.blocks, len(routed.row_counts)
    # The cells of a block lie on etp_size consecutive ranks, and each of them needs the pair.
    first_ranks = blocks // grid.num_local_blocks * grid.etp_size
    etp_ranks = torch.arange(grid.etp_size, dtype=torch.int32, device=blocks.device)
    buckets = first_ranks[:, None] + etp_ranks
    if routed.may_be_empty:
        buckets = buckets.masked_fill((blocks < 0)[:, None], grid.num_ranks)
    if num_chunks > 1:
        buckets *= num_chunks
        for chunk, split in enumerate(buckets.split(routed.pair_counts)):
            split.add_(chunk)
    return buckets.flatten()


def _differs_from_previous(x: Tensor) -> Tensor:
    """Bool `[P]`: True at the first element and wherever an element differs from the one before."""
    differs = torch.ones_like(x, dtype=torch.bool)
    differs[1:] = x[1:] != x[:-1]
    return differs


def _rows_to_send(
    rows: Tensor, begins_row: Tensor, pair_offsets: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Reduce sorted pairs to the rows to send, one per token and destination.

    Args:
        rows: int32, the token of each pair.
        begins_row: bool, True at the first pair of each row.
        pair_offsets: `[buckets + 1]`, where the pairs of each bucket begin.
        max_rows: upper bound of the number of rows.

    Returns:
        `row_to_token` `[max_rows]` int32, and `[buckets + 1]`, where the rows of each bucket begin.
    """
    rows_so_far = begins_row.cumsum(0, dtype=torch.int32)
    # All pairs of a row write the same token to the same index, so their order does not matter.
    row_to_token = rows.new_empty(max_rows).scatter_(0, rows_so_far.long() - 1, rows)
    rows_before = torch.cat((rows_so_far.new_zeros(1), rows_so_far))
    return row_to_token, rows_before.index_select(0, pair_offsets)
