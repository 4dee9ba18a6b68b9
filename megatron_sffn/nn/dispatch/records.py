"""What an exchange starts from, and what arrives of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.ops.block_ffn import Pairs


@dataclass(frozen=True, kw_only=True)
class RoutedPairs:
    """Which row needs which blocks: what is known, and sent, before rows travel.

    Args:
        pairs: `[P]`, which row needs which of all blocks, row by row, chunk after chunk.
        gates: `[P]` or None.
        may_be_empty: whether a block of the pairs may be negative, which stands for none.
        row_counts: rows of each chunk.
        pair_counts: pairs of each chunk.
    """

    pairs: Pairs
    gates: Tensor | None
    may_be_empty: bool
    row_counts: list[int]
    pair_counts: list[int]


@dataclass(frozen=True, kw_only=True)
class DispatchInput:
    """Rows of this rank with the blocks that they need.

    Args:
        rows: `[T, C]`, what meets the keys.
        requests: of these rows.
        output_bytes: of one row that comes back.
        keep: whether the rows stay for the backward, which sends them again.
    """

    rows: Tensor
    requests: RoutedPairs
    output_bytes: int
    keep: bool

    @classmethod
    def of(
        cls, rows: Tensor, routing: Routing, *, output_bytes: int, keep: bool, num_chunks: int = 1
    ) -> DispatchInput:
        """The tokens of a routing in chunks of almost equal size; nobody waits for the device."""
        tokens, active = routing.block_ids.shape
        index = torch.arange(tokens, dtype=torch.int32, device=rows.device)
        bounds = [tokens * chunk // num_chunks for chunk in range(num_chunks + 1)]
        row_counts = [end - start for start, end in pairwise(bounds)]
        requests = RoutedPairs(
            pairs=Pairs(
                rows=index[:, None].expand(tokens, active).reshape(-1),
                blocks=routing.block_ids.reshape(-1).int(),
            ),
            gates=None if routing.gates is None else routing.gates.reshape(-1),
            may_be_empty=routing.may_be_empty,
            row_counts=row_counts,
            pair_counts=[count * active for count in row_counts],
        )
        return cls(rows=rows, requests=requests, output_bytes=output_bytes, keep=keep)


@dataclass(frozen=True, kw_only=True)
class DispatchedTokens:
    """What arrived on this rank of a chunk of all ranks' tokens.

    Args:
        rows: `[R, D]`.
        pairs: which row meets which of this rank's blocks.
        gates: `[P]` in the order of `pairs`, or None.
        rows_again: sends the rows once more, not differentiably; all ranks must call it together.
            None where nobody asked for it.
        first: whether it is the first chunk.
    """

    rows: Tensor
    pairs: Pairs
    gates: Tensor | None
    rows_again: Callable[[], Tensor] | None
    first: bool
