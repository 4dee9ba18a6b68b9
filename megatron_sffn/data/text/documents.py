"""Parses chunks of text into documents, with errors that name the faulty document.

Inputs: chunks of `chunks.py`. Outputs: documents in order, and the text under their keys.

Design notes:
- A document is parsed only when its text is asked for, so a faulty one does not hide the next.
- A list of strings under a key is a document of several sequences, as in Megatron-LM.
- A blank line is not a document.
- orjson parses the lines; `json` parses a line again that orjson refuses and Megatron-LM accepts,
  such as one with NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_sffn.data.text.chunks import BYTE_ORDER_MARK, Fault, TextChunk, place, read_chunks
from megatron_sffn.data.text.sources import Source
from megatron_sffn.utils.errors import ConfigError


class DocumentError(ConfigError):
    """A document that cannot be used.

    Args:
        fault: the reason.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(kw_only=True, slots=True)
class Document:
    """One document, not parsed yet.

    Args:
        path: path of the file.
        unit: `line` or `row`; empty if the file is one document.
        number: number of the line or row, from 1; None for a file.
        content: the bytes of a JSON object or of a text; or a row of Parquet, by column, or the
            error for a row that cannot be read.
    """

    path: str
    unit: str
    number: int | None
    content: bytes | dict[str, Any] | UnicodeDecodeError

    def __str__(self) -> str:
        """Name of the document in messages."""
        return place(self.path, self.unit, self.number)

    def record(self) -> dict[str, Any]:
        """All values by key; a text file has its text under `text`.

        Raises:
            DocumentError: the document is not a JSON object, or not text.
        """
        if isinstance(self.content, dict):
            return self.content
        if isinstance(self.content, UnicodeDecodeError):
            raise self._not_unicode(self.content)
        if not self.unit:
            return {"text": self._decode(self.content)}
        return self._parse(self.content)

    def texts(self, keys: Sequence[str]) -> list[str]:
        """The string under each key.

        Raises:
            DocumentError: the document is not a JSON object, lacks a key, or has another type.
        """
        values = self._values(keys)
        return [self._text(key, value) for key, value in zip(keys, values, strict=True)]

    def sequences(self, keys: Sequence[str]) -> list[list[str]]:
        """The strings under each key, which has one string or a list of them.

        Raises:
            DocumentError: the document is not a JSON object, lacks a key, or has another type.
        """
        values = self._values(keys)
        return [
            [self._text(key, item) for item in (value if isinstance(value, list) else [value])]
            for key, value in zip(keys, values, strict=True)
        ]

    def fault(self, reason: str, remedy: str) -> DocumentError:
        """An error with the name of the document."""
        return DocumentError(
            Fault(path=self.path, unit=self.unit, number=self.number, reason=reason, remedy=remedy)
        )

    def _values(self, keys: Sequence[str]) -> list[Any]:
        record = self.record()
        if not self.unit:
            return [record["text"]]
        for key in keys:
            if key not in record:
                keys_of_record = ", ".join(sorted(record)) or "no keys"
                raise self.fault(
                    f"has no key {key!r} (it has {keys_of_record})", "name an existing key"
                )
        return [record[key] for key in keys]

    def _text(self, key: str, value: Any) -> str:
        if isinstance(value, bytes):
            return self._decode(value)
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise self.fault(
                f"holds {kind} under {key!r}, not a string",
                "store the text of a document as one string",
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.fault(
                f"holds half of a surrogate pair ({value[error.start]!a}) under {key!r}, "
                "which is no character",
                "remove it",
            ) from error
        return value

    def _decode(self, content: bytes) -> str:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_unicode(error) from error
        if "\0" in text:
            raise self.fault(
                f"holds a NUL at byte {content.index(0)}, which no text has", "correct or remove it"
            )
        return text

    def _not_unicode(self, error: UnicodeDecodeError) -> DocumentError:
        return self.fault(
            f"is not UTF-8 ({error.reason} at byte {error.start})", "convert it to UTF-8"
        )

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            record = orjson.loads(content)
        except orjson.JSONDecodeError:
            record = self._parse_again(content)
        if not isinstance(record, dict):
            raise self.fault(
                f"is a JSON {type(record).__name__}, not an object",
                'write {"text": "..."} on every line',
            )
        return record

    def _parse_again(self, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            reason = f"it is not UTF-8 at byte {error.start}"
        except json.JSONDecodeError as error:
            # The message of the error says "line 1", which is not the line of the file.
            reason = f"{error.msg} at character {error.pos}"
        except RecursionError:
            reason = "it is nested too deeply"
        if zeros := content.count(0):
            reason = f"it holds a NUL at byte {content.index(0)}"
            if zeros > len(content) // 4:
                reason += ", as UTF-16 text does"
        if content.strip() in (b"{", b"[", b"[{"):
            raise self.fault(
                "is the beginning of JSON over several lines",
                "write one object on a line: jq -c . of an object, jq -c '.[]' of a list",
            )
        remedy = "correct or remove it"
        if self.number == 1 and content.lstrip()[:1] not in (b"{", b"["):
            remedy += "; a file that is one text has a name that ends in .txt"
        raise self.fault(f"is not JSON ({reason})", remedy)


def documents_of(chunk: TextChunk) -> Iterator[Document]:
    """The documents of a chunk, in order."""
    if chunk.fault:
        return
    source = chunk.source
    if source.kind == "text":
        content = chunk.content.removeprefix(BYTE_ORDER_MARK)
        yield Document(path=source.name, unit="", number=None, content=content)
    elif source.kind == "lines":
        for number, line in enumerate(chunk.content.split(b"\n"), chunk.number):
            if line and not line.isspace():
                yield Document(path=source.name, unit=source.unit, number=number, content=line)
    else:
        for number, row in enumerate(_rows(chunk.content), chunk.number):
            yield Document(path=source.name, unit=source.unit, number=number, content=row)


def _rows(batch: Any) -> Iterable[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a `pyarrow.RecordBatch`; the error for a row that is not UTF-8."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        return [_row(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row(batch: Any) -> dict[str, Any] | UnicodeDecodeError:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return error


def read_documents(
    sources: Sequence[Source], *, columns: Sequence[str] | None = None
) -> Iterator[Document]:
    """Read all documents of all sources, in order.

    Args:
        sources: from `find_sources`.
        columns: columns of Parquet files to read; None: all of them.

    Raises:
        DocumentError: a file is truncated or damaged, or a document is too long.
    """
    for chunk in read_chunks(sources, columns=columns):
        yield from documents_of(chunk)
        if chunk.fault:
            raise DocumentError(chunk.fault)
