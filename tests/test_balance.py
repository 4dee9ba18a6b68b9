"""Block loads: counted in evaluation only, and their entropy."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_sffn.balance import LoadCounter, load_entropy


@pytest.mark.parametrize(
    ("tokens", "entropy"),
    [
        ([5, 5, 5, 5], 1.0),
        ([1, 1, 1], 1.0),
        ([0, 7, 0, 0], 0.0),
        ([3, 3, 0, 0], 0.5),
        ([2, 1, 1], 1.5 * math.log(2) / math.log(3)),
        # One block has nothing to be uneven with.
        ([9], 1.0),
        ([0], 1.0),
        # No tokens, no load: the least even, not an error.
        ([0, 0, 0], 0.0),
        ([2**40, 2**40], 1.0),
    ],
)
def test_load_entropy(tokens: list[int], entropy: float) -> None:
    found = load_entropy(torch.tensor(tokens))
    assert found == pytest.approx(entropy, abs=1e-12)
    assert json.dumps(round(found, 6))[0] != "-", "minus zero in a file looks like an error"


def test_load_entropy_is_between_its_ends_and_knows_no_order() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(0, 50, (13,))
        found = load_entropy(tokens)
        assert 0 < found < 1
        assert load_entropy(tokens.flip(0)) == pytest.approx(found)
        assert load_entropy(tokens * 3) == pytest.approx(found)


def test_loads_are_counted_in_evaluation_only_and_taken_once() -> None:
    counter = LoadCounter(4)
    counter(torch.tensor([[0, 1]]))
    assert counter.take().tolist() == [0, 0, 0, 0]
    counter.eval()
    counter(torch.tensor([[0, 1], [1, 3]]))
    counter(torch.tensor([[1, 2]]))
    taken = counter.take()
    assert taken.tolist() == [1, 3, 1, 1]
    assert counter.take().tolist() == [0, 0, 0, 0]
    assert taken.tolist() == [1, 3, 1, 1]


def test_no_tokens_count_nothing() -> None:
    counter = LoadCounter(3).eval()
    counter(torch.empty(0, 2, dtype=torch.long))
    assert counter.take().tolist() == [0, 0, 0]


def test_a_checkpoint_does_not_hold_the_counts() -> None:
    assert LoadCounter(3).state_dict() == {}
