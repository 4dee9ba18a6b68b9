"""Sources that `--input` names: files, folders, globs and pipes; and errors."""

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


def paths(given: list[str], keys: tuple[str, ...] = ("text",)) -> list[str]:
    return [source.path for source in find_sources(given, keys)]


def test_files_keep_their_order(tmp_path: Path) -> None:
    given = touch(tmp_path, "b.jsonl", "a.jsonl", "part-0001", "c.txt.xz")
    assert paths(given) == given


def test_a_name_gives_the_kind_of_a_file(tmp_path: Path) -> None:
    names = [f"a{kind}{compression}" for kind in KINDS for compression in ("", *COMPRESSIONS)]
    names = [name for name in names if ".parquet." not in name and not name.endswith(".parquet")]
    found = find_sources(touch(tmp_path, *names), ["text"])
    assert [source.kind + source.compression for source in found] == [
        kind + compression
        for kind in ("lines", "lines", "lines", "text")
        for compression in ("", *COMPRESSIONS)
    ]
    other = find_sources(touch(tmp_path, "part-7", "b.gz"), ["text"])
    assert [(source.kind, source.compression) for source in other] == [
        ("lines", ""),
        ("lines", ".gz"),
    ]


def test_a_folder_gives_its_text_files_sorted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet", text=["a"])
    named = touch(tmp_path, "a.jsonl", "b/c.txt", "b/d/e.json.zst", "z.ndjson")
    touch(tmp_path, "notes.md", "f.bin", ".hidden.jsonl", ".git/g.txt", "h.jsonl.part")
    (tmp_path / "empty.txt").mkdir()
    assert paths([str(tmp_path)]) == sorted([*named, str(tmp_path / "p.parquet")])


def test_a_folder_behind_a_link_is_read_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    named = touch(data, "a.jsonl", "own/b.jsonl")
    touch(tmp_path / "elsewhere", "c.jsonl", "deep/d.jsonl")
    (data / "sub").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(data / "own")
    (data / "loop").symlink_to(data)
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    linked = [str(data / "sub" / name) for name in ("c.jsonl", "deep/d.jsonl")]
    assert paths([str(data)]) == sorted([*named, *linked])


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    named = touch(tmp_path, "a.jsonl")
    touch(tmp_path, "x.JSONL", "x.jsonl.lz4", "b/y.csv", "b/z.csv", "LICENSE", ".hidden")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    said: list[str] = []
    assert [one.path for one in find_sources([str(tmp_path)], ["text"], said.append)] == named
    (line,) = said
    assert line.startswith(f"--input {tmp_path}: 6 files are left alone (2 .csv, ")
    assert {"1 .JSONL", "1 .lz4", "1 no ending", "1 broken link"} < set(
        line.partition("(")[2].partition(")")[0].split(", ")
    )
    said.clear()
    find_sources([str(tmp_path / "a.jsonl")], ["text"], said.append)
    assert said == []


def test_names_without_an_ending_are_text_if_no_name_has_one(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("ä note")
    (tmp_path / "part-0001").write_text('\n {"text": "a line"}\n')
    (tmp_path / "image").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin").write_bytes(b"caf\xe9" + b" " * 10)
    (tmp_path / "_SUCCESS").touch()
    found = find_sources([str(tmp_path)], ["text"])
    assert [(Path(one.path).name, one.kind) for one in found] == [
        ("notes", "text"),
        ("part-0001", "lines"),
    ]
    touch(tmp_path, "a.jsonl")
    assert paths([str(tmp_path)]) == [str(tmp_path / "a.jsonl")]


def test_globs_are_expanded(tmp_path: Path) -> None:
    named = touch(tmp_path, "p1.jsonl", "p2.jsonl", "deep/er/p3.jsonl")
    touch(tmp_path, "p4.txt")
    (tmp_path / "p5.jsonl").mkdir()
    assert paths([str(tmp_path / "p*.jsonl")]) == named[:2]
    assert paths([str(tmp_path / "**" / "*.jsonl")]) == sorted(named)
    literal = touch(tmp_path, "[1].jsonl")
    assert paths(literal) == literal


def test_pipes_and_standard_input_have_no_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    found = find_sources(["-", str(tmp_path / "pipe"), str(tmp_path / "a.jsonl")], ["text"])
    assert [source.size for source in found] == [None, None, 5]
    assert total_size(found) is None
    assert total_size(found[2:]) == 5
    assert found[0].name == "standard input"


@pytest.mark.parametrize(
    ("given", "message"),
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.jsonl", "empty/x.bin", "p.parquet.gz")
    (tmp_path / "link").symlink_to("a.jsonl")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but nothing else")
    write_parquet(tmp_path / "p.parquet", body=["a"], n=[1])
    whole = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=message) as error:
        find_sources(given, ["text"])
    assert "\n" not in str(error.value)


def test_a_text_has_one_key(tmp_path: Path) -> None:
    (given,) = touch(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match=r"a.txt is one text, but there are 2 keys \(a, b\)"):
        find_sources([given], ["a", "b"])


def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (given,) = touch(tmp_path, "a.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read anything
    with pytest.raises(ConfigError, match=f"--input {given} cannot be read .*; change"):
        find_sources([given], ["text"])
