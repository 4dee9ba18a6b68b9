"""Seconds of one training step: computing, waiting for other ranks, and the pipeline's bubble.

Inputs: a `Workload` and a `Cluster`. Outputs: a `StepTime`. All numbers are derived; what they
rest on is in docs/planning.md, and `planning/published.py` compares them with published runs.

Design notes
- Matrix products run at `Cluster.flops`. Attention's scores count without the causal half, as in
  `accounting`: kernels that skip the half reach about half the rate of large products.
- Beside the products, kernels that only move numbers take the traffic of their passes: norms and
  residuals (`HIDDEN_PASSES`), activations (`CELL_PASSES`), scores and logits (`SCORE_PASSES`).
- Exchanges, collectives of tensor parallelism and transfers between stages are not hidden, unless
  the run chunks its exchange or interleaves its stages.
- One step takes m + (p - 1)/v times the slowest stage's microbatch, with m microbatches, p stages
  and v chunks per stage (Narayanan et al. 2021, arXiv 2104.04473).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_sffn.accounting.flops import score_flops
from megatron_sffn.accounting.parameters import attention_matrices
from megatron_sffn.accounting.pipeline_stages import Stage, computed_layers
from megatron_sffn.accounting.shape import LayerCounts
from megatron_sffn.planning.block_estimates import estimate_blocks
from megatron_sffn.planning.cluster import COLLECTIVE_LATENCY, Cluster
from megatron_sffn.planning.optimizer_time import optimizer_time
from megatron_sffn.planning.tensor_collectives import (
    Collectives,
    collective_bytes,
    collectives_of,
)
from megatron_sffn.planning.traffic import (
    backward_exchanges,
    exchange,
    pipeline_transfer_bytes,
    replica_bytes,
)
from megatron_sffn.planning.workload import Workload

HIDDEN_PASSES = 8
"""Times that norms, residuals and RoPE read or write `[T, D]`, forward, in each attention and each
feed-forward part: assumed."""

CELL_PASSES = 4
"""Times that the activation reads or writes `[T, cells]` of a dense MLP, forward: assumed."""

PREDICTION_NORMS = 2
"""Parts of layers whose norms take as long as the three norms, the joining and the embedding of a
multi-token prediction: assumed."""

SCORE_PASSES = 6
"""Times that a router, or the loss, reads or writes its fp32 scores, forward: assumed."""

SCORE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step.

    Args:
        compute: of the slowest stage's own work, recomputation and optimizer included.
        tensor: waiting for collectives of tensor parallelism.
        expert: waiting for dispatch and combine.
        pipeline: waiting for transfers between stages.
        data: waiting for gradients and parameters of replicas.
        bubble: waiting for other stages at the start and at the end of a step.
        block_ratio: time of the block products over dense ones; None without sparse layers.
        backend: backend of the blocks; None without sparse layers.
    """

    compute: float
    tensor: float
    expert: float
    pipeline: float
    data: float
    bubble: float
    block_ratio: float | None = None
    backend: str | None = None

    @property
    def total(self) -> float:
        """Seconds of the step."""
        waiting = self.tensor + self.expert + self.pipeline + self.data
        return self.compute + waiting + self.bubble


class Seconds(NamedTuple):
    """Seconds of a microbatch, by what a rank does; see `StepTime`."""

    compute: float
    tensor: float
    expert: float
    pipeline: float = 0.0


