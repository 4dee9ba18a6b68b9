"""How evenly the blocks are used: counts per block, read after an evaluation.

Enters: the block ids of evaluated tokens. Leaves: tokens per block of every sparse layer, over all
ranks. Counting happens in evaluation only: there no layer is recomputed, so nothing counts twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LoadCounter(torch.nn.Module):
    """Tokens per block of one layer since the last `take`.

    Args:
        num_blocks: B.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        # Not persistent: a count of one evaluation has no place in a checkpoint.
        self.register_buffer("tokens", torch.zeros(num_blocks, dtype=torch.long), persistent=False)
        self.tokens: Tensor

    def forward(self, block_ids: Tensor) -> None:
        """Count `[T, K]` ids, in evaluation only."""
        if not self.training:
            self.tokens += torch.bincount(block_ids.flatten(), minlength=len(self.tokens))

    def take(self) -> Tensor:
        """The `[B]` counts of this rank, which start again from zero."""
        taken = self.tokens.clone()
        self.tokens.zero_()
        return taken


def load_entropy(tokens_per_block: Tensor) -> float:
    """Entropy of the load over its maximum: 1 when even, 0 when one block gets everything."""
    if len(tokens_per_block) == 1:
        return 1.0
    share = tokens_per_block.double() / tokens_per_block.sum().clamp(min=1)
    return float(torch.special.entr(share).sum()) / math.log(len(share))
