"""Counters of a layer's routing, and the entropy of its load."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.routing_counters import SUMS, RoutingCounter, TrafficCounter, load_entropy


@pytest.mark.parametrize(
    ("tokens", "entropy"),
    [
        ([5, 5, 5, 5], 1.0),
        ([1, 1, 1], 1.0),
        ([0, 7, 0, 0], 0.0),
        ([3, 3, 0, 0], 0.5),
        ([2, 1, 1], 1.5 * math.log(2) / math.log(3)),
        # A single block is always even.
        ([9], 1.0),
        ([0], 1.0),
        # Without tokens the entropy is zero, not an error.
        ([0, 0, 0], 0.0),
        ([2**40, 2**40], 1.0),
    ],
)
def test_load_entropy_is_its_formula(tokens: list[int], entropy: float) -> None:
    result = load_entropy(torch.tensor(tokens))
    assert result == pytest.approx(entropy, abs=1e-12)
    assert json.dumps(round(result, 6))[0] != "-", "minus zero in a file looks like an error"


def test_load_entropy_is_between_0_and_1_and_depends_on_neither_order_nor_scale() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(0, 50, (13,))
        entropy = load_entropy(tokens)
        assert 0 < entropy < 1
        assert load_entropy(tokens.flip(0)) == pytest.approx(entropy)
        assert load_entropy(tokens * 3) == pytest.approx(entropy)


def load_and_sums(counter: RoutingCounter) -> tuple[list[int], dict[str, float]]:
    counts = counter.take()
    assert counts.load.dtype == torch.long and counts.sums.dtype == torch.float64
    return counts.load.tolist(), dict(zip(SUMS, counts.sums.tolist(), strict=True))


def test_a_routing_is_counted_without_its_empty_places() -> None:
    counter = RoutingCounter(4)
    routing = Routing(
        block_ids=torch.tensor([[0, 1], [1, -1], [3, 1]]),
        gates=torch.tensor([[0.5, 0.25], [0.125, 100.0], [1.0, 2.0]], requires_grad=True),
        scores=torch.tensor([[-1.0, 2.0], [0.0, -3.0], [-4.0, 5.0]]),
        may_be_empty=True,
    )
    counter(routing)
    load, sums = load_and_sums(counter)
    assert load == [1, 3, 0, 1]
    assert sums == {
        "tokens": 3,
        # Without the gate of the empty place.
        "gates": 3.875,
        "squared_gates": 0.25 + 0.0625 + 0.015625 + 1 + 4,
        "negative_scores": 2,
        "scores": 5,
        "empty_places": 1,
    }


def test_sums_accumulate_until_they_are_taken() -> None:
    counter = RoutingCounter(3)
    counter(Routing(block_ids=torch.tensor([[0], [2]])))
    counter(Routing(block_ids=torch.tensor([[2]]), gates=torch.tensor([[0.5]])))
    first_counts = counter.take()
    assert first_counts.load.tolist() == [1, 0, 2]
    assert first_counts.sums.tolist() == [3, 0.5, 0.25, 0, 0, 0]
    load, sums = load_and_sums(counter)
    assert load == [0, 0, 0] and not any(sums.values())
    counter(Routing(block_ids=torch.tensor([[1]])))
    assert first_counts.load.tolist() == [1, 0, 2], "a later count has changed sums that were taken"
    assert counter.take().load.tolist() == [0, 1, 0]


def test_half_precision_gates_are_summed_in_float64() -> None:
    counter = RoutingCounter(1)
    gates = torch.full((5000, 1), 1.0, dtype=torch.bfloat16)
    counter(Routing(block_ids=torch.zeros(5000, 1, dtype=torch.long), gates=gates))
    counter.bfloat16()  # as Megatron casts half-precision models
    counter(Routing(block_ids=torch.zeros(333, 1, dtype=torch.long), gates=gates[:333]))
    load, sums = load_and_sums(counter)
    assert load == [5333]
    assert sums["gates"] == sums["squared_gates"] == sums["tokens"] == 5333


@pytest.mark.parametrize("gates", [False, True])
def test_routings_without_tokens_or_with_empty_places_only_are_counted(gates: bool) -> None:
    counter = RoutingCounter(3)
    for ids in (torch.zeros(0, 2, dtype=torch.long), torch.full((2, 2), -1)):
        ones = torch.ones(ids.shape) if gates else None
        counter(Routing(block_ids=ids, gates=ones, may_be_empty=True))
    load, sums = load_and_sums(counter)
    assert load == [0, 0, 0]
    assert sums["tokens"] == 2 and sums["empty_places"] == 4 and sums["gates"] == 0


def test_a_checkpoint_does_not_hold_the_counts() -> None:
    assert RoutingCounter(3).state_dict() == {}
    assert TrafficCounter().state_dict() == {}


def test_traffic_is_counted_in_evaluation_and_taken_once() -> None:
    counter = TrafficCounter()
    counter(7, 100)
    assert counter.take() == (0, 0)
    counter.eval()
    counter(7, 100)
    counter(3, 50)
    assert counter.take() == (10, 150)
    assert counter.take() == (0, 0)