class _Clock:
    """Seconds of the parts of one microbatch on one rank.

    Args:
        workload: the run.
        cluster: where it runs.
    """

    def __init__(self, workload: Workload, cluster: Cluster) -> None:
        self.workload, self.cluster = workload, cluster
        self.shape, self.layout, self.setup = workload.shape, workload.layout, workload.setup
        self.blocks = None if self.shape.sffn is None else estimate_blocks(workload, cluster)
        self.exchange = exchange(workload, cluster)

    def products(self, flops: float) -> float:
        """Large matrix products."""
        return flops / self.cluster.flops

    def split_products(self, flops: float) -> float:
        """Products of all tokens of a microbatch, of so many FLOPs each, which TP splits."""
        return self.products(self.workload.tokens * flops / self.layout.tp)

    def moves(self, num_bytes: float) -> float:
        """Traffic to and from the GPU's memory."""
        return num_bytes / self.cluster.memory_bytes

    def scores(self) -> float:
        """Attention's scores and weighted sum, forward."""
        return self.split_products(score_flops(self.shape))

    def attention(self) -> float:
        """Attention, forward, recomputed and backward."""
        latent, passes = self.shape.latent_attention, 4 if self.setup.recompute == "full" else 3
        forward = self.split_products(2 * attention_matrices(self.shape)) + self.scores()
        again = self.scores() if self.setup.recomputes("core_attn") else 0.0
        if latent is not None and self.setup.recomputes("mla_up_proj"):
            again += self.split_products(2 * latent.up_matrices(self.shape.num_attention_heads))
        return passes * forward + again

    def norm(self) -> float:
        """The norm and the residual of an attention or a feed-forward part, forward."""
        hidden = self.workload.own_tokens * self.shape.hidden_size * self.layout.bytes_per_number
        return self.moves(HIDDEN_PASSES * hidden)

    def mlp(self, cells: int) -> float:
        """A dense MLP, forward."""
        values = self.workload.tokens * cells / self.layout.tp
        activation = CELL_PASSES * values * self.layout.bytes_per_number
        return self.products(2 * values * self.shape.dense_cell) + self.moves(activation)

    def router(self) -> float:
        """The scores and the selection of a sparse layer, forward."""
        sffn, tokens = self.shape.sffn, self.workload.own_tokens
        assert sffn is not None, "a dense model has no router"
        flops = sffn.router.flops(sffn, self.shape.router_width, gated=self.shape.gated)
        scores = SCORE_PASSES * SCORE_BYTES * sffn.num_blocks * tokens
        return self.products(tokens * flops) + self.moves(scores)

    def cells(self, *, backward: bool) -> float:
        """The block products of a sparse layer, at least the traffic of the rank's own cells."""
        sffn = self.shape.sffn
        assert sffn is not None and self.blocks is not None, "a dense model has no blocks"
        flops = 2 * sffn.chosen_cells * self.shape.sparse_cell * self.workload.own_tokens
        computing = self.blocks.ratio * self.products(flops) * (2 if backward else 1)
        weights = self.shape.sparse_cell * sffn.num_cells / self.layout.expert_ranks
        per_weight = self.layout.bytes_per_number
        if backward:  # the fp32 gradient of the microbatches before is read and written
            per_weight += 2 * self.setup.gradient_bytes
        return max(computing, self.moves(weights * per_weight))

    def feed_forward(self, *, sparse: bool, backward: bool) -> float:
        """The MLP of a layer, dense or sparse, in one pass."""
        factor = 2 if backward else 1
        if not sparse:
            return factor * self.mlp(self.shape.ffn_hidden_size)
        assert self.shape.sffn is not None, "a dense model has no sparse layer"
        shared = self.mlp(self.shape.sffn.shared_cells)
        latent = self.products(2 * self.shape.latent_projections * self.workload.own_tokens)
        return factor * (self.router() + shared + latent) + self.cells(backward=backward)

    def collectives(self, collectives: Collectives) -> float:
        """Collectives of tensor parallelism."""
        rate = self.cluster.ring_bytes(self.layout.tp)
        sent = collective_bytes(self.workload, collectives)
        return collectives.calls * COLLECTIVE_LATENCY + sent / rate

    def exchanged(self, passes: float) -> float:
        """Exchanges of a sparse layer; what travels in the node and between nodes overlaps."""
        if not self.exchange.total:
            return 0.0
        within = (self.exchange.total - self.exchange.network) / self.cluster.node_bytes
        between = self.exchange.network / self.cluster.network_bytes
        return passes * (2 * COLLECTIVE_LATENCY + max(within, between))

    def exposed(self, exchanged: float, computing: float) -> float:
        """The part of an exchange that chunks do not hide behind the blocks' computing."""
        chunks = 1 if self.shape.sffn is None else self.shape.sffn.exchange_chunks
        hidden = min(exchanged, computing) * (chunks - 1) / chunks
        return exchanged - hidden

    def layers(self, counts: LayerCounts, predictions: int) -> Seconds:
        """Seconds of layers and of multi-token predictions, forward, recomputed and backward."""
        full = self.setup.recompute == "full"
        norms = counts.parts + PREDICTION_NORMS * predictions
        compute = norms * (4 if full else 3) * self.norm() + counts.attentions * self.attention()
        joined = 4 * self.shape.hidden_size**2
        compute += predictions * (4 if full else 3) * self.split_products(joined)
        expert = 0.0
        for sparse, count in ((False, counts.dense), (True, counts.sparse)):
            if count:
                passes = 2 if full or self.setup.recomputes("moe" if sparse else "mlp") else 1
                forward = passes * self.feed_forward(sparse=sparse, backward=False)
                compute += count * (forward + self.feed_forward(sparse=sparse, backward=True))
                expert += count * self.exchanges(passes) if sparse else 0.0
        collectives = collectives_of(self.workload, counts, predictions)
        return Seconds(compute=compute, tensor=self.collectives(collectives), expert=expert)

    def exchanges(self, passes: int) -> float:
        """Exchanges of a sparse layer that nothing hides, with so many forward passes."""
        forward = self.exposed(self.exchanged(1), self.cells(backward=False))
        backward = self.exchanged(backward_exchanges(self.workload))
        return passes * forward + self.exposed(backward, self.cells(backward=True))

    def head(self) -> float:
        """Logits and loss, forward and backward."""
        numbers = self.workload.tokens * self.shape.padded_vocab_size / self.layout.tp
        logits = 3 * self.products(2 * numbers * self.shape.hidden_size)
        return logits + self.moves(SCORE_PASSES * SCORE_BYTES * numbers)

    def transfers(self) -> float:
        """Transfers to the neighbour stages; interleaved stages hide them."""
        if self.layout.pp == 1 or self.layout.virtual_stages > 1:
            return 0.0
        stage_ranks = self.layout.world_size // self.layout.pp
        leaves_node = self.cluster.leaves_node(2, stage_ranks)
        rate = self.cluster.network_bytes if leaves_node else self.cluster.node_bytes
        return 2 * (COLLECTIVE_LATENCY + pipeline_transfer_bytes(self.workload) / rate)

    def stage(self, stage: Stage) -> Seconds:
        """Seconds of one microbatch of a stage."""
        counts, predictions = computed_layers(self.shape, stage)
        seconds = self.layers(counts, predictions)
        heads = (1 + predictions) * self.head() if stage.last else 0.0
        return seconds._replace(compute=seconds.compute + heads, pipeline=self.transfers())

    def replicas(self, stage: Stage, *, parameters: bool) -> float:
        """Collectives over data-parallel ranks."""
        layout = self.layout
        rest, cells = replica_bytes(self.workload, stage, parameters=parameters)
        dense_rate = self.cluster.ring_bytes(layout.dp, layout.tp * layout.cp)
        cell_rate = self.cluster.ring_bytes(layout.expert_dp, layout.expert_ranks)
        return rest / dense_rate + cells / cell_rate


