"""The exchange by itself: how exactly it sums, what it waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sffn.nn.comm_volume import regathers
from megatron_sffn.nn.config import Exchange
from megatron_sffn.nn.dispatch import DispatchedTokens, dispatch, messages
from megatron_sffn.nn.dispatch.transfer import Transfer
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.ops.block_ffn import Pairs
from tests.support.ranks import run_ranks
from tests.support.router_cases import Case, build, inputs
from tests.support.waits import recorded

TOKENS, WIDTH, BLOCKS, ACTIVE = 50, 24, 16, 7
LOSS_OF_ONE_ROUNDING = 2.0**-8
"""Largest relative error of a number that is rounded to bf16 once."""


def placement_of(cells: int = 1) -> ExpertGrid:
    group = torch.distributed.group.WORLD
    blocks = group.size() // cells
    return ExpertGrid(group=group, ep_size=blocks, etp_size=cells, num_blocks=BLOCKS, block_size=2)


def tokens_of(rank: int, dtype: torch.dtype) -> tuple[Tensor, Routing, Tensor]:
    """Tokens, their blocks of which some places are empty, and the weights of a loss."""
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
    ids = torch.rand(TOKENS, BLOCKS, generator=draw).argsort(dim=1)[:, :ACTIVE]
    ids[torch.rand(ids.shape, generator=draw) < 0.1] = -1
    gates = torch.rand(ids.shape, generator=draw)
    weights = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
    routing = Routing(block_ids=ids, gates=gates.requires_grad_(), may_be_empty=True)
    return x.requires_grad_(), routing, weights


def factor(rank: int) -> float:
    """What a rank multiplies its rows by: exact in bf16, but no sum of such products is."""
    return (-1.0) ** (rank // 2) * 2.0 ** (-3 * (rank % 4))


def sums_on(dispatcher: str, cells: int, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over ranks of this rank's tokens and gradients, each rank with its own factor."""
    rank, grid = torch.distributed.get_rank(), placement_of(cells)
    x, routing, weights = tokens_of(rank, torch.bfloat16)
    of_gates = []

    def compute(arrived: DispatchedTokens) -> Tensor:
        rows, met = arrived.rows, arrived.pairs.rows.long()
        of_row = torch.zeros(len(rows)).index_fill_(0, met, factor(rank))
        of_gates.append((arrived.gates * (arrived.pairs.blocks + 1) * factor(rank)).sum())
        return rows * of_row[:, None].bfloat16()

    y = dispatch(x, routing, grid, dispatcher, num_chunks=chunks).run(compute)
    assert len(of_gates) == chunks
    ((y * weights).sum() + sum(of_gates)).backward()
    return y.detach(), x.grad, routing.gates.grad


