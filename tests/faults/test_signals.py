"""After a signal of a scheduler the run saves and exits."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.faults.jobs import Job, job
from tests.faults.scenarios import STEPS, asked_to_stop, resuming_flags, torchrun_asked_to_stop


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, 1), (signal.SIGUSR2, 0)])
def test_after_a_signal_to_one_rank_all_ranks_save_and_exit(
    tmp_path: Path, undisturbed_job: Job, number: signal.Signals, rank: int
) -> None:
    assert asked_to_stop(tmp_path, undisturbed_job, number, rank).lost == 0


def test_after_a_signal_to_ranks_and_data_workers_the_run_saves_and_exits(
    tmp_path: Path, undisturbed_job: Job
) -> None:
    flags = "--num-workers 2"
    assert asked_to_stop(tmp_path, undisturbed_job, signal.SIGTERM, flags=flags).lost == 0


def test_torchrun_passes_a_signal_to_the_ranks(tmp_path: Path) -> None:
    assert torchrun_asked_to_stop(tmp_path).lost == 0


def test_routing_lines_cover_every_step_after_a_signal(tmp_path: Path) -> None:
    flags = f"{resuming_flags(tmp_path / 'run')} --log-interval 8"
    with job(2, flags, tmp_path) as run:
        run.wait_for("successfully saved", rank=0)
        run.send(signal.SIGTERM)
        assert run.wait() == [0, 0], run.log()
    with job(2, flags, tmp_path) as run:
        assert run.wait() == [0, 0], run.log()
    lines = map(json.loads, (tmp_path / "run" / "routing.jsonl").read_text().splitlines())
    steps = [line["steps"] for line in lines if line["phase"] == "training" and line["layer"] == 1]
    assert sum(steps) == STEPS
