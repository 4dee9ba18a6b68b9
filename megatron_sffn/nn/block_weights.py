"""The memory of one layer: the tables of keys and values, cut over ranks.

Enters: the layer's numbers and its expert_grid. Leaves: two parameters, keys `[B / ep, G / etp, C]`
(`[B / ep, 2G / etp, C]`, gate keys first, for SwiGLU) and values `[B / ep, G / etp, D]`, their
initial values and their place in a checkpoint. The width of keys, C, is D but where the router says
else; where it is 0 there are values alone.

Choices
- Tables without biases, as both papers define the layer, whatever `--disable-bias-linear` says.
- Each block draws its initial values on the CPU, from a generator seeded by (seed, layer, block):
  the model is the same on one rank and on a thousand, and on a CPU and a GPU.
- A checkpoint holds cells, not blocks: tables `[M, D]` (gate keys apart), in which a block is G
  consecutive rows. So any EP and ETP can load it, and any block size that divides the memory.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

from megatron_sffn.nn.config import SparseFFNConfig, SparseFFNTransformerConfig
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.ops import Activation, device
from megatron_sffn.ops.block_ffn import main_grad
from megatron_sffn.utils.hashing import seed_of


class BlockWeights(MegatronModule):
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
        self.expert_grid = ExpertGrid.of(pg_collection, config.sffn)
        assert self.expert_grid.num_local_blocks == num_local_blocks, (
            self.expert_grid,
            num_local_blocks,
        )
        self.replicas = pg_collection.expt_dp
        self.keys_per_cell = 2 if Activation.of(config).gated else 1
        width = self.sffn.router.key_width(config.hidden_size)
        self.keys = self._table(self.keys_per_cell, width) if width else None
        self.values = self._table(1, config.hidden_size)

    def _table(self, per_cell: int, width: int) -> Parameter:
        """An uninitialised `[B / ep, per_cell · G / etp, width]` with the marks Megatron reads."""
        config, expert_grid = self.config, self.expert_grid
        table = Parameter(
            torch.empty(
                expert_grid.num_local_blocks,
                per_cell * expert_grid.num_local_cells,
                width,
                dtype=config.params_dtype,
                device=device.current(),
            )
        )
        # Gradients are summed over the ranks that hold the same cells, not over all of DP; also
        # where these are the same, so that the optimizer's state has one structure for every EP.
        table.allreduce = False  # type: ignore[attr-defined]
        # Without the mark, gradient norms would count the table on the first TP rank only.
        set_tensor_model_parallel_attributes(table, is_parallel=True, dim=1, stride=1)
        # The layer computes with tables in `block_ffn` alone, but for its router, to which it
        # gives them through `main_grad.shared`.
        main_grad.add_to_main_grad(table)
        return table

    def forward(self) -> tuple[Tensor | None, Tensor]:
        """Keys, if there are any, and values.

        A call rather than two attributes: Megatron's overlapped gather of parameters waits for
        them when a module that owns some is called.
        """
        return self.keys, self.values

    def initialize(self, layer_number: int) -> None:
        """Draw the tables of this layer, block by block."""
        if not self.config.perform_initialization:
            return
        draw_keys, draw_values = init_methods(self.config, self.sffn)
        tables = [(self.values.detach(), 1, draw_values)]
        if self.keys is not None:
            tables.insert(0, (self.keys.detach(), self.keys_per_cell, draw_keys))
        # Drawn on the CPU also for a GPU, whose generator gives other numbers: then a run on a GPU
        # can be compared with one on a CPU, loss by loss.
        drawn = [(_on_cpu(table), keys_per_cell, draw) for table, keys_per_cell, draw in tables]
        grid, first_seed = self.expert_grid, seed_of(self.sffn.seed, layer_number)

        def draw_block(block: int) -> None:
            generator = torch.Generator()
            # Counting on from a hashed number, no two blocks of a layer share a seed.
            generator.manual_seed((first_seed + grid.first_block + block) % 2**32)
            for table, keys_per_cell, draw in drawn:
                shape = keys_per_cell * grid.block_size, table.shape[-1]
                # In half precision torch 2.11 and 2.13 draw other numbers from one seed.
                whole_block = table.new_empty(shape, dtype=drawn_dtype(table))
                draw(whole_block, generator=generator)
                cells = whole_block.view(keys_per_cell, grid.etp_size, grid.num_local_cells, -1)
                table[block] = cells[:, grid.etp_rank].flatten(0, 1)

        # Threads draw at the same time: torch lets Python go on while it fills a tensor.
        with ThreadPoolExecutor(drawing_threads()) as threads:
            collections.deque(threads.map(draw_block, range(grid.num_local_blocks)), maxlen=0)
        for (table, *_), (numbers, *_) in zip(tables, drawn, strict=True):
            if numbers is not table:
                table.copy_(numbers)

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients: ours are never delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The tables as parts of global `[M, D]` tables of cells."""
        names = ("keys",) if self.keys_per_cell == 1 else ("gate_keys", "keys")
        values = self._in_cells(self.values, prefix, ("values",), sharded_offsets)
        if self.keys is None:
            return {f"{prefix}values": values}
        keys = self._in_cells(self.keys, prefix, names, sharded_offsets)
        return {f"{prefix}keys": keys, f"{prefix}values": values}

    def _in_cells(
        self,
        table: Parameter,
        prefix: str,
        names: tuple[str, ...],
        sharded_offsets: tuple[tuple[int, int, int], ...],
    ) -> ShardedTensorFactory:
        """A table on its way to a checkpoint, and the optimizer's state of it.

        Args:
            table: `[B / ep, len(names) · G / etp, width]`.
            prefix: of the names in the checkpoint.
            names: of the parts of a cell in this table, each an `[M, width]` table there.
            sharded_offsets: of the layer, as Megatron gives them.
        """
        grid, axes = self.expert_grid, len(sharded_offsets)
        shape = (grid.num_local_blocks, len(names), grid.num_local_cells)

        def pieces(part: Tensor) -> list[tuple[Tensor, int, int]]:
            """Consecutive cells, which of how many pieces of the whole memory they are."""
            if grid.etp_size == 1:
                return [(part.flatten(0, 1), grid.ep_rank, grid.ep_size)]
            count = grid.num_blocks * grid.etp_size
            first = grid.first_block * grid.etp_size + grid.etp_rank
            return [(part[i], first + i * grid.etp_size, count) for i in range(len(part))]

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
        keys = None if self.keys is None else list(self.keys.shape)
        return f"keys={keys}, values={list(self.values.shape)}"


