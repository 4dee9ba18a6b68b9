"""Counters of one layer's routing: the load of each block, and a few sums per microbatch.

Inputs: the `Routing` of a microbatch, and the bytes of its dispatch. Outputs: sums over this rank's
tokens since the last reading; the sums of all ranks add up.

Design notes: a layer has separate counters for training and evaluation. A recomputed layer runs its
forward pass twice and counts only the pass that has gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

import torch
from torch import Tensor

from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.ops import device
from megatron_sffn.ops.counting import count_ids

SUMS = ("tokens", "gates", "squared_gates", "negative_scores", "scores", "empty_places")
"""The sums beside the load: number of tokens; gates of the chosen blocks, and their squares; number
of negative scores, and of all scores, of the chosen blocks; places that capacity or dropout left
empty."""


@dataclass(frozen=True, kw_only=True)
class RoutingSums:
    """Sums over tokens.

    Args:
        load: `[B]` int64, number of tokens of each block.
        sums: `[6]` float64, in the order of `SUMS`.
    """

    load: Tensor
    sums: Tensor


class RoutingCounter(torch.nn.Module):
    """Load and sums of one layer since the last `take`.

    Args:
        num_blocks: B.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        # Not persistent: a count between two readings does not belong in a checkpoint.
        load = torch.zeros(num_blocks, dtype=torch.long, device=device.current())
        self.register_buffer("load", load, persistent=False)
        self.load: Tensor
        # Not a buffer, because Megatron casts the buffers of half-precision models.
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device.current())

    @override
    @torch.no_grad()
    def forward(self, routing: Routing) -> None:
        """Count a microbatch, without a device sync."""
        ids_TK, gates_TK, scores_TK = routing.block_ids, routing.gates, routing.scores
        # The first element counts empty places, id -1.
        counts = count_ids(ids_TK, len(self.load))
        self.load += counts[1:]
        if routing.may_be_empty:
            # Gates and scores of empty places do not count.
            is_empty = ids_TK < 0
            gates_TK = None if gates_TK is None else gates_TK.masked_fill(is_empty, 0.0)
            scores_TK = None if scores_TK is None else scores_TK.masked_fill(is_empty, 0.0)
        sums = self.sums.new_zeros(len(SUMS))
        sums[0], sums[5] = len(ids_TK), counts[0]
        if gates_TK is not None:
            sums[1] = gates_TK.sum(dtype=torch.float64)
            sums[2] = gates_TK.double().square().sum()
        if scores_TK is not None:
            sums[3], sums[4] = (scores_TK < 0).sum(), ids_TK.numel() - counts[0]
        self.sums += sums

    def take(self) -> RoutingSums:
        """Return this rank's sums and reset them."""
        totals = RoutingSums(load=self.load.clone(), sums=self.sums.clone())
        self.load.zero_()
        self.sums.zero_()
        return totals


class TrafficCounter(torch.nn.Module):
    """Tokens of one layer, and bytes that it sent to other ranks, since the last `take`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self.bytes_sent = 0

    @override
    def forward(self, tokens: int, bytes_sent: int) -> None:
        """Count the tokens and bytes of a forward pass, in evaluation only."""
        if not self.training:
            self.tokens += tokens
            self.bytes_sent += bytes_sent

    def take(self) -> tuple[int, int]:
        """Return this rank's tokens and bytes and reset them."""
        totals = (self.tokens, self.bytes_sent)
        self.tokens = self.bytes_sent = 0
        return totals


def load_entropy(tokens_per_block: Tensor) -> float:
    """Entropy of the load over its maximum: 1 if even, 0 if one block has all tokens."""
    if len(tokens_per_block) == 1:
        return 1.0
    share = tokens_per_block.double() / tokens_per_block.sum().clamp(min=1)
    return float(torch.special.entr(share).sum()) / math.log(len(share))
