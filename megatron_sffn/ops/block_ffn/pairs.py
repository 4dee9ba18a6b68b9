"""Who meets whom: the (row, block) pairs of one call, and their order by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One entry per (row, block) meeting, in any order; a row may have any number of blocks.

    Args:
        rows: `[P]` int64, index of a row of x.
        blocks: `[P]` int64, index of a block of the tables at hand.
    """

    rows: Tensor
    blocks: Tensor

    @classmethod
    def of_ids(cls, block_ids: Tensor) -> Pairs:
        """The pairs of `[T, K]` block ids, token by token; a negative id is no block."""
        tokens, active = block_ids.shape
        rows = torch.arange(tokens, device=block_ids.device).repeat_interleave(active)
        blocks = block_ids.reshape(-1)
        if len(blocks) and blocks.amin() < 0:
            there = blocks >= 0
            rows, blocks = rows[there], blocks[there]
        return cls(rows=rows, blocks=blocks)

    def by_block(self, num_blocks: int) -> tuple[Tensor, list[int]]:
        """Sort the pairs by block.

        Returns:
            `[P]` the order (stable: rows ascend within a block if they did before), and B + 1
            offsets, so that block i owns `order[offsets[i]:offsets[i + 1]]`.
        """
        # Narrow keys sort several times faster than int64 ones.
        narrow = torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32
        order = self.blocks.to(narrow).argsort(stable=True)
        counts = torch.bincount(self.blocks, minlength=num_blocks)
        return order, [0, *counts.cumsum(0).tolist()]
