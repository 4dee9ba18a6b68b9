"""The configuration of our own class (`modeling_sparse_ffn.py`) for a checkpoint's model."""

from __future__ import annotations

from typing import Any

from megatron_sffn.flags.sffn_flags import ffn_hidden_size
from megatron_sffn.hf.modeling_sparse_ffn import SparseFFNGPTConfig
from megatron_sffn.hf.settings import Settings
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.descriptors import subset_size
from megatron_sffn.nn.routers.learned import LearnedConfig
from megatron_sffn.nn.routers.lorkm import LoRKMConfig
from megatron_sffn.nn.routers.peer import PeerConfig
from megatron_sffn.nn.routers.product_keys import ProductKeysConfig
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.nn.routers.vanilla_m import KeyTableConfig


def common_fields(settings: Settings) -> dict[str, Any]:
    """The fields that every class has."""
    args = settings.args
    return {
        "vocab_size": args.padded_vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "max_position_embeddings": settings.context,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "attention_dropout": args.attention_dropout,
        "initializer_range": args.init_method_std,
    }


def sparse_ffn_fields(settings: Settings) -> dict[str, Any]:
    """The fields of `SparseFFNGPTConfig`."""
    args = settings.args
    rotary_dim = args.kv_channels
    if args.rotary_percent < 1.0:
        rotary_dim = int(rotary_dim * args.rotary_percent)
    return {
        **common_fields(settings),
        "num_key_value_heads": settings.num_query_groups,
        "head_dim": args.kv_channels,
        "intermediate_size": ffn_hidden_size(args),
        "hidden_act": settings.activation,
        "dense_act": settings.dense_activation,
        "glu_clamp": settings.glu_clamp,
        "glu_offset": settings.glu_offset,
        "normalization": args.normalization,
        "norm_epsilon": args.layernorm_epsilon,
        "qk_norm": bool(args.qk_layernorm),
        "qkv_bias": bool(args.add_qkv_bias),
        "linear_bias": bool(args.add_bias_linear),
        "position_embedding": settings.position_embedding,
        "rotary_base": float(args.rotary_base),
        "rotary_dim": rotary_dim,
        "rotary_interleaved": bool(args.rotary_interleaved),
        "rotary_interpolation": float(args.rotary_seq_len_interpolation_factor or 1.0),
        "rotary_scaling_factor": float(args.rope_scaling_factor) if args.use_rope_scaling else None,
        "sparse_layers": list(settings.sparse_layers),
        **({} if settings.sffn is None else _sparse_layers(settings, settings.sffn)),
    }


def _sparse_layers(settings: Settings, sffn: SparseFFNConfig) -> dict[str, Any]:
    router_fields = _router_fields(settings, sffn)
    fields = {
        "num_blocks": sffn.num_blocks,
        "num_active_blocks": sffn.num_active_blocks,
        "block_size": sffn.block_size,
        "shared_cells": sffn.shared_cells,
        **router_fields,
    }
    if sffn.other_routers:
        defaults = {name: getattr(SparseFFNGPTConfig, name) for name in router_fields}
        fields["layer_routers"] = {
            str(settings.sparse_layers[index]): (
                defaults | _router_fields(settings, sffn.of_layer(index))
            )
            for index, _ in sffn.other_routers
        }
    return fields


def _router_fields(settings: Settings, sffn: SparseFFNConfig) -> dict[str, Any]:
    """The fields of the router of layers that all have the same."""
    args, router = settings.args, sffn.router
    fields: dict[str, Any] = {"router": router.name}
    if isinstance(router, ScoredConfig):
        fields |= {
            "gate": router.gate,
            "gate_scale": args.moe_router_topk_scaling_factor or 1.0,
            "expert_bias": bool(args.moe_router_enable_expert_bias),
            "quantile_balancing": settings.priced,
            "num_groups": args.moe_router_num_groups or 1,
            "group_topk": args.moe_router_group_topk or 1,
            "group_score": router.group_score,
        }
    if isinstance(router, AvgKConfig):
        is_subset = router.descriptor == "subset"
        fields["descriptor"] = router.descriptor
        fields["descriptor_cells"] = (
            subset_size(sffn.block_size, router.subset_cells) if is_subset else 0
        )
    if isinstance(router, KeyTableConfig):
        fields["aggregator"] = router.aggregation
    if isinstance(router, LoRKMConfig):
        fields["key_rank"] = router.rank
    if isinstance(router, LearnedConfig):
        fields["gate_network"] = router.network
        fields["gate_hidden_size"] = router.width(args.hidden_size)
        fields["gate_activation"] = router.network_activation
    if isinstance(router, ProductKeysConfig):
        fields["product_key_heads"] = router.num_heads
        fields["product_key_size"] = router.key_size
        fields["product_key_norm"] = router.key_norm
    if isinstance(router, PeerConfig):
        fields["gate"] = router.gate
    return fields
