"""Signals of a scheduler: the run saves and leaves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.faults.jobs import Job, job
from tests.faults.scenarios import STEPS, asked_to_stop, in_folder, torchrun_asked_to_stop


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, None), (signal.SIGUSR1, 1), (signal.SIGUSR2, 0)]
)
def test_a_signal_saves_and_leaves(
    tmp_path: Path, undisturbed_job: Job, number: signal.Signals, rank: int | None
) -> None:
    assert asked_to_stop(tmp_path, undisturbed_job, number, rank).lost == 0


def test_processes_that_load_data_get_the_signal_too(tmp_path: Path, undisturbed_job: Job) -> None:
    flags = "--num-workers 2"
    assert asked_to_stop(tmp_path, undisturbed_job, signal.SIGTERM, flags=flags).lost == 0


def test_torchrun_passes_the_signal_on(tmp_path: Path) -> None:
    assert torchrun_asked_to_stop(tmp_path).lost == 0


def test_no_step_is_missing_in_the_lines_about_routing(tmp_path: Path) -> None:
    flags = f"{in_folder(tmp_path / 'run')} --log-interval 8"
    with job(2, flags, tmp_path) as run:
        run.wait_for("successfully saved", rank=0)
        run.send(signal.SIGTERM)
        assert run.wait() == [0, 0], run.log()
    with job(2, flags, tmp_path) as run:
        assert run.wait() == [0, 0], run.log()
    lines = map(json.loads, (tmp_path / "run" / "routing.jsonl").read_text().splitlines())
    steps = [one["steps"] for one in lines if one["phase"] == "training" and one["layer"] == 1]
    assert sum(steps) == STEPS
