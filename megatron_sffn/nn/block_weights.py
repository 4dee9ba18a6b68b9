"""Key and value tables of one layer, sharded over the expert grid.

Inputs: the layer's config and Megatron's process groups. Outputs: two parameters, keys
`[B / ep, G / etp, C]` (`[B / ep, 2G / etp, C]` for SwiGLU, gate keys first) and values
`[B / ep, G / etp, D]`, with their initial values and their form in a checkpoint. C, the width of a
key, is D unless the router says otherwise; if it is 0, there are only values.

Design notes:
- The tables have no biases, as both papers define the layer, whatever `--disable-bias-linear` says.
- Each block is drawn on the CPU from a generator seeded by (seed, layer, block), so the model is
  the same on any number of ranks, on a CPU and on a GPU. `init.py` has the distributions.
- A checkpoint holds cells, not blocks: tables `[M, C]` and `[M, D]`, in which a block is G
  consecutive rows, and one more for gate keys. A checkpoint can therefore be loaded with any EP and
  ETP, and with any block size that divides M.
"""

from __future__ import annotations

import collections
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, override

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

from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.init import InitMethod, block_weight_init, init_dtype
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import Activation, device
from megatron_sffn.ops.block_ffn import main_grad
from megatron_sffn.utils.hashing import seed_of


