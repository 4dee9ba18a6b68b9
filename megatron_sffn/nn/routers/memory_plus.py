"""Memory+: a product-key memory with a gated output (Berges et al. 2024, arXiv 2412.09764).

Blocks are those of `pkm.py`. With `y` the weighted sum of the chosen values, the layer's update is
`(y * silu(x W1)) W2`, with W1 and W2 `[D, D]`. In the paper the memory layers of a model have one
table of values and keys of their own: `--sffn-layers-per-table`. Its norm of queries and keys, used
where training was unstable, is `--sffn-product-key-norm`.

Initial values are those of the authors' code. The biases of its W1 and W2 are left out, as all
biases of a sparse layer, and so is its own learning rate of values.

Design notes: W1 and W2 are on every rank, like all weights of a router. Under sequence parallelism
a rank multiplies its own tokens only, so that no product is computed twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, override

import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers.pkm import PKMConfig, PKMRouter
from megatron_sffn.nn.saved_bytes import LayerCall, SavedBytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlusConfig(PKMConfig):
    """Settings of Memory+."""

    name = "memory-plus"
    summary = "pkm whose output is gated by the token and projected (Memory+)"

    @override
    def router_class(self) -> type[MemoryPlusRouter]:
        return MemoryPlusRouter

    @override
    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        square = (hidden_size, hidden_size)
        projections = {"output_gate": square, "output_projection": square}
        return super().weights(sffn, hidden_size) | projections

    @override
    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        return super().flops(sffn, hidden_size, gated=gated) + 4 * hidden_size**2

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        base = super().saved_bytes(call)
        # The sums of values, the gate before and after SiLU, and the product of sums and gate.
        rows = 4 * call.tokens * call.hidden_size * call.layout.bytes_per_number
        return replace(base, bytes=base.bytes + rows)


class MemoryPlusRouter(PKMRouter):
    """Product keys, and the projections of the output. Arguments as `Router`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.output_gate = self.new_weight("output_gate")
        self.output_projection = self.new_weight("output_projection")

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        width = self.config.hidden_size
        if name == "subkeys":
            bound = 1 / math.sqrt(self.settings.key_size)
            weight.uniform_(-bound, bound)
        elif name == "query":
            bound = math.sqrt(6 / sum(weight.shape))
            weight.uniform_(-bound, bound)
        elif name in ("output_gate", "output_projection"):
            weight.normal_(std=1 / math.sqrt(width))
        else:
            super().draw(name, weight)

    @override
    def project_sums(self, sums: Tensor, x: Tensor) -> Tensor:
        return F.linear(sums * F.silu(F.linear(x, self.output_gate)), self.output_projection)
