"""Communication volume against an enumeration of all choices and against a layer's collectives."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch

from benchmarks.parallel import wire
from megatron_sffn.nn import comm_volume
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.dispatch import dispatch
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.routers.groups import in_best_groups
from tests.support.ranks import run_ranks
from tests.support.router_cases import BATCH, SINGLE_CELLS, SPARSE, Case, D, build, draw


def sparse(router: str = "avg-k", **numbers: Any) -> SparseFFNConfig:
    return SparseFFNConfig(router=ROUTERS[router](), **numbers)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("active", [1, 2, 4, 6])
def test_the_bytes_of_an_exchange_are_those_of_an_enumeration_of_all_choices(
    ranks: int, active: int, slices: int
) -> None:
    blocks, width = 12, 24
    layer = sparse(active_cells=6 * active, block_size=6, expansion=blocks // active)
    gated = sparse("switch", active_cells=6 * active, block_size=6, expansion=blocks // active)
    # The token sits on the first rank of the grid; every choice of its blocks is equally likely.
    choices = [
        [(i * ranks // blocks, slice_index) for i in choice for slice_index in range(slices)]
        for choice in combinations(range(blocks), active)
    ]
    rows = sum(len(set(owners) - {(0, 0)}) for owners in choices) / len(choices)
    pairs = sum(sum(owner != (0, 0) for owner in owners) for owners in choices) / len(choices)
    layout = ParallelLayout(ep=ranks, etp=slices, dtype=torch.bfloat16)
    if ranks * slices == 1:
        assert comm_volume.exchanged_bytes_per_token(layer, width, layout) == 0
        return
    sent = comm_volume.exchanged_bytes_per_token(layer, width, layout)
    assert sent == pytest.approx(2 * rows * width * 2 + pairs * 2)
    with_gates = comm_volume.exchanged_bytes_per_token(gated, width, layout)
    assert with_gates == pytest.approx(2 * rows * width * 2 + pairs * (2 + 4))
    other_ranks = ranks * slices - 1
    gather_layout = dataclasses.replace(layout, dispatcher="allgather")
    gathered = comm_volume.exchanged_bytes_per_token(gated, width, gather_layout)
    assert gathered == other_ranks * (2 * width * 2 + active * (2 + 4))


def choices_in_groups(blocks: int, active: int, groups: int, chosen: int) -> list[tuple[int, ...]]:
    """All choices of K blocks within all choices of groups, all equally likely."""
    size = blocks // groups
    return [
        choice
        for best in combinations(range(groups), chosen)
        for choice in combinations([g * size + i for g in best for i in range(size)], active)
    ]


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize(("groups", "chosen"), [(2, 1), (4, 2), (3, 2), (12, 6), (6, 6)])
def test_bytes_of_group_limited_routing_are_those_of_an_enumeration(
    groups: int, chosen: int, ranks: int
) -> None:
    # The bounds of groups are those of ranks, or a rank holds several groups, or the bounds cross.
    blocks, active, width = 12, 4, 24
    layer = sparse(active_cells=6 * active, block_size=6, expansion=blocks // active)
    choices = choices_in_groups(blocks, active, groups, chosen)
    visits = sum(len({i * ranks // blocks for i in choice}) for choice in choices) / len(choices)
    layout = ParallelLayout(
        ep=ranks,
        dtype=torch.bfloat16,
        router_groups=groups,
        router_group_topk=chosen,
    )
    assert comm_volume.rows_per_token(layer, layout) == pytest.approx(visits)
    remote = 1 - 1 / ranks  # of rows and of pairs, over tokens of all ranks
    sent = comm_volume.exchanged_bytes_per_token(layer, width, layout)
    assert sent == pytest.approx(remote * (2 * visits * width * 2 + active * 2))
    # As two nodes.
    on_nodes = dataclasses.replace(layer, node_size=ranks // 2)
    nodes = sum(len({i * 2 // blocks for i in choice}) for choice in choices) / len(choices)
    node_bytes = comm_volume.bytes_between_nodes_per_token(on_nodes, width, layout)
    if ranks > 2:
        assert node_bytes == pytest.approx((2 * nodes * width * 2 + active * 2) / 2)


def test_groups_as_many_as_ranks_bound_the_ranks_that_a_token_reaches() -> None:
    layer = sparse(active_cells=4096, block_size=64, expansion=16)
    free = ParallelLayout(ep=16, dtype=torch.bfloat16)
    limited = dataclasses.replace(free, router_groups=16, router_group_topk=4)
    assert comm_volume.rows_per_token(layer, free) > 15
    assert comm_volume.rows_per_token(layer, limited) == pytest.approx(4, rel=1e-6)
    assert comm_volume.cheapest_dispatcher(layer, 1024, free) == "allgather"
    assert comm_volume.cheapest_dispatcher(layer, 1024, limited) == "alltoall"


@pytest.mark.parametrize(
    ("router", "numbers", "key_width"),
    [
        ("lorkm", {"active_cells": 64, "block_size": 4, "expansion": 2}, 128),
        ("pkm", {"active_cells": 16, "block_size": 1, "expansion": 16}, 0),
    ],
)
def test_a_dispatched_row_is_as_wide_as_a_key(
    router: str, numbers: dict[str, int], key_width: int
) -> None:
    layer, width = sparse(router, **numbers), 192
    layout = ParallelLayout(ep=4, dtype=torch.bfloat16)
    pair = 2 + (4 if layer.router.gated_output else 0)
    gathered = comm_volume.all_gather_bytes_per_token(layer, width, layout)
    assert gathered == 3 * ((key_width + width) * 2 + layer.num_active_blocks * pair)
    missed = math.comb(layer.num_blocks * 3 // 4, layer.num_active_blocks) / math.comb(
        layer.num_blocks, layer.num_active_blocks
    )
    pairs = layer.num_active_blocks * 3 / 4 * pair
    exact = comm_volume.all_to_all_bytes_per_token(layer, width, layout)
    assert exact == pytest.approx(3 * (1 - missed) * (key_width + width) * 2 + pairs)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("router", ["avg-k", "vanilla-m", "switch"])
def test_a_latent_layer_sends_what_a_layer_of_that_hidden_size_sends(
    router: str, dispatcher: str
) -> None:
    layer = sparse(router, active_cells=64, block_size=4, expansion=2)
    latent = dataclasses.replace(layer, latent_size=48)
    layout = ParallelLayout(ep=4, dispatcher=dispatcher, dtype=torch.bfloat16)
    for volume in (comm_volume.exchanged_bytes_per_token, comm_volume.megatron_bytes_per_token):
        assert volume(latent, 192, layout) == volume(layer, 48, layout)
        assert volume(latent, 192, layout) < volume(layer, 192, layout)


def test_shared_blocks_do_not_travel() -> None:
    layer = sparse(active_cells=64, block_size=4, expansion=2)
    shared = dataclasses.replace(layer, shared_blocks=4)
    layout = ParallelLayout(ep=2)
    for exchanged in comm_volume.DISPATCHERS.values():
        assert exchanged(shared, 24, layout) < exchanged(layer, 24, layout)


def test_megatron_sends_a_copy_per_block() -> None:
    layer = sparse(active_cells=64, block_size=4, expansion=2)
    remote = ParallelLayout(ep=4, dtype=torch.bfloat16)
    sent = comm_volume.megatron_bytes_per_token
    assert sent(layer, 24, remote) == 2 * 16 * 3 / 4 * 24 * 2
    # Each ETP rank of the block gets the copies too.
    etp_layout = ParallelLayout(etp=2, dtype=torch.bfloat16)
    assert sent(layer, 24, etp_layout) == 2 * 16 * 24 * 2
    # Or the token once, with a bool and an fp32 for each of the 32 blocks.
    gather_layout = dataclasses.replace(remote, dispatcher="allgather")
    assert sent(layer, 24, gather_layout) == 3 * (2 * 24 * 2 + 32 * 5)


def test_the_bytes_of_the_papers_smallest_block_on_4096_ranks() -> None:
    layer = sparse(active_cells=4096, block_size=1, expansion=16)
    layout = ParallelLayout(ep=4096, dtype=torch.bfloat16)
    sent = comm_volume.exchanged_bytes_per_token(layer, 1024, layout)
    # 16 of the 65,536 cells on each rank, 4096 of them chosen: (15/16)^16 of the ranks stay out.
    rows = 4095 * (1 - (15 / 16) ** 16)
    assert sent == pytest.approx(2 * rows * 1024 * 2 + 4095 * 2, rel=1e-3)


@pytest.mark.parametrize(
    ("block_size", "ranks", "chosen"),
    [
        (4096, 2, "alltoall"),  # half of the tokens stay
        (1024, 2, "alltoall"),  # 15/16 of the ranks are hit
        (256, 2, "allgather"),
        (256, 8, "alltoall"),  # 88 %
        (64, 8, "allgather"),
        (64, 64, "alltoall"),  # 64 %
    ],
)
def test_the_all_gather_is_chosen_where_almost_every_rank_is_visited(
    block_size: int, ranks: int, chosen: str
) -> None:
    layer = sparse(active_cells=4096, block_size=block_size, expansion=16)
    layout = ParallelLayout(ep=ranks, dtype=torch.bfloat16)
    assert comm_volume.cheapest_dispatcher(layer, 1024, layout) == chosen
    # Gloo's reduce-scatter sends twice.
    gloo = dataclasses.replace(layout, comm_backend="gloo")
    assert comm_volume.cheapest_dispatcher(layer, 1024, gloo) == "alltoall"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What a rank sends to other ranks in a layer's evaluation.

    Args:
        sffn: config of the layer.
        counted: bytes per token of the collectives.
        own_count: the same, as the layer counts them.
        tokens: number of tokens.
    """

    sffn: SparseFFNConfig
    counted: float
    own_count: float
    tokens: int


