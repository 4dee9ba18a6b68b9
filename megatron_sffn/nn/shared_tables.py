"""One table of keys and values for several layers (`--sffn-layers-per-table`).

The first layer of a group has the block weights; the others read them and have a router of their
own. A weight then is a parameter of one module alone: data parallelism, the optimizer, checkpoints
and counts of parameters see it once, under the name of the first layer, whose number seeds it.

Design notes: the layers of a group are in one model chunk, since a weight has one place. Autograd
adds up the gradients of a group's layers. Under recomputation Megatron's hook runs once per layer,
which it counts in the first step before it overlaps the reduction of gradients.
"""

from __future__ import annotations

from itertools import accumulate
from typing import override

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_sffn.nn.block_weights import BlockWeights
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig


class SharedTables:
    """Builds the block weights of a group of layers: it fills Megatron's `experts` slot in each.

    A model chunk builds its layers in order, so that the first call is that of the first layer.
    """

    def __init__(self) -> None:
        self.of_first_layer: BlockWeights | None = None

    def __call__(
        self,
        num_local_blocks: int,
        config: SparseFFNTransformerConfig,
        /,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> BlockWeights | BorrowedBlockWeights:
        """The block weights of a layer. Arguments as `BlockWeights`."""
        if self.of_first_layer is not None:
            return BorrowedBlockWeights(config, self.of_first_layer)
        self.of_first_layer = BlockWeights(
            num_local_blocks, config, pg_collection=pg_collection, name=name
        )
        return self.of_first_layer


class BorrowedBlockWeights(MegatronModule):
    """The block weights of another layer: a module without parameters, and without tensors to save.

    Args:
        config: config of the model.
        block_weights: those of the first layer of the group.
    """

    def __init__(self, config: SparseFFNTransformerConfig, block_weights: BlockWeights) -> None:
        super().__init__(config=config)
        # In a tuple, in which torch does not find it: the parameters stay those of one module.
        self._of_first_layer = (block_weights,)
        self.expert_grid = block_weights.expert_grid

    @override
    def forward(self) -> tuple[Tensor | None, Tensor]:
        """Return the keys, or None, and the values.

        This calls the module that has the parameters, because Megatron's overlapped parameter
        gather waits for them in a hook of that call.
        """
        (block_weights,) = self._of_first_layer
        tables: tuple[Tensor | None, Tensor] = block_weights()
        return tables

    def init_weights(self, layer_number: int) -> None:
        """Do nothing: the first layer draws the tables."""

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; these tables never delay them."""


def tables_of_layer(
    config: SparseFFNTransformerConfig, layer_number: int, groups: dict[int, SharedTables]
) -> SharedTables | None:
    """The tables of a sparse layer's group; None for a layer with a table of its own.

    Args:
        config: config of the model.
        layer_number: Megatron's number of the layer, counted from 1.
        groups: the groups of the model chunk so far; gets the group that the layer begins.
    """
    assert config.sffn is not None and isinstance(config.moe_layer_freq, list)
    layers_per_table = config.sffn.layers_per_table
    if layers_per_table == 1:
        return None
    group, place = divmod(sum(config.moe_layer_freq[: layer_number - 1]), layers_per_table)
    if place == 0:
        groups[group] = SharedTables()
    assert group in groups, f"layer {layer_number}: its group begins in another model chunk"
    return groups[group]


def cut_group(sparse: list[int], chunks: list[int], layers_per_table: int) -> list[int] | None:
    """The sparse layers of a group that does not lie in one model chunk; None if all groups do.

    Args:
        sparse: 1 for each sparse layer of the model, 0 for each dense layer.
        chunks: number of layers of each model chunk, in the order of the layers.
        layers_per_table: sparse layers of a group.
    """
    layers = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
    ends = list(accumulate(chunks))
    for start in range(0, len(layers), layers_per_table):
        group = layers[start : start + layers_per_table]
        if any(group[0] < end <= group[-1] for end in ends):
            return group
    return None
