"""Seconds of a step equal closed forms by hand, and move the right way with the cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sffn.accounting import flops_per_token
from megatron_sffn.accounting.latent_attention import LatentAttention
from megatron_sffn.accounting.muon import Muon, muon_flops
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.planning.block_estimates import estimate_blocks
from megatron_sffn.planning.cluster import Cluster
from megatron_sffn.planning.optimizer_time import muon_time
from megatron_sffn.planning.step_time import step_time
from tests.planning.runs import cluster, workload

LAYOUTS = (
    ParallelLayout(world_size=16),
    ParallelLayout(world_size=16, tp=2, ep=4),
    ParallelLayout(world_size=16, ep=16),
    ParallelLayout(world_size=16, pp=2, ep=2, etp=2),
    ParallelLayout(world_size=16, pp=4, virtual_stages=2),
)


LATENT = LatentAttention(
    q_lora_rank=96, kv_lora_rank=64, qk_head_dim=32, qk_pos_emb_head_dim=16, v_head_dim=32
)
MODELS = (
    {},
    {"latent_attention": LATENT},
    {"predicted_tokens": 2, "prediction": "*-"},
    {"predicted_tokens": 2, "prediction": "*-", "repeats_prediction": True},
)


@pytest.mark.parametrize("model", MODELS)
def test_on_one_gpu_a_dense_step_without_memory_traffic_takes_its_flops_over_the_rate(
    model: dict[str, Any],
) -> None:
    run = workload(ParallelLayout(), sparse=False, model=model)
    fast_memory = cluster(1, memory_bandwidth=1e30)
    flops = 3 * flops_per_token(run.shape).total * run.step_tokens
    time = step_time(run, fast_memory)
    assert time.total == pytest.approx(flops / fast_memory.flops)
    assert time.total == time.compute
    assert time.block_ratio is None


@pytest.mark.parametrize("model", MODELS)
def test_full_recomputation_takes_one_more_forward_pass_of_the_layers(
    model: dict[str, Any],
) -> None:
    fast_memory = cluster(1, memory_bandwidth=1e30)
    stored = workload(ParallelLayout(), sparse=False, model=model)
    recomputed = replace(stored, setup=replace(stored.setup, recompute="full"))
    forward = flops_per_token(stored.shape)
    extra = (forward.total - forward.logits) * stored.step_tokens / fast_memory.flops
    difference = step_time(recomputed, fast_memory).total - step_time(stored, fast_memory).total
    assert difference == pytest.approx(extra)


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_bubble_is_that_of_the_schedule(chunks: int) -> None:
    layout = ParallelLayout(pp=4, virtual_stages=chunks)
    few = step_time(workload(layout, microbatches=4), cluster())
    many = step_time(workload(layout, microbatches=5), cluster())
    microbatch = many.total - few.total
    assert few.bubble == many.bubble == pytest.approx(3 / chunks * microbatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["peak_flops", "memory_bandwidth", "node_bandwidth", "network_bandwidth"]
)
def test_a_faster_card_or_link_never_makes_a_step_slower(layout: ParallelLayout, name: str) -> None:
    run, slow = workload(layout), cluster(16)
    times = [
        step_time(run, cluster(16, **{name: factor * getattr(slow.card, name)})).total
        for factor in (0.5, 1, 2, 8)
    ]
    assert times == sorted(times, reverse=True)


def test_gradients_hide_behind_the_backward_pass_where_the_run_overlaps_them() -> None:
    exposed = workload(ParallelLayout(world_size=16))
    hidden = replace(exposed, overlaps_gradients=True, overlaps_parameters=True)
    assert step_time(hidden, cluster(16)).data < step_time(exposed, cluster(16)).data


def test_blocks_narrower_than_a_tile_cost_more_and_coarse_blocks_cost_as_a_dense_layer() -> None:
    run = workload(ParallelLayout())
    assert run.shape.sffn is not None
    ratios = []
    for size in (1024, 256, 32):
        sffn = replace(run.shape.sffn, block_size=size)
        shaped = replace(run, shape=replace(run.shape, sffn=sffn))
        ratios.append(estimate_blocks(shaped, cluster()).ratio)
    assert 1 < ratios[0] < ratios[1] < ratios[2]
    # At g = 32 all cells are computed and masked: 1.1 · E.
    assert ratios[2] == pytest.approx(1.1 * 4)


def test_a_ring_over_nodes_uses_the_network_cards_of_all_its_members() -> None:
    node = cluster(16)
    assert node.ring_bytes(8) == node.node_bytes
    assert node.ring_bytes(16) == 8 * node.network_bytes
    assert node.ring_bytes(2, 8) == node.network_bytes


@pytest.mark.parametrize("muon", [Muon(), Muon(half=False), Muon(num_ns_steps=10)])
def test_without_memory_traffic_muon_takes_its_iterations_longer_than_adam(muon: Muon) -> None:
    fast_memory = cluster(1, memory_bandwidth=1e30)
    adam = workload(ParallelLayout())
    adam = replace(adam, setup=replace(adam.setup, distributed_optimizer=False))
    run = replace(adam, setup=replace(adam.setup, muon=muon))
    (stage,) = run.stages()
    flops = muon_flops(run.shape, stage, run.layout, muon) * (1 if muon.half else 2)
    difference = step_time(run, fast_memory).total - step_time(adam, fast_memory).total
    assert difference == pytest.approx(flops / fast_memory.flops)
    # On a real card the iterations wait for memory where a matrix has few rows.
    assert muon_time(run, cluster(1), stage, muon) > flops / fast_memory.flops


def test_ranks_that_share_a_matrix_wait_for_each_other_unless_each_takes_its_part() -> None:
    adam = workload(ParallelLayout(tp=2))
    parts, shared, wholes = (
        muon_time(adam, cluster(), adam.stages()[0], Muon(tp_mode=mode))
        for mode in ("blockwise", "distributed", "duplicated")
    )
    assert parts < min(shared, wholes)


def test_efficiency_scales_the_products() -> None:
    run = workload(ParallelLayout(), sparse=False)
    fast = cluster(1, memory_bandwidth=1e30)
    half = Cluster(gpus=1, gpus_per_node=8, card=fast.card, efficiency=fast.efficiency / 2)
    assert step_time(run, half).total == pytest.approx(2 * step_time(run, fast).total)


def test_a_measured_ratio_of_the_blocks_replaces_the_derived_one() -> None:
    run, card = workload(ParallelLayout()), cluster(1).card
    times = [
        step_time(run, Cluster(gpus=1, gpus_per_node=8, card=card, block_ratio=ratio))
        for ratio in (None, 1.0, 3.0)
    ]
    assert times[0].block_ratio not in (1.0, 3.0)
    assert [time.block_ratio for time in times[1:]] == [1.0, 3.0]
    assert times[2].compute > times[1].compute
