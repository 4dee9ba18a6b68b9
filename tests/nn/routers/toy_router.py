"""A new router in one file: the blocks whose centre is nearest to the token.

The score is `x·c - |c|²/2`, where the centre c of a block is the mean of its keys. No router of the
package has this score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import override

from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers.base import score_dtype
from megatron_sffn.nn.routers.scored import ScoredConfig, ScoredRouter
from megatron_sffn.nn.saved_bytes import FP32, LayerCall, SavedBytes
from megatron_sffn.ops.scores import scores


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ScoredConfig):
    """Settings of the toy router: those of every scored router."""

    name = "toy"
    summary = "the blocks whose mean key is nearest to the token"
    default_gate = "sigmoid"

    @override
    def router_class(self) -> type[ToyRouter]:
        return ToyRouter

    @override
    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        return 2 * hidden_size * sffn.num_blocks

    @override
    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        bytes_ = FP32 * call.sffn.num_blocks * call.hidden_size  # the centres
        if call.upcasts_operands:
            bytes_ += FP32 * call.tokens * call.hidden_size
        return SavedBytes(bytes=bytes_, tokens=not call.upcasts_operands)


class ToyRouter(ScoredRouter):
    """Top-K blocks by the distance of their centre to the token."""

    @override
    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        grid = self.expert_grid
        gate_keys = keys[:, : grid.num_local_cells]
        sums = gate_keys.sum(dim=1, dtype=score_dtype(keys))
        centres = grid.sum_over_cells(sums) / grid.block_size
        return scores(x, centres) - centres.square().sum(dim=1) / 2
