"""The input of an exchange, and the tokens that it delivers."""

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
    """The (row, block) pairs of a rank's rows, which are sent before the rows.

    Args:
        pairs: `[P]` pairs with ids of all blocks of the grid, sorted by row and so by chunk.
        gates: `[P]` or None.
        may_be_empty: True if a block id of `pairs` may be negative, for an empty place.
        row_counts: number of rows of each chunk.
        pair_counts: number of pairs of each chunk.
    """

    pairs: Pairs
    gates: Tensor | None
    may_be_empty: bool
    row_counts: list[int]
    pair_counts: list[int]


@dataclass(frozen=True, kw_only=True)
class DispatchInput:
    """The rows of a rank and their pairs.

    Args:
        rows: `[T, C]`, tokens or their queries.
        routed: the pairs of these rows.
        output_bytes: bytes of one output row.
        regather: True to keep `rows` until the backward pass, which dispatches them again.
    """

    rows: Tensor
    routed: RoutedPairs
    output_bytes: int
    regather: bool

    @classmethod
    def of(
        cls,
        rows: Tensor,
        routing: Routing,
        *,
        output_bytes: int,
        regather: bool,
        num_chunks: int = 1,
    ) -> DispatchInput:
        """The input for a routing, in chunks of almost equal size; without a device sync."""
        ids_TK = routing.block_ids
        num_tokens, num_active = ids_TK.shape
        row_T = torch.arange(num_tokens, dtype=torch.int32, device=rows.device)
        bounds = [num_tokens * chunk // num_chunks for chunk in range(num_chunks + 1)]
        row_counts = [end - start for start, end in pairwise(bounds)]
        routed = RoutedPairs(
            pairs=Pairs(
                rows=row_T[:, None].expand(num_tokens, num_active).reshape(-1),
                blocks=ids_TK.reshape(-1).int(),
            ),
            gates=None if routing.gates is None else routing.gates.reshape(-1),
            may_be_empty=routing.may_be_empty,
            row_counts=row_counts,
            pair_counts=[count * num_active for count in row_counts],
        )
        return cls(rows=rows, routed=routed, output_bytes=output_bytes, regather=regather)


@dataclass(frozen=True, kw_only=True)
class DispatchedTokens:
    """The tokens of all ranks that this rank computes, for one chunk.

    Args:
        rows: `[R, C]`.
        pairs: `[P]` pairs of these rows and the blocks of this rank.
        gates: `[P]` in the order of `pairs`, or None.
        regather: dispatches the rows again, not differentiable; all ranks must call it together.
            None if the rows are kept until the backward pass.
        is_first_chunk: True for the first chunk of the call.
    """

    rows: Tensor
    pairs: Pairs
    gates: Tensor | None
    regather: Callable[[], Tensor] | None
    is_first_chunk: bool
