"""`route_topk`: exact, ordered, and the same ids for equal scores in every backend."""

import pytest
import torch

from megatron_sffn.ops import route_topk
from megatron_sffn.ops.route_topk import threshold
from megatron_sffn.utils.errors import ConfigError


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize(("blocks", "active"), [(1, 1), (7, 1), (16, 5), (33, 32), (64, 64)])
def test_ids_are_those_of_the_oracle_with_and_without_ties(
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


def test_infinite_scores_are_ranked_like_other_scores() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, torch.inf, 0.0]])
    assert route_topk(scores, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("backend", ["naive", "torch", "cpu"])
@pytest.mark.parametrize("nans", [1, 3, 4, 8])
def test_rows_with_nan_get_distinct_ids_and_the_others_the_right_ones(
    nans: int, backend: str
) -> None:
    torch.manual_seed(nans)
    scores = torch.randint(3, (20, 9)).float()
    expected = route_topk(scores, 4, backend="naive")
    scores[7, torch.randperm(9)[:nans]] = torch.nan
    scores[12, torch.randperm(9)[:nans]] = -torch.nan
    ids = route_topk(scores, 4, backend=backend)
    other_rows = [row for row in range(20) if row not in (7, 12)]
    assert torch.equal(ids[other_rows], expected[other_rows])
    assert (ids.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < 9


def test_nan_is_refused_if_the_environment_asks_for_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SFFN_CHECK", "1")
    with pytest.raises(FloatingPointError, match="1 of 6 block scores are NaN"):
        route_topk(torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 2.0]]), 1)


def test_slices_of_rows_give_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(3, (20, 9)).float()
    expected = route_topk(scores, 4, backend="torch")
    monkeypatch.setattr(threshold, "SCRATCH_NUMBERS", 3 * 9 + 1)
    assert torch.equal(route_topk(scores, 4, backend="torch"), expected)
    assert torch.equal(expected, route_topk(scores, 4, backend="naive"))


def test_no_tokens_give_no_ids() -> None:
    assert route_topk(torch.zeros(0, 8), 3).shape == (0, 3)


@pytest.mark.parametrize("active", [0, 5])
def test_an_invalid_number_of_active_blocks_is_refused(active: int) -> None:
    with pytest.raises(ConfigError, match=f"{active} of 4 blocks"):
        route_topk(torch.zeros(3, 4), active)
