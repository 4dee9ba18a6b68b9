"""What an exchange starts from, what arrives, and how the outputs come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_sffn.ops.block_ffn import Pairs
from megatron_sffn.routers.base import Routing


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Rows of this rank with the blocks that they need.

    Args:
        rows: `[T, C]`, what meets the keys.
        pairs: `[P]`, which row needs which of all B blocks, row by row.
        gates: `[P]` or None.
        may_be_empty: whether a block of the pairs may be negative, which stands for none.
        output_bytes: of one row that comes back.
        keep: whether the rows stay for the backward, which sends them again.
    """

    rows: Tensor
    pairs: Pairs
    gates: Tensor | None
    may_be_empty: bool
    output_bytes: int
    keep: bool

    @classmethod
    def of(cls, rows: Tensor, routing: Routing, *, output_bytes: int, keep: bool) -> Tokens:
        """The tokens of a routing; nobody waits for the device."""
        tokens, active = routing.block_ids.shape
        index = torch.arange(tokens, dtype=torch.int32, device=rows.device)
        return cls(
            rows=rows,
            pairs=Pairs(
                rows=index[:, None].expand(tokens, active).reshape(-1),
                blocks=routing.block_ids.reshape(-1).int(),
            ),
            gates=None if routing.gates is None else routing.gates.reshape(-1),
            may_be_empty=routing.may_be_empty,
            output_bytes=output_bytes,
            keep=keep,
        )


class Plan(Protocol):
    """How one call's tokens were sent, and how their outputs come back."""

    @property
    def bytes_sent(self) -> int:
        """What this rank sends to others in the forward: tokens, pairs, gates, and the sums back.

        The fixed exchange of counts (16 bytes a rank) is left out.
        """

    def combine(self, y: Tensor) -> Tensor:
        """Send the rows' outputs back and add them up per token: `[R, D]` to `[T, D]`."""


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What arrived on this rank.

    Args:
        rows: `[R, D]`.
        pairs: which row meets which of this rank's blocks.
        gates: `[P]` in the order of `pairs`, or None.
        plan: takes the outputs back.
        rows_again: sends the rows once more, not differentiably; all ranks must call it together.
            None where nobody asked for it.
    """

    rows: Tensor
    pairs: Pairs
    gates: Tensor | None
    plan: Plan
    rows_again: Callable[[], Tensor] | None = None
