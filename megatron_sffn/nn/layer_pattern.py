"""Which layers of a model are sparse, by `--sffn-layers`."""

from __future__ import annotations

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
