"""Every layout of ranks computes what one rank does: outputs and all gradients, in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

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
    NUMBERS,
    SPARSE,
    WHOLE_KEYS,
    Case,
    S,
    build,
    copy_tables,
    inputs,
    run,
)


def layout(tensor: int = 1, expert: int = 1, cells: int = 1) -> dict[str, int]:
    """Arguments of `initialize_model_parallel`."""
    return {
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": cells,
    }


LAYOUTS = {
    "EP2": (2, layout(expert=2)),
    "EP4": (4, layout(expert=4)),
    "EP2 x DP2": (4, layout(expert=2)),
    "TP2": (2, layout(tensor=2)),
    "TP2 EP2": (2, layout(tensor=2, expert=2)),
    "TP2 EP4": (4, layout(tensor=2, expert=4)),
    "TP2 ETP2": (2, layout(tensor=2, cells=2)),
    "ETP2 x DP2": (4, layout(cells=2)),
    "EP2 ETP2": (4, layout(expert=2, cells=2)),
    "TP2 EP2 ETP2": (4, layout(tensor=2, expert=2, cells=2)),
}


def without_balance(router: str, *megatron: tuple[str, object], **fields: object) -> Case:
    """A layer whose result does not depend on how the tokens are cut in microbatches.

    Balance losses are of a microbatch, and so is the choice that S-BASE makes in training.
    """
    none = (("moe_router_load_balancing_type", "none"), ("moe_aux_loss_coeff", 0.0))
    megatron += none if router == "switch" else ()
    return Case(router=router, megatron=megatron, training=router != "s-base", **fields)


def run_all(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """Several layers, one after the other."""
    return [run(case) for case in cases]


@cache
def computed(name: str | None, dispatcher: str) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What each rank of a layout, None for one rank, has of every router it can have."""
    world_size, sizes = LAYOUTS[name] if name else (1, {})
    routers = [router for router in SPARSE if fits(router, name)]
    cases = [
        without_balance(router, ("moe_token_dispatcher_type", dispatcher)) for router in routers
    ]
    parts = zip(*run_ranks(world_size, run_all, cases, **sizes), strict=True)
    return {router: list(ranks) for router, ranks in zip(routers, parts, strict=True)}


def fits(router: str, name: str | None) -> bool:
    """Blocks of single cells have no parts."""
    single = NUMBERS.get(router, {}).get("block_size") == 1
    return not (single and name is not None and "ETP" in name)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    ("name", "router"), [(name, r) for name in LAYOUTS for r in SPARSE if fits(r, name)]
)
def test_a_layout_computes_what_one_rank_does(name: str, router: str, dispatcher: str) -> None:
    (one,) = computed(None, dispatcher)[router]
    assert_same(computed(name, dispatcher)[router], one)


def assert_same(results: list[dict[str, torch.Tensor]], one: dict[str, torch.Tensor]) -> None:
    for result in results:
        for name, expected in one.items():
            torch.testing.assert_close(result[name], expected, rtol=1e-9, atol=1e-11, msg=name)


NODES = {
    "TP2 EP8": (2, layout(tensor=2, expert=8)),
    "TP2 EP4 ETP2": (4, layout(tensor=2, expert=4, cells=2)),
}
"""Layout of 8 ranks, as 2 nodes of 4 -> a block size whose blocks it can cut."""


@pytest.mark.parametrize("name", NODES)
def test_once_per_node_computes_what_one_rank_and_the_flat_exchange_do(name: str) -> None:
    block_size, sizes = NODES[name]
    routers, step = ["switch", "lorkm", "rand-hash"], (("moe_token_dispatcher_type", "alltoall"),)
    flat, on_nodes = (
        [without_balance(router, *step, block_size=block_size, sffn=fields) for router in routers]
        for fields in ((), (("node_size", 4), ("regather", "on")))
    )
    # Without its rows sent again, too.
    on_nodes.append(replace(on_nodes[0], sffn=(("node_size", 4), ("regather", "off"))))
    (one,) = run_ranks(1, run_all, [*flat, flat[0]])
    eight = run_ranks(8, run_all, [*flat, *on_nodes], **sizes)
    for results in eight:
        for result, expected in zip(results, [*one[: len(flat)], *one], strict=True):
            assert_same([result], expected)


