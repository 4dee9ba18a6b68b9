"""PKM: product-key memory (Lample et al. 2019, arXiv 1907.05242).

Each head has a query of its own. The softmax over a head's knn scores gives the weights of its
values, and the heads are summed. As in the authors' code, values are drawn from N(0, 1/D) and
sub-keys from U(±1/sqrt(half)). Their optional batch norm of the queries is left out: a token's
result would depend on the other tokens of its batch, and so on the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

from torch import Tensor

from megatron_sffn.nn.config import flag
from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.product_keys import ProductKeysConfig, ProductKeysRouter
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig


@dataclass(frozen=True, kw_only=True)
class PKMConfig(ProductKeysConfig):
    """Settings of PKM."""

    name = "pkm"
    summary = "product keys choose cells of a memory of values; softmax over each head's scores"
    initialization = "pkm"
    test_numbers = RouterTestNumbers(
        options={"heads": 2, "key_size": 10},
        single_cells=True,
        square_blocks=True,
        flags="--sffn-product-key-size 16",
    )

    heads: int = flag(
        "--sffn-pkm-heads",
        default=4,
        least=1,
        help="queries of a token, of which each chooses K / heads blocks (pkm, pkm-relu, "
        "memory-plus, peer)",
    )

    @override
    @property
    def num_heads(self) -> int:
        return self.heads

    @override
    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        assert config.sffn is not None, "a router is checked in a model that has it"
        if config.sffn.chosen_cells > self.heads:
            return None
        return (
            f"each of --sffn-pkm-heads {self.heads} heads chooses one cell, and the softmax over "
            "one score is always 1; use fewer heads, a larger --sffn-active-cells, or "
            "--sffn-router pkm-relu"
        )

    @override
    @property
    def query_bias(self) -> bool:
        return True

    @override
    def router_class(self) -> type[PKMRouter]:
        return PKMRouter


class PKMRouter(ProductKeysRouter):
    """Product keys with a softmax per head. Arguments as `Router`."""

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        # As in the authors' code; the query as any linear layer, and its bias zero.
        if name == "subkeys":
            bound = 1 / math.sqrt(weight.shape[-1])
            weight.uniform_(-bound, bound)
        elif name == "query_bias":
            weight.zero_()
        else:
            super().draw(name, weight)

    @override
    def coefficients(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=-1)
