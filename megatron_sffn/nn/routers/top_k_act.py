"""Top-K activation: a dense FFN that keeps only its K largest activations (arXiv 2310.10837).

Top-K activation is VanillaM with blocks of one cell: all M coefficients are computed, and the k
largest are the weights of their values. The paper uses ReLU and M = d_ff (E = d_ff / k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import override

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.vanilla_m import KeyTableConfig
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TopKActConfig(KeyTableConfig):
    """Settings of top-K activation."""

    name = "top-k-act"
    summary = "all cells computed, the k largest activations kept; blocks of one cell"
    test_numbers = RouterTestNumbers(single_cells=True)

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        if sffn.block_size != 1:
            raise ConfigError(
                f"--sffn-router top-k-act keeps single cells, not --sffn-block-size "
                f"{sffn.block_size}; use --sffn-block-size 1, or --sffn-router vanilla-m for blocks"
            )