def step_time(workload: Workload, cluster: Cluster) -> StepTime:
    """Seconds of a step of the run on the cluster."""
    clock, layout, setup = _Clock(workload, cluster), workload.layout, workload.setup
    stages = workload.stages()
    kinds = {(stage.counts, stage.last): stage for stage in stages}  # equal ones take as long
    slowest = max(map(clock.stage, kinds.values()), key=sum)
    # The stages that hold the most: one with the embedding, and one with the predictions.
    ends = (stages[0], stages[-1])
    microbatch = sum(slowest)
    # A third of a microbatch runs forward, and two thirds backward.
    hidden = {
        False: 2 / 3 * microbatch if workload.overlaps_gradients else 0.0,
        True: 1 / 3 * microbatch if workload.overlaps_parameters else 0.0,
    }
    data = sum(
        max(0.0, *(clock.replicas(end, parameters=parameters) - hidden[parameters] for end in ends))
        for parameters in (False, True)
    )
    count = setup.num_microbatches
    return StepTime(
        compute=count * slowest.compute
        + max(optimizer_time(workload, cluster, end) for end in ends),
        tensor=count * slowest.tensor,
        expert=count * slowest.expert,
        pipeline=count * slowest.pipeline,
        data=data,
        bubble=(layout.pp - 1) / layout.virtual_stages * microbatch,
        block_ratio=None if clock.blocks is None else clock.blocks.ratio,
        backend=None if clock.blocks is None else clock.blocks.backend,
    )
