"""A folder that is written again, and the tracker file: what no kill is sure to hit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sffn.checkpoints.files import TRACKER, folder_to_load, last_whole
from megatron_sffn.checkpoints.save import empty_folder
from megatron_sffn.utils.atomic_files import atomic_write
from tests.faults.jobs import EP2, job

FLAGS = f"{EP2} --train-iters 4 --save-interval 2"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("two")
    with job(2, f"{FLAGS} --save {folder / 'run'}", folder) as run:
        assert run.wait() == [0, 0], run.log()
    return folder / "run"


def test_a_finished_run_that_is_started_again_saves_nothing(two: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in two.rglob("iter_*/*")}
    # The last iteration of this one is no multiple of the interval: Megatron saves at the end.
    flags = f"{EP2} --train-iters 4 --save-interval 3 --save {two} --load {two}"
    with job(2, flags, tmp_path) as run:
        assert run.wait() == [0, 0], run.log()
    assert {path: path.stat().st_mtime_ns for path in two.rglob("iter_*/*")} == before


def test_the_tracker_never_names_the_folder_that_is_emptied(two: Path) -> None:
    empty_folder(two / "iter_0000004")
    assert folder_to_load(two, None) == two / "iter_0000002"
    assert last_whole(two) == 2
    empty_folder(two / "iter_0000002")
    assert folder_to_load(two, None) is None
    assert not any((two / "iter_0000002").iterdir())


def test_a_save_in_another_process_needs_a_gpu(tmp_path: Path) -> None:
    flags = f"{FLAGS} --save run --async-save --use-persistent-ckpt-worker"
    with job(1, flags.replace(EP2, ""), tmp_path) as run:
        assert run.wait() == [2], run.log()
    assert run.log().splitlines()[-1].startswith("error: --async-save needs a GPU, "), run.log()
    assert not (tmp_path / "run").exists()


def test_a_kill_does_not_leave_an_empty_tracker(tmp_path: Path) -> None:
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
