"""Quantile balancing: a price per block, under which every block is chosen equally often.

Inputs: the scores `[T, B]` of a microbatch. Outputs: prices `[B]`, which are subtracted from the
scores of the next step, for the choice only.

A token's threshold is its best score less price that was not chosen. The price of a block is then
the score above thresholds that T·K/B tokens exceed: at this price, and with the other blocks as
they are, the block gets its even share. That is one step of coordinate descent on the dual of the
balanced assignment; it is Megatron's `--moe-router-load-balancing-type quantile_balancing`, whose
names the buffers have (`qb_beta`), and whose end of a step updates them: the mean over microbatches
and data-parallel ranks, a moving average if a flag asks for it, and centred.

Design notes:
- There is no coefficient and no gradient. The price costs two partial sorts of T·B scores a
  microbatch, in training only; tensor- and context-parallel ranks gather all T·B of them.
- Where T·K/B is no whole number, which Megatron refuses, it is rounded down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.expert_grid import gather_rows
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.utils.errors import ConfigError

QUANTILE_BALANCING = "quantile_balancing"
"""Value of `--moe-router-load-balancing-type`."""

SCRATCH_NUMBERS = 1 << 24
"""Scores of all ranks that are held at a time: 64 MiB."""


@torch.no_grad()
def balancing_prices(scores_TB: Tensor, price_B: Tensor, num_active: int, group: Any) -> Tensor:
    """Prices `[B]` that make the load of one microbatch even.

    Args:
        scores_TB: of this rank's tokens.
        price_B: by which they chose.
        num_active: K, less than B.
        group: process group of the ranks that share the microbatch; they have equally many tokens.
    """
    tokens, blocks = len(scores_TB) * group.size(), len(price_B)
    best = (scores_TB - price_B).topk(num_active + 1, dim=1, sorted=False).values
    above_TB = scores_TB - best.amin(dim=1, keepdim=True)
    share = tokens * num_active // blocks
    prices = []
    for above in above_TB.split(max(1, SCRATCH_NUMBERS // tokens), dim=1):
        by_block = gather_rows(above.contiguous(), group).T.contiguous()
        prices.append(by_block.topk(share + 1, dim=1, sorted=False).values.amin(dim=1))
    return torch.cat(prices)


def check_quantile_balancing(config: SparseFFNTransformerConfig, sffn: SparseFFNConfig) -> None:
    """Refuse quantile balancing of a layer that it cannot balance, or beside another method.

    Raises:
        ConfigError: naming the setting that does not fit.
    """
    kinds, ema = config.moe_router_load_balancing_type, config.moe_router_quantile_balancing_ema
    if kinds != QUANTILE_BALANCING and QUANTILE_BALANCING not in kinds:
        return
    flag = f"--moe-router-load-balancing-type {QUANTILE_BALANCING}"
    if kinds != QUANTILE_BALANCING:
        raise ConfigError(
            f"{flag} is given as one of the list {kinds}, but it balances without any loss; give "
            "it alone, as a string"
        )
    coefficients = config.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    others = {
        "--moe-aux-loss-coeff": any(coefficients),
        "--moe-router-enable-expert-bias": config.moe_router_enable_expert_bias,
        "--moe-router-num-groups": (config.moe_router_num_groups or 1) > 1,
    }
    for other, is_given in others.items():
        if is_given:
            raise ConfigError(f"{flag} does not work together with {other}; leave one of them out")
    if sffn.num_active_blocks == sffn.num_blocks:
        raise ConfigError(
            f"{flag} has nothing to balance where all {sffn.num_blocks} blocks are active; use a "
            "larger --sffn-expansion, or none"
        )
    if not 0 <= ema < 1:
        raise ConfigError(
            f"--moe-router-quantile-balancing-ema {ema} is not at least 0 and below 1; give the "
            "share of the former prices that a step keeps, for example 0.9"
        )
