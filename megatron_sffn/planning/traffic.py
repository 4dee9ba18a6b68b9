"""Bytes that a rank sends in one step, by kind of collective.

Inputs: a `Workload` and a `Cluster`. Outputs: bytes per layer and microbatch, and the sums of a
step on the rank of the first pipeline stage.

Design notes
- An all-gather or a reduce-scatter over n ranks sends (n - 1)/n of the whole tensor, an all-reduce
  twice that (Thakur et al. 2005).
- `tensor_collectives.py` has the collectives of tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.held_parameters import held_parameters
from megatron_sffn.accounting.pipeline_stages import Stage, computed_layers
from megatron_sffn.nn.comm_volume import (
    bytes_between_nodes_per_token,
    exchanged_bytes_per_token,
    megatron_bytes_per_token,
    num_nodes,
    regathers,
)
from megatron_sffn.planning.cluster import Cluster
from megatron_sffn.planning.tensor_collectives import collective_bytes, collectives_of
from megatron_sffn.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends in a step.

    Args:
        tensor: by tensor parallelism.
        expert: by the dispatch and the combine of sparse layers, within and between nodes.
        expert_network: the part of `expert` that leaves the node.
        gradients: by the reduction of gradients over data-parallel ranks.
        parameters: by the all-gather of updated parameters (distributed optimizer).
        pipeline: by pipeline stages.
    """

    tensor: float
    expert: float
    expert_network: float
    gradients: float
    parameters: float
    pipeline: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.tensor + self.expert + self.gradients + self.parameters + self.pipeline


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that a rank sends for one microbatch of one sparse layer in one pass.

    Args:
        total: all bytes.
        network: those that leave the node.
    """

    total: float
    network: float


def exchange(workload: Workload, cluster: Cluster) -> Exchange:
    """Dispatch and combine of a sparse layer's forward pass, as the run's dispatcher sends them."""
    sffn, layout, width = workload.shape.sffn, workload.layout, workload.shape.hidden_size
    ranks, node = layout.expert_ranks, cluster.gpus_per_node
    if sffn is None or ranks == 1:
        return Exchange(total=0.0, network=0.0)
    of_megatron = sffn.backend == "megatron"
    count = megatron_bytes_per_token if of_megatron else exchanged_bytes_per_token
    total = count(sffn, width, layout)
    if ranks <= node:
        network = 0.0
    elif not of_megatron and num_nodes(ranks, sffn.node_size) > 1:
        network = bytes_between_nodes_per_token(sffn, width, layout)
    else:
        # Uniform routing sends as much to each of the other ranks.
        network = total * (ranks - node) / (ranks - 1)
    tokens = workload.own_tokens
    return Exchange(total=tokens * total, network=tokens * network)


def backward_exchanges(workload: Workload) -> float:
    """Bytes of the backward pass over those of the forward pass: half more with a regather."""
    sffn = workload.shape.sffn
    if sffn is None or sffn.backend == "megatron":
        return 1.0
    return 1.5 if regathers(sffn, workload.shape.hidden_size, workload.layout) else 1.0


def expert_passes(workload: Workload) -> float:
    """Forward exchanges to which all exchanges of a microbatch and layer amount."""
    setup = workload.setup
    repeats = setup.recompute == "full" or setup.recomputes("moe")
    return 1 + repeats + backward_exchanges(workload)


def replica_bytes(workload: Workload, stage: Stage, *, parameters: bool) -> tuple[float, float]:
    """Bytes that a rank sends per step over the replicas of its dense weights, and of its cells.

    Args:
        workload: the run.
        stage: pipeline stage of the rank.
        parameters: True for the all-gather of parameters, False for the reduction of gradients.
    """
    layout, setup = workload.layout, workload.setup
    held = held_parameters(workload.shape, stage, layout)
    if parameters:
        per_number = layout.bytes_per_number if setup.distributed_optimizer else 0
    else:
        per_number = setup.gradient_bytes * (1 if setup.distributed_optimizer else 2)
    rest = held.rest * per_number * (layout.dp - 1) / layout.dp
    cells = held.cells * per_number * (layout.expert_dp - 1) / layout.expert_dp
    return rest, cells


def pipeline_transfer_bytes(workload: Workload) -> float:
    """Bytes that a rank sends to the next stage for one microbatch: its share of hidden states."""
    if workload.layout.pp == 1:
        return 0.0
    return workload.hidden_bytes * workload.own_tokens / workload.tokens


def step_traffic(workload: Workload, cluster: Cluster) -> Traffic:
    """Bytes that a rank of the first pipeline stage sends in a step."""
    layout, setup = workload.layout, workload.setup
    stage = workload.stages()[0]
    counts, predictions = computed_layers(workload.shape, stage)
    collectives = collectives_of(workload, counts, predictions)
    sent = exchange(workload, cluster)
    exchanges = counts.sparse * expert_passes(workload) * setup.num_microbatches
    # A rank of the first stage sends activations on and gets their gradients back; a rank between
    # two stages sends both.
    transfers = setup.num_microbatches * (2 * layout.virtual_stages - 1)
    return Traffic(
        tensor=collective_bytes(workload, collectives) * setup.num_microbatches,
        expert=exchanges * sent.total,
        expert_network=exchanges * sent.network,
        gradients=sum(replica_bytes(workload, stage, parameters=False)),
        parameters=sum(replica_bytes(workload, stage, parameters=True)),
        pipeline=transfers * pipeline_transfer_bytes(workload),
    )
