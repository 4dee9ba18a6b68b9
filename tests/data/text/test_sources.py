"""`--input` accepts files, folders, globs and pipes, and refuses what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_sffn.data.text.compression import COMPRESSIONS
from megatron_sffn.data.text.sources import KINDS, find_sources, total_size
from megatron_sffn.utils.errors import ConfigError


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [str(folder / name) for name in names]


def write_parquet(path: Path, **columns: list[object]) -> str:
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def source_paths(inputs: list[str], keys: tuple[str, ...] = ("text",)) -> list[str]:
    return [source.path for source in find_sources(inputs, keys)]


def test_files_are_read_in_the_given_order(tmp_path: Path) -> None:
    inputs = touch(tmp_path, "b.jsonl", "a.jsonl", "part-0001", "c.txt.xz")
    assert source_paths(inputs) == inputs


def test_the_name_of_a_file_decides_its_kind(tmp_path: Path) -> None:
    names = [f"a{kind}{compression}" for kind in KINDS for compression in ("", *COMPRESSIONS)]
    names = [name for name in names if ".parquet." not in name and not name.endswith(".parquet")]
    sources = find_sources(touch(tmp_path, *names), ["text"])
    assert [source.kind + source.compression for source in sources] == [
        kind + compression
        for kind in ("lines", "lines", "lines", "text")
        for compression in ("", *COMPRESSIONS)
    ]
    sources_of_lines = find_sources(touch(tmp_path, "part-7", "b.gz"), ["text"])
    assert [(source.kind, source.compression) for source in sources_of_lines] == [
        ("lines", ""),
        ("lines", ".gz"),
    ]


def test_a_folder_gives_its_text_files_sorted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet", text=["a"])
    expected = touch(tmp_path, "a.jsonl", "b/c.txt", "b/d/e.json.zst", "z.ndjson")
    touch(tmp_path, "notes.md", "f.bin", ".hidden.jsonl", ".git/g.txt", "h.jsonl.part")
    (tmp_path / "empty.txt").mkdir()
    assert source_paths([str(tmp_path)]) == sorted([*expected, str(tmp_path / "p.parquet")])


def test_a_folder_behind_a_link_is_read_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    expected = touch(data, "a.jsonl", "own/b.jsonl")
    touch(tmp_path / "elsewhere", "c.jsonl", "deep/d.jsonl")
    (data / "sub").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(data / "own")
    (data / "loop").symlink_to(data)
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    linked = [str(data / "sub" / name) for name in ("c.jsonl", "deep/d.jsonl")]
    assert source_paths([str(data)]) == sorted([*expected, *linked])


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    expected = touch(tmp_path, "a.jsonl")
    touch(tmp_path, "x.JSONL", "x.jsonl.lz4", "b/y.csv", "b/z.csv", "LICENSE", ".hidden")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    log: list[str] = []
    assert [
        source.path for source in find_sources([str(tmp_path)], ["text"], log.append)
    ] == expected
    (line,) = log
    assert line.startswith(f"--input {tmp_path}: 6 files are left alone (2 .csv, ")
    assert {"1 .JSONL", "1 .lz4", "1 no ending", "1 broken link"} < set(
        line.partition("(")[2].partition(")")[0].split(", ")
    )
    log.clear()
    find_sources([str(tmp_path / "a.jsonl")], ["text"], log.append)
    assert log == []


def test_files_without_an_ending_are_read_if_no_file_has_one(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("ä note")
    (tmp_path / "part-0001").write_text('\n {"text": "a line"}\n')
    (tmp_path / "image").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin").write_bytes(b"caf\xe9" + b" " * 10)
    (tmp_path / "_SUCCESS").touch()
    sources = find_sources([str(tmp_path)], ["text"])
    assert [(Path(source.path).name, source.kind) for source in sources] == [
        ("notes", "text"),
        ("part-0001", "lines"),
    ]
    touch(tmp_path, "a.jsonl")
    assert source_paths([str(tmp_path)]) == [str(tmp_path / "a.jsonl")]


def test_globs_are_expanded(tmp_path: Path) -> None:
    expected = touch(tmp_path, "p1.jsonl", "p2.jsonl", "deep/er/p3.jsonl")
    touch(tmp_path, "p4.txt")
    (tmp_path / "p5.jsonl").mkdir()
    assert source_paths([str(tmp_path / "p*.jsonl")]) == expected[:2]
    assert source_paths([str(tmp_path / "**" / "*.jsonl")]) == sorted(expected)
    literal = touch(tmp_path, "[1].jsonl")
    assert source_paths(literal) == literal


def test_pipes_and_standard_input_have_no_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    sources = find_sources(["-", str(tmp_path / "pipe"), str(tmp_path / "a.jsonl")], ["text"])
    assert [source.size for source in sources] == [None, None, 5]
    assert total_size(sources) is None
    assert total_size(sources[2:]) == 5
    assert sources[0].name == "standard input"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nowhere"], "--input nowhere does not exist; give a file, a folder, a glob"),
        (["nowhere*.jsonl"], r"--input nowhere\*.jsonl does not exist"),
        (["a.jsonl", "nowhere"], "--input nowhere does not exist"),
        (["empty"], "--input empty is a folder without text; .* end in .jsonl, "),
        (["a.jsonl", "a.jsonl"], "--input a.jsonl leads to a.jsonl a second time; name each"),
        (["a.jsonl", "*.jsonl"], r"--input \*.jsonl leads to a.jsonl a second time"),
        (["a.jsonl", "link"], "--input link leads to link a second time"),
        (["p.parquet.gz"], "--input p.parquet.gz is compressed Parquet, .* decompress"),
        (["no.parquet"], r"--input no.parquet is no Parquet file, or a truncated one \(.*\); make"),
        (["cut.parquet"], "--input cut.parquet is no Parquet file, or a truncated one"),
        (["p.parquet"], r"p.parquet has no column 'text' \(it has body, n\); name an existing"),
    ],
)
def test_unreadable_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.jsonl", "empty/x.bin", "p.parquet.gz")
    (tmp_path / "link").symlink_to("a.jsonl")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but nothing else")
    write_parquet(tmp_path / "p.parquet", body=["a"], n=[1])
    content = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=message) as error:
        find_sources(inputs, ["text"])
    assert "\n" not in str(error.value)


def test_several_keys_for_a_text_file_are_refused(tmp_path: Path) -> None:
    (input_path,) = touch(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match=r"a.txt is one text, but there are 2 keys \(a, b\)"):
        find_sources([input_path], ["a", "b"])


def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (input_path,) = touch(tmp_path, "a.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read anything
    with pytest.raises(ConfigError, match=f"--input {input_path} cannot be read .*; change"):
        find_sources([input_path], ["text"])