def sent(case: Case) -> Sent:
    """What this rank sends in an evaluation of a layer."""
    layer = build(case).eval()
    # Descriptors are gathered once per optimizer step, not per microbatch.
    layer.router.weights_version = 0
    steps, rank, grid = 1024, torch.distributed.get_rank(), layer.experts.expert_grid
    ids = torch.randint(1 << 20, (BATCH, steps), generator=torch.Generator().manual_seed(5))
    ids += rank << 20
    hidden = draw(rank, steps, BATCH, D)
    with torch.no_grad():
        layer(hidden, padding_mask=ids)  # the descriptors
        layer.traffic.take()
        with wire.counted() as collectives:
            layer(hidden, padding_mask=ids)
    tokens, own_count = layer.traffic.take()
    # The all-to-all's counts, an int64 pair for each rank, are left out by the closed form.
    groups = [grid.group] if grid.node_groups is None else grid.node_groups
    counts = sum(16 * (group.size() - 1) for group in groups)
    counts = counts if "alltoall" in dict(case.megatron).values() else 0
    return Sent(
        sffn=layer.config.sffn,
        counted=(collectives.total - counts) / tokens,
        own_count=own_count / tokens,
        tokens=tokens,
    )


def sent_by_all(cases: list[Case]) -> list[Sent]:
    """`sent` of several layers, one after the other."""
    return [sent(case) for case in cases]


