"""Computes the layers of each pipeline stage, and its number of microbatches in flight.

Inputs: a `ParallelLayout`, and the pattern of sparse layers. Outputs: the `Stage`s, as
Megatron distributes layers over pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.nn.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The layers of one pipeline stage.

    Args:
        index: index of the stage, from 0.
        chunks: the stage's model chunks: True for each sparse layer of a chunk.
        first: True if the stage has the embedding.
        last: True if the stage has the final norm and the logits.
    """

    index: int
    chunks: tuple[tuple[bool, ...], ...]
    first: bool
    last: bool

    @property
    def layers(self) -> tuple[bool, ...]:
        """The layers of all chunks."""
        return tuple(layer for chunk in self.chunks for layer in chunk)


def pipeline_stages(layout: ParallelLayout, pattern: tuple[bool, ...]) -> list[Stage]:
    """The stages of a model, chunk after chunk as Megatron distributes them.

    Args:
        layout: layout of the run.
        pattern: True for each sparse layer of the model.
    """
    chunks_of_stage: list[list[tuple[bool, ...]]] = [[] for _ in range(layout.pp)]
    start = 0
    for index, count in enumerate(layout.layers_per_chunk(len(pattern))):
        chunks_of_stage[index % layout.pp].append(pattern[start : start + count])
        start += count
    return [
        Stage(index=index, chunks=tuple(chunks), first=index == 0, last=index == layout.pp - 1)
        for index, chunks in enumerate(chunks_of_stage)
    ]


def microbatches_in_flight(layout: ParallelLayout, stage: Stage, num_microbatches: int) -> float:
    """The most microbatches whose activations of the whole stage a rank of the stage holds at once.

    In the 1F1B schedule, it is the number of following stages plus one. In the interleaved
    schedule, each chunk that has run forward and not yet backward counts with its share of the
    stage (Narayanan et al. 2021).
    """
    following = layout.pp - stage.index - 1
    if layout.virtual_stages == 1:
        return min(num_microbatches, following + 1)
    warm_up = 2 * following + (layout.virtual_stages - 1) * layout.pp
    return min(num_microbatches * layout.virtual_stages, warm_up + 1) / layout.virtual_stages


def sparse_pattern(shape: ModelShape, layers: list[int] | None) -> tuple[bool, ...]:
    """True for each sparse layer, False for each dense one.

    Args:
        shape: shape of the model.
        layers: Megatron's `moe_layer_freq`; None if all layers are dense.
    """
    if shape.sffn is None or layers is None:
        return (False,) * shape.num_layers
    pattern = tuple(map(bool, layers))
    assert sum(pattern) == shape.sparse_layers, (pattern, shape.sparse_layers)
    return pattern
