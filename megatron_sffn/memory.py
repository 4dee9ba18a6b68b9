"""The memory of one layer: the tables of keys and values, cut over ranks by blocks.

Enters: the layer's numbers and the expert-parallel group. Leaves: two parameters, keys
`[B/ep, G, D]` (`[B/ep, 2G, D]`, gate keys first, for SwiGLU) and values `[B/ep, G, D]`, their
initial values and their place in a checkpoint.

Choices
- Tables without biases, as both papers define the layer, whatever `--disable-bias-linear` says.
- Each block draws its initial values from a generator seeded by (seed, layer, block): the model is
  the same on one rank and on a thousand.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch.nn.parameter import Parameter

from megatron_sffn.config import SparseFFNTransformerConfig
from megatron_sffn.ops import Activation


class Memory(MegatronModule):
    """Key and value tables of the blocks held by this rank; fills Megatron's `experts` slot.

    Args:
        num_local_blocks: B / ep.
        config: of the model.
        pg_collection: Megatron's process groups; `ep` and `expt_dp` are used.
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
        self.ep_group, self.replicas = pg_collection.ep, pg_collection.expt_dp
        self.num_local_blocks = num_local_blocks
        self.activation = Activation.of(config)
        cells = self.sffn.block_size
        self.keys = self._table(cells * (2 if self.activation.gated else 1))
        self.values = self._table(cells)

    def _table(self, cells: int) -> Parameter:
        """An uninitialised `[B/ep, cells, D]` parameter with the marks Megatron reads."""
        config = self.config
        table = Parameter(
            torch.empty(
                self.num_local_blocks,
                cells,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        # Gradients are summed over the ranks that hold the same blocks, not over all of DP.
        table.allreduce = not (  # type: ignore[attr-defined]
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        # Without the mark, gradient norms would count the table on the first TP rank only.
        set_tensor_model_parallel_attributes(table, is_parallel=True, dim=1, stride=1)
        return table

    @torch.no_grad()
    def initialize(self, layer_number: int) -> None:
        """Draw the tables of this layer, block by block, with Megatron's init methods."""
        if not self.config.perform_initialization:
            return
        devices = [self.keys.device] if self.keys.is_cuda else []
        first = self.ep_group.rank() * self.num_local_blocks
        with torch.random.fork_rng(devices=devices):
            for block in range(self.num_local_blocks):
                torch.manual_seed(_seed(self.sffn.seed, layer_number, first + block))
                self.config.init_method(self.keys[block])
                self.config.output_layer_init_method(self.values[block])

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients: ours are never delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The tables as parts of global `[B, ...]` tensors, so that EP can change on load."""
        axes = len(sharded_offsets)
        cut = (axes, self.ep_group.rank(), self.ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                table,
                *sharded_offsets,
                cut,
                replica_id=(0, 0, self.replicas.rank()),
                prepend_axis_num=axes,
            )
            for name, table in self.named_parameters()
        }

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