class BlockWeights(MegatronModule):
    """Keys and values of the cells that this rank holds; it fills Megatron's `experts` slot.

    Args:
        num_local_blocks: B / ep.
        config: config of the model.
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
        assert config.sffn is not None, "block weights need config.sffn"
        self.sffn = config.sffn
        self.expert_grid = ExpertGrid.of(pg_collection, config.sffn)
        assert self.expert_grid.num_local_blocks == num_local_blocks, (
            self.expert_grid,
            num_local_blocks,
        )
        self.expert_dp_group = pg_collection.expt_dp
        self.keys_per_cell = 2 if Activation.of(config).gated else 1
        key_width = self.sffn.key_width(config.hidden_size)
        self.keys = self._new_table(self.keys_per_cell, key_width) if key_width else None
        self.values = self._new_table(1, self.sffn.row_width(config.hidden_size))
        if self.keys is not None:
            # Values without keys are looked up row by row, as embeddings are, and are no matrices.
            _mark_for_muon(self.keys, self.keys_per_cell, inputs_first=False)
            _mark_for_muon(self.values, 1, inputs_first=True)

    def _new_table(self, vectors_per_cell: int, width: int) -> Parameter:
        """An uninitialised `[B / ep, vectors_per_cell · G / etp, width]`, marked for Megatron."""
        config, grid = self.config, self.expert_grid
        table = Parameter(
            torch.empty(
                grid.num_local_blocks,
                vectors_per_cell * grid.num_local_cells,
                width,
                dtype=config.params_dtype,
                device=device.current(),
            )
        )
        # Reduce gradients over the expert-data-parallel group. This is set even if that group is
        # all of DP, so that the optimizer state has the same structure for every EP.
        table.allreduce = False  # type: ignore[attr-defined]
        # Without this mark, the gradient norm would count the table on the first TP rank only.
        set_tensor_model_parallel_attributes(table, is_parallel=True, dim=1, stride=1)
        # Allowed because only `block_ffn` computes with a table, and the router gets the keys
        # through `main_grad.shared`.
        main_grad.add_to_main_grad(table)
        return table

    @override
    def forward(self) -> tuple[Tensor | None, Tensor]:
        """Return the keys, or None, and the values.

        The layer calls the module instead of reading its attributes, because Megatron's overlapped
        parameter gather waits for the parameters of a module in a hook of its call.
        """
        return self.keys, self.values

    def init_weights(self, layer_number: int) -> None:
        """Draw the tables of this layer block by block, each from its own seed."""
        if not self.config.perform_initialization:
            return
        key_init, value_init = block_weight_init(self.config)
        tables = [_CPUTable(self.values, 1, value_init)]
        if self.keys is not None:
            # Keys first: keys and values of a block are drawn from one generator.
            tables.insert(0, _CPUTable(self.keys, self.keys_per_cell, key_init))
        grid, layer_seed = self.expert_grid, seed_of(self.sffn.seed, layer_number)

        def init_block(local_block: int) -> None:
            generator = torch.Generator()
            # Consecutive seeds from a hashed start: no two blocks of a layer share a seed.
            generator.manual_seed((layer_seed + grid.first_block + local_block) % 2**32)
            for table in tables:
                table.init_block(local_block, grid, generator)

        # Threads help because torch releases the GIL while it fills a tensor.
        with ThreadPoolExecutor(num_init_threads()) as threads:
            collections.deque(threads.map(init_block, range(grid.num_local_blocks)), maxlen=0)
        for table in tables:
            table.copy_to_parameter()

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; these tables never delay them."""

    @override
    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The tables as shards of global tables of cells, `[M, C]` and `[M, D]`."""
        names = ("keys",) if self.keys_per_cell == 1 else ("gate_keys", "keys")
        values = self._sharded_cells(self.values, prefix, ("values",), sharded_offsets)
        if self.keys is None:
            return {f"{prefix}values": values}
        keys = self._sharded_cells(self.keys, prefix, names, sharded_offsets)
        return {f"{prefix}keys": keys, f"{prefix}values": values}

    def _sharded_cells(
        self,
        parameter: Parameter,
        prefix: str,
        names: tuple[str, ...],
        sharded_offsets: tuple[tuple[int, int, int], ...],
    ) -> ShardedTensorFactory:
        """A factory that converts a table, and its optimizer state, to and from a checkpoint.

        Megatron calls the factory for the parameter and for each tensor of its optimizer state,
        so the state gets the form of the parameter.

        Args:
            parameter: `[B / ep, len(names) · G / etp, width]`.
            prefix: prefix of the names in the checkpoint.
            names: names of the checkpoint's tables `[M, width]`; a block of `parameter` has the
                rows of the first table, then those of the second.
            sharded_offsets: position of the layer among the layers, as Megatron gives it.
        """
        grid, num_layer_axes = self.expert_grid, len(sharded_offsets)
        shape = (grid.num_local_blocks, len(names), grid.num_local_cells)

        def build(key: str, data: Tensor, replica_id: ReplicaId, _: slice | None) -> Any:
            tables = data.detach().view(*shape, data.shape[-1]).unbind(1)
            return {
                name: [
                    ShardedTensor.from_rank_offsets(
                        f"{key}{name}",
                        cells,
                        *sharded_offsets,
                        # Shard `index` of `count` equal shards along the axis of the cells.
                        (num_layer_axes, index, count),
                        replica_id=replica_id,
                        prepend_axis_num=num_layer_axes,
                    )
                    for cells, index, count in _cell_shards(table, grid)
                ]
                for name, table in zip(names, tables, strict=True)
            }

        def merge(loaded: Any) -> Tensor:
            tables = [torch.cat(loaded[name]).view(shape[0], shape[2], -1) for name in names]
            return torch.cat(tables, dim=1)

        # The last number is the replica id: one rank of the expert-data-parallel group saves.
        replica_id = (0, 0, self.expert_dp_group.rank())
        return ShardedTensorFactory(prefix, parameter, build, merge, replica_id)

    @override
    def extra_repr(self) -> str:
        """Shapes of the tables, for `print(model)`."""
        keys = None if self.keys is None else list(self.keys.shape)
        return f"keys={keys}, values={list(self.values.shape)}"


def _mark_for_muon(table: Parameter, matrices_per_block: int, *, inputs_first: bool) -> None:
    """Say which matrices of a block Muon orthogonalises; `patches/muon.py` reads it.

    Args:
        table: `[B / ep, matrices_per_block · G / etp, width]`.
        matrices_per_block: a block has so many matrices, one after the other.
        inputs_first: True if a matrix is `[inputs, outputs]`, False for `[outputs, inputs]`.
    """
    table.block_matrices = matrices_per_block  # type: ignore[attr-defined]
    table.block_inputs_first = inputs_first  # type: ignore[attr-defined]


def _cell_shards(table: Tensor, grid: ExpertGrid) -> list[tuple[Tensor, int, int]]:
    """Split a rank's table `[B / ep, G / etp, width]` into runs of consecutive cells.

    Without ETP the cells of a rank are consecutive in the global `[M, width]` table, so they are
    one shard of `ep` shards. With ETP a rank holds only a part of each block, so each block is a
    shard of its own, of B · etp shards.

    Returns:
        Cells of a shard, its index among all shards, and the number of all shards.
    """
    if grid.etp_size == 1:
        return [(table.flatten(0, 1), grid.ep_rank, grid.ep_size)]
    num_shards = grid.num_blocks * grid.etp_size
    first = grid.first_block * grid.etp_size + grid.etp_rank
    return [(cells, first + i * grid.etp_size, num_shards) for i, cells in enumerate(table)]


class _CPUTable:
    """A table on the CPU while it is drawn, also for a parameter on a GPU.

    A GPU's generator gives other numbers. Drawn on the CPU, a run on a GPU can be compared with a
    run on a CPU, loss by loss.

    Args:
        parameter: `[B / ep, vectors_per_cell · G / etp, width]`; on a CPU it is drawn in place.
        vectors_per_cell: 2 for the keys of SwiGLU, else 1.
        init_method: draws the values of a block.
    """

    def __init__(
        self, parameter: Parameter, vectors_per_cell: int, init_method: InitMethod
    ) -> None:
        self.parameter = parameter.detach()
        self.vectors_per_cell, self.init_method = vectors_per_cell, init_method
        is_on_cpu = parameter.device.type == "cpu"
        self.table = self.parameter if is_on_cpu else torch.empty_like(parameter, device="cpu")

    def init_block(self, local_block: int, grid: ExpertGrid, generator: torch.Generator) -> None:
        """Draw all cells of a block, the same for every ETP, and keep those of this rank."""
        shape = self.vectors_per_cell * grid.block_size, self.table.shape[-1]
        block = self.table.new_empty(shape, dtype=init_dtype(self.table))
        self.init_method(block, generator=generator)
        cells = block.view(self.vectors_per_cell, grid.etp_size, grid.num_local_cells, -1)
        self.table[local_block] = cells[:, grid.etp_rank].flatten(0, 1)

    def copy_to_parameter(self) -> None:
        """Copy the drawn table to the parameter's device."""
        if self.table is not self.parameter:
            self.parameter.copy_(self.table)


def num_init_threads() -> int:
    """Number of threads that draw tables: this rank's share of the CPU cores, at most 8."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, len(os.sched_getaffinity(0)) // local_world_size), 8)
