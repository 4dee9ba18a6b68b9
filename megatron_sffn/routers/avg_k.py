"""Avg-K: a block is described by the mean of its keys (Liu et al. 2023, arXiv 2305.13999).

`e_i = mean_j k_j` is not a parameter but a function of the current weights; the score `x·e_i` is
the block's mean pre-activation. The best K blocks compute; the score does not multiply the output
and no gradient passes through the selection: keys learn through `f(x Kᵀ)` alone. For a gated
activation the mean is over the gate keys (ours; the paper has none).

`--sffn-gate` is an ablation: sigmoid or softmax of the score as a factor of the block's output.
Then the score is differentiated, through x and through the keys of every rank.

Descriptors are in fp32 at least and the same bits on every rank. Where the layer is told which
weights it holds, they are computed and gathered once per optimizer step, not once per microbatch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sffn.config import RouterConfig, SparseFFNConfig, flag
from megatron_sffn.ops.route_topk import route_topk
from megatron_sffn.routers.base import Router, Routing, score_dtype


@dataclass(frozen=True, kw_only=True)
class AvgKConfig(RouterConfig):
    """Settings of Avg-K."""

    name = "avg-k"
    summary = "score a block by x · mean of its keys; no router parameter, no gate"

    gate: str = flag(
        "--sffn-gate",
        default="none",
        choices=("none", "sigmoid", "softmax"),
        help="factor of a chosen block's output, from its score (avg-k; the paper has none)",
    )

    def build(self) -> type[AvgKRouter]:
        """See `RouterConfig.build`."""
        return AvgKRouter

    @property
    def gated_output(self) -> bool:
        """See `RouterConfig.gated_output`."""
        return self.gate != "none"

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """One dot product per block."""
        return 2 * hidden_size * sffn.num_blocks


class AvgKRouter(Router):
    """Top-K blocks by the dot product with the mean key."""

    _kept: tuple[Hashable, Tensor] | None = None

    def forward(self, x: Tensor, keys: Tensor, token_ids: Tensor | None = None) -> Routing:
        """See `Router.forward`."""
        assert isinstance(self.sffn.router, AvgKConfig)
        gate, gate_keys = self.sffn.router.gate, keys[:, : self.placement.num_local_cells]
        if gate == "none":
            with torch.no_grad():
                means = self._kept_descriptors(gate_keys)
                scores = x.to(score_dtype(x)) @ means.T
            return Routing(block_ids=route_topk(scores, self.sffn.num_active_blocks))
        means = self._descriptors(gate_keys)
        scores = x.to(score_dtype(x)) @ means.T
        ids = route_topk(scores.detach(), self.sffn.num_active_blocks)
        factors = scores.sigmoid() if gate == "sigmoid" else scores.softmax(dim=-1)
        return Routing(block_ids=ids, gates=factors.gather(1, ids))

    def _kept_descriptors(self, keys: Tensor) -> Tensor:
        """`_descriptors`, computed again only if the weights may have changed."""
        version = self.weights_version
        if version is None:
            return self._descriptors(keys)
        if self._kept is None or self._kept[0] != version:
            self._kept = (version, self._descriptors(keys))
        return self._kept[1]

    def _descriptors(self, keys: Tensor) -> Tensor:
        """Mean key of every block: `[B / ep, G / etp, D]` to `[B, D]`, fp32 at least."""
        sums = keys.sum(dim=1, dtype=score_dtype(keys))
        return self.placement.sum_over_cells(sums) / self.sffn.block_size
