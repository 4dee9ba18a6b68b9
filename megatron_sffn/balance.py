"""How evenly the blocks are used, and what the exchange sends: counts, read after an evaluation.

Enters: the block ids of evaluated tokens, and the bytes of their exchange. Leaves: tokens per block
of every sparse layer over all ranks, and bytes per token. Counting happens in evaluation only:
there no layer is recomputed, so nothing counts twice.
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


class TrafficCounter(torch.nn.Module):
    """Bytes that one layer sent to other ranks since the last `take`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self.bytes_sent = 0

    def forward(self, tokens: int, bytes_sent: int) -> None:
        """Count a forward's tokens and bytes, in evaluation only."""
        if not self.training:
            self.tokens += tokens
            self.bytes_sent += bytes_sent

    def take(self) -> tuple[int, int]:
        """This rank's tokens and bytes, which start again from zero."""
        taken = (self.tokens, self.bytes_sent)
        self.tokens = self.bytes_sent = 0
        return taken


def load_entropy(tokens_per_block: Tensor) -> float:
    """Entropy of the load over its maximum: 1 when even, 0 when one block gets everything."""
    if len(tokens_per_block) == 1:
        return 1.0
    share = tokens_per_block.double() / tokens_per_block.sum().clamp(min=1)
    return float(torch.special.entr(share).sum()) / math.log(len(share))
