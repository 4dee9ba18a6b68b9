"""Which layers of a model are sparse: `--sffn-layers`, or the pattern of a hybrid model.

A layer of Megatron's `GPTModel` has attention and a feed-forward part. A layer of its `HybridModel`
is one of the two, or a recurrent layer, by the symbols of `--hybrid-layer-pattern`: `*` attention,
`+` multi-latent attention, `M` Mamba, `G` gated delta net, `-` dense MLP, `E` sparse layer. `|`
cuts the pattern into pipeline stages; each `/` starts the layers of one multi-token prediction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.utils.errors import ConfigError

ATTENTION = Symbols.ATTENTION + Symbols.MLA
RECURRENT = Symbols.MAMBA + Symbols.GDN
FEED_FORWARD = Symbols.MLP + Symbols.MOE

LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
"""The layer in the name of a weight."""


def hybrid_layers(pattern: str) -> str:
    """The symbols of a hybrid model's layers, without cuts and multi-token prediction."""
    return pattern.split(Symbols.MTP_SEPARATOR)[0].replace(Symbols.PIPE, "")


def count_attention(pattern: str) -> int:
    """Number of a hybrid model's layers that have attention."""
    return sum(symbol in ATTENTION for symbol in hybrid_layers(pattern))


def recurrent_layers(pattern: str) -> str:
    """The symbols of a hybrid model's recurrent layers, in order."""
    return "".join(symbol for symbol in hybrid_layers(pattern) if symbol in RECURRENT)


def pipeline_segments(pattern: str) -> int:
    """Number of pieces into which a hybrid pattern is cut for pipeline stages."""
    return pattern.split(Symbols.MTP_SEPARATOR)[0].count(Symbols.PIPE) + 1


def prediction_layers(pattern: str) -> list[str]:
    """The symbols of the layers of each multi-token prediction of a hybrid model."""
    return [layers for layers in pattern.split(Symbols.MTP_SEPARATOR)[1:] if layers]


def count_layers(num_layers: int, predicted_tokens: int | None, hybrid: str | None) -> int:
    """Number of layers, those of multi-token prediction included.

    Args:
        num_layers: number of layers of the model itself.
        predicted_tokens: Megatron's `--mtp-num-layers`.
        hybrid: Megatron's `--hybrid-layer-pattern`.
    """
    if hybrid is None:
        return num_layers + (predicted_tokens or 0)
    return num_layers + sum(map(len, prediction_layers(hybrid)))


def hybrid_pattern(
    gpt_pattern: Sequence[int], chunks: Iterable[int], *, latent: bool, predicted_tokens: int = 0
) -> str:
    """The pattern of the hybrid model that has the layers of a GPT.

    Args:
        gpt_pattern: 1 for each sparse layer of the GPT, 0 for each dense layer.
        chunks: GPT layers of each pipeline stage, for all first model chunks, then all second ones.
        latent: True if the GPT has multi-latent attention.
        predicted_tokens: multi-token predictions, each by a layer like the GPT's last one.
    """
    attention = Symbols.MLA if latent else Symbols.ATTENTION
    pairs = [attention + (Symbols.MOE if sparse else Symbols.MLP) for sparse in gpt_pattern]
    predictions, remaining = [pairs[-1]] * predicted_tokens, iter(pairs)
    layers = Symbols.PIPE.join("".join(next(remaining) for _ in range(count)) for count in chunks)
    return Symbols.MTP_SEPARATOR.join([layers, *predictions])


def cut(pattern: str, stages: int) -> str:
    """Cut a hybrid pattern into pipeline stages of equally many layers, unless it is cut already.

    Args:
        pattern: Megatron's `--hybrid-layer-pattern`.
        stages: number of stages, which divides the number of layers.
    """
    if pipeline_segments(pattern) > 1:
        return pattern
    layers, *predictions = pattern.split(Symbols.MTP_SEPARATOR)
    count = len(layers) // stages
    pieces = [layers[start : start + count] for start in range(0, len(layers), count)]
    return Symbols.MTP_SEPARATOR.join([Symbols.PIPE.join(pieces), *predictions])


def layers_per_segment(pattern: str, stages: int) -> list[int]:
    """Number of layers of each piece of a hybrid pattern, cut into that many stages if it is not.

    Args:
        pattern: Megatron's `--hybrid-layer-pattern`.
        stages: number of pipeline stages.
    """
    layers = cut(pattern, stages).split(Symbols.MTP_SEPARATOR)[0]
    return [len(piece) for piece in layers.split(Symbols.PIPE)]


def gpt_pattern(pattern: str) -> list[int] | None:
    """1 for each sparse layer, 0 for each dense layer of the GPT that has a hybrid model's layers.

    Returns:
        None if attention and feed-forward layers do not alternate, so that there is no such GPT.
    """
    layers = hybrid_layers(pattern)
    attention, feed_forward = layers[::2], layers[1::2]
    if not layers or len(attention) != len(feed_forward):
        return None
    if not (set(attention) <= set(ATTENTION) and set(feed_forward) <= set(FEED_FORWARD)):
        return None
    return [int(symbol == Symbols.MOE) for symbol in feed_forward]


def gpt_layer(pattern: str, index: int) -> int:
    """The layer, from 0, of the GPT that a hybrid model's layer corresponds to.

    It is the number of layers of the same kind before it, feed-forward, or attention or recurrent.
    No GPT has recurrent layers; their numbers name their weights all the same.

    Args:
        pattern: Megatron's `--hybrid-layer-pattern`.
        index: the hybrid model's layer, from 0.
    """
    layers = hybrid_layers(pattern)
    kind = FEED_FORWARD if layers[index] in FEED_FORWARD else ATTENTION + RECURRENT
    return sum(symbol in kind for symbol in layers[:index])


def gpt_name(name: str, pattern: str) -> str:
    """The name of a hybrid model's weight in the checkpoint of the GPT with the same layers.

    Args:
        name: name of the weight in a checkpoint of the hybrid model.
        pattern: Megatron's `--hybrid-layer-pattern`.
    """
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    return LAYER.sub(lambda layer: f"{layer[1]}{gpt_layer(pattern, int(layer[2]))}.", name)


def layer_pattern(text: str, num_layers: int, hybrid: str | None = None) -> list[int]:
    """Read `--sffn-layers`, or the pattern of a hybrid model.

    Args:
        text: `every:n` for the layers i with (i + 1) % n == 0; `every:n:i` for i, i + n, ...;
            `first:n`; `last:n`; or a list of indices from 0, such as `5,11,17,23`.
        num_layers: number of layers of the model.
        hybrid: Megatron's `--hybrid-layer-pattern`, which then says alone what is sparse.

    Returns:
        Megatron's `moe_layer_freq`: 1 for each sparse layer, 0 for each dense layer.

    Raises:
        ConfigError: if the text has none of these forms, names a layer twice, or names a layer that
            the model does not have.
    """
    if hybrid is not None:
        return [int(symbol == Symbols.MOE) for symbol in hybrid_layers(hybrid)]
    try:
        indices = layer_indices(text, num_layers)
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


def layer_indices(text: str, num_layers: int) -> list[int]:
    """The layers of a text in the form of `layer_pattern`, also those that the model has not.

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
