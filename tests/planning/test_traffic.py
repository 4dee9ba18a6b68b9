"""Bytes of a step equal sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sffn.accounting.held_parameters import held_parameters
from megatron_sffn.nn.comm_volume import exchanged_bytes_per_token
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.planning.traffic import exchange, step_traffic
from tests.planning.runs import cluster, workload

HIDDEN = 512 * 256 * 2  # bytes of the hidden states of a microbatch: tokens, D, bf16


def test_one_rank_sends_nothing() -> None:
    assert step_traffic(workload(ParallelLayout()), cluster()).total == 0


def test_tensor_parallelism_gathers_around_attention_and_dense_mlps() -> None:
    sent = step_traffic(workload(ParallelLayout(tp=2)), cluster())
    # 8 attentions and 4 dense MLPs, 5 collectives each, half of the hidden states, 4 microbatches.
    assert sent.tensor == (8 + 4) * 5 * HIDDEN / 2 * 4


def test_full_recomputation_repeats_the_forward_collectives() -> None:
    run = workload(ParallelLayout(tp=2), recompute="full")
    assert step_traffic(run, cluster()).tensor == (8 + 4) * 7 * HIDDEN / 2 * 4


def test_sparse_layers_exchange_in_both_passes() -> None:
    run = workload(ParallelLayout(ep=8))
    assert run.shape.sffn is not None
    per_token = exchanged_bytes_per_token(run.shape.sffn, 256, run.layout)
    # 4 layers, 4 microbatches, 512 tokens; the backward pass sends the rows once more, and gathers
    # them again, because each rank gets more than two rows per token.
    sent = step_traffic(run, cluster())
    assert sent.expert == pytest.approx(4 * 4 * 512 * per_token * 2.5)
    assert sent.expert_network == 0


def test_an_exchange_over_two_nodes_sends_half_of_the_other_ranks_rows_by_network() -> None:
    sent = exchange(workload(ParallelLayout(ep=16)), cluster(16))
    assert sent.network == pytest.approx(sent.total * 8 / 15)


def test_replicas_reduce_fp32_gradients_and_gather_bf16_parameters() -> None:
    run = workload(ParallelLayout(world_size=8, ep=2))
    held = held_parameters(run.shape, run.stages()[0], run.layout)
    sent = step_traffic(run, cluster())
    assert sent.gradients == pytest.approx(4 * (held.rest * 7 / 8 + held.cells * 3 / 4))
    assert sent.parameters == pytest.approx(sent.gradients / 2)


def test_without_the_distributed_optimizer_gradients_are_all_reduced() -> None:
    sharded = workload(ParallelLayout(world_size=8))
    whole = replace(sharded, setup=replace(sharded.setup, distributed_optimizer=False))
    sent = step_traffic(whole, cluster())
    assert sent.gradients == 2 * step_traffic(sharded, cluster()).gradients
    assert sent.parameters == 0


def test_a_stage_sends_its_hidden_states_once_per_microbatch() -> None:
    assert step_traffic(workload(ParallelLayout(pp=2)), cluster()).pipeline == 4 * HIDDEN