def chunked_and_at_once(name: str) -> list[tuple[Case, Case]]:
    """Layers whose tokens travel in chunks, beside the same ones whose tokens travel at once."""
    on_nodes = (("node_size", 2),) if name == "EP4" else ()
    cases = [
        # Some places stay empty, and a balance loss hangs on the gates.
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
    """`run_all` with the same weights of shared blocks in each."""
    warnings.simplefilter("ignore")  # Megatron's, about the width of shared experts
    results = []
    for case in cases:
        model_parallel_cuda_manual_seed(1)
        results.append(run(case))
    return results


@pytest.mark.parametrize("name", ["EP2", "EP4", "EP2 ETP2"])
def test_chunks_compute_what_the_whole_microbatch_does(name: str) -> None:
    world_size, sizes = LAYOUTS[name]
    pairs = chunked_and_at_once(name)
    cases = [case for pair in pairs for case in pair]
    results = run_ranks(world_size, run_seeded, cases, **sizes)
    for of_rank in results:
        for chunked, at_once in zip(of_rank[::2], of_rank[1::2], strict=True):
            assert_same([chunked], at_once)


@pytest.mark.parametrize("aggregator", ["mean-abs", "max", "min"])
def test_aggregates_of_cells_that_lie_on_several_ranks(aggregator: str) -> None:
    case = Case(router="vanilla-m", options=(("aggregator", aggregator),))
    assert_same(run_ranks(4, run, case, **layout(expert=2, cells=2)), run_ranks(1, run, case)[0])


@pytest.mark.parametrize("router", ["avg-k", "vanilla-m", "lorkm"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_differentiated_score_reaches_the_keys_of_other_ranks(router: str, gate: str) -> None:
    case = Case(router=router, options=(("gate", gate),))
    assert_same(run_ranks(4, run, case, **layout(expert=2, cells=2)), run_ranks(1, run, case)[0])


def test_swiglu_and_single_cells_on_two_ranks() -> None:
    case = Case(router="vanilla-m", block_size=1, swiglu=True)
    assert_same(run_ranks(2, run, case, **layout(expert=2)), run_ranks(1, run, case)[0])


@pytest.mark.parametrize("router", ["avg-k", "switch"])
def test_swiglu_with_cells_on_several_ranks(router: str) -> None:
    case = without_balance(router, swiglu=True)
    assert_same(run_ranks(4, run, case, **layout(expert=2, cells=2)), run_ranks(1, run, case)[0])


def bits_of_descriptors() -> torch.Tensor:
    layer = build(Case(router="avg-k"))
    return layer.router._descriptors(layer.experts.keys.float()).detach()


@pytest.mark.parametrize("name", ["EP2 x DP2", "TP2 EP4", "EP2 ETP2", "TP2 EP2 ETP2"])
def test_descriptors_are_the_same_bits_on_every_rank(name: str) -> None:
    world_size, sizes = LAYOUTS[name]
    first, *others = run_ranks(world_size, bits_of_descriptors, **sizes)
    assert first.dtype == torch.float32
    assert all(torch.equal(first, other) for other in others)
    (one,) = run_ranks(1, bits_of_descriptors)
    torch.testing.assert_close(first, one)


def beside_megatron(router: str, dispatcher: str) -> list[list[torch.Tensor]]:
    """Output and input gradient of our layer and of Megatron's dispatcher and experts behind it."""
    # Megatron's own: its experts hear of sequence parallelism, and have none.
    warnings.simplefilter("ignore")
    case = without_balance(router, ("moe_token_dispatcher_type", dispatcher))
    layers = [build(case), build(replace(case, backend=Backend.MEGATRON))]
    copy_tables(*layers)
    hidden, ids, weights = inputs()
    tensor = parallel_state.get_tensor_model_parallel_group()
    hidden, weights = (part.chunk(tensor.size())[tensor.rank()] for part in (hidden, weights))
    results = []
    for layer in layers:
        x = hidden.clone().requires_grad_()
        y, _ = layer(x, padding_mask=ids)
        (y * weights).sum().backward()
        results.append([y.detach(), x.grad])
    return results


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", ["EP2", "TP2 EP2"])
@pytest.mark.parametrize("router", WHOLE_KEYS)
def test_megatrons_dispatchers_agree_with_ours(router: str, name: str, dispatcher: str) -> None:
    world_size, sizes = LAYOUTS[name]
    for ours, theirs in run_ranks(world_size, beside_megatron, router, dispatcher, **sizes):
        for mine, reference in zip(ours, theirs, strict=True):
            # Megatron's probabilities are fp32.
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


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
    back = dispatch(x, routing, grid, "alltoall", num_chunks=chunks).run(compute)
    expected = x * (ids + 1).sum(dim=1, keepdim=True)
    return {"rows": rows, "pairs": pairs, "right": bool(torch.equal(back, expected))}


def test_a_token_travels_once_to_each_rank_that_holds_a_block_of_it() -> None:
    # Rank 0: token 0 needs rank 0 only (two blocks there), token 1 both ranks.
    ids = [[[0, 3], [1, 6]], [[4, 7], [5, 6], [0, 1]]]
    results = run_ranks(2, exchange, ids)
    assert [result["rows"] for result in results] == [[3], [3]]
    assert [result["pairs"] for result in results] == [[5], [5]]
    assert all(result["right"] for result in results)
    # In two chunks: the first has one token of each rank, the second 1 and 2.
    results = run_ranks(2, exchange, ids, 2)
    assert [result["rows"] for result in results] == [[1, 2], [1, 2]]
    assert [result["pairs"] for result in results] == [[2, 3], [2, 3]]
    assert all(result["right"] for result in results)


@pytest.mark.parametrize(
    "ids",
    [
        [[[0, 1], [2, 3]], [[0, 2], [1, 3]]],  # nothing for rank 1
        [[], [[0, 7]]],  # rank 0 has no token
        [[], []],  # nobody has
    ],
)
def test_ranks_without_rows_or_tokens(ids: list[list[list[int]]]) -> None:
    # With a chunk more than any rank has tokens.
    for chunks in (1, 3):
        results = run_ranks(2, exchange, ids, chunks)
        assert all(result["right"] for result in results)


def one_word(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    """`run` with one id everywhere, and the rows that reached this rank."""
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
def test_a_rank_that_no_token_needs_takes_part(name: str) -> None:
    # All tokens are the same word: they need the same 4 of 12 blocks, and rows travel exactly.
    case = without_balance("rand-hash", ("moe_token_dispatcher_type", "alltoall"))
    ((expected, _),) = run_ranks(1, one_word, case)
    world_size, sizes = LAYOUTS[name]
    results = run_ranks(world_size, one_word, case, **sizes)
    assert_same([result for result, _ in results], expected)
    assert min(rows for _, rows in results) == 0


def initial_tables() -> tuple[torch.Tensor, torch.Tensor]:
    memory = build(Case(router="avg-k")).experts
    return memory.keys.detach().clone(), memory.values.detach().clone()


def test_initial_tables_do_not_depend_on_the_layout() -> None:
    ((keys, values),) = run_ranks(1, initial_tables)
    parts = run_ranks(4, initial_tables, **layout(expert=4))
    assert torch.equal(torch.cat([part[0] for part in parts]), keys)
    assert torch.equal(torch.cat([part[1] for part in parts]), values)
    parts = run_ranks(2, initial_tables, **layout(tensor=2, cells=2))
    assert torch.equal(torch.cat([part[0] for part in parts], dim=1), keys)
    assert torch.equal(torch.cat([part[1] for part in parts], dim=1), values)
