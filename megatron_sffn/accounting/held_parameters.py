"""Parameters that a rank holds: of the layers, the embeddings and the logits of its stage.

Inputs: the model's shape, a pipeline stage and the parallel layout. Outputs: their numbers, by what
the optimizer does with them.

Design notes: multi-token prediction is on the last stage, with a copy of the embedding where that
is not the first stage too (Megatron's `GPTModel` and `HybridModel`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.accounting.parameters import (
    attention_matrices,
    attention_parameters,
    embedding_parameters,
    norm_parameters,
    output_parameters,
    prediction_parameters,
)
from megatron_sffn.accounting.pipeline_stages import Stage
from megatron_sffn.accounting.shape import (
    LayerCounts,
    LayersOfRouter,
    ModelShape,
    count_parts,
)
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class HeldParameters:
    """Parameters on one rank: of its `cells`, which have fewer replicas, and of the `rest`.

    Args:
        cells: parameters of cells.
        rest: all others.
        matrices: those of both that Muon would train, the weight matrices but for the vocabulary's.
    """

    cells: int
    rest: int
    matrices: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.cells + self.rest


def held_parameters(shape: ModelShape, stage: Stage, layout: ParallelLayout) -> HeldParameters:
    """Parameters on a rank of one stage."""
    counts, predictions = held_layers(shape, stage), shape.own_predictions if stage.last else 0
    width, norm = shape.hidden_size, norm_parameters(shape, shape.hidden_size)
    matrices = counts.attentions * attention_matrices(shape) // layout.tp
    matrices += counts.dense * shape.dense_cell * shape.ffn_hidden_size // layout.tp
    matrices += predictions * 2 * width * width // layout.tp
    others = counts.parts * norm + counts.attentions * _attention_vectors(shape, layout)
    others += counts.dense * _mlp_biases(shape, layout)
    others += predictions * (prediction_parameters(shape) - 2 * width * width)
    cells = cell_matrices = 0
    for layer, sffn, count in held_by_router(shape, stage):
        router_matrices = sffn.router.matrix_parameters(sffn, layer.router_width)
        shared = layer.dense_cell * sffn.shared_cells // layout.tp
        matrices += count * (router_matrices + shared + layer.latent_projections)
        others += count * (sffn.router.parameters(sffn, layer.router_width) - router_matrices)
        tables = layer.tables(count, predictions)
        held = tables * layer.sparse_cell * sffn.num_cells // layout.expert_ranks
        cells += held
        cell_matrices += held if sffn.key_width(width) else 0
    learned = shape.learned_positions * width
    vocabulary = output_parameters(shape) // layout.tp
    if stage.first or predictions:
        assert embedding_parameters(shape) == output_parameters(shape) + learned
        matrices += learned  # Megatron does not count positions among the embeddings
        others += vocabulary
    if stage.last:
        others += norm
        # Tied weights are on two ranks where embedding and logits are on different stages.
        others += 0 if stage.first and shape.tied_embeddings else vocabulary
    rest = matrices + others
    return HeldParameters(cells=cells, rest=rest, matrices=matrices + cell_matrices)


def held_by_router(shape: ModelShape, stage: Stage) -> list[LayersOfRouter]:
    """The sparse layers of a stage by their routers, those of multi-token prediction included."""
    kinds = Counter(layer for layer in stage.layers if Symbols.MOE in layer)
    configs: Counter[SparseFFNConfig] = Counter()
    for layer, count in kinds.items():  # plans call this often, and most layers are alike
        configs[shape.sffn_of_layer(layer)] += count
    if predicted := held_layers(shape, stage).sparse - stage.counts.sparse:
        configs[shape.sffn_of_layer(Symbols.MOE)] += predicted
    return [
        LayersOfRouter(replace(shape, sffn=sffn), sffn, count) for sffn, count in configs.items()
    ]


def held_layers(shape: ModelShape, stage: Stage) -> LayerCounts:
    """How often the layers of a stage have each part, those of multi-token prediction included."""
    counts = stage.counts
    if not stage.last or not shape.predicted_tokens:
        return counts
    return counts.plus(count_parts(shape.prediction * shape.own_predictions))


def _attention_vectors(shape: ModelShape, layout: ParallelLayout) -> int:
    """Parameters of attention's biases, sinks and norms; TP splits some of them."""
    has_bias = shape.latent_attention is None and (shape.bias or shape.qkv_bias)
    split = shape.sinks + (shape.projected_width if has_bias else 0)
    vectors = attention_parameters(shape) - attention_matrices(shape)
    return split // layout.tp + vectors - split


def _mlp_biases(shape: ModelShape, layout: ParallelLayout) -> int:
    """Parameters of a dense MLP that are no matrix."""
    if not shape.bias:
        return 0
    return shape.keys_per_cell * shape.ffn_hidden_size // layout.tp + shape.hidden_size
