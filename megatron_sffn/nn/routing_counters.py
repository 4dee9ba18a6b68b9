"""What one layer's routing looks like, counted as it happens: a few sums per microbatch.

Enters: the `Routing` of a microbatch, and the bytes of its exchange. Leaves: sums over this rank's
tokens since the last reading, which add up over ranks.

Choice: a layer counts training and evaluation apart; of a recomputed layer it counts the pass that
has gradients, so that nothing counts twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.ops import device
from megatron_sffn.ops.counting import count_ids

SUMS = ("tokens", "gates", "squared_gates", "negative_scores", "scores", "empty_places")
"""What is summed beside the load: tokens; the gates of chosen blocks and their squares; how many
of their scores are below zero, of how many; places left empty by capacity or dropout."""


@dataclass(frozen=True, kw_only=True)
class RoutingSums:
    """Sums over tokens.

    Args:
        load: `[B]` tokens of each block.
        sums: `[6]` float64, in the order of `SUMS`.
    """

    load: Tensor
    sums: Tensor


class RoutingCounter(torch.nn.Module):
    """Sums of one layer since the last `take`.

    Args:
        num_blocks: B.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        # Not persistent: a count between two readings has no place in a checkpoint.
        load = torch.zeros(num_blocks, dtype=torch.long, device=device.current())
        self.register_buffer("load", load, persistent=False)
        self.load: Tensor
        # Not a buffer: Megatron narrows those of half-precision models.
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device.current())

    @torch.no_grad()
    def forward(self, routing: Routing) -> None:
        """Count a microbatch. The host does not wait for the device."""
        ids, gates, scores = routing.block_ids, routing.gates, routing.scores
        counts = count_ids(ids, len(self.load))
        self.load += counts[1:]
        if routing.may_be_empty:
            # Neither a gate nor a score of an empty place counts.
            empty = ids < 0
            gates = None if gates is None else gates.masked_fill(empty, 0.0)
            scores = None if scores is None else scores.masked_fill(empty, 0.0)
        sums = self.sums.new_zeros(len(SUMS))
        sums[0], sums[5] = len(ids), counts[0]
        if gates is not None:
            sums[1] = gates.sum(dtype=torch.float64)
            sums[2] = gates.double().square().sum()
        if scores is not None:
            sums[3], sums[4] = (scores < 0).sum(), ids.numel() - counts[0]
        self.sums += sums

    def take(self) -> RoutingSums:
        """This rank's sums, which start again from zero."""
        taken = RoutingSums(load=self.load.clone(), sums=self.sums.clone())
        self.load.zero_()
        self.sums.zero_()
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
