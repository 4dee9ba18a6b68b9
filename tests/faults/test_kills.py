"""The whole job or one rank is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import Job
from tests.faults.scenarios import INTERVAL, killed_job, killed_rank
from tests.support.slow import slow


@pytest.mark.parametrize("kills", [5, slow(30)])
def test_a_job_that_is_killed_at_any_moment_resumes(
    kills: int, tmp_path: Path, undisturbed_job: Job
) -> None:
    assert killed_job(tmp_path, undisturbed_job, kills=kills, seed=kills).lost <= INTERVAL


def test_torchrun_restarts_all_ranks_after_one_was_killed(
    tmp_path: Path, undisturbed_job: Job
) -> None:
    assert killed_rank(tmp_path, undisturbed_job).lost <= INTERVAL
