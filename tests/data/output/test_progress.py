"""Progress lines show how much is done, how fast, and how much time is left."""

from __future__ import annotations

import pytest

from megatron_sffn.data.output import progress
from megatron_sffn.data.output.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time, as a list of one number that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_rate_percentage_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress_lines = Progress("copied", 40_000_000)
    clock[0] = 4.0
    progress_lines.add(1_000_000)  # too soon for a line
    clock[0] = 5.0
    progress_lines.add(9_000_000)
    stdout, stderr = capsys.readouterr()
    assert not stdout
    assert stderr == "copied 10.0 MB of 40.0 MB, 2.0 MB/s, 25%, ETA 0:00:15\n"
    assert progress_lines.summary() == "copied 10.0 MB in 5.0 s (2.0 MB/s)"


def test_the_line_of_a_pipe_has_no_percentage(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Progress("read", None)
    clock[0] = 10.0
    lines.reach(5_000)
    assert capsys.readouterr().err == "read 5.0 kB, 0.0 MB/s\n"


def test_the_bytes_of_an_earlier_run_do_not_count_for_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Progress("processed", 100_000_000, done=80_000_000)
    clock[0] = 10.0
    lines.print("9 documents", 90_000_000)
    assert capsys.readouterr().err == "processed 9 documents, 90%, ETA 0:00:10\n"
