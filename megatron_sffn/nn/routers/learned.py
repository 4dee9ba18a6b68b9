"""Routers with a gate network, which computes scores from the token alone.

Inputs: tokens `[T, D]`. Outputs: scores `[T, B]`.

Networks (`--sffn-gate-network`)
- `linear`: `x Wᵀ`, `W: [B, D]`, as in the papers.
- `mlp`: `f(x Hᵀ) Wᵀ`, `H: [h, D]`, `W: [B, h]`.
- `attention`: blocks are keys `W: [B, h]` that the token attends to with the query `x Hᵀ`:
  `(x Hᵀ) Wᵀ / sqrt(h)`.
`mlp` and `attention` are ours; the paper on block sizes (arXiv 2305.13999) leaves other gates open.

Design notes: scores are fp32 at least: on a GPU products of half precision with sums in fp32
(`ops/scores`), elsewhere Megatron's function, which keeps no fp32 copy for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, override

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig, flag
from megatron_sffn.nn.routers.base import score_dtype
from megatron_sffn.nn.routers.scored import ScoredConfig, ScoredRouter
from megatron_sffn.nn.saved_bytes import FP32, LayerCall, SavedBytes
from megatron_sffn.ops.scores import scores, tensor_core_dtype
from megatron_sffn.utils.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
"""Value of `--sffn-gate-activation` -> function."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(ScoredConfig):
    """Settings of every method with a gate network."""

    megatron_flags: ClassVar[tuple[str, ...]] = (
        *ScoredConfig.megatron_flags,
        "moe_input_jitter_eps",
    )

    per_block_weights: ClassVar[tuple[str, ...]] = ("weight",)

    network: str = flag(
        "--sffn-gate-network",
        default="linear",
        choices=("linear", "mlp", "attention"),
        help="how a learned router scores blocks: linear as in the papers; mlp and attention (over "
        "a learned key per block) are ours",
    )
    network_width: int | None = flag(
        "--sffn-gate-hidden-size",
        default=None,
        kind=int,
        least=1,
        help="width of the mlp's hidden layer or of attention's keys (default: --hidden-size)",
    )
    network_activation: str = flag(
        "--sffn-gate-activation",
        default="relu",
        choices=tuple(ACTIVATIONS),
        help="of the mlp's hidden layer",
    )

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        """Refuse a setting that has no effect on the chosen network."""
        super().check(sffn)
        for option, value, default, networks in (
            ("--sffn-gate-hidden-size", self.network_width, None, ("mlp", "attention")),
            ("--sffn-gate-activation", self.network_activation, "relu", ("mlp",)),
        ):
            if value != default and self.network not in networks:
                raise ConfigError(
                    f"{option} {value} has nothing to act on with --sffn-gate-network "
                    f"{self.network}; leave it out, or use --sffn-gate-network {networks[0]}"
                )

    @property
    @override
    def scores_have_weights(self) -> bool:
        return True

    def width(self, hidden_size: int) -> int:
        """Width of the gate's row of a block."""
        return hidden_size if self.network == "linear" else self.network_width or hidden_size

    @override
    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        width = self.width(hidden_size)
        weights: dict[str, tuple[int, ...]] = {"weight": (sffn.num_blocks, width)}
        if self.network != "linear":
            weights["hidden"] = (width, hidden_size)
        return weights

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """One multiply-add for every weight of the gate network."""
        return 2 * self.parameters(sffn, hidden_size)

    @override
    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        numbers = 0
        if self.network != "linear":
            # GELU keeps its input beside its output.
            keeps_input = self.network == "mlp" and self.network_activation == "gelu"
            numbers = self.width(call.hidden_size) * (2 if keeps_input else 1)
        return SavedBytes(bytes=call.tokens * numbers * FP32, tokens=True)


class LearnedRouter(ScoredRouter):
    """Scores by a gate network. Arguments as `Router`."""

    settings: LearnedConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.weight = self.new_weight("weight")
        self.hidden = None if self.settings.network == "linear" else self.new_weight("hidden")

    @override
    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        x = self._jittered(x)
        if self.hidden is None:
            return linear(x, self.weight)
        query = linear(x, self.hidden)
        if self.settings.network == "mlp":
            return linear(ACTIVATIONS[self.settings.network_activation](query), self.weight)
        return linear(query, self.weight) / math.sqrt(query.shape[1])

    def _jittered(self, x: Tensor) -> Tensor:
        """Tokens with the noise of `--moe-input-jitter-eps`."""
        eps = self.config.moe_input_jitter_eps
        if not (self.training and eps):
            return x
        return x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product `x Wᵀ` in fp32 at least."""
    if tensor_core_dtype(x, weight) is not None:
        return scores(x, weight)
    product: Tensor = router_gating_linear(x, weight, None, score_dtype(x))
    return product
