"""Avg-K: a block is described by the mean of its keys (Liu et al. 2023, arXiv 2305.13999).

`e_i = mean_j k_j` is not a parameter but a function of the current weights; the score `x·e_i` is
the block's mean pre-activation. The best K blocks compute; the score does not multiply the output
and no gradient passes through the selection: keys learn through `f(x Kᵀ)` alone. For a gated
activation the mean is over the gate keys (ours; the paper has none).

Ablations, all ours: another descriptor (`descriptors.py`), a gate from the score, balance losses
and bias. With a gate or a loss the score is differentiated, through x and the keys of every rank.

Descriptors are in fp32 at least and the same bits on every rank. Where the layer is told the
version of its weights, they are computed and gathered once per optimizer step, not once per
microbatch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, override

import torch
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig, flag
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.routers.descriptors import DESCRIPTORS
from megatron_sffn.nn.routers.scored import ScoredConfig, ScoredRouter
from megatron_sffn.nn.saved_bytes import FP32, LayerCall, SavedBytes
from megatron_sffn.ops.scores import scores
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AvgKConfig(ScoredConfig):
    """Settings of Avg-K."""

    name = "avg-k"
    summary = "score a block by x · mean of its keys; no router parameter, no gate"
    scores_rows = True

    descriptor: str = flag(
        "--sffn-descriptor",
        default="mean",
        choices=tuple(DESCRIPTORS),
        help="what describes a block (avg-k; the paper has the mean, the others are ours): its "
        "longest key, a mean weighted by length or by learned weights, the mean of a subset of its "
        "cells, a moving average of the tokens that chose it",
    )
    subset_cells: int | None = flag(
        "--sffn-descriptor-cells",
        default=None,
        kind=int,
        least=1,
        help="cells of a block that --sffn-descriptor subset averages (default: g/4)",
    )
    decay: float = flag(
        "--sffn-descriptor-decay",
        default=0.99,
        least=0.0,
        most=1.0,
        help="share of the former average that --sffn-descriptor ema keeps in a step",
    )

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        cells = self.subset_cells
        if cells is not None and (cells > sffn.block_size or self.descriptor != "subset"):
            raise ConfigError(
                f"--sffn-descriptor-cells {cells} needs --sffn-descriptor subset and at most the "
                f"{sffn.block_size} cells of --sffn-block-size; change one of them"
            )
        if self.decay != AvgKConfig.decay and self.descriptor != "ema":
            raise ConfigError(
                f"--sffn-descriptor-decay {self.decay} has nothing to act on with "
                f"--sffn-descriptor {self.descriptor}; leave it out, or use ema"
            )
        if self.descriptor == "learned" and sffn.block_size == 1:
            raise ConfigError(
                "--sffn-descriptor learned has nothing to learn with --sffn-block-size 1: the "
                "weight of a block's only cell is always 1; use --sffn-descriptor mean"
            )

    @property
    @override
    def scores_have_weights(self) -> bool:
        return self.descriptor == "learned"

    @override
    def bound_to_blocks(
        self, before: SparseFFNConfig, after: SparseFFNConfig, hidden_size: int
    ) -> str | None:
        if self.descriptor == "ema":
            return f"the averages of --sffn-descriptor ema are of blocks of {before.block_size}"
        return super().bound_to_blocks(before, after, hidden_size)

    @override
    def router_class(self) -> type[AvgKRouter]:
        return AvgKRouter

    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """None, but for learned weights of the cells."""
        if self.descriptor != "learned":
            return {}
        return {"descriptor.weight": (sffn.num_blocks, sffn.block_size)}

    def held_bytes(self, sffn: SparseFFNConfig, hidden_size: int, vocab_size: int | None) -> int:
        """The average and the sums of `--sffn-descriptor ema`, in fp32, with their counts."""
        return 8 * sffn.num_blocks * (hidden_size + 1) if self.descriptor == "ema" else 0

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """One dot product per block."""
        return 2 * hidden_size * sffn.num_blocks

    @override
    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        blocks, width = call.sffn.num_blocks, call.hidden_size
        bytes_ = FP32 * blocks * width + DESCRIPTORS[self.descriptor].saved_bytes(call)
        if call.upcasts_operands:
            bytes_ += call.tokens * width * FP32
        return SavedBytes(bytes=bytes_, tokens=not call.upcasts_operands)


class AvgKRouter(ScoredRouter):
    """Top-K blocks by the dot product with the block's descriptor. Arguments as `Router`."""

    settings: AvgKConfig
    _cached: tuple[Hashable, Tensor] | None = None
    """Version of the weights, and the descriptors of that version."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.descriptor = DESCRIPTORS[self.settings.descriptor](
            self,
            group=arguments["pg_collection"].tp_dp_cp,
            subset_cells=self.settings.subset_cells,
            decay=self.settings.decay,
        )

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        # The softmax of zeros weighs all cells of a block alike.
        weight.zero_()

    @override
    def post_route(self, x: Tensor, routing: Routing) -> Routing:
        # A forward pass that will be recomputed is skipped, so that a microbatch is observed once.
        if self.training and torch.is_grad_enabled():
            self.descriptor.observe(x, routing.block_ids)
        return routing

    @override
    def end_step(self) -> None:
        self.descriptor.end_step()

    @override
    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        gate_keys = keys[:, : self.expert_grid.num_local_cells]
        return scores(x, self._descriptors(gate_keys))

    def _descriptors(self, keys: Tensor) -> Tensor:
        """Descriptors `[B, D]`; cached per version of the weights unless they need a gradient."""
        version = self.weights_version
        if torch.is_grad_enabled() or version is None or not self.descriptor.of_weights_alone:
            described: Tensor = self.descriptor(keys, self.layer_number)
            return described
        if self._cached is None or self._cached[0] != version:
            self._cached = (version, self.descriptor(keys, self.layer_number))
        return self._cached[1]
