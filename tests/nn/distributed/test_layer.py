"""Every parallel layout computes the outputs and all gradients of one rank, in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_sffn.nn import layer as layer_module
from megatron_sffn.nn.config import Backend
from megatron_sffn.nn.dispatch import DispatchedTokens, dispatch
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.routers.base import Routing
from tests.support.ranks import run_ranks
from tests.support.router_cases import (
    BATCH,
    SINGLE_CELLS,
    SPARSE,
    WHOLE_KEYS,
    Case,
    S,
    build,
    copy_tables,
    inputs,
    run,
)
from tests.support.slow import slow


def layout(tp: int = 1, ep: int = 1, etp: int = 1) -> dict[str, int]:
    """Arguments of `initialize_model_parallel`."""
    return {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


LAYOUTS = {
    "EP2": (2, layout(ep=2)),
    "EP4": (4, layout(ep=4)),
    "EP2 x DP2": (4, layout(ep=2)),
    "TP2": (2, layout(tp=2)),
    "TP2 EP2": (2, layout(tp=2, ep=2)),
    "TP2 EP4": (4, layout(tp=2, ep=4)),
    "TP2 ETP2": (2, layout(tp=2, etp=2)),
    "ETP2 x DP2": (4, layout(etp=2)),
    "EP2 ETP2": (4, layout(ep=2, etp=2)),
    "TP2 EP2 ETP2": (4, layout(tp=2, ep=2, etp=2)),
}


COVERED = ["EP4", "ETP2 x DP2", "EP2 ETP2"]
"""Layouts for `make test-slow`: others have the same dimensions, with TP or EP beside them."""


def without_balance(router: str, *megatron: tuple[str, object], **fields: object) -> Case:
    """A layer whose result does not depend on the split of the tokens into microbatches.

    Auxiliary losses depend on it, and so does the choice of S-BASE in training.
    """
    no_loss = (("moe_router_load_balancing_type", "none"), ("moe_aux_loss_coeff", 0.0))
    megatron += no_loss if router == "switch" else ()
    return Case(router=router, megatron=megatron, training=router != "s-base", **fields)


def run_all(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """Run several layers, one after the other."""
    return [run(case) for case in cases]


@cache
def computed(name: str | None, dispatcher: str) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Results of every router that fits a layout, from each of its ranks; None for one rank."""
    world_size, sizes = LAYOUTS[name] if name else (1, {})
    routers = [router for router in SPARSE if fits(router, name)]
    cases = [
        without_balance(router, ("moe_token_dispatcher_type", dispatcher)) for router in routers
    ]
    results = zip(*run_ranks(world_size, run_all, cases, **sizes), strict=True)
    return {router: list(ranks) for router, ranks in zip(routers, results, strict=True)}


def fits(router: str, name: str | None) -> bool:
    """False if the layout splits blocks and the router's blocks are single cells."""
    return not (router in SINGLE_CELLS and name is not None and "ETP" in name)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    ("name", "router"),
    [
        slow(name, router) if name in COVERED else (name, router)
        for name in LAYOUTS
        for router in SPARSE
        if fits(router, name)
    ],
)
def test_every_layout_computes_the_results_of_one_rank(
    name: str, router: str, dispatcher: str
) -> None:
    (expected,) = computed(None, dispatcher)[router]
    assert_same(computed(name, dispatcher)[router], expected)


