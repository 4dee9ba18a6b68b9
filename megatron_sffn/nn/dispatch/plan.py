"""How one call's tokens travel: in chunks, so that some are on their way while others are computed.

Each chunk is a generator, which yields where it has rows on their way; `run_interleaved` runs chunk
i one step behind chunk i + 1. With one step out and one back that is

    start 0 | start 1, compute 0, send 0 back | start 2, compute 1, send 1 back, sum 0 | ...

and in the backward, which autograd runs in the reverse order, the same from the other end. Two
steps out, across nodes and within, overlap with the chunks around them likewise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_sffn.nn.dispatch.records import DispatchedTokens
from megatron_sffn.nn.dispatch.row_exchange import RowExchange
from megatron_sffn.nn.dispatch.transfer import Transfer
from megatron_sffn.ops.block_ffn import Pairs

Compute = Callable[[DispatchedTokens], Tensor]
"""From the rows that arrived to their outputs, `[R, D]`."""


@dataclass(frozen=True, kw_only=True)
class TokenChunk:
    """Some of a rank's tokens.

    Args:
        rows: `[T, C]`.
        wires: along which they travel, one after the other; none if all blocks are on this rank.
        meetings: gives the pairs that arrive, and their gates. It may wait for the device.
        keep: whether the rows stay for the backward, which sends them again.
    """

    rows: Tensor
    wires: tuple[RowExchange, ...]
    meetings: Callable[[], tuple[Pairs, Tensor | None]]
    keep: bool

    def travel(self, compute: Compute, *, first: bool) -> Generator[None, None, Tensor]:
        """Send the rows, compute them where they arrive, and return the sums `[T, D]`."""
        rows, pairs, gates = self.rows, None, None
        for wire in self.wires:
            leg = Transfer(wire)
            token = leg.start(rows, keep=self.keep and wire is self.wires[0])
            yield
            if wire is self.wires[-1]:
                # Before the rows are waited for.
                pairs, gates = self.meetings()
            rows = leg.finish(token)
        if pairs is None:
            pairs, gates = self.meetings()
        again = partial(_send_again, self.rows.detach(), self.wires) if self.keep else None
        y = compute(
            DispatchedTokens(rows=rows, pairs=pairs, gates=gates, rows_again=again, first=first)
        )
        del rows, pairs, gates
        for wire in reversed(self.wires):
            leg = Transfer(wire, back=True)
            token = leg.start(y)
            del y
            yield
            y = leg.finish(token)
        return y


def _send_again(rows: Tensor, wires: tuple[RowExchange, ...]) -> Tensor:
    """The rows that arrive, once more, not differentiably; all ranks call it together."""
    for wire in wires:
        rows = wire.start_out(rows).land()
    return rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One call's tokens, chunk after chunk.

    Args:
        chunks: of equally many steps.
        bytes_sent: what this rank sends to others in the forward: tokens, pairs, gates, and the
            sums back. The fixed exchange of counts (16 bytes a rank and chunk) is left out.
    """

    chunks: list[TokenChunk]
    bytes_sent: int

    def run(self, compute: Compute) -> Tensor:
        """Send the tokens out, compute each chunk where it arrives, and bring the sums back.

        Args:
            compute: called once for each chunk, in their order, on all ranks.

        Returns:
            `[T, D]`.
        """
        outputs = run_interleaved(
            chunk.travel(compute, first=number == 0) for number, chunk in enumerate(self.chunks)
        )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def run_interleaved[Result](journeys: Iterable[Generator[None, None, Result]]) -> list[Result]:
    """Run generators of equally many steps, each one step behind the one after it.

    In every turn one more sets out first, then the others take a step, the newest first.
    """
    waiting, under_way, results = deque(journeys), deque[Generator[None, None, Result]](), []
    while waiting or under_way:
        if waiting:
            under_way.appendleft(waiting.popleft())
        for journey in list(under_way):
            try:
                next(journey)
            except StopIteration as end:
                results.append(end.value)
                under_way.remove(journey)
    return results
