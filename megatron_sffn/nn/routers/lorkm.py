"""LoRKM: VanillaM with keys of low rank (Liu et al. 2023, arXiv 2305.13999).

`t = x Dᵀ` with `D: [d_l, D]`, keys `[M, d_l]`, `s = f(t K~ᵀ)`: the same number selects a cell and
weighs its value, which stays full. Scoring all cells costs d_l/D of what it costs in VanillaM, and
only t is dispatched to the blocks. d_l = 128 is our reading of the paper; at g > 1 cells are
aggregated as in VanillaM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, override

import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig, flag
from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.vanilla_m import VanillaMConfig, VanillaMRouter
from megatron_sffn.nn.saved_bytes import LayerCall, SavedBytes


@dataclass(frozen=True, kw_only=True)
class LoRKMConfig(VanillaMConfig):
    """Settings of LoRKM."""

    name = "lorkm"
    summary = "vanilla-m with keys of low rank: x is projected to d_l numbers first"
    test_numbers = RouterTestNumbers(options={"rank": 7}, flags="--sffn-key-rank 16")

    rank: int = flag(
        "--sffn-key-rank", default=128, least=1, help="d_l, numbers of a low-rank key (lorkm)"
    )

    @override
    def router_class(self) -> type[LoRKMRouter]:
        return LoRKMRouter

    @override
    def key_width(self, hidden_size: int) -> int:
        return self.rank

    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """The weights of the projection."""
        return {"down": (self.rank, hidden_size)}

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """FLOPs of the projection, and of scoring all keys."""
        return 2 * self.rank * hidden_size + super().flops(sffn, hidden_size, gated=gated)

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        # The projection has a gradient from the cells too, not only from the scores.
        return replace(super().saved_bytes(call), tokens=True)


class LoRKMRouter(VanillaMRouter):
    """VanillaM on projected tokens. Arguments as `Router`."""

    settings: LoRKMConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.down = self.new_weight("down")

    @override
    def query(self, x: Tensor) -> Tensor:
        return F.linear(x, self.down)
