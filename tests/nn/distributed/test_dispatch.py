"""Token dispatch without a layer: rounding of its sums, device syncs, messages, order of chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sffn.nn.comm_volume import regathers
from megatron_sffn.nn.dispatch import DispatchedTokens, dispatch, messages
from megatron_sffn.nn.dispatch.transfer import Transfer
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.ops.block_ffn import Pairs
from tests.support.ranks import run_ranks
from tests.support.router_cases import Case, build, inputs
from tests.support.waits import recorded

TOKENS, WIDTH, BLOCKS, ACTIVE = 50, 24, 16, 7
ONE_ROUNDING = 2.0**-8
"""Largest relative error of a number that is rounded to bf16 once."""


def grid_of(etp_size: int = 1) -> ExpertGrid:
    group = torch.distributed.group.WORLD
    ep_size = group.size() // etp_size
    return ExpertGrid(
        group=group, ep_size=ep_size, etp_size=etp_size, num_blocks=BLOCKS, block_size=2
    )


def tokens_of(rank: int, dtype: torch.dtype) -> tuple[Tensor, Routing, Tensor]:
    """Tokens of a rank, a routing with some empty places, and the weights of a loss."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    ids = torch.rand(TOKENS, BLOCKS, generator=generator).argsort(dim=1)[:, :ACTIVE]
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    gates = torch.rand(ids.shape, generator=generator)
    weights = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    routing = Routing(block_ids=ids, gates=gates.requires_grad_(), may_be_empty=True)
    return x.requires_grad_(), routing, weights


