"""Atomic output: files appear together or not at all, also after a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sffn.data.output.atomic_output import atomic_output, bin_and_idx
from megatron_sffn.utils.errors import ConfigError


def write(prefix: Path, text: str, *, overwrite: bool = False) -> None:
    files = bin_and_idx(str(prefix))
    with atomic_output(str(prefix), files, overwrite=overwrite) as folder:
        for path in files:
            (folder / path.name).write_text(text)


def read_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_appear_when_all_are_written(tmp_path: Path) -> None:
    files = bin_and_idx(f"{tmp_path}/a")
    with atomic_output(f"{tmp_path}/a", files, overwrite=False) as folder:
        for path in files:
            (folder / path.name).write_text("x")
        assert not any(path.exists() for path in files)
        assert folder.parent == tmp_path  # beside them, so that a rename is enough
    assert read_files(tmp_path) == {"a.bin": "x", "a.idx": "x"}


def test_an_error_keeps_the_old_files(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    files = bin_and_idx(f"{tmp_path}/a")
    with (
        pytest.raises(ZeroDivisionError),
        atomic_output(f"{tmp_path}/a", files, overwrite=True) as folder,
    ):
        (folder / "a.bin").write_text("new")
        raise ZeroDivisionError
    assert read_files(tmp_path) == {"a.bin": "old", "a.idx": "old"}


@pytest.mark.parametrize("renamed", [0, 1])
def test_renames_that_a_kill_interrupted_are_completed(tmp_path: Path, renamed: int) -> None:
    """The process ends while it renames the files."""
    pid = os.fork()
    if not pid:
        replace, calls = Path.replace, []

        def die_in_replace(path: Path, target: Path) -> Path:
            if path.suffix in (".bin", ".idx"):
                calls.append(path)
                if len(calls) > renamed:
                    os._exit(9)
            return replace(path, target)

        Path.replace = die_in_replace  # type: ignore[method-assign]
        write(tmp_path / "a", "whole")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (tmp_path / "a.idx").exists()
    with pytest.raises(ConfigError, match="is there already"):
        write(tmp_path / "a", "another")
    assert read_files(tmp_path) == {"a.bin": "whole", "a.idx": "whole"}
    write(tmp_path / "a", "another", overwrite=True)
    assert read_files(tmp_path) == {"a.bin": "another", "a.idx": "another"}


def test_an_unwritable_folder_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.bin.partial").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"a\.bin\.partial cannot be written \(File exists\); give"
    ):
        write(tmp_path / "a", "x")
    assert read_files(tmp_path) == {"a.bin.partial": "in the way"}
