"""What a router promises: the record it returns, and how scores travel between ranks.

Enters: tokens `[T, D]` and this rank's keys. Leaves: a `Routing`, K block ids per token and, where
the method has them, gates. Never a tokens × blocks map: at g = 1 that map has 65,536 columns
(Megatron's own routers return one).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sffn.config import SparseFFNConfig, SparseFFNTransformerConfig
from megatron_sffn.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The blocks of every token.

    Args:
        block_ids: `[T, K]` int64, distinct within a row, of all B blocks.
        gates: `[T, K]` factor of each block's output, or None where the method has none.
    """

    block_ids: Tensor
    gates: Tensor | None = None


class Router(torch.nn.Module):
    """Base of the routers that have no Megatron counterpart.

    Args:
        config: of the model; its `sffn` holds the layer's numbers.
        pg_collection: Megatron's process groups; `tp_ep`, `ep` and `expt_tp` say where blocks are.
    """

    weights_version: Hashable | None = None
    """Which weights the keys hold: the same value promises the same weights, so that what follows
    from them alone is computed once; None promises nothing (see `layer.set_weights_version`)."""

    def __init__(
        self,
        *,
        config: SparseFFNTransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__()
        assert config.sffn is not None, "a router needs config.sffn"
        self.config = config
        self.sffn: SparseFFNConfig = config.sffn
        self.placement = Placement.of(pg_collection, config.sffn)
        self.layer_number: int | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron tells each layer its number, counted from 1, after it is built."""
        self.layer_number = layer_number

    def forward(self, x: Tensor, keys: Tensor, token_ids: Tensor | None) -> Routing:
        """Choose K blocks for each token.

        Args:
            x: `[T, D]` tokens of this rank.
            keys: `[B / ep, G / etp, D]` the keys held here; `[B / ep, 2G / etp, D]`, gate keys
                first, for a gated activation.
            token_ids: `[T]` input ids, for routers that ask for them.
        """
        raise NotImplementedError


def score_dtype(x: Tensor) -> torch.dtype:
    """Scores are at least fp32, so that a selection does not hang on a half-precision tie."""
    return torch.promote_types(x.dtype, torch.float32)
