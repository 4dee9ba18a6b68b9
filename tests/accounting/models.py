"""Shapes of models to count, and Megatron's GPT of a given shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.models.gpt import GPTModelConfig

from megatron_sffn.accounting import ModelShape
from megatron_sffn.accounting.latent_attention import LatentAttention
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.hybrid_spec import hybrid_stack_spec
from megatron_sffn.nn.layer_pattern import layer_pattern
from megatron_sffn.nn.layer_spec import block_spec, prediction_spec
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import (
    SparseFFNMLATransformerConfig,
    SparseFFNTransformerConfig,
)

# Odd sizes, so that no two of them can be mistaken for each other.
SMALL = ModelShape(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    kv_channels=10,
    seq_length=18,
    padded_vocab_size=96,
)
LATENT = LatentAttention(
    q_lora_rank=14, kv_lora_rank=12, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=9
)
DENSE: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-llama": {
        "gated": True,
        "bias": False,
        "layernorm": False,
        "tied_embeddings": False,
        "num_query_groups": 2,
    },
    "dense-qwen": {"bias": False, "qkv_bias": True, "qk_layernorm": True, "layernorm": False},
    "dense-gated-attention": {"output_gate": True, "softmax_type": "learnable", "bias": False},
    "dense-gated-attention-bias": {
        "output_gate": True,
        "num_query_groups": 2,
        "softmax_type": "off-by-one",
    },
    "dense-latent-attention": {
        "latent_attention": LATENT,
        "qk_layernorm": True,
        "layernorm": False,
    },
    "dense-latent-attention-layernorm": {"latent_attention": LATENT, "qk_layernorm": True},
    "dense-latent-attention-of-queries-without-latents": {
        "latent_attention": dataclasses.replace(LATENT, q_lora_rank=None),
    },
    "dense-qk-layernorm": {"qk_layernorm": True, "num_query_groups": 1, "learned_positions": 20},
}
"""Models without sparse layers, as changes of `SMALL`."""

SPARSE = [name for name in ROUTERS if name != "dense"]
SINGLE_KEY = [name for name in SPARSE if not ROUTERS[name].test_numbers.gated_activation]
"""Routers whose cells have no gate key, so that they cannot have a gated activation."""


def sparse(router: str = "avg-k", options: dict[str, Any] | None = None, **numbers: Any) -> Any:
    """A small sparse layer; sizes that are not passed are sizes that the router accepts."""
    test_numbers = ROUTERS[router].test_numbers
    defaults = test_numbers.layer(active_cells=48, block_size=6, expansion=3)
    return SparseFFNConfig(
        router=ROUTERS[router](**{**test_numbers.options, **(options or {})}),
        **{"backend": Backend.CPU, **defaults, **numbers},
    )


SEVERAL_ROUTERS: SparseFFNConfig = sparse(
    "switch",
    other_routers=((0, ROUTERS["lorkm"](rank=10)), (1, ROUTERS["rand-hash"]())),
)
"""Three sparse layers, each with another router."""


def paper(router: str = "avg-k", block_size: int = 4096, expansion: int = 16) -> ModelShape:
    """The 355 M models of arXiv 2305.13999: every sixth of 24 layers is sparse."""
    return ModelShape(
        num_layers=24,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        kv_channels=64,
        seq_length=2048,
        padded_vocab_size=50257,
        sparse_layers=4,
        sffn=SparseFFNConfig(
            router=ROUTERS[router](),
            active_cells=4096,
            block_size=block_size,
            expansion=expansion,
        ),
    )


def config_of(
    shape: ModelShape, dtype: torch.dtype = torch.float32, **megatron: Any
) -> SparseFFNTransformerConfig:
    """Megatron's config of this shape, with its local modules.

    Args:
        shape: sizes of the model.
        dtype: of weights and activations.
        megatron: other fields of Megatron's config.
    """
    latent = shape.latent_attention
    config_class = SparseFFNTransformerConfig if latent is None else SparseFFNMLATransformerConfig
    return config_class(
        **({} if latent is None else dataclasses.asdict(latent))
        | {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "kv_channels": shape.kv_channels,
            "add_bias_linear": shape.bias,
            "add_qkv_bias": shape.qkv_bias,
            "gated_linear_unit": shape.gated,
            "activation_func": F.silu if shape.gated else F.gelu,
            "normalization": "LayerNorm" if shape.layernorm else "RMSNorm",
            "qk_layernorm": shape.qk_layernorm,
            "attention_output_gate": shape.output_gate,
            "softmax_type": shape.softmax_type,
            "mtp_num_layers": shape.predicted_tokens or None,
            "mtp_use_repeated_layer": shape.repeats_prediction,
            "moe_layer_freq": pattern_of(shape),
            "hybrid_pattern": hybrid_pattern_of(shape),
            **dataclasses.asdict(shape.mamba),
            **dataclasses.asdict(shape.delta_net),
            "is_hybrid_model": shape.attention_layers is not None,
            "sffn": shape.sffn,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "transformer_impl": "local",
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
        }
        | megatron
    )


def build(shape: ModelShape, dtype: torch.dtype = torch.float32, **megatron: Any) -> Any:
    """Megatron's GPT or hybrid model of this shape; arguments as `config_of`."""
    config = config_of(shape, dtype, **megatron)
    model = build_hybrid(shape, config) if config.is_hybrid_model else build_gpt(shape, config)
    for parameter in model.parameters():
        # Torch's norms are in fp32 until Megatron's wrapper narrows them.
        parameter.data = parameter.data.to(dtype)
    return model


