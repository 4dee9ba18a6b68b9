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
from megatron_sffn.accounting.held_parameters import held_by_router, held_parameters
from megatron_sffn.accounting.pipeline_stages import (
    Stage,
    microbatches_in_flight,
    pipeline_stages,
)
from megatron_sffn.accounting.shape import ModelShape, count_parts
from megatron_sffn.accounting.training_setup import TrainingSetup
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.saved_bytes import FP32, INT64


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank.

    Args:
        stage: the rank's pipeline stage, from 0.
        parameters: number of parameters that the rank holds.
        weights: bytes of the parameters.
        gradients: bytes of Megatron's gradient buffer.
        optimizer: bytes of moments, and of the master copy of half-precision weights.
        router_tables: bytes that sparse layers hold beside their weights (`router_tables`).
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
        router_tables=router_tables(shape, stage, setup),
        activations=round(activations),
        attention_scores=round(scores),
        in_flight=in_flight,
    )


def router_tables(shape: ModelShape, stage: Stage, setup: TrainingSetup) -> int:
    """Bytes that the sparse layers of one stage hold on each rank beside their weights.

    They are the router's own tables, two counters of the tokens of each block (of training and of
    evaluation), and what load balancing holds. A few single numbers of a layer are not counted.
    """
    total = 0
    for layer, sffn, count in held_by_router(shape, stage):
        tables = sffn.router.held_bytes(sffn, layer.router_width, layer.padded_vocab_size)
        block_bytes = 2 * INT64
        if "moe_router_enable_expert_bias" in sffn.router.megatron_flags:
            block_bytes += setup.balance_numbers * FP32
        total += count * (tables + sffn.num_blocks * block_bytes)
    return total


def _activations(activations: Activations, stage: Stage, in_flight: float) -> tuple[float, float]:
    """Bytes of the activations of a stage, and how many of them are attention scores."""
    embedding = activations.embedding() * in_flight if stage.first else 0.0
    if activations.setup.recompute == "full":
        layers = _full_recomputation(activations, stage.chunks, in_flight)
    else:
        layers = _sum(activations, Counter(stage.layers), in_flight)
    scores = layers.scores + layers.working_scores
    if not stage.last:
        return embedding + layers.total, scores
    # The head and the predictions of one microbatch are freed before a layer is recomputed.
    predictions = _predictions(activations)
    ends = predictions.bytes + predictions.scores + max(activations.head(), predictions.working)
    peak = layers.bytes + layers.scores + max(ends, layers.working)
    return embedding + peak, scores + predictions.scores


class _Kept(NamedTuple):
    """Bytes of layers.

    Args:
        bytes: kept, without attention scores.
        scores: kept attention scores.
        working: of one recomputation.
        working_scores: the part of `working` that is attention scores, in full recomputation.
    """

    bytes: float = 0.0
    scores: float = 0.0
    working: float = 0.0
    working_scores: float = 0.0

    @property
    def total(self) -> float:
        """The most bytes at a time."""
        return self.bytes + self.scores + self.working


def _sum(activations: Activations, layers: Counter[str], in_flight: float = 1.0) -> _Kept:
    """What layers keep; recomputed activations exist for one layer of one microbatch at a time."""
    total = _Kept()
    for layer, count in layers.items():
        kept = _kept(activations, layer)
        total = _Kept(
            bytes=total.bytes + count * kept.bytes * in_flight,
            scores=total.scores + count * kept.scores * in_flight,
            working=max(total.working, kept.working),
        )
    return total


def _predictions(activations: Activations) -> _Kept:
    """What multi-token prediction keeps of one microbatch, without its logits."""
    shape, setup = activations.shape, activations.setup
    count, layers = shape.predicted_tokens, shape.prediction_layers
    if not count:
        return _Kept()
    inputs, projection = activations.prediction_input(), activations.prediction_projection()
    kept = _sum(activations, Counter(layers))
    if setup.recompute == "full" and shape.attention_layers is not None:
        kept = _full_recomputation(activations, (layers,), 1.0)
    if setup.recompute == "full" and setup.recompute_method == "uniform":
        # Megatron recomputes projection and layers of a prediction as one, from its two inputs.
        inputs += 2 * activations.hidden_states()
        return _Kept(bytes=count * inputs, working=projection + kept.total)
    bytes_ = inputs + projection + kept.bytes
    return _Kept(bytes=count * bytes_, scores=count * kept.scores, working=kept.working)


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
        feed_forward = activations.feed_forward(layer)
        if setup.recomputes("moe" if counts.sparse else "mlp"):
            inputs = activations.mlp_norm_and_dropout() + activations.hidden_states()
            working = max(working, feed_forward - inputs)
            feed_forward = inputs
        count += feed_forward
    return _Kept(bytes=count, scores=scores, working=working)


def _full_recomputation(
    activations: Activations, chunks: tuple[tuple[str, ...], ...], in_flight: float
) -> _Kept:
    """What the layers of model chunks keep under full recomputation."""
    count = activations.setup.recompute_layers
    recomputed: list[tuple[str, ...]] = []
    stored: tuple[str, ...] = ()
    for chunk in chunks:
        if activations.setup.recompute_method == "uniform":
            recomputed += [chunk[start : start + count] for start in range(0, len(chunk), count)]
        else:
            # The first layers of a chunk are recomputed one by one, the others are stored.
            recomputed += [(layer,) for layer in chunk[:count]]
            stored += chunk[count:]
    kept = _sum(activations, Counter(stored), in_flight)
    inputs = len(recomputed) * activations.hidden_states() * in_flight
    largest = max(recomputed, key=lambda group: sum(map(activations.layer, group)), default=())
    scores = count_parts("".join(largest)).attentions * activations.attention_scores()
    working = sum(map(activations.layer, largest))
    return _Kept(
        bytes=kept.bytes + inputs, scores=kept.scores, working=working, working_scores=scores
    )
