"""Documents as lines of JSON, the form in which one tool hands text to the next.

Enters: documents of any source. Leaves: lines. Choice: a line that was one stays as it is, byte for
byte, with whatever keys it has; a row of Parquet keeps its columns.
"""

from __future__ import annotations

import orjson

from megatron_sffn.data.text.documents import Document


def as_line(document: Document, key: str, text: str) -> bytes:
    """A document with its line end.

    Args:
        document: to be written.
        key: of its text.
        text: what it has there.

    Raises:
        DocumentError: it holds what JSON cannot.
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
