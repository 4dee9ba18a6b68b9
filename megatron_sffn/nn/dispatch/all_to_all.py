"""`alltoall`: exact counts, each row where it is needed. A rank may send or get none.

First the counts of rows and of pairs, then the pairs with their gates, each in one message for all
chunks; then the rows, chunk by chunk (`plan.py`). How long a message is must be known on the host,
so that the host waits once, for the counts: everything that needs no counts is queued before.

On several nodes all of this is done twice, and the host waits twice. Straight to each rank, a token
would cross the network between nodes once for each rank there that has a block of it. In two steps
it crosses once, to the rank at its own rank's place in the other node, with its pairs of all blocks
there; that rank is then the sender of an exchange within its node. The outputs are summed within
the node first, so that one row per node comes back. Sums are rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
    """Where rows go in one exchange, and the pairs that arrived before them.

    Args:
        wires: of the rows of each chunk.
        codes: `[P]` pairs that arrived, chunk after chunk; see `messages.decode`.
        gates: `[P]` or None.
        pair_counts: of each chunk.
        pair_bytes_sent: to other ranks, pairs and gates.
    """

    wires: list[AllToAllRows]
    codes: Tensor
    gates: Tensor | None
    pair_counts: list[int]
    pair_bytes_sent: int

    def requests(self) -> RoutedPairs:
        """Those of the rows that arrive, for another exchange."""
        return RoutedPairs(
            pairs=messages.decode(self.codes),
            gates=self.gates,
            may_be_empty=False,
            row_counts=[sum(wire.received) for wire in self.wires],
            pair_counts=self.pair_counts,
        )

    def bytes_sent(self, row_bytes: int, output_bytes: int) -> int:
        """To other ranks: pairs, gates and rows, and the outputs of the rows that came."""
        sent = self.pair_bytes_sent
        for wire in self.wires:
            own = wire.group.rank()
            sent += (sum(wire.sent) - wire.sent[own]) * row_bytes
            sent += (sum(wire.received) - wire.received[own]) * output_bytes
        return sent


def all_to_all(tokens: DispatchInput, expert_grid: ExpertGrid) -> Plan:
    """Send each row once to each rank that holds cells of its blocks.

    On several nodes, once to each node that has a block of it, then to the node's ranks.
    """
    levels = (expert_grid,) if expert_grid.node_groups is None else expert_grid.levels()
    requests, steps = tokens.requests, list[ExchangeLevel]()
    for level in levels:
        if steps:
            requests = steps[-1].requests()
        steps.append(_exchange_level(requests, level))
    arrived = steps[-1]
    codes = arrived.codes.split(arrived.pair_counts)
    gates: tuple[Tensor | None, ...] = (None,) * len(codes)
    if arrived.gates is not None:
        gates = arrived.gates.split(arrived.pair_counts)
    rows = tokens.rows.split(tokens.requests.row_counts)
    wires = zip(*(step.wires for step in steps), strict=True)
    row_bytes = tokens.rows.shape[1] * tokens.rows.itemsize
    return Plan(
        chunks=[
            TokenChunk(rows=part, wires=way, meetings=partial(_meetings, *pairs), keep=tokens.keep)
            for part, way, *pairs in zip(rows, wires, codes, gates, strict=True)
        ],
        bytes_sent=sum(step.bytes_sent(row_bytes, tokens.output_bytes) for step in steps),
    )


def _meetings(codes: Tensor, gates: Tensor | None) -> tuple[Pairs, Tensor | None]:
    return messages.decode(codes), gates


def _exchange_level(requests: RoutedPairs, expert_grid: ExpertGrid) -> ExchangeLevel:
    """Tell the ranks how many rows and which pairs they will get; one wait for all chunks."""
    group, chunks = expert_grid.group, len(requests.row_counts)
    departures = _permute_pairs(requests, expert_grid)
    arrivals = torch.empty_like(departures.counts)
    torch.distributed.all_to_all_single(arrivals, departures.counts, group=group)
    # [sent or received, rows or pairs, rank, chunk].
    numbers = torch.stack((departures.counts, arrivals)).permute(0, 3, 1, 2)
    (rows_sent, pairs_sent), (rows_received, pairs_received) = HostCopy(numbers).wait()

    # Rank after rank, and for each chunk after chunk; the rest of the places is not used.
    behind = departures.tokens[: sum(map(sum, rows_sent))]
    pieces = behind.split([count for counts in rows_sent for count in counts])
    wires, start = [], 0
    for chunk, num_tokens in enumerate(requests.row_counts):
        wires.append(
            AllToAllRows(
                group=group,
                num_tokens=num_tokens,
                # A copy, so that the places that are not used are not kept.
                tokens=torch.cat(pieces[chunk::chunks]) - start,
                sent=[counts[chunk] for counts in rows_sent],
                received=[counts[chunk] for counts in rows_received],
            )
        )
        start += num_tokens
    sent, gates = [sum(counts) for counts in pairs_sent], requests.gates
    pair_wire = PairExchange(
        group=group,
        order=departures.order[: sum(sent)],
        slices=expert_grid.etp_size,
        sent=sent,
        received=pairs_received,
    )
    codes, arrived_gates = pair_wire.send(departures.codes[: sum(sent)], gates)
    pair_bytes = codes.itemsize + (0 if gates is None else gates.itemsize)
    return ExchangeLevel(
        wires=wires,
        codes=codes,
        gates=arrived_gates,
        pair_counts=[sum(counts) for counts in zip(*pairs_received, strict=True)],
        pair_bytes_sent=(sum(sent) - sent[group.rank()]) * pair_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _PermutedPairs:
    """What this rank sends, rank after rank, before anybody knows how much that is.

    Args:
        counts: `[ranks, chunks, 2]` int64, rows and pairs for each rank of each chunk.
        tokens: int32, the token behind each row; more places than rows.
        order: `[P · ETP]` int32, pair and slice behind each pair that is sent.
        codes: `[P · ETP]`, see `messages.encode`.
    """

    counts: Tensor
    tokens: Tensor
    order: Tensor
    codes: Tensor


def _permute_pairs(requests: RoutedPairs, expert_grid: ExpertGrid) -> _PermutedPairs:
    """Sort the pairs by the ranks that hold their blocks; nobody waits for the device."""
    ranks, slices, pairs = expert_grid.num_ranks, expert_grid.etp_size, requests.pairs
    chunks = len(requests.row_counts)
    # A block lies on `slices` ranks: `[P, slices]` owners of each pair. Empty places go to one
    # more rank, which does not exist, behind the others.
    owners = (pairs.blocks // expert_grid.num_local_blocks * slices)[:, None]
    owners = owners + torch.arange(slices, dtype=torch.int32, device=owners.device)
    if requests.may_be_empty:
        owners = owners.masked_fill((pairs.blocks < 0)[:, None], ranks)
    destinations = ranks + int(requests.may_be_empty)
    if chunks > 1:
        # Each chunk of a rank has an offset of its own. Within a rank the order is that of the
        # rows, and so of the chunks, in any case.
        owners *= chunks
        for chunk, part in enumerate(owners.split(requests.pair_counts)):
            part.add_(chunk)
    order, offsets = sort_stably(owners.flatten(), destinations * chunks)
    owners = owners.flatten().index_select(0, order)
    behind = order // slices
    rows = pairs.rows.index_select(0, behind)
    blocks = pairs.blocks.index_select(0, behind) % expert_grid.num_local_blocks

    # Pairs of a rank are in the order of their rows: a row begins where row or rank change.
    begins_row = torch.ones_like(rows, dtype=torch.bool)
    begins_row[1:] = (rows[1:] != rows[:-1]) | (owners[1:] != owners[:-1])
    row_number = begins_row.cumsum(0, dtype=torch.int32)
    rows_before = torch.cat((row_number.new_zeros(1), row_number)).index_select(0, offsets)
    places = min(len(rows), sum(requests.row_counts) * destinations)
    # All pairs of a row write the same number to the same place.
    tokens = rows.new_empty(places).scatter_(0, row_number.long() - 1, rows)
    counts = torch.stack((rows_before.diff(), offsets.diff()), dim=1)
    return _PermutedPairs(
        counts=counts.view(destinations, chunks, 2)[:ranks].contiguous(),
        tokens=tokens,
        order=order,
        codes=messages.encode(blocks, begins_row, expert_grid.num_local_blocks),
    )
