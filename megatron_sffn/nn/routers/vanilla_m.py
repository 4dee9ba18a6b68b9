"""VanillaM: score every cell with the real keys, then aggregate over a block (arXiv 2305.13999).

`s = f(x Kᵀ)` for all M cells, aggregated over the g cells of a block after the nonlinearity; all
cells of a chosen block compute. At g = 1 this is plain top-k of the memory coefficients. The
selection is a hard top-K: unselected cells get exactly no gradient, and none passes through it.

Keys stay on their ranks: under expert parallelism the tokens are gathered on every rank (T·D
numbers) and the scores are sent back (T·B), which avoids gathering the key table (M·D numbers, E
times the FFN). Where a block's cells lie on several ranks, each rank sends the aggregate of its own
cells.

The aggregate `norm` is not the paper's. In Autonomy-of-Experts (Lv et al. 2025, arXiv 2501.13074)
experts of largest activation norm compute, and the softmax of all norms is the gate
(`--sffn-gate softmax`). There the norm is that of `x W_b`, of low rank, where `W_b` is a factor of
the expert's own keys. Here it is that of the coefficients: a row that travels has one query for all
blocks, so that keys cannot have a factor for each block.

Gates and load-balancing losses are ours. They differentiate the scores, so that the coefficients of
all M cells are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import override

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
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
    "norm": (lambda s: s.norm(dim=-1), lambda parts: parts.norm(dim=-1)),
}
"""Name -> two functions. The first aggregates a rank's cells `[..., G / etp]` of a block into a
score `[...]`; the second aggregates the scores of the block's ranks `[..., etp]`, which have
equally many cells each."""

SCRATCH_NUMBERS = 1 << 24
"""Coefficients held at a time; all T·M of them are 512 MiB at T = 2048, M = 65,536."""


@dataclass(frozen=True, kw_only=True)
class KeyTableConfig(ScoredConfig):
    """Settings of every method that scores all cells with the keys of the blocks."""

    scores_rows = True

    @property
    def aggregation(self) -> str:
        """Name in `AGGREGATORS` of the aggregation of cells into a block."""
        return "mean"

    @override
    def router_class(self) -> type[VanillaMRouter]:
        return VanillaMRouter

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """FLOPs of scoring the keys of all M cells but those of the K chosen blocks.

        The papers count the chosen blocks' 2·D·k once, and so do we, although our layer computes
        them again.
        """
        per_cell = 2 * self.key_width(hidden_size) * (2 if gated else 1)
        return per_cell * (sffn.num_cells - sffn.chosen_cells)

    def exchanged_bytes(
        self, sffn: SparseFFNConfig, hidden_size: int, layout: ParallelLayout
    ) -> float:
        """Bytes of the query row sent to every other rank, and of the scores that come back."""
        scores = sffn.num_blocks / layout.ep * SCORE_BYTES
        query_row = self.key_width(hidden_size) * layout.bytes_per_number
        return (layout.expert_ranks - 1) * (query_row + scores)

    @override
    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        sffn, ranks, width = call.sffn, call.layout.expert_ranks, self.key_width(call.hidden_size)
        # Each rank scores its part of the cells for the tokens of all ranks: T · M coefficients.
        per_cell = {"gelu": 1, "relu": 1, "squared_relu": 1, "swiglu": 3, "quick_geglu": 4}[
            call.activation
        ]
        # The gates, clamped, and the linear half, clamped or with its offset.
        per_cell += call.clamp + (call.clamp or call.offset)
        if self.aggregation != "mean" and call.activation != "relu":
            per_cell += 1
        per_token = per_cell * sffn.num_cells
        if self.aggregation in ("max", "min", "norm"):
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
        help="how a block's cell activations become its score (vanilla-m, lorkm): mean, mean-abs, "
        "max or min as in the paper, or their norm, by which the experts of Autonomy-of-Experts "
        "choose themselves (there of low-rank activations, with --sffn-gate softmax)",
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
        returned = all_to_all(group, scores)
        # From [ep, etp, T, B / ep] to [T, ep, B / ep, etp].
        shape = (grid.ep_size, grid.etp_size, len(x), grid.num_local_blocks)
        by_rank = returned.view(shape).permute(2, 0, 3, 1)
        _, aggregate_ranks = AGGREGATORS[self.settings.aggregation]
        return aggregate_ranks(by_rank).flatten(1)

    def _local_scores(self, x: Tensor, keys: Tensor) -> Tensor:
        """Scores `[T, B / ep]` of this rank's cells, a few blocks at a time."""
        aggregate_cells, _ = AGGREGATORS[self.settings.aggregation]
        activation = Activation.of(self.config)
        if tensor_core_dtype(x, keys) is None:
            x = x.to(score_dtype(x))  # once for all chunks
        cells, width = keys.shape[1:]
        step = max(1, SCRATCH_NUMBERS // max(1, x.shape[0] * cells))
        block_scores = []
        for key_chunk in keys.split(step):
            up = scores(x, key_chunk.reshape(-1, width))
            block_scores.append(aggregate_cells(activation(up.view(x.shape[0], -1, cells))))
        return torch.cat(block_scores, dim=1)
