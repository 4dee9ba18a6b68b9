"""Reads text in chunks: complete lines, rows of Parquet, or a text file, in constant memory.

Inputs: the sources of `sources.py`. Outputs: chunks in order, which `documents.py` parses.

Design notes:
- Reading is sequential, and parsing is not: chunks go to other processes unparsed.
- A chunk has the position of its end, from which another run can resume.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from backports import zstd

from megatron_sffn.data.text.compression import decompressed
from megatron_sffn.data.text.sources import Source, open_raw

CHUNK_BYTES = 1 << 20
LONGEST_DOCUMENT = 1 << 30
"""Bytes. A longer line or text file is a fault, and is never in memory."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""First bytes of a file that is not plain text -> its format."""

ENDINGS = {
    "gzip": ".jsonl.gz or .txt.gz",
    "zstd": ".jsonl.zst or .txt.zst",
    "xz": ".jsonl.xz or .txt.xz",
    "bzip2": ".jsonl.bz2 or .txt.bz2",
    "Parquet": ".parquet",
}
"""Format -> the ending that a file of this format should have."""

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


@dataclass(frozen=True, kw_only=True)
class Position:
    """A position from which reading resumes.

    Args:
        file: number of the source, from 0.
        offset: bytes of its decompressed content that have been read.
        number: lines or rows of it that have been read.
    """

    file: int = 0
    offset: int = 0
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The fault of a document, or of the rest of a file.

    Args:
        path: path of the file.
        unit: `line` or `row`; empty if the file is one document.
        number: number of the line or row, from 1; None for the file.
        reason: what is wrong, as the second half of a sentence.
        remedy: what the user can do.
    """

    path: str
    unit: str
    number: int | None
    reason: str
    remedy: str

    def __str__(self) -> str:
        """One sentence for an error message."""
        return f"{place(self.path, self.unit, self.number)} {self.reason}; {self.remedy}"


def place(path: str, unit: str, number: int | None) -> str:
    """Name of a document in messages."""
    return path if number is None else f"{unit} {number} of {path}"


@dataclass(frozen=True, kw_only=True)
class TextChunk:
    """Consecutive documents of one source.

    Args:
        source: their source.
        number: number of the first line or row, from 1.
        content: the bytes of complete lines or of a text file, or a `pyarrow.RecordBatch`; empty
            if there is a fault.
        end: position after the chunk.
        consumed: bytes on disk, of all sources, that have been read after it.
        fault: what is wrong with the document, or with the rest of the file.
    """

    source: Source
    number: int
    content: Any
    end: Position
    consumed: int
    fault: Fault | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the content."""
        return len(self.content) if isinstance(self.content, bytes) else int(self.content.nbytes)


def read_chunks(
    sources: Sequence[Source],
    *,
    columns: Sequence[str] | None = None,
    start: Position | None = None,
) -> Iterator[TextChunk]:
    """Read all chunks of all sources, in order.

    A source that is truncated, or cannot be decompressed, yields the chunks that can be read and
    then a chunk with a fault; the next source follows.

    Args:
        sources: from `find_sources`.
        columns: columns of Parquet files to read; None: all of them.
        start: position to resume from; None: the first source.
    """
    start = start or Position()
    size_before = sum(source.size or 0 for source in sources[: start.file])
    for file, source in enumerate(sources[start.file :], start.file):
        first = start if file == start.file else Position(file=file)
        for chunk in _read_source(source, first, columns):
            yield replace(chunk, consumed=size_before + chunk.consumed)
        size_before += source.size or 0


def _read_source(
    source: Source, start: Position, columns: Sequence[str] | None
) -> Iterator[TextChunk]:
    last = start
    try:
        for chunk in _read_chunks_of(source, start, columns):
            last = chunk.end
            yield chunk
        return
    except _NotTextError as error:
        reason, remedy = error.args
    except READ_ERRORS as error:
        after = f" after {source.unit} {last.number}" if source.unit else ""
        reason = f"is truncated or damaged{after} ({str(error) or type(error).__name__})"
        remedy = "make or copy the file again"
    yield TextChunk(
        source=source,
        number=last.number + 1,
        content=b"",
        end=Position(file=start.file + 1),
        consumed=source.size or 0,
        fault=Fault(path=source.name, unit=source.unit, number=None, reason=reason, remedy=remedy),
    )


class _NotTextError(Exception):
    """A file has another format than its name says; the arguments are reason and remedy."""


