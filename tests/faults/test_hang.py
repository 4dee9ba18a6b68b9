"""A rank that hangs."""

from __future__ import annotations

from pathlib import Path

from tests.faults.scenarios import hung_rank


def test_the_rank_that_hangs_is_named(tmp_path: Path) -> None:
    note = hung_rank(tmp_path, rank=1).note
    assert "rank 1 (" in note and ") does not answer" in note, note


def test_a_first_rank_that_hangs_takes_the_store_with_it(tmp_path: Path) -> None:
    assert "the store does not answer: rank 0" in hung_rank(tmp_path, rank=0).note
