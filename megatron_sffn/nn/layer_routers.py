"""Which router each sparse layer has: the text of `--sffn-router`.

It is the name of one router, such as `avg-k`, or several with their layers, such as
`rand-hash:first:3,avg-k`. Layers are counted over the sparse layers alone, from 0, so that a GPT
and the hybrid model with its layers have the same text. The last router has no layers: it takes all
that remain, and the sparse layers of multi-token prediction.
"""

from __future__ import annotations

from megatron_sffn.nn.layer_pattern import layer_indices
from megatron_sffn.utils.errors import ConfigError

FLAG = "--sffn-router"
REST = ":rest"
"""May be written behind the last router."""

FORMS = "first:N, last:N, every:N, every:N:I or one index"


def router_names(text: str) -> list[str]:
    """The names of the routers, each once, that of the remaining layers first."""
    names = [part.partition(":")[0] for part in text.split(",")]
    return list(dict.fromkeys(reversed(names)))


def canonical(text: str) -> str:
    """The text without blanks, and without the word for the remaining layers."""
    return "".join(text.split()).removesuffix(REST)


def other_routers(text: str, num_sparse: int) -> dict[int, str]:
    """The sparse layers that do not have the last router of the text.

    Args:
        text: value of `--sffn-router`.
        num_sparse: number of the model's sparse layers.

    Returns:
        Sparse layer, counted from 0 -> name of its router, in order.

    Raises:
        ConfigError: if layers are missing in the text, named twice, or not in the model.
    """
    *parts, last = text.split(",")
    if ":" in last:
        raise ConfigError(
            f"{FLAG} {text} says layers of its last router, which has all that remain; write for "
            f"example {text},avg-k"
        )
    names: dict[int, str] = {}
    for part in parts:
        name, _, layers = part.partition(":")
        for index in _indices(text, part, layers, num_sparse):
            if index in names:
                raise ConfigError(
                    f"{FLAG} {text} gives sparse layer {index} two routers; give it one"
                )
            names[index] = name
    if parts and len(names) == num_sparse:
        raise ConfigError(
            f"{FLAG} {text} leaves none of the {num_sparse} sparse layers to {last}; name fewer"
        )
    return dict(sorted(names.items()))


def _indices(text: str, part: str, layers: str, num_sparse: int) -> list[int]:
    """The sparse layers of one part of the text."""
    try:
        indices = layer_indices(layers, num_sparse)
    except ValueError:
        raise ConfigError(
            f"{FLAG} {text} does not say which layers {part} has; write {FORMS} behind the name, "
            "for example rand-hash:first:3"
        ) from None
    outside = [index for index in indices if not 0 <= index < num_sparse]
    if outside or not indices:
        problem = f"names sparse layer {outside[0]}" if outside else "names no layer"
        raise ConfigError(
            f"{FLAG} {text}: {part} {problem} of a model with {num_sparse} sparse layers, which "
            "are counted from 0; name others"
        )
    return indices
