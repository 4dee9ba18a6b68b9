"""Seconds of the optimizer's step on a rank.

Inputs: a `Workload`, a `Cluster` and a pipeline stage. Outputs: seconds.

Design notes
- The step reads and writes the optimizer's state, weights and gradients once.
- Muon also orthogonalises its matrices. The iterations take as long as their products
  (`accounting/muon.py`) or the traffic of their operands, whichever is more: a matrix of few rows
  has few FLOPs per byte. Products in fp32 (`--muon-fp32-matmul-prec high`) run as TF32, at half the
  rate of bf16.
- What tensor parallelism or expert tensor parallelism splits is gathered in fp32, or its square is
  all-reduced in each iteration (`--muon-tp-mode distributed`).
"""

from __future__ import annotations

from megatron_sffn.accounting.held_parameters import held_parameters
from megatron_sffn.accounting.muon import Matrix, Muon, held_numbers, muon_matrices
from megatron_sffn.accounting.pipeline_stages import Stage
from megatron_sffn.nn.saved_bytes import FP32
from megatron_sffn.planning.cluster import COLLECTIVE_LATENCY, Cluster
from megatron_sffn.planning.workload import Workload

MATRIX_PASSES, SQUARE_PASSES = 4, 5
"""Times that an iteration reads or writes the matrix, and squares of its rows: its three products'
operands and results."""

UPDATE_PASSES = 10
"""Times that Muon reads or writes the fp32 update beside its iterations: norm, casts, scale and
addition; assumed."""


def optimizer_time(workload: Workload, cluster: Cluster, stage: Stage) -> float:
    """Seconds of the step on a rank of one stage."""
    layout, setup = workload.layout, workload.setup
    held = held_parameters(workload.shape, stage, layout)
    gradients = 2 * setup.gradient_bytes * held.total  # the norm and the clipping read all
    numbers: float = held.total - held.matrices
    state = setup.state_bytes(layout, matrix=True) * held.matrices
    if setup.distributed_optimizer:
        numbers, state = held.cells / layout.expert_dp + held.rest / layout.dp, 0
        weights = layout.bytes_per_number * numbers
    else:
        weights = layout.bytes_per_number * held.total
    moved = gradients + 2 * (state + setup.state_bytes(layout) * numbers) + weights
    orthogonalising = 0.0
    if setup.muon is not None:
        orthogonalising = muon_time(workload, cluster, stage, setup.muon)
    return moved / cluster.memory_bytes + orthogonalising


def muon_time(workload: Workload, cluster: Cluster, stage: Stage, muon: Muon) -> float:
    """Seconds of Muon's updates of all matrices on a rank, without its momentum."""
    matrices = muon_matrices(workload.shape, stage, workload.layout, muon)
    updates = UPDATE_PASSES * FP32 * held_numbers(matrices, workload.layout) / cluster.memory_bytes
    return updates + sum(
        count * (_iterations(matrix, workload, cluster, muon))
        + _collectives(matrix, count, workload, cluster, muon)
        for matrix, count in matrices.items()
    )


def _iterations(matrix: Matrix, workload: Workload, cluster: Cluster, muon: Muon) -> float:
    """Seconds of the iterations on one matrix."""
    rows, columns = matrix.sides(muon, workload.layout)
    moved = muon.num_ns_steps * (MATRIX_PASSES * rows * columns + SQUARE_PASSES * rows**2)
    slowdown = 1 if muon.half else 2
    products = slowdown * matrix.flops(muon, workload.layout) / cluster.flops
    return max(products, 2 * slowdown * moved / cluster.memory_bytes)


def _collectives(
    matrix: Matrix, count: int, workload: Workload, cluster: Cluster, muon: Muon
) -> float:
    """Seconds of the collectives for so many equal matrices, of which blocks are a batch."""
    ranks = matrix.ranks(workload.layout)
    if ranks == 1 or (not matrix.etp and muon.tp_mode == "blockwise"):
        return 0.0
    share, calls = (ranks - 1) / ranks, 1 if matrix.etp else count
    sent = count * share * FP32 * matrix.rows * matrix.columns
    if not matrix.etp and muon.tp_mode == "distributed":
        rows, _ = matrix.sides(muon, workload.layout)
        calls *= muon.num_ns_steps
        sent = count * 2 * share * (2 if muon.half else FP32) * rows**2 * muon.num_ns_steps
    return calls * COLLECTIVE_LATENCY + sent / cluster.ring_bytes(ranks)
