"""Memory of a rank: weights, gradients, the optimizer's state, routers' tables, and activations.

Inputs: the model's shape, which of its layers are sparse, the parallel layout and the training
setup. Outputs: bytes of the fullest rank. `torch.cuda.max_memory_allocated` is this sum plus what
kernels use while they run.

Design notes
- The fullest rank belongs to the pipeline stage with the largest sum: the first stage has the
  embedding and the most microbatches in flight, the last stage has the logits.
- Recomputation keeps the inputs of the recomputed layers for every microbatch in flight, and all
  activations of one recomputed layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.activations import Activations
from megatron_sffn.accounting.parameters import (
    embedding_parameters,
    norm_parameters,
    output_parameters,
)
from megatron_sffn.accounting.pipeline_stages import (
    Stage,
    microbatches_in_flight,
    pipeline_stages,
)
from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.accounting.training_setup import TrainingSetup
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


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank.

    Args:
        stage: the rank's pipeline stage, from 0.
        parameters: number of parameters that the rank holds.
        weights: bytes of the parameters.
        gradients: bytes of Megatron's gradient buffer.
        optimizer: bytes of moments, and of the master copy of half-precision weights.
        router_tables: bytes of tables that routers hold beside their weights.
        activations: bytes kept for the backward pass at the fullest moment.
        attention_scores: the part of the activations that are the attention's `s²` scores, which
            fused attention does not keep.
        in_flight: microbatches that have run forward and not yet backward.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    router_tables: int
    activations: int
    attention_scores: int
    in_flight: float

    @property
    def state(self) -> int:
        """Bytes of everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.router_tables

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.state + self.activations


def memory_per_rank(
    shape: ModelShape, pattern: tuple[bool, ...], layout: ParallelLayout, setup: TrainingSetup
) -> RankMemory:
    """Memory of the fullest rank.

    Args:
        shape: shape of the model.
        pattern: True for each sparse layer.
        layout: layout of the ranks.
        setup: setup of the training.
    """
    stages = pipeline_stages(layout, pattern)
    ranks = [memory_of_stage(shape, stage, layout, setup) for stage in stages]
    return max(ranks, key=lambda rank: rank.total)


def memory_of_stage(
    shape: ModelShape, stage: Stage, layout: ParallelLayout, setup: TrainingSetup
) -> RankMemory:
    """Memory of a rank of one pipeline stage."""
    local_parameters = held_parameters(shape, stage, layout)
    parameters = local_parameters.cells + local_parameters.rest
    matrices = local_parameters.matrices
    state = setup.state_bytes(layout, matrix=True) * matrices
    state += setup.state_bytes(layout) * (parameters - matrices)
    if setup.distributed_optimizer:
        sharded_parameters = (
            local_parameters.cells / layout.expert_dp + local_parameters.rest / layout.dp
        )
        state = round(setup.state_bytes(layout) * sharded_parameters)
    in_flight = microbatches_in_flight(layout, stage, setup.num_microbatches)
    activations, scores = _activations(Activations(shape, layout, setup), stage, in_flight)
    return RankMemory(
        stage=stage.index,
        parameters=parameters,
        weights=layout.bytes_per_number * parameters,
        gradients=setup.gradient_bytes * parameters,
        optimizer=state,
        router_tables=router_tables(shape, stage),
        activations=round(activations),
        attention_scores=round(scores),
        in_flight=in_flight,
    )


def held_parameters(shape: ModelShape, stage: Stage, layout: ParallelLayout) -> HeldParameters:
    """Parameters on a rank of one stage."""
    sparse, num_layers = sum(stage.layers), len(stage.layers)
    matrices = num_layers * _attention_matrices(shape, layout)
    matrices += (num_layers - sparse) * shape.dense_cell * shape.ffn_hidden_size // layout.tp
    others = num_layers * _attention_vectors(shape, layout)
    others += (num_layers - sparse) * _mlp_biases(shape, layout)
    cells = 0
    if shape.sffn is not None:
        sffn, width = shape.sffn, shape.router_width
        router_matrices = sffn.router.matrix_parameters(sffn, width)
        shared = shape.dense_cell * sffn.shared_cells // layout.tp
        matrices += sparse * (router_matrices + shared + shape.latent_projections)
        others += sparse * (sffn.router.parameters(sffn, width) - router_matrices)
        tables = shape.tables(sparse)
        cells = tables * shape.sparse_cell * sffn.num_cells // layout.expert_ranks
    learned = shape.learned_positions * shape.hidden_size
    vocabulary = output_parameters(shape) // layout.tp
    if stage.first:
        assert embedding_parameters(shape) == output_parameters(shape) + learned
        matrices += learned  # Megatron does not count positions among the embeddings
        others += vocabulary
    if stage.last:
        others += norm_parameters(shape, shape.hidden_size)
        # Tied weights are on two ranks where embedding and logits are on different stages.
        others += 0 if stage.first and shape.tied_embeddings else vocabulary
    rest = matrices + others
    if shape.sffn is not None and shape.sffn.router.key_width(shape.hidden_size):
        matrices += cells
    return HeldParameters(cells=cells, rest=rest, matrices=matrices)


