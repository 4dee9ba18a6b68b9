"""Order of dispatch, compute and combine of one call, in chunks of tokens that overlap.

Each chunk runs as a generator that yields after it has started a collective. `run_interleaved`
keeps chunk i one step behind chunk i + 1, so the collective of one chunk overlaps with the compute
of the chunk before. With one dispatch and one combine per chunk the order is

    dispatch 0 | dispatch 1, compute 0, combine 0 | dispatch 2, compute 1, combine 1, sum 0 | ...

Autograd runs the backward pass in reverse order, so it overlaps in the same way. With two exchanges
per chunk, across nodes and within a node, both overlap with the compute of other chunks.
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
"""Computes the outputs `[R, D]` of dispatched tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenChunk:
    """A part of a rank's tokens that is dispatched together.

    Args:
        rows: `[T, C]`.
        exchanges: the row exchanges of the dispatch, in order; none if this rank has all blocks.
        received_pairs: returns the pairs that this rank computes and their gates. It may wait for
            the device.
        regather: True to keep `rows` until the backward pass, which dispatches them again.
    """

    rows: Tensor
    exchanges: tuple[RowExchange, ...]
    received_pairs: Callable[[], tuple[Pairs, Tensor | None]]
    regather: bool

    def run(self, compute: Compute, *, is_first: bool) -> Generator[None, None, Tensor]:
        """Dispatch, compute and combine; yield after the start of each collective.

        Returns:
            Outputs `[T, D]` of the chunk's tokens.
        """
        rows, pairs, gates = self.rows, None, None
        for exchange in self.exchanges:
            transfer = Transfer(exchange)
            save_rows = self.regather and exchange is self.exchanges[0]
            handle = transfer.start(rows, save_rows=save_rows)
            yield
            if exchange is self.exchanges[-1]:
                # The pairs are prepared while the rows are still in flight.
                pairs, gates = self.received_pairs()
            rows = transfer.wait(handle)
        if pairs is None:
            pairs, gates = self.received_pairs()
        regather = None
        if self.regather:
            regather = partial(_dispatch_again, self.rows.detach(), self.exchanges)
        y = compute(
            DispatchedTokens(
                rows=rows,
                pairs=pairs,
                gates=gates,
                regather=regather,
                is_first_chunk=is_first,
            )
        )
        # This frame outlives the combine, so it must not hold on to the rows and their outputs.
        del rows, pairs, gates
        for exchange in reversed(self.exchanges):
            transfer = Transfer(exchange, combine=True)
            handle = transfer.start(y)
            del y
            yield
            y = transfer.wait(handle)
        return y


def _dispatch_again(rows: Tensor, exchanges: tuple[RowExchange, ...]) -> Tensor:
    """Dispatch the rows once more, not differentiable; all ranks call it together."""
    for exchange in exchanges:
        rows = exchange.start_dispatch(rows).wait()
    return rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The dispatch of one call's tokens, prepared up to the exchange of rows.

    Args:
        chunks: all with the same number of exchanges.
        bytes_sent: bytes that this rank sends to other ranks in the forward pass: rows, pairs,
            gates and output rows. The exchange of counts, 16 bytes per rank and chunk, is left out.
    """

    chunks: list[TokenChunk]
    bytes_sent: int

    def run(self, compute: Compute) -> Tensor:
        """Dispatch the tokens, compute each chunk on the ranks of its blocks, and combine.

        Args:
            compute: called once per chunk, in the order of the chunks, on all ranks.

        Returns:
            `[T, D]`.
        """
        outputs = run_interleaved(
            chunk.run(compute, is_first=index == 0) for index, chunk in enumerate(self.chunks)
        )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def run_interleaved[Result](generators: Iterable[Generator[None, None, Result]]) -> list[Result]:
    """Run generators of the same number of steps, each one step behind the next.

    In every turn, one more generator starts; then each generator that has started takes one step,
    the newest first.
    """
    pending, started, results = deque(generators), deque[Generator[None, None, Result]](), []
    while pending or started:
        if pending:
            started.appendleft(pending.popleft())
        for generator in list(started):
            try:
                next(generator)
            except StopIteration as end:
                results.append(end.value)
                started.remove(generator)
    return results
