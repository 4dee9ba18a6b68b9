"""Names of Megatron's main (0.20) that every machine needs replaced; in 0.19 nothing asks for them.

Design notes: the names exist in both, so that one row serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sffn.patches.registry import Patch, apply


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES:
        apply(patch)


def _class_without_instances(name: str) -> Callable[[Any], Any]:
    """A class that nothing is an instance of, where Transformer Engine has none of this name."""
    return lambda original: original if isinstance(original, type) else type(name, (), {})


_LAYERS = "megatron.core.tensor_parallel.inference_layers"

PATCHES = tuple(
    Patch(
        target=f"{_LAYERS}.{name}",
        make=_class_without_instances(name),
        needed_by=_LAYERS,
        why="without Transformer Engine multi-token prediction asks whether its projection is an "
        "instance of a class that is none",
        until="Megatron asks for it only where Transformer Engine is installed",
    )
    for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear")
)
"""Without these, multi-token prediction of Megatron's main cannot be built."""