def build_gpt(shape: ModelShape, config: SparseFFNTransformerConfig) -> GPTModel:
    """Megatron's GPT of this shape, with RoPE unless it has learned positions."""
    mtp_spec = None
    if shape.sffn is None:
        spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization)
        if shape.predicted_tokens:
            mtp_spec = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    else:
        model_config = GPTModelConfig(transformer=config)
        spec = block_spec(model_config)
        if shape.predicted_tokens:
            mtp_spec = prediction_spec(model_config)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.learned_positions or shape.seq_length,
        mtp_block_spec=mtp_spec,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="learned_absolute" if shape.learned_positions else "rope",
    )


def build_hybrid(shape: ModelShape, config: SparseFFNTransformerConfig) -> HybridModel:
    """Megatron's hybrid model of this shape, with RoPE."""
    return HybridModel(
        config=config,
        hybrid_stack_spec=hybrid_stack_spec(config),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.seq_length,
        hybrid_layer_pattern=hybrid_pattern_of(shape),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
    )


def hybrid_pattern_of(shape: ModelShape) -> str | None:
    """Attention, then dense, sparse and recurrent layers; None for a GPT."""
    if shape.attention_layers is None:
        return None
    layers = "*" * shape.attention_layers + "-" * shape.dense_layers + "E" * shape.sparse_layers
    layers += shape.recurrent
    pattern = "/".join([layers, *[shape.prediction] * shape.predicted_tokens])
    return pattern if shape.latent_attention is None else pattern.replace("*", "+")


def pattern_of(shape: ModelShape) -> Any:
    """Megatron's `moe_layer_freq`."""
    if shape.sffn is None:
        return [0] * shape.num_layers
    if shape.attention_layers is not None:
        return layer_pattern("", 0, hybrid_pattern_of(shape))
    return layer_pattern(f"every:{shape.num_layers // shape.sparse_layers}", shape.num_layers)


def batch(shape: ModelShape, samples: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model's forward, without labels."""
    ids = torch.arange(samples * shape.seq_length).reshape(samples, -1) % shape.padded_vocab_size
    positions = torch.arange(shape.seq_length).expand(samples, -1)
    causal = torch.ones(shape.seq_length, shape.seq_length).triu(1).bool()
    return (ids, positions, causal[None, None]), {"padding_mask": ids}
