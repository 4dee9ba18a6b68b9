"""PKM with ReLU instead of softmax (Csordás, Irie, Schmidhuber 2023, arXiv 2310.10837).

The weights of the values are the ReLU of the scores, which do not compete. With all M cells chosen
this is a dense FFN whose keys are `[c_i; c'_j]`. Values and sub-keys are initialised as in
sigma-MoE: a coefficient then starts with the variance of a dense layer's coefficient (our reading:
the sum of the two halves has the variance of one whole key).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

from torch import Tensor

from megatron_sffn.nn.routers.pkm import PKMConfig, PKMRouter
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig, depth


@dataclass(frozen=True, kw_only=True)
class PKMReLUConfig(PKMConfig):
    """Settings of PKM with ReLU."""

    name = "pkm-relu"
    summary = "pkm with the ReLU of the scores instead of a softmax"
    initialization = "sigma-moe"

    @override
    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        return None  # the ReLU of a head's only score depends on the score

    @override
    def router_class(self) -> type[PKMReLURouter]:
        return PKMReLURouter


class PKMReLURouter(PKMRouter):
    """Product keys with ReLU. Arguments as `Router`."""

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        # Std by the fan-in: D for queries, the size of a whole key for sub-keys.
        if name in ("query_bias", "query_norm"):
            super().draw(name, weight)
            return
        fan_in = self.settings.key_size if name == "subkeys" else self.config.hidden_size
        weight.normal_(std=math.sqrt(2 / (depth(self.config) * fan_in)))

    @override
    def coefficients(self, scores: Tensor) -> Tensor:
        return scores.relu()
