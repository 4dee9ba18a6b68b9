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


def write_file(path: Path, content: bytes = LINES) -> str:
    """Write a file; a name of an archive is compressed, in two parts like `cat a.gz b.gz`."""
    library: Any = COMPRESSIONS.get(path.suffix)
    if library is None:
        path.write_bytes(content)
        return str(path)
    with path.open("wb") as file:
        file.write(library.compress(content[:1000]) + library.compress(content[1000:]))
    return str(path)


def read_all(*inputs: str, start: Position | None = None) -> list[TextChunk]:
    return list(read_chunks(find_sources(inputs, ["text"]), columns=["text"], start=start))


def texts_of(chunks: list[TextChunk]) -> list[str]:
    return [
        document.texts(["text"])[0]
        for chunk in chunks
        if not chunk.fault
        for document in documents_of(chunk)
    ]


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_reading_lines_can_start_at_any_chunk(tmp_path: Path, compression: str) -> None:
    path = write_file(tmp_path / f"a.jsonl{compression}")
    chunks = read_all(path)
    assert len(chunks) > 10
    assert texts_of(chunks) == TEXTS
    assert all(len(chunk.content) < 3 * text_chunks.CHUNK_BYTES or compression for chunk in chunks)
    assert [chunk.number for chunk in chunks] == [
        1,
        *(chunk.end.number + 1 for chunk in chunks[:-1]),
    ]
    consumed = [chunk.consumed for chunk in chunks]
    assert consumed == sorted(consumed) and consumed[-1] == os.path.getsize(path)
    for chunk in chunks[::3]:
        assert texts_of(read_all(path, start=chunk.end)) == TEXTS[chunk.end.number :]


def test_reading_rows_can_start_at_any_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": TEXTS, "other": [b"x" * 50] * len(TEXTS)})
    parquet.write_table(table, path, row_group_size=301)
    chunks = read_all(str(path))
    assert len(chunks) > 10
    assert chunks[0].content.column_names == ["text"]
    assert texts_of(chunks) == TEXTS
    assert chunks[-1].consumed == path.stat().st_size
    for chunk in chunks[::3]:
        later_chunks = read_all(str(path), start=chunk.end)
        assert texts_of(later_chunks) == TEXTS[chunk.end.number :]
        assert not later_chunks or later_chunks[0].number == chunk.end.number + 1


