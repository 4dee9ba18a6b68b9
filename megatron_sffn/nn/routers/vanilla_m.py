"""VanillaM: score every cell with the real keys, then aggregate over a block (arXiv 2305.13999).

`s = f(x Kᵀ)` for all M cells, aggregated over the g cells of a block after the nonlinearity; all
cells of a chosen block compute. At g = 1 this is plain top-k of the memory coefficients. The
selection is a hard top-K: unselected cells get exactly no gradient, and none passes through it.

Keys stay where they are: under expert parallelism the tokens visit every rank (T·D numbers) and
the scores come back (T·B), instead of gathering the key table (M·D numbers, E times the FFN). Where
a block's cells lie on several ranks, each sends the aggregate of its own.

Gates and balance losses are ours. They differentiate the scores, which then keeps the coefficients
of all M cells for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import override

import torch
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
)
from torch import Tensor

from megatron_sffn.nn.comm_volume import SCORE_BYTES
from megatron_sffn.nn.config import SparseFFNConfig, flag
from megatron_sffn.nn.expert_grid import gather_rows
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.base import score_dtype
from megatron_sffn.nn.routers.scored import ScoredConfig, ScoredRouter
from megatron_sffn.nn.saved_bytes import FP32, LayerCall, SavedBytes
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.scores import scores, tensor_core_dtype

AGGREGATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mean": (lambda s: s.mean(dim=-1), lambda parts: parts.mean(dim=-1)),
    "mean-abs": (lambda s: s.abs().mean(dim=-1), lambda parts: parts.mean(dim=-1)),
    "max": (lambda s: s.amax(dim=-1), lambda parts: parts.amax(dim=-1)),
    "min": (lambda s: s.amin(dim=-1), lambda parts: parts.amin(dim=-1)),
}
"""From the coefficients of a block's cells on a rank `[..., G / etp]` to a score `[...]`, and from
the scores of several ranks `[..., etp]`, which have equally many cells each, to the block's."""

SCRATCH_NUMBERS = 1 << 24
"""Coefficients held at a time; T·M of them would be 512 MiB at T = 2048, M = 65,536."""


@dataclass(frozen=True, kw_only=True)
class KeyTableConfig(ScoredConfig):
    """What the methods share that score all cells with the keys that compute."""

    @property
    def aggregation(self) -> str:
        """How cells become a block, in `AGGREGATORS`."""
        return "mean"

    @override
    def build(self) -> type[VanillaMRouter]:
        return VanillaMRouter

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """All M keys are scored; the K chosen blocks' share is then not computed again.

        The papers count it so, and so do we, although our layer computes those 2·d·k again.
        """
        per_cell = 2 * self.key_width(hidden_size) * (2 if gated else 1)
        return per_cell * (sffn.num_cells - sffn.chosen_cells)

    def exchanged_bytes(
        self, sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
    ) -> float:
        """The token goes to every rank to be scored, and the scores come back."""
        scores = sffn.num_blocks / layout.ep * SCORE_BYTES
        query = self.key_width(hidden_size) * layout.bytes_per_number
        return (layout.expert_ranks - 1) * (query + scores)

    @override
    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        sffn, ranks, width = call.sffn, call.layout.expert_ranks, self.key_width(call.hidden_size)
        # Each rank scores its part of the cells for the tokens of all ranks: T · M coefficients.
        per_cell = {"gelu": 1, "relu": 1, "squared_relu": 1, "swiglu": 3}[call.activation]
        if self.aggregation != "mean" and call.activation != "relu":
            per_cell += 1
        per_token = per_cell * sffn.num_cells
        if self.aggregation in ("max", "min"):
            per_token += sffn.num_blocks
        bytes_ = call.tokens * per_token * FP32
        copies_rows = call.upcasts_operands or ranks > 1
        if copies_rows:
            row_bytes = FP32 if call.upcasts_operands else call.layout.bytes_per_number
            bytes_ += call.tokens * ranks * width * row_bytes
        if call.upcasts_operands:
            bytes_ += call.keys_per_cell * sffn.num_cells * width * FP32 // ranks
        return SavedBytes(bytes=bytes_, tokens=not copies_rows)


@dataclass(frozen=True, kw_only=True)
class VanillaMConfig(KeyTableConfig):
    """Settings of VanillaM."""

    name = "vanilla-m"
    summary = "score all cells with their keys, aggregate over a block; costs a full x Kᵀ"

    aggregator: str = flag(
        "--sffn-aggregator",
        default="mean",
        choices=tuple(AGGREGATORS),
        help="how a block's cell activations become its score (vanilla-m, lorkm)",
    )

    @override
    @property
    def aggregation(self) -> str:
        return self.aggregator


class VanillaMRouter(ScoredRouter):
    """Top-K blocks by the aggregated activations of their cells. Arguments as `Router`."""

    settings: KeyTableConfig

    @override
    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        grid, group = self.expert_grid, self.expert_grid.group
        rows = gather_rows(queries, group)
        scores = self._local_scores(rows, keys)
        if grid.num_ranks == 1:
            return scores
        back = all_to_all(group, scores)
        # From [ep, etp, T, B / ep] to [T, ep, B / ep, etp].
        shape = (grid.ep_size, grid.etp_size, len(x), grid.num_local_blocks)
        parts = back.view(shape).permute(2, 0, 3, 1)
        _, join = AGGREGATORS[self.settings.aggregation]
        return join(parts).flatten(1)

    def _local_scores(self, x: Tensor, keys: Tensor) -> Tensor:
        """`[T, B / ep]` scores of the cells held here, a few blocks at a time."""
        aggregate, _ = AGGREGATORS[self.settings.aggregation]
        activation = Activation.of(self.config)
        if tensor_core_dtype(x, keys) is None:
            x = x.to(score_dtype(x))  # once for all chunks
        cells, width = keys.shape[1:]
        step = max(1, SCRATCH_NUMBERS // max(1, x.shape[0] * cells))
        parts = []
        for some in keys.split(step):
            up = scores(x, some.reshape(-1, width))
            parts.append(aggregate(activation(up.view(x.shape[0], -1, cells))))
        return torch.cat(parts, dim=1)
