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

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megatron_sffn.accounting.activations import Activations
from megatron_sffn.accounting.held_parameters import held_layers, held_parameters
from megatron_sffn.accounting.pipeline_stages import (
    Stage,
    microbatches_in_flight,
    pipeline_stages,
)
from megatron_sffn.accounting.shape import ModelShape, count_parts
from megatron_sffn.accounting.training_setup import TrainingSetup
from megatron_sffn.nn.parallel_layout import ParallelLayout


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
    shape: ModelShape, parts: tuple[str, ...], layout: ParallelLayout, setup: TrainingSetup
) -> RankMemory:
    """Memory of the fullest rank.

    Args:
        shape: shape of the model.
        parts: the parts of each layer (`layer_parts`).
        layout: layout of the ranks.
        setup: setup of the training.
    """
    stages = pipeline_stages(layout, parts)
    ranks = [memory_of_stage(shape, stage, layout, setup) for stage in stages]
    return max(ranks, key=lambda rank: rank.total)


def memory_of_stage(
    shape: ModelShape, stage: Stage, layout: ParallelLayout, setup: TrainingSetup
) -> RankMemory:
    """Memory of a rank of one pipeline stage."""
    held = held_parameters(shape, stage, layout)
    state = setup.state_bytes(layout, matrix=True) * held.matrices
    state += setup.state_bytes(layout) * (held.total - held.matrices)
    if setup.distributed_optimizer:
        sharded_parameters = held.cells / layout.expert_dp + held.rest / layout.dp
        state = round(setup.state_bytes(layout) * sharded_parameters)
    in_flight = microbatches_in_flight(layout, stage, setup.num_microbatches)
    activations, scores = _activations(Activations(shape, layout, setup), stage, in_flight)
    return RankMemory(
        stage=stage.index,
        parameters=held.total,
        weights=layout.bytes_per_number * held.total,
        gradients=setup.gradient_bytes * held.total,
        optimizer=state,
        router_tables=router_tables(shape, stage),
        activations=round(activations),
        attention_scores=round(scores),
        in_flight=in_flight,
    )


def router_tables(shape: ModelShape, stage: Stage) -> int:
    """Bytes that the routers of one stage hold on each rank beside their weights."""
    if shape.sffn is None:
        return 0
    sffn = shape.sffn
    per_layer = sffn.router.held_bytes(sffn, shape.router_width, shape.padded_vocab_size)
    return held_layers(shape, stage).sparse * per_layer


def _activations(activations: Activations, stage: Stage, in_flight: float) -> tuple[float, float]:
    """Bytes of the activations of a stage, and how many of them are attention scores."""
    embedding = activations.embedding() * in_flight if stage.first else 0.0
    head = float(activations.head()) if stage.last else 0.0
    if activations.setup.recompute == "full":
        layers, working, scores = _full_recomputation(activations, stage, in_flight)
        return embedding + layers + max(head, working), scores
    layers, scores, working = 0.0, 0.0, 0.0
    for layer, count in Counter(stage.layers).items():
        kept = _kept(activations, layer)
        layers += count * kept.bytes * in_flight
        scores += count * kept.scores * in_flight
        # Recomputed activations exist for one layer of one microbatch at a time.
        working = max(working, kept.working)
    # The last microbatch's head is freed before a layer is recomputed.
    return embedding + layers + scores + max(head, working), scores


class _Kept(NamedTuple):
    """Bytes of one layer: kept without attention scores, of the scores, and of a recomputation."""

    bytes: float
    scores: float
    working: float


def _kept(activations: Activations, layer: str) -> _Kept:
    """What one layer keeps under selective recomputation, or without any."""
    setup, counts = activations.setup, count_parts(layer)
    count, scores, working = 0.0, 0.0, 0.0
    if counts.attentions:
        count, scores = float(activations.attention()), float(activations.attention_scores())
        if setup.recomputes("core_attn"):
            scores, working = 0.0, scores
        if activations.shape.latent_attention is not None and setup.recomputes("mla_up_proj"):
            working += activations.up_projections()
    if counts.dense + counts.sparse:
        feed_forward = activations.feed_forward(sparse=counts.sparse > 0)
        if setup.recomputes("moe" if counts.sparse else "mlp"):
            inputs = activations.mlp_norm_and_dropout() + activations.hidden_states()
            working = max(working, feed_forward - inputs)
            feed_forward = inputs
        count += feed_forward
    return _Kept(count, scores, working)


def _full_recomputation(
    activations: Activations, stage: Stage, in_flight: float
) -> tuple[float, float, float]:
    """Bytes that stay, bytes of one recomputation, and the attention scores among both."""
    count = activations.setup.recompute_layers
    recomputed: list[tuple[str, ...]] = []
    stored: tuple[str, ...] = ()
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
    stored_scores, working_scores = (
        count_parts("".join(group)).attentions * activations.attention_scores()
        for group in (stored, largest)
    )
    working = sum(map(activations.layer, largest))
    return layers * in_flight, working, stored_scores * in_flight + working_scores
