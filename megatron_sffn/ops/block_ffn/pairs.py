"""Who meets whom: the (row, block) pairs of one call, and their order by block and by row.

Nothing in this module waits for the device, but for `pairs_of_ids` where ids may be negative.
"""

from __future__ import annotations

from collections.abc import Hashable
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


def pairs_of_ids(
    block_ids: Tensor, gates: Tensor | None, *, may_be_empty: bool = True
) -> tuple[Pairs, Tensor | None]:
    """The pairs of `[T, K]` block ids, token by token, and their gates.

    Args:
        block_ids: `[T, K]`, distinct within a row.
        gates: `[T, K]` or None.
        may_be_empty: True if an id may be negative, which stands for no block: such pairs are left
            out, and the host waits for the device once to learn how many remain. False promises
            that there is no negative id: nothing is looked at, and nothing waits.

    Returns:
        The pairs, and their gates `[P]`.
    """
    tokens, active = block_ids.shape
    rows = torch.arange(tokens, dtype=torch.int32, device=block_ids.device)
    rows, blocks = rows[:, None].expand(tokens, active).reshape(-1), block_ids.reshape(-1).int()
    gates = None if gates is None else gates.reshape(-1)
    if may_be_empty:
        kept = (blocks >= 0).nonzero()[:, 0]
        if len(kept) < len(blocks):
            rows, blocks = rows.index_select(0, kept), blocks.index_select(0, kept)
            gates = None if gates is None else gates.index_select(0, kept)
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
    """Pairs in the order of their blocks; rows ascend within a block.

    Args:
        rows: `[P]` int32.
        offsets: `[B + 1]` int64: block i owns the pairs from `offsets[i]` to `offsets[i + 1]`.
        order: `[P]` int32: the place in `Pairs` of each; None where it was not kept.
        distinct: whether a row meets a block only once.
        derived: what a backend makes of these once, for all products with them; by its type, or
            by a tuple of its type or name and a size.
        of_pass: likewise for what is large: made again in the backward pass, rather than kept.
    """

    rows: Tensor
    offsets: Tensor
    order: Tensor | None = None
    distinct: bool = True
    derived: dict[Hashable, Any] = field(default_factory=dict)
    of_pass: dict[Hashable, Any] = field(default_factory=dict)

    def by_row(self, num_rows: int) -> ByRow:
        """The order by row, made once for all products with these pairs.

        `Pairs` come row by row, so that the order by row is the inverse of the order by block,
        which one scatter gives. Without the latter the rows are sorted.

        Args:
            num_rows: R.
        """
        if (kept := self.derived.get(ByRow)) is None:
            if self.order is None:
                order = self.rows.argsort(stable=True).int()
            else:
                places = torch.arange(len(self.order), dtype=torch.int32, device=self.order.device)
                # Not in place, which torch.compile cannot hand from forward to backward.
                order = places.index_copy(0, self.order.long(), places)
            offsets = _starts(self.rows.index_select(0, order), num_rows)
            kept = self.derived[ByRow] = ByRow(order=order, offsets=offsets.int())
        by_row: ByRow = kept
        assert len(by_row.offsets) == num_rows + 1, (by_row.offsets.shape, num_rows)
        return by_row


def sort_by_block(blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """`autograd.Products.sort` in plain torch; does not wait for the device.

    Args:
        blocks: `[P]` int32 in [0, num_blocks).
        num_blocks: B.

    Returns:
        The stable order `[P]`, int32, and the blocks' offsets `[B + 1]`, int64.
    """
    # Narrow keys sort several times faster than int64 ones.
    narrow = torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32
    ascending, order = blocks.to(narrow).sort(stable=True)
    return order.int(), _starts(ascending, num_blocks)


def _starts(ascending: Tensor, count: int) -> Tensor:
    """`[count + 1]` int64: where in ascending integers each of 0 to `count` begins.

    A search, because `bincount` would make the host wait for the largest number.
    """
    bounds = torch.arange(count + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, bounds)
