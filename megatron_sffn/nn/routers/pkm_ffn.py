"""PKM-FFN: product keys as the key table of a feed-forward memory (arXiv 2305.13999, our reading).

`s = f(t1·c_i + t2·c'_j)` with `t = x Dᵀ` split in two: one head, no softmax, the model's
activation. The cells of the largest sums are chosen. Where f is not monotone (GELU below zero) and
fewer than k sums are positive, the chosen cells do not have the largest coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import override

from torch import Tensor

from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.product_keys import ProductKeysConfig, ProductKeysRouter
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops.activation import Activation
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PKMFFNConfig(ProductKeysConfig):
    """Settings of PKM-FFN."""

    name = "pkm-ffn"
    summary = "an FFN whose key table is made of product keys: one head, the model's activation"
    test_numbers = RouterTestNumbers(
        options={"key_size": 14},
        single_cells=True,
        square_blocks=True,
        gated_activation=False,
        flags="--sffn-product-key-size 16",
    )

    @override
    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        if Activation.of(config).gated:
            raise ConfigError(
                "--swiglu and --quick-geglu need two keys per cell, and a cell of --sffn-router "
                "pkm-ffn has one; "
                "use GELU, --sffn-relu or --squared-relu"
            )

    @override
    def router_class(self) -> type[PKMFFNRouter]:
        return PKMFFNRouter


class PKMFFNRouter(ProductKeysRouter):
    """Product keys with the model's activation. Arguments as `Router`."""

    @override
    def coefficients(self, scores: Tensor) -> Tensor:
        return Activation.of(self.config)(scores)
