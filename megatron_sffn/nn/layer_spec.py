"""Layer spec of the GPT model: which layers are sparse, and how they replace Megatron's MLP.

Inputs: Megatron's config with `sffn` set. Outputs: Megatron's own block spec, with the `mlp` of the
sparse layers replaced. Only this file knows Megatron's MLP slot.
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
            `first:n`; `last:n`; or a list of indices from 0, such as `5,11,17,23`.
        num_layers: number of layers of the model.

    Returns:
        Megatron's `moe_layer_freq`: 1 for each sparse layer, 0 for each dense layer.

    Raises:
        ConfigError: if the text has none of these forms, names a layer twice, or names a layer that
            the model does not have.
    """
    try:
        indices = _layer_indices(text, num_layers)
    except ValueError:
        raise ConfigError(
            f"--sffn-layers {text} is neither every:N, every:N:I, first:N, last:N nor a list of "
            "layer indices; write for example every:6, every:2:0, last:4 or 5,11,17,23"
        ) from None
    outside = sorted(index for index in indices if not 0 <= index < num_layers)
    if outside or not indices:
        problem = f"names layer {outside[0]}" if outside else "names no layer"
        raise ConfigError(
            f"--sffn-layers {text} {problem} of a model with --num-layers {num_layers}; "
            f"use indices from 0 to {num_layers - 1}, or every:N, first:N, last:N with N from 1 "
            f"to {num_layers}"
        )
    if len(set(indices)) < len(indices):
        raise ConfigError(f"--sffn-layers {text} names a layer twice; name each layer once")
    return [int(index in indices) for index in range(num_layers)]


def _layer_indices(text: str, num_layers: int) -> list[int]:
    """The layer indices of the text, without a check that the model has these layers.

    Raises:
        ValueError: if the text has no valid form.
    """
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
    for index, layer in enumerate(spec.layer_specs):
        if config.moe_layer_freq[offset + index]:
            # A copy, because Megatron puts the same spec object into several layers.
            layer = copy.deepcopy(layer)
            layer.submodules.mlp = partial(
                layer_class(config.sffn.backend), layer_number=offset + index + 1
            )
            spec.layer_specs[index] = layer
    return spec
