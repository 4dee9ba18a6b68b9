"""Re-initialisation of dense weights, so that they do not depend on the layout.

Megatron draws a weight's shard from a generator that is seeded by tensor- and pipeline-parallel
rank. `reinit_dense_weights` draws each weight of the built model once more: as a whole, from a
generator seeded by its name, and every rank keeps its shard. Every layout then starts from the same
model, and so does the dense baseline. Block weights, latent projections and routers are drawn that
way from the start (`block_weights.py`, `latent_projection.py`, `routers/base.py`).

Design notes: `sharded_state_dict` says where a shard lies in its weight, because Megatron's
checkpoints need the same knowledge.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_sffn.nn.block_weights import BlockWeights
from megatron_sffn.nn.init import SOFTMAX_OFFSET, InitMethod, dense_weight_init, init_dtype
from megatron_sffn.nn.latent_projection import LatentProjection
from megatron_sffn.nn.layer_pattern import gpt_name
from megatron_sffn.nn.routers import Router
from megatron_sffn.utils.hashing import seed_of


def reinit_dense_weights(seed: int, chunks: list[Any]) -> list[Any]:
    """Draw the dense weights again; a pre-wrap hook of Megatron.

    Args:
        seed: seed of the run.
        chunks: the model chunks of this rank.

    Returns:
        The same chunks.
    """
    for chunk in chunks:
        if chunk.config.perform_initialization:
            _mark_softmax_offsets(chunk)
            _reinit_chunk(seed, chunk)
    return chunks


def _mark_softmax_offsets(chunk: Any) -> None:
    """Mark the attention sinks as sharded over the attention heads of the tensor-parallel ranks.

    Megatron does not. Without the mark, the gradient norm counts the sinks of the first
    tensor-parallel rank only.
    """
    for name, parameter in chunk.named_parameters():
        if name.endswith(SOFTMAX_OFFSET):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)


@torch.no_grad()
def _reinit_chunk(seed: int, chunk: Any) -> None:
    # Block weights are left out because a whole table need not fit in the RAM of one rank.
    drawn_already = {
        f"{module_name}.{weight}"
        for module_name, module in chunk.named_modules()
        if isinstance(module, BlockWeights | LatentProjection | Router)
        for weight, _ in module.named_parameters()
    }
    state_dict = chunk.sharded_state_dict()
    state_dict = {name: shard for name, shard in state_dict.items() if name not in drawn_already}
    apply_factories(state_dict)
    pattern = chunk.config.hybrid_pattern
    with torch.random.fork_rng(devices=[]):
        for shard in nested_values(state_dict):
            if not isinstance(shard, ShardedTensor) or not shard.dtype.is_floating_point:
                continue
            init_method = dense_weight_init(shard.key, len(shard.local_shape), chunk.config)
            if init_method is not None:
                name = shard.key if pattern is None else gpt_name(shard.key, pattern)
                shard.data.copy_(_draw_shard(seed, name, shard, init_method))


def _draw_shard(seed: int, name: str, shard: ShardedTensor, init_method: InitMethod) -> Tensor:
    """Draw the whole weight on the CPU and return this rank's shard.

    Megatron prepends axes that number the layers; each layer is a weight of its own.

    Args:
        seed: seed of the run.
        name: name that seeds the weight.
        shard: this rank's shard.
        init_method: draws the weight.
    """
    num_layer_axes = shard.prepend_axis_num
    layer = shard.global_offset[:num_layer_axes]
    # The CPU's generator only; the caller restores its state.
    torch.default_generator.manual_seed(seed_of(seed, name, layer))
    weight = torch.empty(shard.global_shape[num_layer_axes:], dtype=init_dtype(shard.data))
    init_method(weight)
    starts = shard.global_offset[num_layer_axes:]
    return weight[tuple(slice(i, i + n) for i, n in zip(starts, shard.local_shape, strict=True))]
