"""The flags of a class of transformers: the way back of `architectures.py`.

Inputs: a configuration with all defaults. Outputs: words of a command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_sffn.hf.flag_words import Fields, block_flags, layers_value, number
from megatron_sffn.utils.errors import ConfigError


def stock_flags(architecture: str, fields: Fields) -> Iterator[Any]:
    """The flags, without sizes that every architecture has."""
    layer_norm = architecture in ("gpt_neox", "starcoder2")
    epsilon = next(
        fields[name]
        for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
        if name in fields
    )
    yield from ("--norm-epsilon", epsilon)
    yield from ("--normalization", "LayerNorm" if layer_norm else "RMSNorm")
    yield from _stock_activation(fields["hidden_act"]) if layer_norm else ["--swiglu"]
    yield from _stock_rope(fields)
    attention_bias = bool(fields.get("attention_bias", False))
    if not (fields.get("mlp_bias") or fields.get("use_bias") or architecture == "gpt_neox"):
        yield "--disable-bias-linear"
    if (
        architecture == "qwen2"
        or fields.get("qkv_bias")
        or (architecture == "glm4_moe" and attention_bias)
    ):
        yield "--add-qkv-bias"
    if architecture in ("qwen3", "qwen3_moe") or fields.get("use_qk_norm"):
        yield "--qk-layernorm"
    sparse = _sparse_layers(architecture, fields)
    yield from ("--ffn-hidden-size", fields["intermediate_size"])
    if not sparse:
        yield from ("--sffn-router", "dense")
        return
    yield from ("--sffn-layers", layers_value(sparse, fields["num_hidden_layers"]))
    yield from _experts(architecture, fields)


def _stock_activation(name: str) -> list[str]:
    known = {
        "gelu": ["--no-bias-gelu-fusion"],
        "gelu_pytorch_tanh": [],
        "relu": ["--sffn-relu"],
        "relu2": ["--squared-relu"],
    }
    if name not in known:
        raise ConfigError(
            f"config.json says hidden_act {name}, which no model of ours has; give a model with "
            f"{', '.join(known)}"
        )
    return known[name]


def _stock_rope(fields: Fields) -> Iterator[Any]:
    rope = fields["rope_parameters"]
    yield from ("--position-embedding-type", "rope", "--rotary-base", number(rope["rope_theta"]))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield from ("--rotary-percent", rope["partial_rotary_factor"])
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        yield from ("--use-rope-scaling", "--rope-scaling-factor", rope["factor"])
    elif kind == "linear":
        yield from ("--rotary-seq-len-interpolation-factor", number(rope["factor"]))


def _sparse_layers(architecture: str, fields: Fields) -> list[int]:
    layers = range(fields["num_hidden_layers"])
    if architecture == "glm4_moe":
        return [*layers[fields["first_k_dense_replace"] :]]
    if architecture == "mixtral":
        return [*layers]
    if architecture in ("qwen2_moe", "qwen3_moe"):
        dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
        return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
    return []


def _experts(architecture: str, fields: Fields) -> Iterator[Any]:
    # transformers calls the number of experts by one of three names, whatever the class.
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    experts = next(fields[name] for name in names if name in fields)
    size = fields["intermediate_size" if architecture == "mixtral" else "moe_intermediate_size"]
    shared = fields.get("shared_expert_intermediate_size", 0)
    if architecture == "glm4_moe":
        shared = fields["n_shared_experts"] * size
    yield from block_flags(experts, fields["num_experts_per_tok"], size, shared)
    if architecture == "glm4_moe":
        yield from ("--sffn-router", "sigma-moe")
        if fields["norm_topk_prob"]:
            yield from ("--sffn-gate", "sigmoid-chosen")
        if fields["routed_scaling_factor"] != 1.0:
            yield from ("--moe-router-topk-scaling-factor", fields["routed_scaling_factor"])
        if fields["n_group"] > 1:
            yield from ("--moe-router-num-groups", fields["n_group"])
            yield from ("--moe-router-group-topk", fields["topk_group"])
    else:
        after = architecture == "mixtral" or fields["norm_topk_prob"]
        yield from ("--sffn-router", "softmax-after" if after else "softmax-before")
