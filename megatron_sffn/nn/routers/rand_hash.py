"""RandHash: a fixed random map from the input token's id to K blocks (arXiv 2305.13999; HashLayer,
Roller et al. 2021). No parameter, no gate, no balance loss.

The K blocks of an id are K of B by a hash of the id, the layer and the seed (`hashing.py`): the map
is the same on every device and layout, and a checkpoint need not carry it.

Design notes: where the size V of the vocabulary is known, the first forward pass hashes all ids
into a table `[V, K]`, and every pass looks its tokens up there without a wait for the device.
Without it, or where the table would be too large, every pass hashes its own ids, and waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import override

import torch
from torch import Tensor

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig, flag
from megatron_sffn.nn.routers.base import Router, Routing
from megatron_sffn.nn.saved_bytes import LayerCall, SavedBytes
from megatron_sffn.utils.hashing import hashed_subsets

LARGEST_TABLE = 1 << 28
"""Bytes of a layer's table: 256 MiB hold 50,304 ids with 2,667 blocks each."""

HASHED_IDS = 1 << 20
"""Ids times blocks that are hashed at once: each takes 8 bytes in several temporary tensors."""


@dataclass(frozen=True, kw_only=True)
class RandHashConfig(RouterConfig):
    """Settings of RandHash."""

    name = "rand-hash"
    summary = "a fixed random set of blocks for every token id; selection costs nothing"

    needs_token_ids = True
    megatron_flags = ("moe_latent_size",)

    seed: int = flag("--sffn-hash-seed", default=42, help="seed of the map (rand-hash)")
    shared: bool = flag(
        "--sffn-hash-shared", default=False, help="the same map in all layers (rand-hash)"
    )

    @override
    def router_class(self) -> type[RandHashRouter]:
        return RandHashRouter

    def held_bytes(self, sffn: SparseFFNConfig, hidden_size: int, vocab_size: int | None) -> int:
        """Bytes of the table of all ids' blocks; 0 if the table would be too large."""
        row_bytes = table_dtype(sffn.num_blocks).itemsize * sffn.num_active_blocks
        size = (vocab_size or 0) * row_bytes
        return size if size <= LARGEST_TABLE else 0

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        return SavedBytes()  # no gradient passes through the map


def table_dtype(num_blocks: int) -> torch.dtype:
    """The smaller of int16 and int32 that holds every block."""
    return torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32


def blocks_of_ids(ids: Tensor, sffn: SparseFFNConfig, layer_number: int | None) -> Tensor:
    """The map: `[N, K]` int64 blocks of `[N]` ids in a layer, which counts from 1."""
    settings = sffn.router
    assert isinstance(settings, RandHashConfig)
    layer = 0 if settings.shared else layer_number
    assert layer is not None, "rand-hash needs the layer number"
    return hashed_subsets(
        ids,
        size=sffn.num_blocks,
        count=sffn.num_active_blocks,
        key=settings.seed * 1_000_003 + layer,
    )


class RandHashRouter(Router):
    """Blocks by a keyed permutation of the token id. Arguments as `Router`."""

    _table: Tensor | None = None
    """`[V, K]` blocks of every id. Not a buffer: a checkpoint need not carry it."""

    @override
    def set_layer_number(self, layer_number: int) -> None:
        # The map depends on the layer number.
        super().set_layer_number(layer_number)
        self._table = None

    @override
    def forward(
        self,
        x: Tensor,
        keys: Tensor | None,
        token_ids: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        assert token_ids is not None, (
            "rand-hash needs the input ids: give them to the layer (or Megatron's GPTModel) as "
            "`padding_mask`, the slot for numbers of a token that reaches every pipeline stage"
        )
        if self._table is None and self._held_bytes():
            self._table = self._make_table(token_ids.device)
        if self._table is not None:
            return Routing(block_ids=self._table.index_select(0, token_ids).long())
        ids, position = token_ids.unique(return_inverse=True)
        return Routing(block_ids=self._hash(ids)[position])

    def _hash(self, ids: Tensor) -> Tensor:
        """`[N, K]` int64 blocks of `[N]` ids."""
        return blocks_of_ids(ids, self.sffn, self.layer_number)

    def _held_bytes(self) -> int:
        """Bytes of the table; 0 if V is not known, or the table would be too large."""
        width, rows = self.config.hidden_size, self.config.padded_vocab_size
        return self.sffn.router.held_bytes(self.sffn, width, rows)

    def _make_table(self, device: torch.device) -> Tensor:
        """`[V, K]` blocks of every id; the host waits, once."""
        rows = self.config.padded_vocab_size
        assert rows is not None, "a table needs the size of the vocabulary"
        dtype, ids = table_dtype(self.sffn.num_blocks), torch.arange(rows, device=device)
        chunks = ids.split(max(1, HASHED_IDS // self.sffn.num_active_blocks))
        return torch.cat([self._hash(chunk).to(dtype) for chunk in chunks])