def assert_same(by_rank: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for result in by_rank:
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


NODES = {
    "TP2 EP8": (2, layout(tp=2, ep=8)),
    "TP2 EP4 ETP2": (4, layout(tp=2, ep=4, etp=2)),
}
"""Layout of 8 ranks, as 2 nodes of 4 -> (a block size that it can split, its group sizes)."""


# With and without ETP, rows go the same way; with ETP, more ranks need a row.
@pytest.mark.parametrize("name", [slow("TP2 EP8"), "TP2 EP4 ETP2"])
def test_dispatch_over_nodes_computes_the_results_of_one_rank(name: str) -> None:
    block_size, sizes = NODES[name]
    routers, flag = ["switch", "lorkm", "rand-hash"], ("moe_token_dispatcher_type", "alltoall")
    flat, on_nodes = (
        [without_balance(router, flag, block_size=block_size, sffn=fields) for router in routers]
        for fields in ((), (("node_size", 4), ("regather", "on")))
    )
    # One case keeps its rows in place of regathering them.
    on_nodes.append(replace(on_nodes[0], sffn=(("node_size", 4), ("regather", "off"))))
    (expected,) = run_ranks(1, run_all, [*flat, flat[0]])
    expected = [*expected[: len(flat)], *expected]
    for results in run_ranks(8, run_all, [*flat, *on_nodes], **sizes):
        for result, one_rank_result in zip(results, expected, strict=True):
            assert_same([result], one_rank_result)


def chunked_and_unchunked(name: str) -> list[tuple[Case, Case]]:
    """Layers that dispatch their tokens in 5 chunks, each with the same layer in 1 chunk."""
    on_nodes = (("node_size", 2),) if name == "EP4" else ()
    cases = [
        # With a capacity factor some places stay empty.
        ("switch", (("moe_expert_capacity_factor", 1.0), ("moe_token_drop_policy", "probs")), ()),
        ("switch", (), (("regather", "on"),)),
        ("avg-k", (), (("shared_blocks", 1), ("regather", "off"))),
        ("lorkm", (), (("regather", "on"),)),
        *([] if "ETP" in name else [("pkm", (), ())]),
    ]
    return [
        tuple(
            without_balance(
                router,
                ("moe_token_dispatcher_type", "alltoall"),
                *megatron,
                sffn=(*on_nodes, *sffn, ("exchange_chunks", chunks)),
            )
            for chunks in (5, 1)
        )
        for router, megatron, sffn in cases
    ]


def run_seeded(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """`run_all` with the same weights of the shared blocks in every case."""
    warnings.simplefilter("ignore")  # Megatron's warning about the width of shared experts
    results = []
    for case in cases:
        model_parallel_cuda_manual_seed(1)
        results.append(run(case))
    return results


@pytest.mark.parametrize("name", ["EP2", "EP4", "EP2 ETP2"])
def test_chunks_compute_the_results_of_the_whole_microbatch(name: str) -> None:
    world_size, sizes = LAYOUTS[name]
    pairs = chunked_and_unchunked(name)
    cases = [case for pair in pairs for case in pair]
    results = run_ranks(world_size, run_seeded, cases, **sizes)
    for rank_results in results:
        for chunked, unchunked in zip(rank_results[::2], rank_results[1::2], strict=True):
            assert_same([chunked], unchunked)


OPTIONS = {
    **{
        f"aggregator {aggregator}": Case(router="vanilla-m", options=(("aggregator", aggregator),))
        for aggregator in ("mean-abs", "max", "min")
    },
    "norms with a gate": Case(
        router="vanilla-m", options=(("aggregator", "norm"), ("gate", "softmax"))
    ),
    # Gradients of scores reach the keys of other ranks.
    **{
        f"{router} {gate}": Case(router=router, options=(("gate", gate),))
        for router in ("avg-k", "vanilla-m", "lorkm")
        for gate in ("sigmoid", "softmax")
    },
    **{f"{router} swiglu": without_balance(router, swiglu=True) for router in ("avg-k", "switch")},
    "max-norm": Case(router="avg-k", options=(("descriptor", "max-norm"),)),
    "subset": Case(router="avg-k", options=(("descriptor", "subset"), ("subset_cells", 2))),
    "several heads": Case(router="peer", options=(("heads", 2),)),
    "mlp": Case(router="sigma-moe", options=(("network", "mlp"), ("network_width", 6))),
}
LATENT = {
    router: without_balance(router, options=options, sffn=(("latent_size", 6),))
    for router, options in {
        "avg-k": (("gate", "sigmoid"),),
        "vanilla-m": (("gate", "sigmoid"),),
        "lorkm": (("gate", "sigmoid"), ("rank", 5)),
        "switch": (),
        "s-base": (),
        "rand-hash": (),
    }.items()
}
"""Layers whose blocks have rows of 6 numbers, by routers that score these rows or the tokens."""


def latent_results(**sizes: int) -> dict[str, list[dict[str, Any]]]:
    """Results of each of `LATENT` on every rank of a layout of 4 ranks, or on one rank."""
    ranks = run_ranks(4 if sizes else 1, run_all, list(LATENT.values()), **layout(**sizes))
    return dict(zip(LATENT, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("sizes", [{"tp": 2, "ep": 4}, {"ep": 2, "etp": 2}], ids=str)
def test_latent_layers_compute_the_results_of_one_rank(sizes: dict[str, int]) -> None:
    expected = latent_results()
    for router, by_rank in latent_results(**sizes).items():
        (one_rank,) = expected[router]
        assert {"dfc1_latent_proj.weight", "dfc2_latent_proj.weight"} <= one_rank.keys()
        assert all(float(one_rank[name].abs().max()) > 1e-6 for name in one_rank), router
        assert_same(by_rank, one_rank)


@cache
def computed_options(world_size: int, ep: int, etp: int) -> dict[str, list[dict[str, Any]]]:
    """Results of each of `OPTIONS` on every rank of a layout."""
    ranks = run_ranks(world_size, run_all, list(OPTIONS.values()), **layout(ep=ep, etp=etp))
    return dict(zip(OPTIONS, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_agree_with_one_rank_if_the_cells_of_a_block_lie_on_several_ranks(
    name: str,
) -> None:
    assert_same(computed_options(4, 2, 2)[name], computed_options(1, 1, 1)[name][0])


def test_swiglu_agrees_with_one_rank_for_single_cells_on_two_ranks() -> None:
    case = Case(router="vanilla-m", block_size=1, swiglu=True)
    assert_same(run_ranks(2, run, case, **layout(ep=2)), run_ranks(1, run, case)[0])


def descriptors() -> torch.Tensor:
    layer = build(Case(router="avg-k"))
    return layer.router._descriptors(layer.experts.keys.float()).detach()


@pytest.mark.parametrize("name", ["EP2 x DP2", "TP2 EP4", "EP2 ETP2", "TP2 EP2 ETP2"])
def test_descriptors_have_the_same_bits_on_every_rank(name: str) -> None:
    world_size, sizes = LAYOUTS[name]
    by_rank = run_ranks(world_size, descriptors, **sizes)
    assert by_rank[0].dtype == torch.float32
    assert all(torch.equal(by_rank[0], rank_descriptors) for rank_descriptors in by_rank)
    (expected,) = run_ranks(1, descriptors)
    torch.testing.assert_close(by_rank[0], expected)


def run_both_layers(router: str, dispatcher: str) -> list[list[torch.Tensor]]:
    """Output and input gradient of `SparseFFN` and of `MegatronBackedFFN`, on this rank."""
    # Megatron's experts warn because sequence parallelism is on and they do not use it.
    warnings.simplefilter("ignore")
    case = without_balance(router, ("moe_token_dispatcher_type", dispatcher))
    layers = [build(case), build(replace(case, backend=Backend.MEGATRON))]
    copy_tables(*layers)
    hidden, ids, weights = inputs()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    hidden, weights = (x.chunk(tp_group.size())[tp_group.rank()] for x in (hidden, weights))
    results = []
    for layer in layers:
        x = hidden.clone().requires_grad_()
        y, _ = layer(x, padding_mask=ids)
        (y * weights).sum().backward()
        # A copy, because Megatron's all-gather dispatcher uses the memory of this gradient again.
        results.append([y.detach(), x.grad.clone()])
    return results


def run_both_layers_of_all(dispatcher: str) -> dict[str, list[list[torch.Tensor]]]:
    """`run_both_layers` of each router that has Megatron's keys."""
    return {router: run_both_layers(router, dispatcher) for router in WHOLE_KEYS}


@cache
def both_layers(name: str, dispatcher: str) -> list[dict[str, list[list[torch.Tensor]]]]:
    """`run_both_layers_of_all` on every rank of a layout."""
    world_size, sizes = LAYOUTS[name]
    return run_ranks(world_size, run_both_layers_of_all, dispatcher, **sizes)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", ["EP2", "TP2 EP2"])
@pytest.mark.parametrize("router", WHOLE_KEYS)
def test_megatrons_dispatchers_agree_with_sparse_ffn(
    router: str, name: str, dispatcher: str
) -> None:
    for rank_results in both_layers(name, dispatcher):
        for actual, expected in zip(*rank_results[router], strict=True):
            # Megatron's probabilities are fp32.
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def exchange(block_ids: list[list[list[int]]], chunks: int = 1) -> dict[str, object]:
    """Dispatch and combine tokens whose blocks are given per rank; 8 blocks over the ranks."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.group.WORLD
    ids = torch.tensor(block_ids[rank], dtype=torch.long).view(-1, 2)
    x = (torch.arange(len(ids)).double()[:, None] + 100 * rank).expand(-1, 3).contiguous()
    gates = torch.ones(ids.shape, dtype=torch.double)
    grid = ExpertGrid(group=group, ep_size=ranks, etp_size=1, num_blocks=8, block_size=1)
    rows, pairs = [], []

    def compute(dispatched: DispatchedTokens) -> torch.Tensor:
        # Each block multiplies by its own number, so a row on the wrong rank changes the result.
        y, pair_rows = torch.zeros_like(dispatched.rows), dispatched.pairs.rows
        factors = (dispatched.pairs.blocks + rank * (8 // ranks) + 1).double()[:, None]
        rows.append(len(y))
        pairs.append(len(pair_rows))
        return y.index_add_(0, pair_rows, dispatched.rows[pair_rows] * factors)

    routing = Routing(block_ids=ids, gates=gates)
    y = dispatch(x, routing, grid, "alltoall", num_chunks=chunks).run(compute)
    expected = x * (ids + 1).sum(dim=1, keepdim=True)
    return {"rows": rows, "pairs": pairs, "correct": bool(torch.equal(y, expected))}


def test_a_token_is_sent_once_to_each_rank_that_holds_one_of_its_blocks() -> None:
    # On rank 0, token 0 needs two blocks of rank 0, and token 1 needs a block of each rank.
    ids = [[[0, 3], [1, 6]], [[4, 7], [5, 6], [0, 1]]]
    results = run_ranks(2, exchange, ids)
    assert [result["rows"] for result in results] == [[3], [3]]
    assert [result["pairs"] for result in results] == [[5], [5]]
    assert all(result["correct"] for result in results)
    # In two chunks, the first has 1 token of each rank, the second 1 and 2 tokens.
    results = run_ranks(2, exchange, ids, 2)
    assert [result["rows"] for result in results] == [[1, 2], [1, 2]]
    assert [result["pairs"] for result in results] == [[2, 3], [2, 3]]
    assert all(result["correct"] for result in results)


@pytest.mark.parametrize(
    "ids",
    [
        [[[0, 1], [2, 3]], [[0, 2], [1, 3]]],  # nothing for rank 1
        [[], [[0, 7]]],  # rank 0 has no token
        [[], []],  # no rank has a token
    ],
)
def test_ranks_without_rows_or_without_tokens_take_part(ids: list[list[list[int]]]) -> None:
    # 3 chunks are more than a rank has tokens.
    for chunks in (1, 3):
        results = run_ranks(2, exchange, ids, chunks)
        assert all(result["correct"] for result in results)


def run_with_one_word(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    """`run` with the same id for all tokens, and the number of rows of this rank."""
    rows = []
    compute = layer_module.block_ffn_pairs

    def counting(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows.append(len(x))
        return compute(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "block_ffn_pairs", counting)
        result = run(case, ids=torch.full((BATCH, S), 4))
    return result, rows[0]


@pytest.mark.parametrize("name", ["EP4", "TP2 EP4"])
def test_a_rank_whose_blocks_no_token_needs_takes_part(name: str) -> None:
    # All tokens have the same id, so they need the same 4 of 12 blocks.
    case = without_balance("rand-hash", ("moe_token_dispatcher_type", "alltoall"))
    ((expected, _),) = run_ranks(1, run_with_one_word, case)
    world_size, sizes = LAYOUTS[name]
    results = run_ranks(world_size, run_with_one_word, case, **sizes)
    assert_same([result for result, _ in results], expected)
    assert min(rows for _, rows in results) == 0


def initial_block_weights() -> tuple[torch.Tensor, torch.Tensor]:
    block_weights = build(Case(router="avg-k")).experts
    return block_weights.keys.detach().clone(), block_weights.values.detach().clone()


def test_initial_block_weights_do_not_depend_on_the_layout() -> None:
    ((keys, values),) = run_ranks(1, initial_block_weights)
    rank_keys, rank_values = zip(*run_ranks(4, initial_block_weights, **layout(ep=4)), strict=True)
    assert torch.equal(torch.cat(rank_keys), keys)
    assert torch.equal(torch.cat(rank_values), values)
    by_rank = run_ranks(2, initial_block_weights, **layout(tp=2, etp=2))
    rank_keys, rank_values = zip(*by_rank, strict=True)
    assert torch.equal(torch.cat(rank_keys, dim=1), keys)
    assert torch.equal(torch.cat(rank_values, dim=1), values)
