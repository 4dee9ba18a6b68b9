"""Words of a command line that the flags of all architectures share.

Inputs: numbers of a configuration. Outputs: words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_sffn.utils.errors import ConfigError

Fields = dict[str, Any]
"""Fields of a configuration of transformers."""


def number(value: float) -> str:
    """A number without a fraction, where it has none, for flags of whole numbers."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def layers_value(sparse: list[int], num_layers: int) -> str:
    """The value of `--sffn-layers` for the numbers of the sparse layers, counted from 0."""
    return "every:1" if len(sparse) == num_layers else ",".join(map(str, sparse))


def block_flags(blocks: int, chosen: int, size: int, shared_cells: int) -> Iterator[Any]:
    """Flags of B blocks, of which K are chosen beside the shared cells."""
    if shared_cells % size:
        raise ConfigError(
            f"the shared expert has {shared_cells} cells, which are no whole blocks of {size}; "
            "give a model whose experts' width divides its shared expert's"
        )
    active = chosen + shared_cells // size
    if blocks % active:
        raise ConfigError(
            f"{blocks} experts are no multiple of the {active} that a token uses (shared ones "
            "included), as --sffn-expansion needs; give a model where they are"
        )
    yield from ("--sffn-block-size", size, "--sffn-active-cells", active * size)
    yield from ("--sffn-expansion", blocks // active)
    if shared_cells:
        yield from ("--sffn-shared-blocks", shared_cells // size)
