"""S-BASE: a balanced choice while training, by Sinkhorn's algorithm (Clark et al. 2022, arXiv
2202.01169; as a baseline in arXiv 2310.10837).

The scores of a microbatch become a transport plan between tokens and blocks, in which every block
gets the same weight; in training each token takes the K blocks of largest weight in its row, in
evaluation those of largest score. Sigmoids of the scores multiply the output either way.

The plan is of all tokens of a microbatch: tensor-parallel ranks make it together. Of a token's row
only the order of its blocks matters, so that the plan is a price per block, added to all scores; it
is found in logarithms, where scores of any size are harmless, in a bounded number of turns
(Megatron's `sinkhorn` has neither and does not end for scores of standard deviation 10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

import torch
from torch import Tensor

from megatron_sffn.nn.expert_grid import gather_rows
from megatron_sffn.nn.routers.learned import LearnedConfig, LearnedRouter

TOLERANCE = 1e-3
"""Mean change of a price, in units of scores, at which the plan is good enough."""
MOST_TURNS = 100
TURNS_PER_LOOK = 10
"""Turns between two looks at whether the plan is good enough: the host waits for each look. Turns
after the one that was good enough change nothing, so that this number does not, either."""


@dataclass(frozen=True, kw_only=True)
class SBaseConfig(LearnedConfig):
    """Settings of S-BASE."""

    name = "s-base"
    summary = "learned sigmoid gate; in training Sinkhorn's algorithm balances the choice"
    default_gate = "sigmoid"

    @override
    def build(self) -> type[SBaseRouter]:
        return SBaseRouter


class SBaseRouter(LearnedRouter):
    """A learned sigmoid gate with a balanced choice. Arguments as `Router`."""

    @override
    def selection_scores(self, scores: Tensor) -> Tensor:
        if not self.training:
            return super().selection_scores(scores)
        everyone = gather_rows(scores, self.balance.tp_cp_group)
        return scores + balancing_prices(everyone)


def balancing_prices(scores: Tensor) -> Tensor:
    """Sinkhorn's algorithm between tokens and blocks.

    Args:
        scores: `[T, B]`.

    Returns:
        `[B]` prices. The exponentials of `scores + prices`, with every row scaled to a sum of 1,
        have columns that sum to T / B.
    """
    tokens, blocks = scores.shape
    prices = scores.new_zeros(blocks)
    done = torch.zeros((), dtype=torch.bool, device=scores.device)
    for turn in range(1, MOST_TURNS + 1):
        rows = (scores + prices).logsumexp(dim=1, keepdim=True)
        moved = math.log(tokens / blocks) - (scores - rows).logsumexp(dim=0)
        change = (moved - prices).abs().mean()
        prices = torch.where(done, prices, moved)
        done = done | (change < TOLERANCE)
        if turn % TURNS_PER_LOOK == 0 and done:
            break
    return prices
