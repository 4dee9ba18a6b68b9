"""`route_topk`: exact, ordered, and the same choice among equals everywhere."""

import pytest
import torch

from megatron_sffn.errors import ConfigError
from megatron_sffn.ops import route_topk


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize(("blocks", "active"), [(1, 1), (7, 1), (16, 5), (33, 32), (64, 64)])
def test_against_the_oracle_with_and_without_ties(
    blocks: int, active: int, levels: int, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(levels)
    scores = torch.randint(levels, (50, blocks)).to(dtype) - levels / 2
    ids = route_topk(scores, active, backend=backend)
    assert torch.equal(ids, route_topk(scores, active, backend="naive"))
    assert ids.shape == (50, active)
    assert (ids.diff(dim=1) > 0).all(), "ids must ascend, hence be distinct"


@pytest.mark.parametrize("backend", ["naive", "torch", "cpu"])
def test_a8_ties_go_to_the_lowest_index(backend: str) -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 5.0, 3.0]])
    assert route_topk(scores, 2, backend=backend).tolist() == [[0, 1], [0, 1], [0, 2]]


def test_infinite_scores_are_scores() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, torch.inf, 0.0]])
    assert route_topk(scores, 2).tolist() == [[1, 2]]


def test_nan_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="1 of 6 block scores are NaN"):
        route_topk(torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 2.0]]), 1)


def test_no_tokens() -> None:
    assert route_topk(torch.zeros(0, 8), 3).shape == (0, 3)


@pytest.mark.parametrize("active", [0, 5])
def test_numbers_of_blocks_that_cannot_be_chosen(active: int) -> None:
    with pytest.raises(ConfigError, match=f"{active} of 4 blocks"):
        route_topk(torch.zeros(3, 4), active)
