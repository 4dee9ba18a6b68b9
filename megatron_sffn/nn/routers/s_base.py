"""S-BASE: a balanced choice while training, by Sinkhorn's algorithm (Clark et al. 2022, arXiv
2202.01169; as a baseline in arXiv 2310.10837).

The scores of a microbatch become a transport plan between tokens and blocks, in which every block
gets the same weight. In training each token takes the K blocks of largest weight in its row, in
evaluation the blocks of largest score. In both the sigmoids of the scores multiply the output.

The plan covers all tokens of a microbatch: tensor-parallel ranks make it together. Only the order
of the blocks in a token's row matters, so that the plan is a price per block that is added to all
scores. Prices are computed in logarithms, which are stable for scores of any size, in a bounded
number of iterations (Megatron's `sinkhorn` has neither property and does not end for scores of
standard deviation 10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

import torch
from torch import Tensor

from megatron_sffn.nn.expert_grid import gather_rows
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.nn.routers.learned import LearnedConfig, LearnedRouter
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.utils.errors import ConfigError

TOLERANCE = 1e-3
"""Mean change of a price, in units of scores, below which the prices have converged."""
MAX_ITERATIONS = 100
ITERATIONS_PER_CHECK = 10
"""Iterations between two checks of whether the prices have converged; the host waits for each.
Iterations after convergence change nothing, so that this number does not change the result."""


@dataclass(frozen=True, kw_only=True)
class SBaseConfig(LearnedConfig):
    """Settings of S-BASE."""

    name = "s-base"
    summary = "learned sigmoid gate; in training Sinkhorn's algorithm balances the choice"
    default_gate = "sigmoid"

    @override
    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        super().check_model(config)
        if config.moe_router_load_balancing_type == QUANTILE_BALANCING:
            raise ConfigError(
                f"--moe-router-load-balancing-type {QUANTILE_BALANCING} has nothing to balance "
                f"with --sffn-router {self.name}, whose choice is even; use none, or --sffn-router "
                "sigma-moe"
            )

    @override
    def router_class(self) -> type[SBaseRouter]:
        return SBaseRouter


class SBaseRouter(LearnedRouter):
    """A learned sigmoid gate with a balanced choice. Arguments as `Router`."""

    @override
    def selection_scores(self, scores: Tensor) -> Tensor:
        if not self.training:
            return super().selection_scores(scores)
        all_scores = gather_rows(scores, self.balance.tp_cp_group)
        return scores + balancing_prices(all_scores)


def balancing_prices(scores: Tensor) -> Tensor:
    """Sinkhorn's algorithm between tokens and blocks.

    Args:
        scores: `[T, B]`.

    Returns:
        `[B]` prices: the softmax of `scores + prices` over each row has columns that sum to T / B.
    """
    tokens, blocks = scores.shape
    prices = scores.new_zeros(blocks)
    converged = torch.zeros((), dtype=torch.bool, device=scores.device)
    for iteration in range(1, MAX_ITERATIONS + 1):
        rows = (scores + prices).logsumexp(dim=1, keepdim=True)
        updated = math.log(tokens / blocks) - (scores - rows).logsumexp(dim=0)
        change = (updated - prices).abs().mean()
        prices = torch.where(converged, prices, updated)
        converged = converged | (change < TOLERANCE)
        if iteration % ITERATIONS_PER_CHECK == 0 and converged:
            break
    return prices
