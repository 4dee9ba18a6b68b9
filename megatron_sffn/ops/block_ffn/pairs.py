"""Who meets whom: the (row, block) pairs of one call, and their order by block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One entry per (row, block) meeting, row by row; a row may have any number of blocks.

    Args:
        rows: `[P]` int32, index of a row of x, ascending.
        blocks: `[P]` int32, index of a block of the tables at hand, distinct within a row.
    """

    rows: Tensor
    blocks: Tensor


def pairs_of_ids(block_ids: Tensor, gates: Tensor | None) -> tuple[Pairs, Tensor | None]:
    """The pairs of `[T, K]` block ids, token by token, and their gates; a negative id is no block.

    Args:
        block_ids: `[T, K]`, distinct within a row.
        gates: `[T, K]` or None.

    Returns:
        The pairs, and their gates `[P]`.
    """
    tokens, active = block_ids.shape
    rows = torch.arange(tokens, dtype=torch.int32, device=block_ids.device)
    rows, blocks = rows.repeat_interleave(active), block_ids.reshape(-1).int()
    gates = None if gates is None else gates.reshape(-1)
    if len(blocks) and blocks.amin() < 0:
        there = blocks >= 0
        rows, blocks = rows[there], blocks[there]
        gates = None if gates is None else gates[there]
    return Pairs(rows=rows, blocks=blocks), gates


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Pairs in the order of their blocks; rows ascend within a block.

    Args:
        rows: `[P]` int32.
        offsets: `[B + 1]` int64: block i owns the pairs from `offsets[i]` to `offsets[i + 1]`.
        distinct: whether a row meets a block only once.
        derived: what a backend makes of these once, for all products with them; by its type.
    """

    rows: Tensor
    offsets: Tensor
    distinct: bool = True
    derived: dict[type, Any] = field(default_factory=dict)
