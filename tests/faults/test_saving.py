"""Repeated saves and the tracker file, in states that a random kill may not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sffn.checkpoints.files import TRACKER, folder_to_load, last_whole
from megatron_sffn.checkpoints.save import empty_folder
from megatron_sffn.utils.atomic_files import atomic_write
from tests.faults.jobs import EP2, job

FLAGS = f"{EP2} --train-iters 4 --save-interval 2"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("two")
    with job(2, f"{FLAGS} --save {folder / 'run'}", folder) as run:
        assert run.wait() == [0, 0], run.log()
    return folder / "run"


def test_a_finished_run_that_is_started_again_saves_nothing(
    run_folder: Path, tmp_path: Path
) -> None:
    mtimes = {path: path.stat().st_mtime_ns for path in run_folder.rglob("iter_*/*")}
    # Here the last iteration is no multiple of the interval: Megatron would save at the end.
    flags = f"{EP2} --train-iters 4 --save-interval 3 --save {run_folder} --load {run_folder}"
    with job(2, flags, tmp_path) as run:
        assert run.wait() == [0, 0], run.log()
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("iter_*/*")} == mtimes


def test_the_tracker_never_names_a_folder_that_is_being_emptied(run_folder: Path) -> None:
    empty_folder(run_folder / "iter_0000004")
    assert folder_to_load(run_folder, None) == run_folder / "iter_0000002"
    assert last_whole(run_folder) == 2
    empty_folder(run_folder / "iter_0000002")
    assert folder_to_load(run_folder, None) is None
    assert not any((run_folder / "iter_0000002").iterdir())


def test_async_save_is_refused_without_a_gpu(tmp_path: Path) -> None:
    flags = f"{FLAGS} --save run --async-save --use-persistent-ckpt-worker"
    with job(1, flags.replace(EP2, ""), tmp_path) as run:
        assert run.wait() == [2], run.log()
    assert run.log().splitlines()[-1].startswith("error: --async-save needs a GPU, "), run.log()
    assert not (tmp_path / "run").exists()


def test_an_interrupted_write_keeps_the_old_tracker(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("2")
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_write(tmp_path / TRACKER, durable=True) as file,
    ):
        file.write("4")
        file.flush()
        assert (tmp_path / TRACKER).read_text() == "2"
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]
