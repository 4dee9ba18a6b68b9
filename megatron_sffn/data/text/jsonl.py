"""Documents as JSON lines, the format in which one tool hands text to the next.

Design notes:
- A document that was a JSON line is written byte for byte, with all its keys. A row of Parquet
  keeps all its columns.
"""

from __future__ import annotations

import orjson

from megatron_sffn.data.text.documents import Document


def as_line(document: Document, key: str, text: str) -> bytes:
    """A document as a JSON line, with the line end.

    Args:
        document: the document.
        key: key of its text.
        text: its text.

    Raises:
        DocumentError: the document holds a value that JSON cannot represent.
    """
    if isinstance(document.content, bytes) and document.unit:
        return document.content.rstrip(b"\r\n") + b"\n"
    record = document.record() | {key: text} if document.unit else {key: text}
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise document.fault(
            f"has a value that JSON cannot hold ({error})", "leave out that column"
        ) from error
