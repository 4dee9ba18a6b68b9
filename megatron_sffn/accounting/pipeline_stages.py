"""Computes the layers of each pipeline stage, and its number of microbatches in flight.

Inputs: a `ParallelLayout`, and the parts of each layer. Outputs: the `Stage`s, as Megatron
distributes layers over pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.accounting.shape import LayerCounts, ModelShape, count_parts
from megatron_sffn.nn.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The layers of one pipeline stage.

    Args:
        index: index of the stage, from 0.
        chunks: the stage's model chunks: the parts of each layer of a chunk (`layer_parts`).
        first: True if the stage has the embedding.
        last: True if the stage has multi-token prediction, the final norm and the logits.
    """

    index: int
    chunks: tuple[tuple[str, ...], ...]
    first: bool
    last: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """The parts of each layer of all chunks."""
        return tuple(layer for chunk in self.chunks for layer in chunk)

    @property
    def counts(self) -> LayerCounts:
        """How often the stage's layers have each part."""
        return count_parts("".join(self.layers))


def pipeline_stages(layout: ParallelLayout, parts: tuple[str, ...]) -> list[Stage]:
    """The stages of a model, chunk after chunk as Megatron distributes them.

    Args:
        layout: layout of the run.
        parts: the parts of each layer of the model (`layer_parts`).
    """
    chunks_of_stage: list[list[tuple[str, ...]]] = [[] for _ in range(layout.pp)]
    for index, chunk in enumerate(_chunks(layout, parts)):
        chunks_of_stage[index % layout.pp].append(chunk)
    return [
        Stage(index=index, chunks=tuple(chunks), first=index == 0, last=index == layout.pp - 1)
        for index, chunks in enumerate(chunks_of_stage)
    ]


def _chunks(layout: ParallelLayout, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The layers of each chunk: where a hybrid pattern cuts them, else of equal shares."""
    cuts = [index for index, part in enumerate(parts) if part == Symbols.PIPE]
    if cuts:
        pieces = zip([-1, *cuts], [*cuts, len(parts)], strict=True)
        return [parts[before + 1 : end] for before, end in pieces]
    chunks, start = [], 0
    for count in layout.layers_per_chunk(len(parts)):
        chunks.append(parts[start : start + count])
        start += count
    return chunks


def computed_layers(shape: ModelShape, stage: Stage) -> tuple[LayerCounts, int]:
    """How often a stage computes each part in a pass, and its number of multi-token predictions.

    A prediction that repeats the layer of another one has no weights of its own, but computes.
    """
    predictions = shape.predicted_tokens if stage.last else 0
    return stage.counts.plus(count_parts(predictions * shape.prediction)), predictions


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


def layer_parts(
    shape: ModelShape, layers: list[int] | None, hybrid: str | None = None
) -> tuple[str, ...]:
    """The parts of each layer, by the symbols of a hybrid model (`nn/layer_pattern.py`).

    Args:
        shape: shape of the model.
        layers: Megatron's `moe_layer_freq`; None if all layers are dense.
        hybrid: Megatron's `--hybrid-layer-pattern`; None for a GPT.

    Returns:
        `*-` or `*E` for each layer of a GPT; the symbols of a hybrid model, with the `|` that cut
        it into stages, without its multi-token prediction. A number behind `E` is the index of the
        layer's router among those of the model, where it is not the first.
    """
    return _with_routers(shape, _symbols(shape, layers, hybrid))


def _with_routers(shape: ModelShape, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of each layer, with the index of its router behind `E`."""
    if shape.sffn is None or not shape.sffn.other_routers:
        return parts
    routers, router_of_layer = shape.sffn.routers, dict(shape.sffn.other_routers)
    numbered, sparse_layer = [], 0
    for part in parts:
        if Symbols.MOE in part:
            if sparse_layer in router_of_layer:
                part += str(routers.index(router_of_layer[sparse_layer]))
            sparse_layer += 1
        numbered.append(part)
    return tuple(numbered)


def _symbols(shape: ModelShape, layers: list[int] | None, hybrid: str | None) -> tuple[str, ...]:
    """The symbols of each layer, as in `layer_parts`."""
    if hybrid is not None:
        return tuple(hybrid.split(Symbols.MTP_SEPARATOR)[0])
    if shape.sffn is None or layers is None:
        return (Symbols.ATTENTION + Symbols.MLP,) * shape.num_layers
    assert sum(layers) == shape.sparse_layers, (layers, shape.sparse_layers)
    return tuple(Symbols.ATTENTION + (Symbols.MOE if layer else Symbols.MLP) for layer in layers)
