"""Layer spec of the GPT model: which layers are sparse, and how they replace Megatron's MLP.

Inputs: Megatron's config with `sffn` set. Outputs: Megatron's own block spec, with the `mlp` of the
sparse layers replaced. Only this file knows Megatron's MLP slot.
"""

from __future__ import annotations

import copy
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig

from megatron_sffn.nn.layer import layer_class
from megatron_sffn.nn.shared_tables import SharedTables, tables_of_layer
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig


def block_spec(model: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's spec of this pipeline stage's layers, with a sparse layer in the chosen MLP slots.

    Args:
        model: Megatron's model config.
        vp_stage: the model chunk under interleaved pipeline parallelism.
    """
    config = model.transformer
    assert isinstance(config, SparseFFNTransformerConfig) and config.sffn is not None
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    assert isinstance(config.moe_layer_freq, list)
    groups: dict[int, SharedTables] = {}
    for index, layer in enumerate(spec.layer_specs):
        if config.moe_layer_freq[offset + index]:
            number = offset + index + 1
            tables = tables_of_layer(config, number, groups)
            # A copy, because Megatron puts the same spec object into several layers.
            layer = copy.deepcopy(layer)
            layer.submodules.mlp = partial(
                layer_class(config.sffn.backend), layer_number=number, tables=tables
            )
            spec.layer_specs[index] = layer
    return spec


def prediction_spec(
    model: GPTModelConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Megatron's spec of multi-token prediction: its layers are copies of the GPT's last layer.

    Args:
        model: Megatron's model config, with `mtp_num_layers`.
        vp_stage: the model chunk under interleaved pipeline parallelism.

    Returns:
        None if this pipeline stage has none of the layers.
    """
    config = model.transformer
    assert isinstance(config, SparseFFNTransformerConfig) and config.sffn is not None
    engine = config.transformer_impl == "transformer_engine"
    layers = get_gpt_decoder_layer_specs(
        config, engine, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    layer = copy.deepcopy(layers[-1])
    assert isinstance(config.moe_layer_freq, list)
    if config.moe_layer_freq[-1]:
        layer.submodules.mlp = layer_class(config.sffn.backend)
    return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=engine, vp_stage=vp_stage)
