"""The disk is full or fails while a run saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sffn.checkpoints.disk_space import bytes_per_parameter
from megatron_sffn.checkpoints.files import args_in, read_common
from tests.faults.jobs import EP2, Job, SmallDisk, job
from tests.faults.scenarios import failing_write, full_disk, resuming_flags, size_of
from tests.support.slow import slow


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, undisturbed_job: Job) -> None:
    try:
        assert full_disk(tmp_path, undisturbed_job).lost <= 5
    except PermissionError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")


def test_a_write_that_fails_keeps_the_last_checkpoint(tmp_path: Path, undisturbed_job: Job) -> None:
    assert failing_write(tmp_path, undisturbed_job).lost == 5


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path: Path) -> None:
    try:
        with (
            SmallDisk(tmp_path / "disk", 1 << 17),
            job(2, resuming_flags(tmp_path / "disk" / "run"), tmp_path / "log") as run,
        ):
            assert run.wait(rank=0) == [2], run.log(0)
            assert not list((tmp_path / "disk").iterdir())
    except PermissionError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    sentence = f"error: --save {tmp_path}/disk/run has 131.1 kB free, but a checkpoint of this "
    assert run.log(0).splitlines()[-1].startswith(f"{sentence}model has "), run.log(0)


@pytest.mark.parametrize(
    ("flags", "num_bytes"),
    [
        ("", 12),
        slow("--bf16", 14),
        slow("--use-distributed-optimizer", 16),
        ("--bf16 --use-distributed-optimizer", 14),
        ("--no-save-optim", 4),
        slow("--optimizer sgd", 8),
    ],
)
def test_the_closed_form_gives_the_size_of_a_checkpoint(
    tmp_path: Path, flags: str, num_bytes: int
) -> None:
    flags = f"{EP2} --train-iters 1 --save-interval 9 --hidden-size 256 {flags} --save {tmp_path}"
    with job(2, flags, tmp_path) as run:
        assert run.wait() == [0, 0], run.log()
    args = args_in(read_common(tmp_path / "iter_0000001"))
    assert bytes_per_parameter(args) == num_bytes
    parameters = json.loads((tmp_path / "summary.json").read_text())["parameters_total"]
    size = size_of(tmp_path / "iter_0000001")
    assert num_bytes * parameters < size < 1.05 * num_bytes * parameters
