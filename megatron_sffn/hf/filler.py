"""Fills a model of Megatron's with tensors that were read by name.

Inputs: tensors by the names of a checkpoint, every layer by itself. Outputs: the model with these
weights; or a sentence about a tensor that is missing, too many, or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_sffn.checkpoints.tensors import STACKED
from megatron_sffn.hf import dense_to_sparse
from megatron_sffn.hf.dense_to_sparse import DenseToSparse
from megatron_sffn.utils.errors import ConfigError

NORM_NAMES = {
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
}
"""A norm of a layer by itself -> the same norm with the linear layer that follows."""

TRAINED_ANEW = re.compile(
    r"decoder\.layers\.\d+\.mlp\.router\.(noise_weight|balance\.l1_coefficient)"
)
"""Tensors that act in training only, which no Hugging Face folder has."""


class Filler:
    """Gives a model its weights by the names of its shards in a checkpoint.

    Args:
        tensors: by the names of the checkpoint, every layer by itself.
        how: form of a dense model that becomes sparse, whose routers may be new.
    """

    def __init__(self, tensors: Mapping[str, Tensor], how: DenseToSparse | None) -> None:
        self.tensors, self.how = tensors, how
        self.left = {*tensors}

    @torch.no_grad()
    def fill(self, model: Any) -> int:
        """Fill Megatron's model on one rank; returns its number of parameters.

        Raises:
            ConfigError: if a tensor is missing, too many, or of another shape.
        """
        filled = {}
        for key, entry in model.sharded_state_dict().items():
            if isinstance(entry, ShardedTensor):
                filled[key] = self._value(entry)
            elif isinstance(entry, ShardedTensorFactory):
                shards = dict_list_map_inplace(self._value, entry.build())
                filled[key] = entry.merge_fn(shards)
        if self.left:
            raise ConfigError(
                f"tensor {min(self.left)} has no place in a model of these flags; give a model "
                "without it"
            )
        missing, unexpected = model.load_state_dict(filled, strict=False)
        # A tied output layer is the embedding.
        known = ("_extra_state", "output_layer.weight")
        missing = [name for name in missing if not name.endswith(known)]
        assert not missing and not unexpected, (missing, unexpected)
        return sum(tensor.numel() for tensor in filled.values())

    def _value(self, shard: ShardedTensor) -> Tensor:
        """The part of a tensor that a shard is."""
        stacked, layers = STACKED.fullmatch(shard.key), shard.prepend_axis_num
        name = shard.key
        if stacked is not None:
            name = f"{stacked[1]}{shard.global_offset[0]}.{stacked[2]}"
        tensor = self._tensor(name)
        if tensor is None:
            return self._initial(name, shard)
        shape = tuple(shard.global_shape[layers:])
        if tensor.shape != shape:
            raise ConfigError(
                f"tensor {name} has the shape {tuple(tensor.shape)}, and the configuration needs "
                f"{shape}; give a model whose config.json fits its weights"
            )
        sizes = zip(shard.global_offset[layers:], shard.local_shape, strict=True)
        part = tensor[tuple(slice(start, start + size) for start, size in sizes)]
        return part.to(shard.dtype)

    def _tensor(self, name: str) -> Tensor | None:
        """A tensor by its name, or by that of the same norm at another place; None if absent."""
        names = [name]
        for alone, fused in NORM_NAMES.items():
            names += [name.replace(alone, fused), name.replace(fused, alone)]
        found = next((name for name in names if name in self.tensors), None)
        if found is None:
            return None
        self.left.discard(found)
        return self.tensors[found]

    def _initial(self, name: str, shard: ShardedTensor) -> Tensor:
        """The initial value of a router's tensor, which the model that was read does not have."""
        if not (TRAINED_ANEW.fullmatch(name) or (self.how and ".mlp.router." in name)):
            raise ConfigError(f"tensor {name} is missing; give a model with all shards")
        assert shard.data is not None, name
        if self.how and self.how.copies is not None and name.endswith(".mlp.router.weight"):
            return dense_to_sparse.shared_rows(shard.data, self.how)
        return shard.data