def router_tables(shape: ModelShape, stage: Stage) -> int:
    """Bytes that the routers of one stage hold on each rank beside their weights."""
    if shape.sffn is None:
        return 0
    sffn = shape.sffn
    per_layer = sffn.router.held_bytes(sffn, shape.router_width, shape.padded_vocab_size)
    return sum(stage.layers) * per_layer


def _attention_matrices(shape: ModelShape, layout: ParallelLayout) -> int:
    """Parameters of the projections of attention, which TP splits."""
    return (shape.projected_width + shape.query_width) * shape.hidden_size // layout.tp


def _attention_vectors(shape: ModelShape, layout: ParallelLayout) -> int:
    """Parameters of attention's biases and sinks, and of both norms; TP splits some of them."""
    split = shape.projected_width if shape.bias or shape.qkv_bias else 0
    split += shape.sinks
    replicated = 2 * norm_parameters(shape, shape.hidden_size)
    replicated += shape.hidden_size if shape.bias else 0
    replicated += 2 * norm_parameters(shape, shape.kv_channels) if shape.qk_layernorm else 0
    return split // layout.tp + replicated


def _mlp_biases(shape: ModelShape, layout: ParallelLayout) -> int:
    """Parameters of a dense MLP that are no matrix."""
    if not shape.bias:
        return 0
    return shape.keys_per_cell * shape.ffn_hidden_size // layout.tp + shape.hidden_size


def _activations(activations: Activations, stage: Stage, in_flight: float) -> tuple[float, float]:
    """Bytes of the activations of a stage, and how many of them are attention scores."""
    setup = activations.setup
    embedding = activations.embedding() * in_flight if stage.first else 0.0
    head = float(activations.head()) if stage.last else 0.0
    if setup.recompute == "full":
        layers, working, scores = _full_recomputation(activations, stage, in_flight)
        return embedding + layers + max(head, working), scores
    drops_scores = setup.recomputes("core_attn")
    scores = 0.0 if drops_scores else len(stage.layers) * activations.attention_scores() * in_flight
    # Recomputed activations exist for one layer of one microbatch at a time.
    layers, working = 0.0, float(activations.attention_scores() if drops_scores else 0)
    for sparse in stage.layers:
        feed_forward = (
            activations.layer(sparse) - activations.attention() - activations.attention_scores()
        )
        if setup.recomputes("moe" if sparse else "mlp"):
            inputs = activations.mlp_norm_and_dropout() + activations.hidden_states()
            working = max(working, feed_forward - inputs)
            feed_forward = inputs
        layers += (activations.attention() + feed_forward) * in_flight
    # The last microbatch's head is freed before a layer is recomputed.
    return embedding + layers + scores + max(head, working), scores


def _full_recomputation(
    activations: Activations, stage: Stage, in_flight: float
) -> tuple[float, float, float]:
    """Bytes that stay, bytes of one recomputation, and the attention scores among both."""
    count = activations.setup.recompute_layers
    recomputed: list[tuple[bool, ...]] = []
    stored: tuple[bool, ...] = ()
    for chunk in stage.chunks:
        if activations.setup.recompute_method == "uniform":
            recomputed += [chunk[start : start + count] for start in range(0, len(chunk), count)]
        else:
            # The first layers of a chunk are recomputed one by one, the others are stored.
            recomputed += [(layer,) for layer in chunk[:count]]
            stored += chunk[count:]
    inputs = len(recomputed) * activations.hidden_states()
    layers = inputs + sum(map(activations.layer, stored))
    largest = max(recomputed, key=lambda group: sum(map(activations.layer, group)), default=())
    scores = (len(stored) * in_flight + len(largest)) * activations.attention_scores()
    return layers * in_flight, sum(map(activations.layer, largest)), scores
