"""Stack spec of the hybrid model: our layer in its `E` slot, with or without Transformer Engine.

Inputs: Megatron's config. Outputs: Megatron's spec of a `HybridStack`.

Design notes: Megatron's own spec needs Transformer Engine. Here attention layers and MLP layers are
the two halves of Megatron's GPT layer, in the implementation that the config asks for, so that
their weights have the GPT's names in a checkpoint. Mamba layers and gated delta nets are
Megatron's, with the norms and linear layers of that implementation.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_sffn.nn.layer import layer_class, layers_before
from megatron_sffn.nn.shared_tables import SharedTables, tables_of_layer
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig


def hybrid_stack_spec(config: SparseFFNTransformerConfig) -> ModuleSpec:
    """The spec of a stack whose `E` layers are sparse layers.

    Args:
        config: config of the model; without `config.sffn` the model has no `E` layers.
    """
    engine = config.transformer_impl == "transformer_engine"
    layers = get_gpt_decoder_layer_specs(
        config, engine, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    # GPT layers with a dense MLP (0) and with a sparse layer (1), which have the same attention.
    kinds = {} if config.sffn is None else dict(zip(config.moe_layer_freq, layers, strict=True))
    dense = kinds.get(0, layers[0]).submodules
    attention = ModuleSpec(module=TransformerLayer, submodules=_attention_half(dense))
    stack = HybridStackSubmodules(
        attention_layer=attention,
        mla_layer=attention,  # the GPT's layer has the attention of --multi-latent-attention
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp_half(dense)),
        mamba_layer=_mamba_spec(config, engine),
        gdn_layer=_delta_net_spec(config, engine),
        mtp_block_spec=_prediction_spec(engine),
    )
    if config.sffn is not None:
        sparse = _mlp_half(kinds[1].submodules)
        sparse.mlp = layer_class(config.sffn.backend)
        stack.moe_layer = ModuleSpec(
            module=SparseHybridLayer, submodules=sparse, params={"groups": {}}
        )
    return ModuleSpec(module=HybridStack, submodules=stack)


class SparseHybridLayer(MoETransformerLayer):
    """An `E` layer, whose sparse layer learns its number, and so its router, when it is built."""

    def __init__(
        self,
        config: SparseFFNTransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        groups: dict[int, SharedTables],
        **arguments: Any,
    ) -> None:
        tables = None
        if layers_before(config, False, arguments.get("name")) == 0:
            tables = tables_of_layer(config, layer_number, groups)
        mlp = partial(submodules.mlp, layer_number=layer_number, tables=tables)
        submodules = dataclasses.replace(submodules, mlp=mlp)
        super().__init__(config, submodules, layer_number=layer_number, **arguments)


def _attention_half(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The attention of a GPT layer, with its norm."""
    return TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
        sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
    )


def _mlp_half(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The MLP of a GPT layer, with its norm."""
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=layer.mlp,
        mlp_bda=layer.mlp_bda,
        sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
    )


def _norm_and_linears(
    config: SparseFFNTransformerConfig, engine: bool
) -> tuple[Any, Any, Any, Any]:
    """The norm, the norm before the first linear layer, and the linear layers into and out of one.

    Transformer Engine has the norm in the first linear layer.
    """
    provider = TESpecProvider() if engine else LocalSpecProvider()
    norm = provider.layer_norm(rms_norm=config.normalization == "RMSNorm")
    if provider.fuse_layernorm_and_linear():
        first, fused = IdentityOp, provider.column_parallel_layer_norm_linear()
        return norm, first, fused, provider.row_parallel_linear()
    return norm, norm, provider.column_parallel_linear(), provider.row_parallel_linear()


def _mamba_spec(config: SparseFFNTransformerConfig, engine: bool) -> ModuleSpec:
    """The spec of a Mamba layer."""
    _, norm, in_proj, out_proj = _norm_and_linears(config, engine)
    submodules = MambaMixerSubmodules(in_proj=in_proj, out_proj=out_proj)
    mixer = ModuleSpec(module=MambaMixer, submodules=submodules)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
    )


def _delta_net_spec(config: SparseFFNTransformerConfig, engine: bool) -> ModuleSpec:
    """The spec of a layer with a gated delta net in the place of attention."""
    out_norm, norm, in_proj, out_proj = _norm_and_linears(config, engine)
    submodules = GatedDeltaNetSubmodules(in_proj=in_proj, out_norm=out_norm, out_proj=out_proj)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=GatedDeltaNet, submodules=submodules),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _prediction_spec(engine: bool) -> ModuleSpec:
    """The spec of multi-token prediction, whose layers Megatron builds from the pattern."""
    layer = get_mtp_layer_spec(None, use_transformer_engine=engine)
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )
