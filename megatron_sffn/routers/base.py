"""What a router promises: the record it returns, and how scores travel between ranks.

Enters: tokens `[T, D]` and this rank's keys. Leaves: a `Routing`, K block ids per token and, where
the method has them, gates. Never a tokens × blocks map: at g = 1 that map has 65,536 columns
(Megatron's own routers return one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sffn.config import SparseFFNConfig, SparseFFNTransformerConfig


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
        pg_collection: Megatron's process groups; `ep` is the one over which blocks are cut.
    """

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
        self.ep_group = pg_collection.ep
        self.layer_number: int | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron tells each layer its number, counted from 1, after it is built."""
        self.layer_number = layer_number

    def forward(self, x: Tensor, keys: Tensor, token_ids: Tensor | None) -> Routing:
        """Choose K blocks for each token.

        Args:
            x: `[T, D]` tokens of this rank.
            keys: `[B / ep, G, D]` the keys held here; `[B / ep, 2G, D]`, gate keys first, for a
                gated activation.
            token_ids: `[T]` input ids, for routers that ask for them.
        """
        raise NotImplementedError


def score_dtype(x: Tensor) -> torch.dtype:
    """Scores are at least fp32, so that a selection does not hang on a half-precision tie."""
    return torch.promote_types(x.dtype, torch.float32)


def gather_blocks(local: Tensor, group: Any) -> Tensor:
    """`[B / ep, ...]` of every rank as `[B, ...]`, without a gradient."""
    if group.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def token_ids_of(layer_input_ids: Tensor | None, router: str) -> Tensor:
    """The input ids, or a clear message about who has to provide them."""
    assert layer_input_ids is not None, (
        f"router {router} needs the input ids of this microbatch: call "
        "megatron_sffn.layer.provide_token_ids(model, ids) before the forward pass"
    )
    return layer_input_ids
