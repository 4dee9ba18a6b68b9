"""Initial weights that do not depend on the layout.

Enters: Megatron's model chunks, just built. Leaves: the same ones, with the weights that Megatron
drew from generators seeded by tensor- and pipeline-parallel rank drawn again, each as a whole from
a generator seeded by its name, of which every rank keeps its part. So one rank and any layout start
from the same model, the dense baseline too. The tables and routers of sparse layers are so already
(`memory.py`, `routers/base.py`).

Where a part lies in the whole is what Megatron's checkpoints know: `sharded_state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sffn.nn.block_weights import BlockWeights, drawn_dtype
from megatron_sffn.nn.routers import Router
from megatron_sffn.utils.hashing import seed_of

Draw = Callable[[Tensor], Any]

SINK = "softmax_offset"
"""End of the name of `--softmax-type learnable`'s weights, the one vector that is drawn."""


def reinit_dense_weights(seed: int, chunks: list[Any]) -> list[Any]:
    """Megatron's pre-wrap hook.

    Args:
        seed: of the run.
        chunks: this rank's parts of the model.

    Returns:
        The chunks.
    """
    for chunk in chunks:
        if chunk.config.perform_initialization:
            _draw_chunk(seed, chunk)
    return chunks


@torch.no_grad()
def _draw_chunk(seed: int, chunk: Any) -> None:
    parts = chunk.sharded_state_dict()
    for name, parameter in chunk.named_parameters():
        if name.endswith(SINK):
            # Of this rank's heads. Megatron does not mark it, so that the norm of all gradients
            # would count those of the first tensor-parallel rank alone.
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    # Tables are drawn block by block; here they would have to fit a rank as a whole.
    drawn = {
        f"{name}.{weight}"
        for name, module in chunk.named_modules()
        if isinstance(module, BlockWeights | Router)
        for weight, _ in module.named_parameters()
    }
    parts = {name: part for name, part in parts.items() if name not in drawn}
    apply_factories(parts)
    with torch.random.fork_rng(devices=[]):
        for part in nested_values(parts):
            draw = _method(part, chunk.config) if isinstance(part, ShardedTensor) else None
            if draw is not None:
                part.data.copy_(_part_of_whole(seed, part, draw))


def _part_of_whole(seed: int, part: ShardedTensor, draw: Draw) -> Tensor:
    """Draw the whole tensor on the CPU and cut this rank's part out of it.

    Axes that Megatron prepends number the layers, which are tensors of their own.
    """
    axes = part.prepend_axis_num
    # The CPU's generator alone, which the caller restores.
    torch.default_generator.manual_seed(seed_of(seed, part.key, part.global_offset[:axes]))
    whole = torch.empty(part.global_shape[axes:], dtype=drawn_dtype(part.data))
    draw(whole)
    starts = part.global_offset[axes:]
    return whole[tuple(slice(i, i + n) for i, n in zip(starts, part.local_shape, strict=True))]


def _method(part: ShardedTensor, config: TransformerConfig) -> Draw | None:
    """How Megatron draws a weight, by its name; None for what it sets to a constant."""
    if not part.dtype.is_floating_point:
        return None
    if part.key.endswith(SINK):
        return config.init_method
    if len(part.local_shape) < 2:
        return None
    if "embedding" in part.key:
        return config.embedding_init_method
    if part.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.output_layer_init_method
    return config.init_method
