"""Noisy top-K gating (Shazeer et al. 2017, arXiv 1701.06538).

In training the scores are `x W_gᵀ + n · softplus(x W_nᵀ)` with n from a standard normal
distribution, so that blocks that lose narrowly are tried as well; the gate is the softmax over the
chosen blocks. Both weights start at zero, as in the paper: at first the noise alone decides. The
paper's two balance losses (importance and load) are not implemented; Switch's auxiliary loss has
the same aim and is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, override

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig, flag
from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.learned import LearnedConfig, LearnedRouter, linear
from megatron_sffn.nn.saved_bytes import FP32, LayerCall, SavedBytes


@dataclass(frozen=True, kw_only=True)
class NoisyTopKConfig(LearnedConfig):
    """Settings of noisy top-K."""

    name = "noisy-top-k"
    summary = "learned gate with learned noise in training, softmax over the chosen blocks"
    balance_coefficient = 0.01
    default_gate = "softmax-chosen"
    test_numbers = RouterTestNumbers(options={"noise": 0.0})
    per_block_weights: ClassVar[tuple[str, ...]] = ("weight", "noise_weight")

    noise: float = flag(
        "--sffn-noise",
        default=1.0,
        least=0.0,
        training_only=True,
        help="factor of the noise on the scores (noisy-top-k; 1 in its paper)",
    )

    @override
    def router_class(self) -> type[NoisyTopKRouter]:
        return NoisyTopKRouter

    @override
    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return super().weights(sffn, hidden_size) | {"noise_weight": (sffn.num_blocks, hidden_size)}

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """FLOPs without the noise, which an evaluation does not compute."""
        return super().flops(sffn, hidden_size, gated=gated) - 2 * sffn.num_blocks * hidden_size

    @override
    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        # The spread before its softplus, and the noise.
        noise = call.tokens * 2 * call.sffn.num_blocks * FP32
        return SavedBytes(bytes=super().saved_by_scores(call).bytes + noise, tokens=True)


class NoisyTopKRouter(LearnedRouter):
    """A learned gate with noise. Arguments as `Router`."""

    settings: NoisyTopKConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.noise_weight = self.new_weight("noise_weight")

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        # The paper starts the last layers, of scores and of noise, at zero.
        if name == "hidden":
            super().draw(name, weight)
        else:
            weight.zero_()

    @override
    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        scores = super().score(x, queries, keys)
        if not self.training:
            return scores
        spread = F.softplus(linear(x, self.noise_weight)) * self.settings.noise
        return scores + torch.randn_like(spread) * spread
