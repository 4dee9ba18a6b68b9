"""RandHash: a fixed random map from the input token's id to K blocks (arXiv 2305.13999; HashLayer,
Roller et al. 2021). No parameter, no gate, no balance loss.

The K blocks of an id are K of B by a hash of the id, the layer and the seed (`hashing.py`): the map
is the same on every device and layout, and a checkpoint need not carry it.

Design notes: where the size V of the vocabulary is known, the first forward pass hashes all ids
into a table `[V, K]`, and every pass looks its tokens up there without a wait for the device.
Without it, or where the table would be too large, every pass hashes its own ids, and waits.

With `--sffn-hash-balance` the map also depends on the ids' counts in a data set
(`balanced_map.py`). It is then a buffer in the checkpoint, so that nothing but the start of a run
reads the data set: a map made again from a data set that has changed would be another model.

With `--sffn-hash-ngram N`, which is ours, the layer gets a number of each n-gram in place of the
ids (`token_keys`). The numbers are made where whole sequences are, before Megatron cuts them over
ranks. There are too many for a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, override

import torch
from torch import Tensor

from megatron_sffn.nn.config import ConfigError, RouterConfig, SparseFFNConfig, flag
from megatron_sffn.nn.routers.balanced_map import balanced_map
from megatron_sffn.nn.routers.base import Router, Routing
from megatron_sffn.nn.saved_bytes import LayerCall, SavedBytes
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import device
from megatron_sffn.utils.hashing import hashed_subsets, ngram_keys

LARGEST_TABLE = 1 << 28
"""Bytes of a layer's table: 256 MiB hold 50,304 ids with 2,667 blocks each."""

STORED = torch.int32
"""Type of a balanced map, in the layer as in checkpoints and exports."""

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
    balance: str | None = flag(
        "--sffn-hash-balance",
        default=None,
        kind=str,
        value_in_checkpoint=True,
        help="make the map balanced instead of uniform: a new run counts the ids of this data set, "
        "a prefix of .bin and .idx, and gives the most frequent ids to the emptiest blocks; the "
        "map is stored in checkpoints (rand-hash)",
    )
    ngram: int = flag(
        "--sffn-hash-ngram",
        default=1,
        least=1,
        help="N, ids that are hashed together: that of the token and the N - 1 before it in its "
        "sequence; 1 hashes the token alone (rand-hash; more is not in the papers)",
    )

    @override
    def router_class(self) -> type[RandHashRouter]:
        return RandHashRouter

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        if self.balance is not None and self.ngram > 1:
            raise ConfigError(
                f"--sffn-hash-ngram {self.ngram} has no table of all n-grams, which "
                "--sffn-hash-balance would balance; leave one of them out"
            )

    @override
    def token_keys(self, ids_bs: Tensor) -> Tensor:
        return ids_bs if self.ngram == 1 else ngram_keys(ids_bs, self.ngram)

    @property
    @override
    def stores_blocks(self) -> bool:
        return self.balance is not None

    @override
    def bound_to_blocks(
        self, before: SparseFFNConfig, after: SparseFFNConfig, hidden_size: int
    ) -> str | None:
        if not self.stores_blocks:
            return None
        return f"the map of --sffn-hash-balance is of blocks of {before.block_size}"

    @override
    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        sffn, rows = config.sffn, config.padded_vocab_size
        if self.ngram > 1 and config.context_parallel_size > 1:
            raise ConfigError(
                f"--sffn-hash-ngram {self.ngram} needs whole sequences, which "
                f"--context-parallel-size {config.context_parallel_size} cuts; use 1"
            )
        if self.balance is None or sffn is None or rows is None:
            return
        if not self.held_bytes(sffn, config.hidden_size, rows):
            raise ConfigError(
                f"--sffn-hash-balance {self.balance} makes a table of {rows} ids with "
                f"{sffn.num_active_blocks} blocks each, more than {LARGEST_TABLE >> 20} MiB in "
                "every layer; leave it out, or use a larger --sffn-block-size"
            )

    def held_bytes(self, sffn: SparseFFNConfig, hidden_size: int, vocab_size: int | None) -> int:
        """Bytes of the table of all ids' blocks; 0 if the table would be too large."""
        if self.ngram > 1:
            return 0
        dtype = table_dtype(sffn.num_blocks) if self.balance is None else STORED
        size = (vocab_size or 0) * dtype.itemsize * sffn.num_active_blocks
        return size if size <= LARGEST_TABLE else 0

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        return SavedBytes()  # no gradient passes through the map


def table_dtype(num_blocks: int) -> torch.dtype:
    """The smaller of int16 and int32 that holds every block."""
    return torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32


def blocks_of_ids(ids: Tensor, sffn: SparseFFNConfig, layer_number: int | None) -> Tensor:
    """The uniform map: `[N, K]` int64 blocks of `[N]` ids in a layer, which counts from 1."""
    key = _key(sffn, layer_number)
    return hashed_subsets(ids, size=sffn.num_blocks, count=sffn.num_active_blocks, key=key)


def _key(sffn: SparseFFNConfig, layer_number: int | None) -> int:
    """The key of a layer's hash."""
    settings = sffn.router
    assert isinstance(settings, RandHashConfig)
    layer = 0 if settings.shared else layer_number
    assert layer is not None, "rand-hash needs the layer number"
    return settings.seed * 1_000_003 + layer


class RandHashRouter(Router):
    """Blocks by a keyed permutation of the token id. Arguments as `Router`."""

    _table: Tensor | None = None
    """`[V, K]` blocks of every id. Not a buffer: a checkpoint need not carry it."""
    map: Tensor | None
    """`[V, K]` blocks of every id if they are balanced, else None: a buffer, uniform until
    `balance_map`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("map", self._new_map() if self.sffn.router.stores_blocks else None)

    def _new_map(self) -> Tensor:
        """The buffer of a balanced map, before the number of the layer is known."""
        rows = self.config.padded_vocab_size
        if rows is None:
            raise ConfigError(
                "--sffn-hash-balance needs the number of token ids; give the config of the layer "
                "padded_vocab_size"
            )
        shape = (rows, self.sffn.num_active_blocks)
        return torch.zeros(shape, dtype=STORED, device=device.current())

    @override
    def set_layer_number(self, layer_number: int) -> None:
        # The map depends on the layer number.
        former = self.layer_number
        super().set_layer_number(layer_number)
        self._table = None
        if self.map is not None and self.layer_number != former:
            self.map.copy_(self._make_table(self.map.device))

    def balance_map(self, counts: Tensor) -> None:
        """Replace the uniform map by a balanced one (`--sffn-hash-balance`).

        Args:
            counts: int64 occurrences of every id, on the CPU; further ids do not occur.
        """
        assert self.map is not None, "the router's config has no balance"
        counts_V = torch.zeros(len(self.map), dtype=torch.int64)
        counts_V[: len(counts)] = counts
        self.map.copy_(
            balanced_map(
                counts_V,
                num_blocks=self.sffn.num_blocks,
                num_active=self.sffn.num_active_blocks,
                key=_key(self.sffn, self.layer_number),
            )
        )

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
        if self.map is None and self._table is None and self._held_bytes():
            self._table = self._make_table(token_ids.device)
        table = self._table if self.map is None else self.map
        if table is not None:
            return Routing(block_ids=table.index_select(0, token_ids).long())
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
