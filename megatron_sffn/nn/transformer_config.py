"""Megatron's config of a model, with the sparse layers' numbers in it.

Inputs: Megatron's fields, and a `SparseFFNConfig`. Outputs: a config whose MoE fields follow from
the sparse layers, and the config of each layer.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Self

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_sffn.nn.config import Backend, SparseFFNConfig, nearest_divisors
from megatron_sffn.nn.layer_pattern import gpt_layer, hybrid_layers, prediction_layers
from megatron_sffn.ops.block_ffn import grouped
from megatron_sffn.utils.errors import ConfigError

LOGS_ALL_LAYERS = "num_moe_layers" in inspect.signature(MoEMetricsTracker.report).parameters
"""True if Megatron's table of losses has a row for every layer of a hybrid model: its log is then
told how many of them are sparse."""

ACTS_IN_OUR_ROUTERS = (
    "moe_expert_capacity_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
)
"""Fields of Megatron's config that our routers act on and check."""


@dataclass
class SparseFFNTransformerConfig(TransformerConfig):
    """Megatron's config with the sparse layers' numbers in it.

    Megatron's own MoE fields are derived from `sffn`, so that its validation, FLOPs and expert
    parallelism see the true sizes: B experts of width g, of which K are active.
    """

    sffn: SparseFFNConfig | None = None
    padded_vocab_size: int | None = None
    """Rows of the embedding, where they are known: Megatron pads the vocabulary once its tokenizer
    is built. RandHash makes a table of its map with it."""
    hybrid_pattern: str | None = None
    """Megatron's `--hybrid-layer-pattern`; None for a GPT. It has another name than the field of
    Megatron's `HybridModelConfig`, which would otherwise be set here instead of there."""

    def __post_init__(self) -> None:
        """Derive Megatron's MoE fields, then let Megatron validate."""
        biased: bool = vars(self)["moe_router_enable_expert_bias"]
        if self.sffn is not None:
            for name, value in moe_fields(self.sffn).items():
                setattr(self, name, value)
            # Megatron allows the expert bias for its own sigmoid scores only. Our routers add the
            # bias to their scores themselves, and Megatron updates it.
            self.moe_router_enable_expert_bias = False
        # Our routers check these fields: Megatron allows a capacity with few dispatchers only, and
        # asserts about groups. It validates without them.
        router_fields = {name: vars(self)[name] for name in ACTS_IN_OUR_ROUTERS}
        capacity = router_fields["moe_expert_capacity_factor"]
        if capacity is not None and capacity < 0:
            # In Megatron a negative capacity is no limit.
            router_fields["moe_expert_capacity_factor"] = None
        for name in router_fields:
            setattr(self, name, None)
        super().__post_init__()
        self.moe_router_enable_expert_bias = biased
        for name, value in router_fields.items():
            setattr(self, name, value)
        if self.sffn is not None:
            for router in self.sffn.routers:
                sffn = self.sffn.with_router(router)
                self._with(sffn)._check_router(sffn)
            self._check_tables(self.sffn)

    def _with(self, sffn: SparseFFNConfig) -> Self:
        """A copy with another config of the sparse layers."""
        config = copy.copy(self)
        config.sffn = sffn
        return config

    def of_layer(self, layer_number: int | None) -> Self:
        """The config of one sparse layer, in which `sffn` has that layer's router alone.

        Args:
            layer_number: Megatron's number of the layer, counted from 1; None for a layer that is
                none of the model's own, as those of multi-token prediction.
        """
        sffn, freq = self.sffn, self.moe_layer_freq
        assert sffn is not None, "a dense model has no sparse layer"
        if layer_number is None:
            return self._with(sffn.with_router(sffn.router))
        earlier = freq[: layer_number - 1] if isinstance(freq, list) else [1] * (layer_number - 1)
        return self._with(sffn.of_layer(sum(earlier)))

    def _check_router(self, sffn: SparseFFNConfig) -> None:
        """Refuse a router that has nothing to learn in this model, or cannot be computed."""
        sffn.router.check_model(self)
        reason = sffn.router.untrained(self)
        if reason is not None:
            raise ConfigError(
                f"no gradient reaches the weights of --sffn-router {sffn.router.name}: {reason}"
            )
        self._check_backend(sffn)

    def ffn_number(self, layer_number: int) -> int:
        """The number of a sparse layer that seeds its weights and hash maps.

        In a hybrid model it is that of the GPT's layer with this feed-forward part, so that both
        models start from the same weights.

        Args:
            layer_number: Megatron's number of the layer, counted from 1.
        """
        if self.hybrid_pattern is None:
            return layer_number
        if layer_number > self.num_layers:  # of multi-token prediction, in no GPT
            return layer_number
        return gpt_layer(self.hybrid_pattern, layer_number - 1) + 1

    def logged_layer(self, layer_number: int) -> tuple[int, int]:
        """Where Megatron logs the losses of a sparse layer: its number, and the number of layers.

        Of a hybrid model Megatron 0.19 logs the `E` layers alone, in a table with a few rows more;
        its main logs all layers, and has one row for each multi-token prediction.
        """
        predictions = self.mtp_num_layers or 0
        rows = self.num_layers + predictions
        if self.hybrid_pattern is None or LOGS_ALL_LAYERS:
            return min(layer_number, rows), rows
        layers = hybrid_layers(self.hybrid_pattern)
        layers += "".join(prediction_layers(self.hybrid_pattern))
        return layers[:layer_number].count("E"), layers.count("E") + predictions

    def _check_tables(self, sffn: SparseFFNConfig) -> None:
        """Refuse groups of layers with one table that the sparse layers do not fill."""
        flag = f"--sffn-layers-per-table {sffn.layers_per_table}"
        if sffn.layers_per_table == 1:
            return
        if sffn.other_routers:
            names = ", ".join(router.name for router in sffn.routers)
            raise ConfigError(
                f"{flag} is for layers with the same router, whose tables are alike; choose one of "
                f"{names} for all layers"
            )
        layers = self.moe_layer_freq
        count = sum(layers) if isinstance(layers, list) else self.num_layers
        if count % sffn.layers_per_table:
            raise ConfigError(
                f"{flag} does not divide the {count} sparse layers (--sffn-layers); "
                f"{nearest_divisors(count, sffn.layers_per_table)}"
            )

    def _check_backend(self, sffn: SparseFFNConfig) -> None:
        """Refuse a backend that cannot compute a layer of these sizes, whatever the device."""
        if sffn.backend not in (Backend.GROUPED, Backend.QUACK):
            return
        slices = vars(self)["expert_tensor_parallel_size"] or 1
        width, key_width = sffn.row_width(self.hidden_size), sffn.key_width(self.hidden_size)
        name_of_width = "--hidden-size" if sffn.latent_size is None else "--moe-latent-size"
        reason = grouped.refusal_of_widths(
            {name_of_width: width, "the width of keys": key_width}
            | {"--sffn-block-size / --expert-tensor-parallel-size": sffn.block_size // slices}
        )
        if not key_width:
            reason = f"needs keys, and --sffn-router {sffn.router.name} has values alone"
        if reason is not None:
            raise ConfigError(f"--sffn-backend {sffn.backend} {reason}; use auto, masked or torch")


@dataclass
class SparseFFNMLATransformerConfig(SparseFFNTransformerConfig, MLATransformerConfig):
    """The same for a model with multi-latent attention."""

    def __post_init__(self) -> None:
        """Turn multi-latent attention on, which Megatron's flags leave to its own config class."""
        self.multi_latent_attention = True
        super().__post_init__()


def depth(config: TransformerConfig) -> float:
    """Layers with attention and a feed-forward part, by whose number initial values are scaled.

    A hybrid model counts attention and feed-forward part as a layer each, as Megatron does.
    """
    return config.num_layers / (2 if config.is_hybrid_model else 1)


def moe_fields(sffn: SparseFFNConfig) -> dict[str, Any]:
    """Megatron's MoE fields that follow from a sparse layer (names of `TransformerConfig`)."""
    return {
        "num_moe_experts": sffn.num_blocks,
        "moe_router_topk": sffn.num_active_blocks,
        "moe_ffn_hidden_size": sffn.block_size,
        "moe_shared_expert_intermediate_size": sffn.shared_cells or None,
        "moe_latent_size": sffn.latent_size,
        # The probability over all blocks, as Switch defines it: not renormalised over the chosen.
        "moe_router_pre_softmax": True,
    }
