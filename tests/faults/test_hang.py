"""A rank hangs, and the other rank reports it."""

from __future__ import annotations

from pathlib import Path

from tests.faults.scenarios import hung_rank


def test_the_rank_that_hangs_is_reported(tmp_path: Path) -> None:
    note = hung_rank(tmp_path, rank=1).note
    assert "rank 1 (" in note and ") does not answer" in note, note


def test_a_store_whose_rank_hangs_is_reported(tmp_path: Path) -> None:
    assert "the store does not answer: rank 0" in hung_rank(tmp_path, rank=0).note
