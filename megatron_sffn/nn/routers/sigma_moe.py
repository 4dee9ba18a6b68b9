"""sigma-MoE: scores that do not compete (Csordás, Irie, Schmidhuber 2023, arXiv 2310.10837).

`s = sigmoid(x W3ᵀ)`; the K blocks of largest s compute, and s multiplies their output. The paper
has ReLU cells (`--sffn-relu`), block dropout and entropy regularisation (`--sffn-block-dropout`,
`--sffn-entropy-coeff`), and an initialisation that treats all M cells as one dense layer: of keys
and values (`--sffn-init sigma-moe`, this router's default), and of W3, whose rows have equal
length, so that no block is preferred at first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import override

from torch import Tensor

from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.learned import LearnedConfig, LearnedRouter
from megatron_sffn.nn.transformer_config import depth


@dataclass(frozen=True, kw_only=True)
class SigmaMoEConfig(LearnedConfig):
    """Settings of sigma-MoE."""

    name = "sigma-moe"
    summary = "learned sigmoid gate per block, with block dropout and entropy regularisation"
    initialization = "sigma-moe"
    default_gate = "sigmoid"
    test_numbers = RouterTestNumbers(
        flags="--sffn-relu --sffn-entropy-coeff 1e-3 --sffn-block-dropout 0.05",
        paper_flags="--sffn-entropy-coeff 1e-3",
    )

    @override
    def router_class(self) -> type[SigmaMoERouter]:
        return SigmaMoERouter


class SigmaMoERouter(LearnedRouter):
    """A learned sigmoid gate. Arguments as `Router`."""

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        # As keys; then rows are scaled to equal length, which keeps the std of the whole weight.
        std = math.sqrt(2 / (depth(self.config) * weight.shape[1]))
        weight.normal_(std=std)
        if name == "weight":
            drawn_std = weight.std(correction=0)
            weight /= weight.norm(dim=1, keepdim=True)
            weight *= drawn_std / weight.std(correction=0)
