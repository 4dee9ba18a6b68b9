"""Chunks: a file is read completely, from any position, and only one chunk is in memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from megatron_sffn.data.text import chunks as text_chunks
from megatron_sffn.data.text import parquet as rows
from megatron_sffn.data.text.chunks import Position, TextChunk, read_chunks
from megatron_sffn.data.text.compression import COMPRESSIONS
from megatron_sffn.data.text.documents import documents_of
from megatron_sffn.data.text.sources import find_sources

TEXTS = [f"document {number} " + "abc " * (number % 50) for number in range(2000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)


def write(path: Path, content: bytes = LINES) -> str:
    """Compressed, if the name says so; in two parts, as `cat a.gz b.gz` makes them."""
    library: Any = COMPRESSIONS.get(path.suffix)
    if library is None:
        path.write_bytes(content)
        return str(path)
    with path.open("wb") as file:
        file.write(library.compress(content[:1000]) + library.compress(content[1000:]))
    return str(path)


def read(*given: str, start: Position | None = None) -> list[TextChunk]:
    return list(read_chunks(find_sources(given, ["text"]), columns=["text"], start=start))


def texts_of(found: list[TextChunk]) -> list[str]:
    return [
        document.texts(["text"])[0]
        for chunk in found
        if not chunk.fault
        for document in documents_of(chunk)
    ]


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_lines_are_read_from_any_chunk_on(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / f"a.jsonl{compression}")
    found = read(path)
    assert len(found) > 10
    assert texts_of(found) == TEXTS
    assert all(len(chunk.content) < 3 * text_chunks.CHUNK_BYTES or compression for chunk in found)
    assert [chunk.number for chunk in found] == [1, *(chunk.end.number + 1 for chunk in found[:-1])]
    consumed = [chunk.consumed for chunk in found]
    assert consumed == sorted(consumed) and consumed[-1] == os.path.getsize(path)
    for chunk in found[::3]:
        assert texts_of(read(path, start=chunk.end)) == TEXTS[chunk.end.number :]


def test_rows_are_read_from_any_chunk_on(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": TEXTS, "other": [b"x" * 50] * len(TEXTS)})
    parquet.write_table(table, path, row_group_size=301)
    found = read(str(path))
    assert len(found) > 10
    assert found[0].content.column_names == ["text"]
    assert texts_of(found) == TEXTS
    assert found[-1].consumed == path.stat().st_size
    for chunk in found[::3]:
        rest = read(str(path), start=chunk.end)
        assert texts_of(rest) == TEXTS[chunk.end.number :]
        assert not rest or rest[0].number == chunk.end.number + 1


def test_positions_continue_over_several_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.txt").write_bytes(b"the third")
    given = (first, second, str(tmp_path / "c.txt"))
    found = read(*given)
    assert texts_of(found) == [*TEXTS, *TEXTS, "the third"]
    assert found[-1].consumed == sum(map(os.path.getsize, given))
    for chunk in found[::7]:
        rest = texts_of(read(*given, start=chunk.end))
        assert rest == [*TEXTS, *TEXTS, "the third"][chunk.end.file * 2000 + chunk.end.number :]
    assert read(*given, start=found[-1].end) == []


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    assert texts_of(read(write(tmp_path / "a.jsonl", LINES[:-1]))) == TEXTS


def test_byte_order_marks_line_ends_and_blank_lines_are_handled(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b'{"text": "a\\r\\n"}\r\n\r\n  \n{"text": "b"}\r\n\n'
    (chunk,) = read(write(tmp_path / "a.jsonl", content))
    documents = list(documents_of(chunk))
    assert [document.texts(["text"]) for document in documents] == [["a\r\n"], ["b"]]
    assert [document.number for document in documents] == [1, 4]
    assert chunk.end == Position(offset=len(content), number=5)
    (text,) = read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n"))
    assert texts_of([text]) == ["one\r\n\r\ntwo\n"]


def test_empty_files_are_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", b"")) == []
    assert texts_of(read(write(tmp_path / "a.txt", b""))) == [""]
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet"
    )
    assert read(str(tmp_path / "a.parquet")) == []


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_truncated_archive_is_read_up_to_its_end(tmp_path: Path, compression: str) -> None:
    # Text that does not compress, so that every compression has given a part of it before the end.
    random = os.urandom(300_000).hex().encode()
    lines = b"".join(b'{"text": "%s"}\n' % random[at : at + 500] for at in range(0, 600_000, 500))
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(
        COMPRESSIONS[compression].compress(lines)[: 200_000 if compression != ".bz2" else -5]
    )
    other = write(tmp_path / "b.jsonl")
    *found, last, _ = (found := read(str(path), other))[: -len(read(other)) + 1]
    read_lines = last.number - 1
    assert b"".join(chunk.content for chunk in found) == b"".join(
        lines.splitlines(keepends=True)[:read_lines]
    )
    assert read_lines > 100 or compression == ".bz2"
    assert str(last.fault).startswith(f"{path} is truncated or damaged after line {read_lines} (")
    assert str(last.fault).endswith("; make or copy the file again")
    assert last.end == Position(file=1)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_wrong_archive_is_a_fault(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(LINES)
    (chunk,) = read(str(path))
    assert f"{path} is truncated or damaged after line 0 (" in str(chunk.fault)


@pytest.mark.parametrize("compression", [".xz", ".bz2"])
def test_streams_padding_and_damage_after_a_stream_are_read(
    tmp_path: Path, compression: str
) -> None:
    library: Any = COMPRESSIONS[compression]
    path = tmp_path / f"a.jsonl{compression}"
    first, second = (library.compress(lines) for lines in (LINES[:1000], LINES[1000:]))
    path.write_bytes(first + bytes(70_000 * 4) + second + bytes(8))
    found = read(str(path))
    assert texts_of(found) == TEXTS
    for chunk in found[::3]:
        assert texts_of(read(str(path), start=chunk.end)) == TEXTS[chunk.end.number :]
    path.write_bytes(first + second + b"what is no stream")
    *found, last = read(str(path))
    assert texts_of(found) == TEXTS
    assert f"{path} is truncated or damaged after line 2000 (" in str(last.fault)
    if compression == ".xz":
        path.write_bytes(first + bytes(3) + second)
        assert "after line" in str(read(str(path))[-1].fault)


def test_a_zstd_window_of_two_gigabytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    options = {zstd.CompressionParameter.window_log: 31}
    path.write_bytes(b"")
    compressor = zstd.ZstdCompressor(options=options)  # of a pipe: it does not know the length
    path.write_bytes(compressor.compress(LINES) + compressor.flush())
    assert texts_of(read(str(path))) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.jsonl",
            gzip.compress(LINES),
            "is gzip by its first bytes; give it a name that ends",
        ),
        ("a.jsonl.zstd", zstd.compress(LINES), "is zstd by its first bytes; give it a name that"),
        ("A.JSONL.XZ", lzma.compress(LINES), "is xz by its first bytes; give it a name that ends"),
        ("a.txt", bz2.compress(LINES), "is bzip2 by its first bytes; give it a name that ends in"),
        ("a.jsonl", "text".encode("utf-16"), "is UTF-16 by its first bytes; convert it: iconv -f"),
        ("a.txt.gz", gzip.compress("text".encode("utf-16")), "is UTF-16 by its first bytes; conv"),
    ],
)
def test_a_file_of_another_format_is_a_fault(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    other = write(tmp_path / "b.jsonl")
    first, *rest = read(str(tmp_path / name), other)
    assert f"{name} {sentence}" in str(first.fault)
    assert texts_of(rest) == TEXTS


def test_a_damaged_row_group_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    at = len(content) * 6 // 10
    content[at : at + 500] = bytes(500)
    path.write_bytes(content)
    *found, last = read(str(path))
    assert texts_of(found) == TEXTS[: last.number - 1]
    assert f"{path} is truncated or damaged after row {last.number - 1} (" in str(last.fault)


def test_a_deleted_file_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    sources = find_sources([path], ["text"])
    os.unlink(path)
    (chunk,) = read_chunks(sources)
    assert "No such file" in str(chunk.fault)


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_line_that_is_too_long_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(text_chunks, "LONGEST_DOCUMENT", 100_000)
    long = b'{"text": "' + b"x" * 400_000 + b'"}\n'
    content = LINES[:5000].rpartition(b"\n")[0] + b"\n"
    path = write(tmp_path / f"a.jsonl{compression}", content + long + LINES + long[:-1])
    found = read(path)
    faults = [chunk for chunk in found if chunk.fault]
    lines = content.count(b"\n")
    assert [str(chunk.fault) for chunk in faults] == [
        f"line {number} of {path} is longer than 100000 bytes; cut it into several documents"
        for number in (lines + 1, lines + 2 + len(TEXTS))
    ]
    assert texts_of(found) == [*TEXTS[:lines], *TEXTS]
    assert [chunk.number for chunk in faults] == [lines + 1, lines + 2 + len(TEXTS)]
    assert texts_of(read(path, start=faults[0].end)) == TEXTS


def test_a_text_that_is_too_long_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_chunks, "LONGEST_DOCUMENT", 10)
    fits, long = tmp_path / "a.txt", tmp_path / "b.txt"
    fits.write_bytes(b"x" * 10)
    long.write_bytes(b"x" * 11)
    found = read(str(fits), str(long))
    assert texts_of(found) == ["x" * 10]
    assert str(found[1].fault) == f"{long} is longer than 10 bytes; cut it into several documents"


def test_a_long_line_needs_few_times_its_length_of_memory(tmp_path: Path) -> None:
    length = 30_000_000
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(3):
            file.write(b'{"text": "' + b"x" * length + b'"}\n')
    tracemalloc.start()
    try:
        for chunk in read_chunks(find_sources([str(path)], ["text"])):
            assert len(chunk.content) == length + 13
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * length


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = os.urandom(5_000).hex()
    table = pyarrow.table({"text": [text[number:] + text[:number] for number in range(3000)]})
    parquet.write_table(table, path, row_group_size=3000, use_dictionary=False, compression="none")
    assert path.stat().st_size > 29_000_000
    del table
    before = pyarrow.total_allocated_bytes()
    peak = 0
    for _ in read_chunks(find_sources([str(path)], ["text"])):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < 15_000_000