def _refuse_other_formats(source: Source, stream: BinaryIO) -> None:
    """Refuse a file whose first bytes show another format than its name."""
    head = stream.peek(8)  # type: ignore[attr-defined]
    for magic, name in MAGICS.items():
        if not head.startswith(magic) or (name == "bzip2" and not head[4:].startswith(b"1AY")):
            continue
        reason = f"is {name} by its first bytes"
        if name == "UTF-16":
            raise _NotTextError(reason, "convert it: iconv -f UTF-16 -t UTF-8")
        raise _NotTextError(reason, f"give it a name that ends in {ENDINGS[name]}")


def _read_chunks_of(
    source: Source, start: Position, columns: Sequence[str] | None
) -> Iterator[TextChunk]:
    if source.kind == "rows":
        return _read_rows(source, start, columns)
    return (_read_text if source.kind == "text" else _read_lines)(source, start)


def _read_lines(source: Source, start: Position) -> Iterator[TextChunk]:
    with open_raw(source) as raw, decompressed(raw, source.compression) as stream:
        if start.offset:
            stream.seek(start.offset)
        else:
            _refuse_other_formats(source, stream)
        position = start
        for content, size in _complete_lines(stream):
            num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
            end = replace(
                position, offset=position.offset + size, number=position.number + num_lines
            )
            fault = None if size == len(content) else _too_long(source, end.number)
            if position.offset == 0:
                content = content.removeprefix(BYTE_ORDER_MARK)
            consumed = raw.tell() if source.size is not None else 0
            yield TextChunk(
                source=source,
                number=position.number + 1,
                content=content,
                end=end,
                consumed=consumed,
                fault=fault,
            )
            position = end


def _complete_lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Read complete lines.

    The lines before a read error are yielded first, and the error is raised after them.

    Yields:
        The lines, and their size in bytes. For a line that is too long the content is empty.
    """
    pieces: list[bytes] = []
    size = 0  # bytes of all pieces
    complete = 0  # bytes of the complete lines in them
    failure: Exception | None = None
    while failure is None:
        try:
            piece = stream.read1(CHUNK_BYTES)  # type: ignore[attr-defined]
        except READ_ERRORS as error:
            failure, piece = error, b""
        if not piece:
            break
        if line_end := piece.rfind(b"\n") + 1:
            complete = size + line_end
        pieces.append(piece)
        size += len(piece)
        if complete and (size >= CHUNK_BYTES or size - complete > LONGEST_DOCUMENT):
            content = b"".join(pieces)
            yield content[:complete], complete
            pieces, size, complete = [content[complete:]], size - complete, 0
        if size - complete > LONGEST_DOCUMENT:
            skipped, rest = _skip_line(stream)
            yield b"", size + skipped
            pieces, size, complete = [rest], len(rest), rest.rfind(b"\n") + 1
    content = b"".join(pieces)
    if content := content[:complete] if failure else content:
        yield content, len(content)
    if failure:
        raise failure


def _skip_line(stream: BinaryIO) -> tuple[int, bytes]:
    """Skip to the end of a line; returns the number of skipped bytes, and the bytes after them."""
    skipped = 0
    while piece := stream.read1(CHUNK_BYTES):  # type: ignore[attr-defined]
        if line_end := piece.find(b"\n") + 1:
            return skipped + line_end, piece[line_end:]
        skipped += len(piece)
    return skipped, b""


def _read_text(source: Source, start: Position) -> Iterator[TextChunk]:
    if start.number:
        return
    with open_raw(source) as raw, decompressed(raw, source.compression) as stream:
        _refuse_other_formats(source, stream)
        content = stream.read(LONGEST_DOCUMENT + 1)
    fault = _too_long(source, None) if len(content) > LONGEST_DOCUMENT else None
    yield TextChunk(
        source=source,
        number=1,
        content=b"" if fault else content,
        end=replace(start, number=1),
        consumed=source.size or 0,
        fault=fault,
    )


def _read_rows(
    source: Source, start: Position, columns: Sequence[str] | None
) -> Iterator[TextChunk]:
    from megatron_sffn.data.text.parquet import read_rows

    for batch, number, share in read_rows(source.path, columns, start.number):
        yield TextChunk(
            source=source,
            number=number + 1,
            content=batch,
            end=replace(start, number=number + batch.num_rows),
            consumed=int(share * (source.size or 0)),
        )


def _too_long(source: Source, number: int | None) -> Fault:
    return Fault(
        path=source.name,
        unit=source.unit,
        number=number,
        reason=f"is longer than {LONGEST_DOCUMENT} bytes",
        remedy="cut it into several documents",
    )
