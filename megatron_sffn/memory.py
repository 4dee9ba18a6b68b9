"""The memory of one layer: the tables of keys and values, cut over ranks.

Enters: the layer's numbers and its placement. Leaves: two parameters, keys `[B / ep, G / etp, D]`
(`[B / ep, 2G / etp, D]`, gate keys first, for SwiGLU) and values `[B / ep, G / etp, D]`, their
initial values and their place in a checkpoint.

Choices
- Tables without biases, as both papers define the layer, whatever `--disable-bias-linear` says.
- Each block draws its initial values from a generator seeded by (seed, layer, block): the model is
  the same on one rank and on a thousand.
- A checkpoint holds cells, not blocks: tables `[M, D]` (gate keys apart), in which a block is G
  consecutive rows. So any EP and ETP can load it, and any block size that divides the memory.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.parameter import Parameter

from megatron_sffn.config import SparseFFNTransformerConfig
from megatron_sffn.ops import Activation
from megatron_sffn.placement import Placement


class Memory(MegatronModule):
    """Key and value tables of the cells held by this rank; fills Megatron's `experts` slot.

    Args:
        num_local_blocks: B / ep.
        config: of the model.
        pg_collection: Megatron's process groups; `tp_ep`, `ep`, `expt_tp` and `expt_dp` are used.
        name: Megatron's name of the module instance; not used.
    """

    def __init__(
        self,
        num_local_blocks: int,
        config: SparseFFNTransformerConfig,
        /,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.sffn is not None, "a memory needs config.sffn"
        self.sffn = config.sffn
        self.placement = Placement.of(pg_collection, config.sffn)
        assert self.placement.num_local_blocks == num_local_blocks, (
            self.placement,
            num_local_blocks,
        )
        self.replicas = pg_collection.expt_dp
        self.keys_per_cell = 2 if Activation.of(config).gated else 1
        self.keys = self._table(self.keys_per_cell)
        self.values = self._table(1)

    def _table(self, per_cell: int) -> Parameter:
        """An uninitialised `[B / ep, per_cell · G / etp, D]` with the marks Megatron reads."""
        config, placement = self.config, self.placement
        table = Parameter(
            torch.empty(
                placement.num_local_blocks,
                per_cell * placement.num_local_cells,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        # Gradients are summed over the ranks that hold the same cells, not over all of DP; also
        # where these are the same, so that the optimizer's state has one structure for every EP.
        table.allreduce = False  # type: ignore[attr-defined]
        # Without the mark, gradient norms would count the table on the first TP rank only.
        set_tensor_model_parallel_attributes(table, is_parallel=True, dim=1, stride=1)
        return table

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values.

        A call rather than two attributes: Megatron's overlapped gather of parameters waits for
        them when a module that owns some is called.
        """
        return self.keys, self.values

    @torch.no_grad()
    def initialize(self, layer_number: int) -> None:
        """Draw the tables of this layer, block by block, with Megatron's init methods."""
        if not self.config.perform_initialization:
            return
        devices = [self.keys.device] if self.keys.is_cuda else []
        drawn = (
            (self.keys, self.keys_per_cell, self.config.init_method),
            (self.values, 1, self.config.output_layer_init_method),
        )
        grid = self.placement
        with torch.random.fork_rng(devices=devices):
            for block in range(grid.num_local_blocks):
                torch.manual_seed(_seed(self.sffn.seed, layer_number, grid.first_block + block))
                for table, per_cell, draw in drawn:
                    whole = table.new_empty(per_cell * grid.block_size, table.shape[-1])
                    draw(whole)
                    cells = whole.view(per_cell, grid.cell_parts, grid.num_local_cells, -1)
                    table[block] = cells[:, grid.cell_part].flatten(0, 1)

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients: ours are never delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The tables as parts of global `[M, D]` tables of cells."""
        keys = ("keys",) if self.keys_per_cell == 1 else ("gate_keys", "keys")
        return {
            f"{prefix}keys": self._in_cells(self.keys, prefix, keys, sharded_offsets),
            f"{prefix}values": self._in_cells(self.values, prefix, ("values",), sharded_offsets),
        }

    def _in_cells(
        self,
        table: Parameter,
        prefix: str,
        names: tuple[str, ...],
        sharded_offsets: tuple[tuple[int, int, int], ...],
    ) -> ShardedTensorFactory:
        """A table on its way to a checkpoint, and the optimizer's state of it.

        Args:
            table: `[B / ep, len(names) · G / etp, D]`.
            prefix: of the names in the checkpoint.
            names: of the parts of a cell in this table, each a `[M, D]` table of the checkpoint.
            sharded_offsets: of the layer, as Megatron gives them.
        """
        grid, axes = self.placement, len(sharded_offsets)
        shape = (grid.num_local_blocks, len(names), grid.num_local_cells)

        def pieces(part: Tensor) -> list[tuple[Tensor, int, int]]:
            """Consecutive cells, which of how many pieces of the whole memory they are."""
            if grid.cell_parts == 1:
                return [(part.flatten(0, 1), grid.block_part, grid.block_parts)]
            count = grid.num_blocks * grid.cell_parts
            first = grid.first_block * grid.cell_parts + grid.cell_part
            return [(part[i], first + i * grid.cell_parts, count) for i in range(len(part))]

        def build(key: str, data: Tensor, replica_id: ReplicaId, _: slice | None) -> Any:
            parts = data.detach().view(*shape, data.shape[-1]).unbind(1)
            return {
                name: [
                    ShardedTensor.from_rank_offsets(
                        f"{key}{name}",
                        piece,
                        *sharded_offsets,
                        (axes, index, count),
                        replica_id=replica_id,
                        prepend_axis_num=axes,
                    )
                    for piece, index, count in pieces(part)
                ]
                for name, part in zip(names, parts, strict=True)
            }

        def merge(loaded: Any) -> Tensor:
            cells = [torch.cat(loaded[name]).view(shape[0], shape[2], -1) for name in names]
            return torch.cat(cells, dim=1)

        return ShardedTensorFactory(prefix, table, build, merge, (0, 0, self.replicas.rank()))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"keys={list(self.keys.shape)}, values={list(self.values.shape)}"


def _seed(seed: int, layer: int, block: int) -> int:
    """A seed for each block of each layer.

    torch's CPU generator reads 32 bits of it: the layer starts at a hashed place among them, and
    its blocks count on from there, so that no two blocks of a layer share a seed.
    """
    start = hashlib.blake2b(f"{seed}/{layer}".encode(), digest_size=4).digest()
    return (int.from_bytes(start) + block) % 2**32
