"""The flags of our class for transformers: the way back of `own_fields.py`.

Inputs: a configuration with all defaults. Outputs: words of a command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_sffn.hf.flag_words import Fields, block_flags, layers_value, number
from megatron_sffn.hf.settings import POSITIONS
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.peer import PeerConfig
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.utils.errors import ConfigError


def own_flags(fields: Fields) -> Iterator[Any]:
    """The flags, without sizes that every architecture has."""
    yield from ("--ffn-hidden-size", fields["intermediate_size"])
    yield from (
        "--normalization",
        fields["normalization"],
        "--norm-epsilon",
        fields["norm_epsilon"],
    )
    activations = {
        "relu": ["--sffn-relu"],
        "squared_relu": ["--squared-relu"],
        "swiglu": ["--swiglu"],
        "quick_geglu": ["--quick-geglu"],
    }
    yield from activations.get(fields["hidden_act"], [])
    if fields.get("glu_clamp") is not None:
        yield from ("--activation-func-clamp-value", fields["glu_clamp"])
    if fields.get("glu_offset"):
        yield from ("--glu-linear-offset", fields["glu_offset"])
    if fields["hidden_act"] == "gelu" and fields["dense_act"] == "gelu":
        yield "--no-bias-gelu-fusion"
    if not fields["linear_bias"]:
        yield "--disable-bias-linear"
    if fields["qkv_bias"]:
        yield "--add-qkv-bias"
    if fields["qk_norm"]:
        yield "--qk-layernorm"
    yield from _own_positions(fields)
    sparse = fields["sparse_layers"] or []
    if not sparse:
        yield from ("--sffn-router", "dense")
        return
    yield from ("--sffn-layers", layers_value(sparse, fields["num_hidden_layers"]))
    yield from block_flags(
        fields["num_blocks"],
        fields["num_active_blocks"],
        fields["block_size"],
        fields["shared_cells"],
    )
    yield from ("--sffn-router", _router_text(fields))
    for layer in [fields, *layer_fields(fields).values()]:
        yield from _own_router(layer)


def layer_fields(fields: Fields) -> dict[int, Fields]:
    """The fields of each layer that has another router than the others."""
    layers: dict[str, Any] = fields["layer_routers"] or {}
    return {int(layer): {**fields, **changed} for layer, changed in layers.items()}


def _router_text(fields: Fields) -> str:
    """The value of `--sffn-router`."""
    sparse = fields["sparse_layers"]
    others = [
        f"{layer['router']}:{sparse.index(index)}" for index, layer in layer_fields(fields).items()
    ]
    return ",".join([*others, fields["router"]])


def _own_positions(fields: Fields) -> Iterator[Any]:
    megatron_name = {name: flag for flag, name in POSITIONS.items()}[fields["position_embedding"]]
    yield from ("--position-embedding-type", megatron_name)
    if fields["position_embedding"] != "rope":
        return
    yield from ("--rotary-base", number(fields["rotary_base"]))
    if fields["rotary_dim"] != fields["head_dim"]:
        yield from ("--rotary-percent", fields["rotary_dim"] / fields["head_dim"])
    if fields["rotary_interleaved"]:
        yield "--rotary-interleaved"
    if fields["rotary_interpolation"] != 1.0:
        yield from (
            "--rotary-seq-len-interpolation-factor",
            number(fields["rotary_interpolation"]),
        )
    if fields["rotary_scaling_factor"] is not None:
        factor = fields["rotary_scaling_factor"]
        yield from ("--use-rope-scaling", "--rope-scaling-factor", factor)


OF_ROUTERS = {
    "descriptor": "--sffn-descriptor",
    "aggregator": "--sffn-aggregator",
    "key_rank": "--sffn-key-rank",
    "gate_network": "--sffn-gate-network",
    "gate_activation": "--sffn-gate-activation",
    "product_key_heads": "--sffn-pkm-heads",
    "product_key_size": "--sffn-product-key-size",
}
"""Field of our configuration -> the flag of a router."""


def _own_router(fields: Fields) -> Iterator[Any]:
    name = fields["router"]
    if name not in ROUTERS:
        raise ConfigError(
            f"config.json says router {name}, which this version of megatron-sffn does not have; "
            f"choose of {', '.join(ROUTERS)}"
        )
    router = ROUTERS[name]
    own_flags = {item.metadata["flag"] for item in dataclasses.fields(router)}
    for field, flag in OF_ROUTERS.items():
        if flag in own_flags:
            yield from (flag, fields[field])
    if fields["product_key_norm"] and "--sffn-product-key-norm" in own_flags:
        yield "--sffn-product-key-norm"
    if "--sffn-gate-hidden-size" in own_flags and fields["gate_network"] != "linear":
        yield from ("--sffn-gate-hidden-size", fields["gate_hidden_size"])
    if fields["descriptor"] == "subset" and "--sffn-descriptor" in own_flags:
        yield from ("--sffn-descriptor-cells", fields["descriptor_cells"])
    if issubclass(router, ScoredConfig | PeerConfig) and fields["gate"] != router.default_gate:
        yield from ("--sffn-gate", fields["gate"])
    if not issubclass(router, ScoredConfig):
        return
    if fields["expert_bias"]:
        yield "--moe-router-enable-expert-bias"
    if fields["quantile_balancing"]:
        yield from ("--moe-router-load-balancing-type", QUANTILE_BALANCING)
    if fields["gate_scale"] != 1.0:
        yield from ("--moe-router-topk-scaling-factor", fields["gate_scale"])
    if fields["num_groups"] > 1:
        yield from ("--moe-router-num-groups", fields["num_groups"])
        yield from ("--moe-router-group-topk", fields["group_topk"])
        yield from ("--sffn-group-score", fields["group_score"])