Draw = Callable[..., Any]
"""`draw(tensor, generator=...)` of `torch.nn.init` fills a tensor."""


def _on_cpu(table: Tensor) -> Tensor:
    """The table itself if it is on the CPU, else an uninitialised one of its shape and dtype."""
    return table if table.device.type == "cpu" else torch.empty_like(table, device="cpu")


def drawn_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight is drawn, before it is rounded to its own."""
    return torch.promote_types(weight.dtype, torch.float32)


def drawing_threads() -> int:
    """Threads that draw tables: this rank's share of the processors, and at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, len(os.sched_getaffinity(0)) // ranks), 8)


def init_methods(config: SparseFFNTransformerConfig, sffn: SparseFFNConfig) -> tuple[Draw, Draw]:
    """How keys and values are drawn (`--sffn-init`; `config.INITIALIZATIONS` says from where)."""
    layers, width = config.num_layers, config.hidden_size
    # Of a layer before which the hidden states are normalised, and that many are added up.
    like_dense = partial(torch.nn.init.normal_, std=math.sqrt(2 / (layers * width)))
    match sffn.initialization or sffn.router.initialization:
        case "sigma-moe":
            std = math.sqrt(2 / (layers * sffn.num_cells))
            return like_dense, partial(torch.nn.init.normal_, std=std)
        case "sigma-moe-block":
            std = math.sqrt(2 / (layers * sffn.block_size))
            return like_dense, partial(torch.nn.init.normal_, std=std)
        case "pkm":
            return config.init_method, partial(torch.nn.init.normal_, std=width**-0.5)
        case _:
            return config.init_method, config.output_layer_init_method