def test_positions_continue_over_several_files(tmp_path: Path) -> None:
    first, second = write_file(tmp_path / "a.jsonl"), write_file(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.txt").write_bytes(b"the third")
    inputs = (first, second, str(tmp_path / "c.txt"))
    chunks = read_all(*inputs)
    assert texts_of(chunks) == [*TEXTS, *TEXTS, "the third"]
    assert chunks[-1].consumed == sum(map(os.path.getsize, inputs))
    for chunk in chunks[::7]:
        later_texts = texts_of(read_all(*inputs, start=chunk.end))
        assert (
            later_texts == [*TEXTS, *TEXTS, "the third"][chunk.end.file * 2000 + chunk.end.number :]
        )
    assert read_all(*inputs, start=chunks[-1].end) == []


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    assert texts_of(read_all(write_file(tmp_path / "a.jsonl", LINES[:-1]))) == TEXTS


def test_byte_order_marks_line_ends_and_blank_lines_are_handled(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b'{"text": "a\\r\\n"}\r\n\r\n  \n{"text": "b"}\r\n\n'
    (chunk,) = read_all(write_file(tmp_path / "a.jsonl", content))
    documents = list(documents_of(chunk))
    assert [document.texts(["text"]) for document in documents] == [["a\r\n"], ["b"]]
    assert [document.number for document in documents] == [1, 4]
    assert chunk.end == Position(offset=len(content), number=5)
    (text,) = read_all(write_file(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n"))
    assert texts_of([text]) == ["one\r\n\r\ntwo\n"]


def test_empty_files_can_be_read(tmp_path: Path) -> None:
    assert read_all(write_file(tmp_path / "a.jsonl", b"")) == []
    assert texts_of(read_all(write_file(tmp_path / "a.txt", b""))) == [""]
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet"
    )
    assert read_all(str(tmp_path / "a.parquet")) == []


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_truncated_archive_is_read_up_to_its_end(tmp_path: Path, compression: str) -> None:
    # Text that does not compress, so that every format decompresses a part of it before the cut.
    random = os.urandom(300_000).hex().encode()
    lines = b"".join(
        b'{"text": "%s"}\n' % random[start : start + 500] for start in range(0, 600_000, 500)
    )
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(
        COMPRESSIONS[compression].compress(lines)[: 200_000 if compression != ".bz2" else -5]
    )
    other_path = write_file(tmp_path / "b.jsonl")
    all_chunks = read_all(str(path), other_path)
    *chunks, last, _ = all_chunks[: -len(read_all(other_path)) + 1]
    num_lines = last.number - 1
    assert b"".join(chunk.content for chunk in chunks) == b"".join(
        lines.splitlines(keepends=True)[:num_lines]
    )
    assert num_lines > 100 or compression == ".bz2"
    assert str(last.fault).startswith(f"{path} is truncated or damaged after line {num_lines} (")
    assert str(last.fault).endswith("; make or copy the file again")
    assert last.end == Position(file=1)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_uncompressed_file_with_an_archive_name_is_a_fault(
    tmp_path: Path, compression: str
) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(LINES)
    (chunk,) = read_all(str(path))
    assert f"{path} is truncated or damaged after line 0 (" in str(chunk.fault)


@pytest.mark.parametrize("compression", [".xz", ".bz2"])
def test_concatenated_streams_padding_and_trailing_damage_are_handled(
    tmp_path: Path, compression: str
) -> None:
    library: Any = COMPRESSIONS[compression]
    path = tmp_path / f"a.jsonl{compression}"
    first, second = (library.compress(lines) for lines in (LINES[:1000], LINES[1000:]))
    path.write_bytes(first + bytes(70_000 * 4) + second + bytes(8))
    chunks = read_all(str(path))
    assert texts_of(chunks) == TEXTS
    for chunk in chunks[::3]:
        assert texts_of(read_all(str(path), start=chunk.end)) == TEXTS[chunk.end.number :]
    path.write_bytes(first + second + b"what is no stream")
    *chunks, last = read_all(str(path))
    assert texts_of(chunks) == TEXTS
    assert f"{path} is truncated or damaged after line 2000 (" in str(last.fault)
    if compression == ".xz":
        path.write_bytes(first + bytes(3) + second)
        assert "after line" in str(read_all(str(path))[-1].fault)


def test_a_zstd_window_of_two_gigabytes_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    options = {zstd.CompressionParameter.window_log: 31}
    path.write_bytes(b"")
    compressor = zstd.ZstdCompressor(options=options)  # as for a pipe, whose length is unknown
    path.write_bytes(compressor.compress(LINES) + compressor.flush())
    assert texts_of(read_all(str(path))) == TEXTS


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
    other_path = write_file(tmp_path / "b.jsonl")
    first, *other_chunks = read_all(str(tmp_path / name), other_path)
    assert f"{name} {sentence}" in str(first.fault)
    assert texts_of(other_chunks) == TEXTS


def test_a_damaged_row_group_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    start = len(content) * 6 // 10
    content[start : start + 500] = bytes(500)
    path.write_bytes(content)
    *chunks, last = read_all(str(path))
    assert texts_of(chunks) == TEXTS[: last.number - 1]
    assert f"{path} is truncated or damaged after row {last.number - 1} (" in str(last.fault)


def test_a_deleted_file_is_a_fault(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.jsonl")
    sources = find_sources([path], ["text"])
    os.unlink(path)
    (chunk,) = read_chunks(sources)
    assert "No such file" in str(chunk.fault)


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_line_that_is_too_long_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setattr(text_chunks, "LONGEST_DOCUMENT", 100_000)
    long_line = b'{"text": "' + b"x" * 400_000 + b'"}\n'
    content = LINES[:5000].rpartition(b"\n")[0] + b"\n"
    path = write_file(
        tmp_path / f"a.jsonl{compression}", content + long_line + LINES + long_line[:-1]
    )
    chunks = read_all(path)
    faults = [chunk for chunk in chunks if chunk.fault]
    num_lines = content.count(b"\n")
    assert [str(chunk.fault) for chunk in faults] == [
        f"line {number} of {path} is longer than 100000 bytes; cut it into several documents"
        for number in (num_lines + 1, num_lines + 2 + len(TEXTS))
    ]
    assert texts_of(chunks) == [*TEXTS[:num_lines], *TEXTS]
    assert [chunk.number for chunk in faults] == [num_lines + 1, num_lines + 2 + len(TEXTS)]
    assert texts_of(read_all(path, start=faults[0].end)) == TEXTS


def test_a_text_that_is_too_long_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_chunks, "LONGEST_DOCUMENT", 10)
    fitting, too_long = tmp_path / "a.txt", tmp_path / "b.txt"
    fitting.write_bytes(b"x" * 10)
    too_long.write_bytes(b"x" * 11)
    chunks = read_all(str(fitting), str(too_long))
    assert texts_of(chunks) == ["x" * 10]
    assert (
        str(chunks[1].fault) == f"{too_long} is longer than 10 bytes; cut it into several documents"
    )


def test_a_long_line_needs_at_most_five_times_its_length_of_memory(tmp_path: Path) -> None:
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


def test_memory_does_not_grow_with_the_size_of_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = os.urandom(5_000).hex()
    table = pyarrow.table({"text": [text[number:] + text[:number] for number in range(3000)]})
    parquet.write_table(table, path, row_group_size=3000, use_dictionary=False, compression="none")
    assert path.stat().st_size > 29_000_000
    del table
    allocated_before = pyarrow.total_allocated_bytes()
    peak = 0
    for _ in read_chunks(find_sources([str(path)], ["text"])):
        peak = max(peak, pyarrow.total_allocated_bytes() - allocated_before)
    assert peak < 15_000_000
