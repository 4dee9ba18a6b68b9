"""The comparison with published throughput states every error."""

from __future__ import annotations

import pytest

from megatron_sffn.accounting import count_parameters
from megatron_sffn.planning.published import (
    MODELS,
    PUBLISHED,
    compare_published,
    published_table,
    workload_of,
)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("Mixtral-8x22B", 141),
        ("Mixtral-8x22B-G8T8", 141),
        ("Qwen2-57B-A14B", 57),
        ("Qwen3-235B-A22B", 235),
    ],
)
def test_published_models_have_their_parameters(model: str, billions: int) -> None:
    run = next(run for run in PUBLISHED if run.model == model)
    assert count_parameters(workload_of(run).shape).total / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_model_is_compared_and_every_error_is_printed() -> None:
    comparisons, table = compare_published(), published_table()
    assert {comparison.run.model for comparison in comparisons} == MODELS.keys()
    for comparison in comparisons:
        assert f"{comparison.error:+.0%}" in table
        assert comparison.run.source in table


def test_all_but_the_last_two_runs_are_foreseen_within_a_quarter() -> None:
    """docs/planning.md says what is known about the two."""
    errors = [abs(comparison.error) for comparison in compare_published()]
    assert max(errors[:7]) < 0.25