def sums_of(rank: int, ranks: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64 on no rank."""
    x, routing, weights = tokens_of(rank, torch.bfloat16)
    ids, each = routing.block_ids, BLOCKS // (ranks // cells)
    total, dgates = torch.zeros(TOKENS, 1).double(), torch.zeros(ids.shape).double()
    for other in range(ranks):
        met = (ids // each == other // cells) & (ids >= 0)
        total += met.any(dim=1, keepdim=True) * factor(other)
        dgates += met * factor(other) * (ids % each + 1)
    return x.detach().double() * total, weights.double() * total, dgates


def all_sums(layouts: list[tuple[str, int, int]]) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    return [[sums_on(*layout) for _ in range(2)] for layout in layouts]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_between_ranks_in_bf16_have_the_error_of_one_rounding(ranks: int) -> None:
    layouts = [(way, cells, 1) for way in ("alltoall", "allgather") for cells in (1, 2)]
    layouts += [("alltoall", cells, 3) for cells in (1, 2)]
    results = run_ranks(ranks, all_sums, layouts)
    for rank, by_layout in enumerate(results):
        for (way, cells, chunks), (first, second) in zip(layouts, by_layout, strict=True):
            exact = sums_of(rank, ranks, cells)
            assert all(map(torch.equal, first, second)), (way, cells, chunks)
            for mine, expected in zip(first[:2], exact[:2], strict=True):
                error = (mine.double() - expected).abs()
                bound = LOSS_OF_ONE_ROUNDING * expected.abs() + 1e-6
                assert (error <= bound).all(), (way, cells, chunks)
            torch.testing.assert_close(first[2].double(), exact[2], rtol=1e-6, atol=1e-6)


def waits_of(dispatcher: str, *, may_be_empty: bool, chunks: int) -> dict[str, int]:
    """Where the host would wait for a GPU in a forward and a backward."""
    x, routing, weights = tokens_of(torch.distributed.get_rank(), torch.float32)
    if not may_be_empty:
        ids = torch.arange(ACTIVE).expand(TOKENS, ACTIVE) + torch.arange(TOKENS)[:, None] % 9
        routing = Routing(block_ids=ids, gates=routing.gates)

    def step() -> None:
        plan = dispatch(x, routing, placement_of(), dispatcher, num_chunks=chunks)
        gates = []
        y = plan.run(lambda arrived: gates.append(arrived.gates) or arrived.rows * 2)
        torch.autograd.backward([y, *gates], [weights, *map(torch.ones_like, gates)])

    return recorded(step)


def all_waits() -> list[dict[str, int]]:
    ways = (("alltoall", 1), ("alltoall", 3), ("allgather", 1))
    return [
        waits_of(way, may_be_empty=empty, chunks=chunks)
        for way, chunks in ways
        for empty in (False, True)
    ]


def test_the_host_waits_once_for_counts_of_all_chunks_and_for_nothing_else() -> None:
    for waits in run_ranks(2, all_waits):
        assert waits == [{"ops/streams.py:wait": 1}] * 6


@pytest.mark.parametrize("num_blocks", [3, 2**15, 2**15 + 1])
def test_pairs_travel_in_as_few_bytes_as_the_blocks_need(num_blocks: int) -> None:
    rows = torch.tensor([0, 0, 1, 2, 2, 2], dtype=torch.int32)
    blocks = torch.tensor([0, num_blocks - 1, 0, num_blocks - 1, 1, 0], dtype=torch.int32)
    begins = torch.tensor([True, False, True, True, False, False])
    codes = messages.encode(blocks, begins, num_blocks)
    assert codes.itemsize == (2 if num_blocks <= 2**15 else 4)
    gates = torch.rand(6, dtype=torch.float64)
    arrived, with_gates = messages.unpack(messages.pack(codes, gates), codes.dtype, gates.dtype)
    pairs = messages.decode(arrived)
    assert isinstance(pairs, Pairs)
    assert torch.equal(pairs.rows, rows)
    assert torch.equal(pairs.blocks, blocks)
    assert torch.equal(with_gates, gates)


def step_of(router: str, dispatcher: str, regather: str) -> list[Tensor]:
    """Output and gradients of a layer on this rank."""
    layer = build(Case(router=router, megatron=(("moe_token_dispatcher_type", dispatcher),)))
    layer.config.sffn = dataclasses.replace(layer.config.sffn, regather=regather)
    hidden, ids, weights = inputs()
    x = (hidden + torch.distributed.get_rank()).requires_grad_()
    y, _ = layer(x, padding_mask=ids)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(table.grad for table in layer.experts.parameters())]


def steps_with_and_without() -> list[tuple[list[Tensor], list[Tensor]]]:
    cases = [(router, way) for router in ("switch", "lorkm") for way in ("alltoall", "allgather")]
    return [(step_of(*case, "on"), step_of(*case, "off")) for case in cases]


def test_rows_that_are_sent_again_give_the_same_bits() -> None:
    for by_case in run_ranks(2, steps_with_and_without, expert_model_parallel_size=2):
        for again, kept in by_case:
            assert all(map(torch.equal, again, kept))


@pytest.mark.parametrize(
    ("ranks", "dispatcher", "regather", "expected"),
    [
        (1, "alltoall", "on", False),  # nothing travels
        (2, "alltoall", "auto", False),  # at most two rows for one
        (2, "allgather", "auto", True),
        (3, "alltoall", "auto", True),
        (3, "alltoall", "off", False),
        (2, "alltoall", "on", True),
    ],
)
def test_rows_are_sent_again_where_that_halves_what_is_kept(
    ranks: int, dispatcher: str, regather: str, expected: bool, one_rank: None
) -> None:
    sffn = dataclasses.replace(build(Case(router="avg-k")).config.sffn, regather=regather)
    exchange = Exchange(expert_parallel_size=ranks)
    assert regathers(sffn, 8, exchange, dispatcher) is expected


@pytest.mark.parametrize("count", [0, 1])
def test_a_message_of_at_most_one_pair_is_read(count: int) -> None:
    codes, gates = torch.full((count,), -3, dtype=torch.int16), torch.rand(count)
    arrived, with_gates = messages.unpack(messages.pack(codes, gates), torch.int16, torch.float32)
    assert torch.equal(arrived, codes)
    assert torch.equal(with_gates, gates)


def order_of_steps() -> tuple[list[str], list[str]]:
    """What a rank does with the rows of three chunks, in the forward and in the backward."""
    x, routing, weights = tokens_of(torch.distributed.get_rank(), torch.float32)
    steps: list[str] = []
    numbers: dict[Transfer, int] = {}

    def noting(name: str) -> Any:
        original = getattr(Transfer, name)

        def noted(leg: Transfer, *args: Any, **kwargs: Any) -> Any:
            steps.append(f"{name} {numbers.setdefault(leg, len(numbers))}")
            return original(leg, *args, **kwargs)

        return noted

    def compute(arrived: DispatchedTokens) -> Tensor:
        steps.append("compute")
        y = arrived.rows * 2
        y.register_hook(lambda grad: steps.append("compute"))
        return y

    Transfer.launch, Transfer.land = noting("launch"), noting("land")  # type: ignore[method-assign]
    y = dispatch(x, routing, placement_of(), "alltoall", num_chunks=3).run(compute)
    forward = list(steps)
    steps.clear()
    (y * weights).sum().backward()
    return forward, steps


def test_rows_of_the_next_chunk_are_on_their_way_while_one_is_computed() -> None:
    out = ["launch 0", "launch 1", "land 0", "compute", "launch 2", "launch 3", "land 1", "compute"]
    back = ["launch 4", "land 2", "land 3", "compute", "launch 5", "land 4", "land 5"]
    other = {"launch": "land", "land": "launch"}
    for forward, backward in run_ranks(2, order_of_steps):
        assert forward == out + back
        # Legs 0, 1 and 3 go out, 2, 4 and 5 back; the backward is the forward from its end.
        turned = [" ".join(other.get(word, word) for word in step.split()) for step in forward]
        assert backward == turned[::-1]