def factor(rank: int) -> float:
    """Factor of the rows on a rank: the products are exact in bf16, but their sums are not."""
    return (-1.0) ** (rank // 2) * 2.0 ** (-3 * (rank % 4))


def sums_on(dispatcher: str, etp_size: int, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and gradients of this rank's tokens, if each rank multiplies by its own factor."""
    rank, grid = torch.distributed.get_rank(), grid_of(etp_size)
    x, routing, weights = tokens_of(rank, torch.bfloat16)
    gate_losses = []

    def compute(dispatched: DispatchedTokens) -> Tensor:
        rows, pairs = dispatched.rows, dispatched.pairs
        row_factors = torch.zeros(len(rows)).index_fill_(0, pairs.rows.long(), factor(rank))
        gate_losses.append((dispatched.gates * (pairs.blocks + 1) * factor(rank)).sum())
        return rows * row_factors[:, None].bfloat16()

    y = dispatch(x, routing, grid, dispatcher, num_chunks=chunks).run(compute)
    assert len(gate_losses) == chunks
    ((y * weights).sum() + sum(gate_losses)).backward()
    return y.detach(), x.grad, routing.gates.grad


def exact_sums(rank: int, ranks: int, etp_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `sums_on` for this rank, computed in float64 without communication."""
    x, routing, weights = tokens_of(rank, torch.bfloat16)
    ids_TK, num_local_blocks = routing.block_ids, BLOCKS // (ranks // etp_size)
    factors, dgates = torch.zeros(TOKENS, 1).double(), torch.zeros(ids_TK.shape).double()
    for peer_rank in range(ranks):
        is_held = (ids_TK // num_local_blocks == peer_rank // etp_size) & (ids_TK >= 0)
        factors += is_held.any(dim=1, keepdim=True) * factor(peer_rank)
        dgates += is_held * factor(peer_rank) * (ids_TK % num_local_blocks + 1)
    return x.detach().double() * factors, weights.double() * factors, dgates


def all_sums(layouts: list[tuple[str, int, int]]) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    return [[sums_on(*layout) for _ in range(2)] for layout in layouts]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_between_ranks_in_bf16_have_the_error_of_one_rounding(ranks: int) -> None:
    layouts = [(name, etp_size, 1) for name in ("alltoall", "allgather") for etp_size in (1, 2)]
    layouts += [("alltoall", etp_size, 3) for etp_size in (1, 2)]
    results = run_ranks(ranks, all_sums, layouts)
    for rank, by_layout in enumerate(results):
        for layout, (first, second) in zip(layouts, by_layout, strict=True):
            exact = exact_sums(rank, ranks, etp_size=layout[1])
            assert all(map(torch.equal, first, second)), layout
            for actual, expected in zip(first[:2], exact[:2], strict=True):
                error = (actual.double() - expected).abs()
                bound = ONE_ROUNDING * expected.abs() + 1e-6
                assert (error <= bound).all(), layout
            torch.testing.assert_close(first[2].double(), exact[2], rtol=1e-6, atol=1e-6)


def waits_of(dispatcher: str, *, may_be_empty: bool, chunks: int) -> dict[str, int]:
    """Where the host would wait for a GPU in a forward and a backward pass, and how often."""
    x, routing, weights = tokens_of(torch.distributed.get_rank(), torch.float32)
    if not may_be_empty:
        ids = torch.arange(ACTIVE).expand(TOKENS, ACTIVE) + torch.arange(TOKENS)[:, None] % 9
        routing = Routing(block_ids=ids, gates=routing.gates)

    def step() -> None:
        plan = dispatch(x, routing, grid_of(), dispatcher, num_chunks=chunks)
        gates = []
        y = plan.run(lambda tokens: gates.append(tokens.gates) or tokens.rows * 2)
        torch.autograd.backward([y, *gates], [weights, *map(torch.ones_like, gates)])

    return recorded(step)


def all_waits() -> list[dict[str, int]]:
    dispatchers = (("alltoall", 1), ("alltoall", 3), ("allgather", 1))
    return [
        waits_of(name, may_be_empty=may_be_empty, chunks=chunks)
        for name, chunks in dispatchers
        for may_be_empty in (False, True)
    ]


def test_the_host_waits_once_for_the_counts_of_all_chunks_and_for_nothing_else() -> None:
    for waits in run_ranks(2, all_waits):
        assert waits == [{"ops/streams.py:wait": 1}] * 6


@pytest.mark.parametrize("num_blocks", [3, 2**15, 2**15 + 1])
def test_pairs_are_sent_in_the_narrowest_dtype_that_holds_the_block_ids(num_blocks: int) -> None:
    rows = torch.tensor([0, 0, 1, 2, 2, 2], dtype=torch.int32)
    blocks = torch.tensor([0, num_blocks - 1, 0, num_blocks - 1, 1, 0], dtype=torch.int32)
    begins_row = torch.tensor([True, False, True, True, False, False])
    codes = messages.encode(blocks, begins_row, num_blocks)
    assert codes.itemsize == (2 if num_blocks <= 2**15 else 4)
    gates = torch.rand(6, dtype=torch.float64)
    message = messages.pack(codes, gates)
    unpacked_codes, unpacked_gates = messages.unpack(message, codes.dtype, gates.dtype)
    pairs = messages.decode(unpacked_codes)
    assert isinstance(pairs, Pairs)
    assert torch.equal(pairs.rows, rows)
    assert torch.equal(pairs.blocks, blocks)
    assert torch.equal(unpacked_gates, gates)


def layer_step(router: str, dispatcher: str, regather: str) -> list[Tensor]:
    """Output and gradients of a layer on this rank."""
    layer = build(Case(router=router, megatron=(("moe_token_dispatcher_type", dispatcher),)))
    layer.config.sffn = dataclasses.replace(layer.config.sffn, regather=regather)
    hidden, ids, weights = inputs()
    x = (hidden + torch.distributed.get_rank()).requires_grad_()
    y, _ = layer(x, padding_mask=ids)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(table.grad for table in layer.experts.parameters())]


def steps_with_and_without() -> list[tuple[list[Tensor], list[Tensor]]]:
    dispatchers = ("alltoall", "allgather")
    cases = [(router, name) for router in ("switch", "lorkm") for name in dispatchers]
    return [(layer_step(*case, "on"), layer_step(*case, "off")) for case in cases]


def test_regathered_rows_give_the_same_bits_as_kept_rows() -> None:
    for by_case in run_ranks(2, steps_with_and_without, expert_model_parallel_size=2):
        for regathered, kept in by_case:
            assert all(map(torch.equal, regathered, kept))


@pytest.mark.parametrize(
    ("ranks", "dispatcher", "regather", "expected"),
    [
        (1, "alltoall", "on", False),  # nothing is sent
        (2, "alltoall", "auto", False),  # a rank receives less than two rows per token
        (2, "allgather", "auto", True),
        (3, "alltoall", "auto", True),
        (3, "alltoall", "off", False),
        (2, "alltoall", "on", True),
    ],
)
def test_rows_are_regathered_if_that_halves_the_bytes_kept(
    ranks: int, dispatcher: str, regather: str, expected: bool, one_rank: None
) -> None:
    sffn = dataclasses.replace(build(Case(router="avg-k")).config.sffn, regather=regather)
    layout = ParallelLayout(ep=ranks, dispatcher=dispatcher)
    assert regathers(sffn, 8, layout) is expected


@pytest.mark.parametrize("count", [0, 1])
def test_a_message_of_at_most_one_pair_is_unpacked(count: int) -> None:
    codes, gates = torch.full((count,), -3, dtype=torch.int16), torch.rand(count)
    message = messages.pack(codes, gates)
    unpacked_codes, unpacked_gates = messages.unpack(message, torch.int16, torch.float32)
    assert torch.equal(unpacked_codes, codes)
    assert torch.equal(unpacked_gates, gates)


def order_of_steps() -> tuple[list[str], list[str]]:
    """The steps of a rank for three chunks, in the forward and in the backward pass."""
    x, routing, weights = tokens_of(torch.distributed.get_rank(), torch.float32)
    steps: list[str] = []
    transfer_numbers: dict[Transfer, int] = {}

    def recording(method: str, step: str) -> Any:
        original = getattr(Transfer, method)

        def recorded(transfer: Transfer, *args: Any, **kwargs: Any) -> Any:
            number = transfer_numbers.setdefault(transfer, len(transfer_numbers))
            steps.append(f"{step} {number}")
            return original(transfer, *args, **kwargs)

        return recorded

    def compute(dispatched: DispatchedTokens) -> Tensor:
        steps.append("compute")
        y = dispatched.rows * 2
        y.register_hook(lambda grad: steps.append("compute"))
        return y

    Transfer.start_collective = recording("start_collective", "start")  # type: ignore
    Transfer.wait_for_collective = recording("wait_for_collective", "wait")  # type: ignore
    y = dispatch(x, routing, grid_of(), "alltoall", num_chunks=3).run(compute)
    forward = list(steps)
    steps.clear()
    (y * weights).sum().backward()
    return forward, steps


def test_the_rows_of_the_next_chunk_are_in_flight_while_a_chunk_is_computed() -> None:
    # Transfers 0, 1 and 3 dispatch; transfers 2, 4 and 5 combine.
    expected = ["start 0", "start 1", "wait 0", "compute", "start 2"]
    expected += ["start 3", "wait 1", "compute", "start 4", "wait 2"]
    expected += ["wait 3", "compute", "start 5", "wait 4", "wait 5"]
    swapped = {"start": "wait", "wait": "start"}
    for forward, backward in run_ranks(2, order_of_steps):
        assert forward == expected
        # The backward pass is the forward pass from its end, with start and wait swapped.
        adjoint = [" ".join(swapped.get(word, word) for word in step.split()) for step in forward]
        assert backward == adjoint[::-1]
