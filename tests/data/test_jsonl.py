"""Inputs that are refused before any work; what lines may hold is in tests/tools."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sffn.data.jsonl import COMPRESSED, check_inputs, read_lines
from megatron_sffn.errors import ConfigError


def test_files_and_pipes_are_read_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1\n2\n")
    second.write_bytes(b"3")
    reader, writer = os.pipe()
    os.write(writer, b"4\n")
    os.close(writer)
    paths = [str(first), str(second), f"/dev/fd/{reader}"]
    check_inputs(paths)
    lines = list(read_lines(paths))
    os.close(reader)
    assert [line.content for line in lines] == [b"1\n", b"2\n", b"3", b"4\n"]
    assert [line.number for line in lines] == [1, 2, 1, 1]
    assert str(lines[1]) == f"line 2 of {first}"


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--input {tmp_path} is a folder; give the files"):
        check_inputs([str(tmp_path)])


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_compressed_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.touch()
    with pytest.raises(ConfigError, match=rf"--input {path} is compressed, .* decompress it"):
        check_inputs([str(path)])


def test_a_file_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read anything
    with pytest.raises(ConfigError, match=rf"--input {path} cannot be read .*; change"):
        check_inputs([str(path)])


def test_the_second_of_two(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    with pytest.raises(ConfigError, match="--input nowhere does not exist; give"):
        check_inputs([str(path), "nowhere"])
