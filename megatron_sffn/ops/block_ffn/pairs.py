"""The (row, block) pairs of one call, and their order by block and by row.

Nothing in this module waits for the device, except `pairs_of_ids` if ids may be negative.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The blocks that each row is multiplied with, row by row; a row may have any number of them.

    Args:
        rows: `[P]` int32, index of a row of x, ascending.
        blocks: `[P]` int32, index of a block of this rank's tables, distinct within a row.
    """

    rows: Tensor
    blocks: Tensor


def pairs_of_ids(
    block_ids: Tensor, gates: Tensor | None, *, may_be_empty: bool = True
) -> tuple[Pairs, Tensor | None]:
    """The pairs of `[T, K]` block ids, token by token, and their gates.

    Args:
        block_ids: `[T, K]`, distinct within a row.
        gates: `[T, K]` or None.
        may_be_empty: True if an id may be negative, which stands for no block. Such pairs are left
            out, and the host waits for the device once, for the number of pairs that remain. False
            promises that no id is negative; then the host does not wait.

    Returns:
        The pairs, and their gates `[P]` or None.
    """
    tokens, active = block_ids.shape
    rows = torch.arange(tokens, dtype=torch.int32, device=block_ids.device)
    rows, blocks = rows[:, None].expand(tokens, active).reshape(-1), block_ids.reshape(-1).int()
    gates = None if gates is None else gates.reshape(-1)
    if may_be_empty:
        nonempty = (blocks >= 0).nonzero()[:, 0]
        if len(nonempty) < len(blocks):
            rows, blocks = rows.index_select(0, nonempty), blocks.index_select(0, nonempty)
            gates = None if gates is None else gates.index_select(0, nonempty)
    return Pairs(rows=rows, blocks=blocks), gates


@dataclass(frozen=True, kw_only=True)
class ByRow:
    """The order of sorted pairs by row.

    Args:
        order: `[P]` int32: the pairs of row 0 in `Sorted`, then those of row 1, and so on.
        offsets: `[R + 1]` int32: row r owns `order[offsets[r] : offsets[r + 1]]`.
    """

    order: Tensor
    offsets: Tensor


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Pairs sorted by block; rows ascend within a block.

    Args:
        rows: `[P]` int32.
        offsets: `[B + 1]` int64: block i owns the pairs from `offsets[i]` to `offsets[i + 1]`.
        order: `[P]` int32, the position in `Pairs` of each pair; None in a backward pass, which
            does not keep it.
        distinct: True if a row has each block at most once.
        derived: cache of what backends compute from the pairs, shared by all products of forward
            and backward pass. A key is the type of the record, or a tuple of type or name and size.
        of_pass: the same for large records, which the backward pass computes again.
    """

    rows: Tensor
    offsets: Tensor
    order: Tensor | None = None
    distinct: bool = True
    derived: dict[Hashable, Any] = field(default_factory=dict)
    of_pass: dict[Hashable, Any] = field(default_factory=dict)

    def by_row(self, num_rows: int) -> ByRow:
        """The order by row, computed once for all products with these pairs.

        `Pairs` are in the order of the rows, so the order by row is the inverse of the permutation
        `order`, which one scatter computes. Without `order` the rows are sorted.

        Args:
            num_rows: R.
        """
        if (cached := self.derived.get(ByRow)) is None:
            if self.order is None:
                order = self.rows.argsort(stable=True).int()
            else:
                places = torch.arange(len(self.order), dtype=torch.int32, device=self.order.device)
                # Out of place: torch.compile cannot pass a mutated tensor from the forward to the
                # backward pass.
                order = places.index_copy(0, self.order.long(), places)
            offsets = _starts(self.rows.index_select(0, order), num_rows)
            cached = self.derived[ByRow] = ByRow(order=order, offsets=offsets.int())
        by_row: ByRow = cached
        assert len(by_row.offsets) == num_rows + 1, (by_row.offsets.shape, num_rows)
        return by_row


def sort_by_block(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """`Products.sort` in plain torch; the host does not wait for the device."""
    # Narrow keys sort several times faster than int64 ones.
    narrow = torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32
    ascending, order = blocks.to(narrow).sort(stable=True)
    return order.int(), _starts(ascending, num_blocks)


def _starts(ascending: Tensor, count: int) -> Tensor:
    """`[count + 1]` int64: the first position of each of 0 to `count` in ascending integers.

    A binary search, because `bincount` would make the host wait for the largest number.
    """
    bounds = torch.arange(count + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, bounds)