LAYOUTS = {
    # Everything is in float64, gates and scores too.
    "EP2": ParallelLayout(ep=2, dtype=torch.float64),
    "EP2 ETP2": ParallelLayout(ep=2, etp=2, dtype=torch.float64),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_of_latent_layers_send_the_bytes_of_the_closed_form(name: str) -> None:
    layout = dataclasses.replace(LAYOUTS[name], dispatcher="allgather")
    cases = [
        Case(
            router=router,
            block_size=8,
            sffn=(("latent_size", 5),),
            megatron=(("moe_token_dispatcher_type", "allgather"),),
        )
        for router in ("avg-k", "rand-hash", "vanilla-m")
    ]
    ranks = run_ranks(layout.world_size, sent_by_all, cases, **layout.megatron_sizes())
    for results in zip(*ranks, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comm_volume, "SCORE_BYTES", 8)
            patch.setattr("megatron_sffn.nn.routers.vanilla_m.SCORE_BYTES", 8)
            expected = comm_volume.exchanged_bytes_per_token(results[0].sffn, D, layout)
        assert {result.counted for result in results} == {expected}


def routers_of(name: str) -> list[str]:
    """Routers that fit a layout: a block of a single cell is not split."""
    return [router for router in SPARSE if name == "EP2" or router not in SINGLE_CELLS]


@cache
def sent_by_routers(name: str, dispatcher: str) -> dict[str, tuple[Sent, ...]]:
    """`sent` of each router on each rank of a layout."""
    layout, routers = LAYOUTS[name], routers_of(name)
    cases = []
    for router in routers:
        # g = 8: K = 2 of B = 6 blocks or of 4, so that many tokens visit one rank only.
        numbers = ROUTERS[router].test_numbers.layer(active_cells=16, block_size=8, expansion=3)
        cases.append(
            Case(
                router=router,
                block_size=numbers["block_size"],
                expansion=numbers["expansion"],
                megatron=(("moe_token_dispatcher_type", dispatcher),),
            )
        )
    ranks = run_ranks(layout.world_size, sent_by_all, cases, **layout.megatron_sizes())
    return dict(zip(routers, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    ("router", "name"), [(router, name) for name in LAYOUTS for router in routers_of(name)]
)
def test_collectives_send_the_bytes_of_the_closed_form(
    router: str, name: str, dispatcher: str
) -> None:
    layout = dataclasses.replace(LAYOUTS[name], dispatcher=dispatcher)
    results = sent_by_routers(name, dispatcher)[router]
    counted = sum(result.counted for result in results) / layout.world_size
    layer = results[0].sffn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm_volume, "SCORE_BYTES", 8)
        patch.setattr("megatron_sffn.nn.routers.vanilla_m.SCORE_BYTES", 8)
        expected = comm_volume.exchanged_bytes_per_token(layer, D, layout)
        selection = layer.router.exchanged_bytes(layer, D, layout)
    for result in results:
        assert result.tokens == 4096
        # The layer's own count is that of the collectives, without the selection's bytes.
        assert result.own_count + selection == pytest.approx(result.counted, rel=1e-12)
    if dispatcher == "allgather":
        assert counted == expected
    elif router == "rand-hash":
        # Uniform routing: 4 standard errors of a mean over 4096 tokens a rank.
        assert counted == pytest.approx(expected, rel=4 / math.sqrt(4096 * layout.world_size))
    else:
        # A choice by scores is not uniform: its volume is between no and all ranks visited.
        assert 0 < counted < 1.25 * expected


def test_a_token_crosses_to_each_node_once() -> None:
    case = Case(
        router="rand-hash",
        block_size=4,
        megatron=(("moe_token_dispatcher_type", "alltoall"),),
        sffn=(("node_size", 2),),
    )
    results = run_ranks(4, sent, case, expert_model_parallel_size=4)
    for result in results:
        assert result.own_count == pytest.approx(result.counted, rel=1e-12)
    # Each token has 4 of 12 blocks, of which a node has 6 and a rank 3.
    node_share, rank_share = (
        1 - math.comb(6, 4) / math.comb(12, 4),
        1 - math.comb(9, 4) / math.comb(12, 4),
    )
    row, pair = 2 * D * 2, 2
    node_bytes = node_share * row + 4 / 2 * pair
    expected = node_bytes + 2 * rank_share * row + 4 / 2 * pair
    layer = sparse(active_cells=16, block_size=4, expansion=3, node_size=2)
    layout = ParallelLayout(ep=4, dtype=torch.bfloat16)
    assert comm_volume.bytes_between_nodes_per_token(layer, D, layout) == pytest.approx(node_bytes)
    assert comm_volume.exchanged_bytes_per_token(layer, D, layout) == pytest.approx(expected)
    # The run is in float64.
    layer = dataclasses.replace(layer, router=ROUTERS["rand-hash"]())
    float64_layout = dataclasses.replace(layout, dtype=torch.float64)
    expected = comm_volume.exchanged_bytes_per_token(layer, D, float64_layout)
    counted = sum(result.counted for result in results) / 4
    assert counted == pytest.approx(expected, rel=4 / math.sqrt(4096 * 4))
    flat = dataclasses.replace(layer, node_size=0)
    assert comm_volume.cheapest_dispatcher(layer, D, layout) == "alltoall"
    assert comm_volume.exchanged_bytes_per_token(flat, D, float64_layout) < expected


def sent_in_groups(by_score: bool) -> float:
    """Bytes per token of an exchange whose tokens have 4 of 64 blocks in 2 of 8 groups."""
    group, tokens = torch.distributed.group.WORLD, 4096
    grid = ExpertGrid(group=group, ep_size=4, etp_size=1, num_blocks=64, block_size=1)
    random = torch.Generator().manual_seed(group.rank())
    scores = torch.rand(tokens, 64, generator=random)
    if by_score:
        allowed = in_best_groups(scores, 4, 8, 2, lambda worth, count: worth.topk(count).indices)
    else:
        chosen = torch.rand(tokens, 8, generator=random).topk(2).indices
        allowed = torch.zeros(tokens, 8, dtype=torch.bool).scatter_(1, chosen, True)
        allowed = allowed.repeat_interleave(8, dim=1)
    ids = scores.masked_fill(~allowed, -1).topk(4).indices
    with wire.counted() as collectives:
        plan = dispatch(torch.zeros(tokens, D), Routing(block_ids=ids), grid, "alltoall")
        plan.run(lambda arrived: arrived.rows)
    assert plan.bytes_sent == collectives.total - 16 * (group.size() - 1)
    return plan.bytes_sent / tokens


def test_group_limited_routing_sends_the_bytes_of_the_closed_form() -> None:
    layer = sparse(active_cells=4, block_size=1, expansion=16)
    free = ParallelLayout(ep=4)
    layout = dataclasses.replace(free, router_groups=8, router_group_topk=2)
    expected = comm_volume.exchanged_bytes_per_token(layer, D, layout)
    uniform = sum(run_ranks(4, sent_in_groups, False)) / 4
    assert uniform == pytest.approx(expected, rel=4 / math.sqrt(4096 * 4))
    # Scores choose groups with several good blocks, so that tokens use both of their groups.
    scored_bytes = sum(run_ranks(4, sent_in_groups, True)) / 4
    assert expected < scored_bytes < 1.1 * expected
    assert scored_bytes < 0.8 * comm_volume.exchanged_bytes_per_token(layer, D, free)
