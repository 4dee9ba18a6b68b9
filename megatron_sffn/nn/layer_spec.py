"""Which layers are sparse, and how they get into Megatron's GPT: only this file knows its MLP slot.

Enters: Megatron's config with `sffn` set. Leaves: a `GPTModelConfig` whose layer spec is Megatron's
own, with the `mlp` of the chosen layers replaced.
"""

from __future__ import annotations

import copy
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig

from megatron_sffn.nn.config import SparseFFNTransformerConfig
from megatron_sffn.nn.layer import layer_class
from megatron_sffn.utils.errors import ConfigError


def layer_pattern(text: str, num_layers: int) -> list[int]:
    """Read `--sffn-layers`.

    Args:
        text: `every:n` for the layers i with (i + 1) % n == 0; `every:n:i` for i, i + n, ...;
            `first:n`; `last:n`; or indices from 0: `5,11,17,23`.
        num_layers: of the model.

    Returns:
        1 for each sparse layer, 0 for each other; Megatron's `moe_layer_freq`.

    Raises:
        ConfigError: if the text is none of these, or names a layer twice or one that the model
            does not have.
    """
    try:
        chosen = _chosen_layers(text, num_layers)
    except ValueError:
        raise ConfigError(
            f"--sffn-layers {text} is neither every:N, every:N:I, first:N, last:N nor a list of "
            "layer indices; write for example every:6, every:2:0, last:4 or 5,11,17,23"
        ) from None
    outside = sorted(index for index in chosen if not 0 <= index < num_layers)
    if outside or not chosen:
        wrong = f"names layer {outside[0]}" if outside else "names no layer"
        raise ConfigError(
            f"--sffn-layers {text} {wrong} of a model with --num-layers {num_layers}; "
            f"use indices from 0 to {num_layers - 1}, or every:N, first:N, last:N with N from 1 "
            f"to {num_layers}"
        )
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--sffn-layers {text} names a layer twice; name each layer once")
    return [int(index in chosen) for index in range(num_layers)]


def _chosen_layers(text: str, num_layers: int) -> list[int]:
    """The indices that the text names, of which some may be outside of the model."""
    kind, colon, rest = text.partition(":")
    if not colon:
        return [int(index) for index in text.split(",")]
    numbers = [int(number) for number in rest.split(":")]
    match kind, numbers:
        case "every", [step]:
            return list(range(step - 1, num_layers, step)) if step > 0 else []
        case "every", [step, first]:
            return [first, *range(first + step, num_layers, step)] if step > 0 else []
        case "first", [count]:
            return list(range(count))
        case "last", [count]:
            return list(range(num_layers - count, num_layers))
    raise ValueError(text)


def block_spec(model: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's spec of this pipeline stage's layers, with our layer in the chosen MLP slots."""
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
    for index, layer in enumerate(spec.layer_specs):
        if config.moe_layer_freq[offset + index]:
            layer = copy.deepcopy(layer)
            layer.submodules.mlp = partial(
                layer_class(config.sffn.backend), layer_number=offset + index + 1
            )
            spec.layer_specs[index] = layer
    return spec
