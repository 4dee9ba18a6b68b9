"""Atomic writes never leave half a file, and half a line at the end of a file is not read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.utils.atomic_files import (
    append_records,
    atomic_write,
    atomic_write_text,
    read_records,
    replace_records,
)


def test_atomic_write_text_makes_folders_and_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    atomic_write_text(path, "one\n")
    atomic_write_text(path, "two\n")
    assert path.read_text() == "two\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_atomic_write_text_that_fails_leaves_the_former_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file.json"
    atomic_write_text(path, "one\n")

    def raise_disk_full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def write_one_byte(partial: Path, text: str) -> None:
        partial.write_bytes(text.encode()[:1])
        raise_disk_full()

    if failing == "write":
        monkeypatch.setattr(Path, "write_text", write_one_byte)
    else:
        monkeypatch.setattr(os, "replace", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(path, "two\n")
    assert path.read_text() == "one\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_partial_file_is_removed_an_hour_after_its_last_write(tmp_path: Path) -> None:
    path = tmp_path / "[a]*.json"  # characters that a glob would read
    recent, stale = tmp_path / f"{path.name}.1234.part", tmp_path / f"{path.name}.5678.part"
    for partial in (recent, stale):
        partial.touch()
    os.utime(stale, (0, 0))
    with atomic_write(path, durable=True) as file:
        file.write("text")
    assert sorted(tmp_path.iterdir()) == sorted([path, recent])
    assert path.read_text() == "text"


def test_appended_records_go_to_the_end_of_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_records(path) == []
    append_records(path, [{"iteration": 1}, {"iteration": 2}])
    inode = path.stat().st_ino
    append_records(path, [{"iteration": 3}])
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3]
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("cut", range(1, 17))
def test_a_line_cut_by_a_kill_is_not_read_and_goes_with_the_next_replacement(
    tmp_path: Path, cut: int
) -> None:
    path, line = tmp_path / "lines.jsonl", '{"iteration": 2}\n'
    append_records(path, [{"iteration": 1}])
    with path.open("a") as file:
        file.write(line[:cut])
    assert read_records(path) == [{"iteration": 1}]
    replace_records(path, lambda record: True, [{"iteration": 3}])
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 3}\n'


def test_replaced_records_are_dropped_and_new_records_are_inserted_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_records(path, [{"iteration": iteration, "old": True} for iteration in (1, 2, 2, 4)])
    replace_records(path, lambda record: record["iteration"] != 2, [{"iteration": 2, "old": False}])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["iteration"], record["old"]) for record in records] == [
        (1, True),
        (2, False),
        (4, True),
    ]
