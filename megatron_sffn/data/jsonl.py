"""Files with one JSON object per line, and messages that name the line that is wrong.

Enters: paths. Leaves: lines in order, and the strings they hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sffn.errors import ConfigError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of an input file, with what an error message needs to name it."""

    path: str
    number: int
    content: bytes

    def __str__(self) -> str:
        """How messages name the line."""
        return f"line {self.number} of {self.path}"


def check_inputs(paths: Sequence[str]) -> None:
    """Refuse inputs that cannot be read, before any work is done.

    Pipes such as `<(zcat part.jsonl.gz)` are accepted: nothing is read twice.
    """
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"--input {path} does not exist; give the path of an existing file")
        if os.path.isdir(path):
            raise ConfigError(f"--input {path} is a folder; give the files in it")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"--input {path} cannot be read by this user; change its permissions")
        if path.endswith(COMPRESSED):
            raise ConfigError(
                f"--input {path} is compressed, and only plain files are read; "
                "decompress it first, or pipe it: --input <(zcat FILE)"
            )


def read_lines(paths: Sequence[str]) -> Iterator[Line]:
    """All lines of all files, in order."""
    for path in paths:
        with open(path, "rb") as file:
            for number, content in enumerate(file, start=1):
                yield Line(path=path, number=number, content=content)


def texts_of(line: Line, keys: Sequence[str]) -> list[str]:
    """The strings that a line holds under `keys`.

    Raises:
        ConfigError: the line is no JSON object, lacks a key, or holds no text there.
    """
    try:
        record = json.loads(line.content)
    except ValueError as error:
        # JSONDecodeError's own words name "line 1", which is never the line of the file.
        reason = getattr(error, "msg", None) or "it is not UTF-8"
        raise ConfigError(f"{line} is not JSON ({reason}); correct or remove it") from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{line} is a JSON {type(record).__name__}, not an object; "
            f'write {{"{keys[0]}": "..."}} on every line'
        )
    return [_text_of(line, record, key) for key in keys]


def _text_of(line: Line, record: dict[str, Any], key: str) -> str:
    if key not in record:
        has = ", ".join(sorted(record)) or "no keys"
        raise ConfigError(f"{line} has no key {key!r} (it has {has}); name an existing key")
    text = record[key]
    if not isinstance(text, str):
        raise ConfigError(
            f"{line} holds {type(text).__name__} under {key!r}, not a string; "
            "store the text of a document as one string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{line} holds half of a surrogate pair ({text[error.start]!a}) under {key!r}, "
            "which is no character; remove it"
        ) from error
    return text
