"""Sources of text: the files that `--input` names.

Inputs: paths of files, folders and globs, or `-` for standard input.
Outputs: sources in order, which `chunks.py` reads.

Design notes:
- The name of a file gives its format: `.jsonl`, `.json` and `.ndjson` have a JSON object on every
  line, `.txt` is one document, `.parquet` has a document in every row. All formats but Parquet may
  be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). A file with another name holds JSON lines, if
  `--input` names the file itself.
"""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from typing import BinaryIO

from megatron_sffn.data.text.compression import COMPRESSIONS
from megatron_sffn.utils.errors import ConfigError

STANDARD_INPUT = "-"
KINDS = {
    ".jsonl": "lines",
    ".json": "lines",
    ".ndjson": "lines",
    ".txt": "text",
    ".parquet": "rows",
}
"""Ending of a name -> kind of the source."""

HEAD_BYTES = 4096
"""First bytes of a file, which show whether it is text."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to read.

    Args:
        path: path of the file, or `-` for standard input.
        kind: `lines` (of JSON), `text` (one document) or `rows` (of Parquet).
        compression: ending of the compression, such as `.gz`; empty if there is none.
        size: bytes on disk; None for a pipe, which can be read only once, from its start.
        modified: time of the last change, in nanoseconds.
    """

    path: str
    kind: str
    compression: str
    size: int | None
    modified: int

    @property
    def name(self) -> str:
        """Name of the source in messages."""
        return "standard input" if self.path == STANDARD_INPUT else self.path

    @property
    def unit(self) -> str:
        """`line` or `row`, which is one document; empty if the file is one document."""
        return {"lines": "line", "rows": "row", "text": ""}[self.kind]


def find_sources(
    inputs: Sequence[str],
    keys: Sequence[str],
    say: Callable[[str], None] = lambda message: None,
) -> list[Source]:
    """Find the files that `--input` names, and check them before any work is done.

    Args:
        inputs: files, pipes, folders (read recursively, sorted by name), globs, `-`.
        keys: columns that Parquet files must have.
        say: receives a line about the files of a folder that are not read.

    Raises:
        ConfigError: a path does not exist, a file is named twice, cannot be read, or lacks a key.
    """
    sources: dict[str, Source] = {}
    for value in inputs:
        for path, kind in _expand(value, say).items():
            real = os.path.realpath(path) if path != STANDARD_INPUT else path
            if real in sources:
                raise ConfigError(
                    f"--input {value} leads to {path} a second time; name each file once"
                )
            sources[real] = _source(path, kind)
    for source in sources.values():
        _check_keys(source, keys)
    return list(sources.values())


def _check_keys(source: Source, keys: Sequence[str]) -> None:
    if source.kind == "rows":
        from megatron_sffn.data.text.parquet import check_columns

        check_columns(source.path, keys)
    if source.kind == "text" and len(keys) > 1:
        raise ConfigError(
            f"--input {source.path} is one text, but there are {len(keys)} keys "
            f"({', '.join(keys)}); name one key, or give the texts as JSON lines"
        )


def _expand(value: str, say: Callable[[str], None]) -> dict[str, str]:
    """Path -> kind for the files that one value of `--input` names.

    The kind is empty where the name of the file gives it.
    """
    if value == STANDARD_INPUT:
        if sys.stdin is None:
            raise ConfigError("--input - is standard input, which is closed; pipe text into it")
        return {value: ""}
    if os.path.isdir(value):
        return _files_below(value, say)
    if os.path.exists(value):
        return {value: ""}
    if matches := sorted(path for path in glob(value, recursive=True) if os.path.isfile(path)):
        return dict.fromkeys(matches, "")
    raise ConfigError(
        f"--input {value} does not exist; give a file, a folder, a glob such as 'part-*.jsonl', "
        "or - for standard input"
    )


def _files_below(folder: str, say: Callable[[str], None]) -> dict[str, str]:
    """Path -> kind for the text files in a folder, sorted by path.

    Files without an ending are read only if no file has the ending of a text format: beside such
    files they are mostly markers and licenses.
    """
    texts: list[str] = []
    non_texts: list[str] = []
    for path in _walk(folder):
        name = os.path.basename(path)
        (texts if os.path.isfile(path) and _ending(name)[0] else non_texts).append(path)
    kinds = dict.fromkeys(sorted(texts), "")
    if not texts:
        without_ending = [path for path in sorted(non_texts) if not os.path.splitext(path)[1]]
        kinds = {path: kind for path in without_ending if (kind := kind_of_content(path))}
    if not kinds:
        raise ConfigError(
            f"--input {folder} is a folder without text; it may hold files that end in "
            f"{', '.join(KINDS)}, or in these and {', '.join(COMPRESSIONS)}, or, if there are none "
            "of these, text in files without an ending"
        )
    if unread := [path for path in non_texts if path not in kinds]:
        endings = Counter(
            (os.path.splitext(path)[1] or "no ending") if os.path.exists(path) else "broken link"
            for path in unread
        )
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
        more = ", ..." if len(endings) > 5 else ""
        say(f"--input {folder}: {len(unread)} files are left alone ({counts}{more}): {unread[0]!a}")
    return kinds


def _walk(folder: str) -> Iterator[str]:
    """Visible files below a folder; links are followed, and each folder is visited once."""
    visited = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        to_visit = []
        # Real folders come before links to them, so that paths have the real names.
        for name in sorted(folders, key=lambda name: (os.path.islink(f"{parent}/{name}"), name)):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in visited:
                visited.add(real)
                to_visit.append(name)
        folders[:] = to_visit
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def kind_of_content(path: str) -> str:
    """Kind of a file by its first bytes; empty if they are not text."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if b"\0" in head or not head.strip():
        return ""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # otherwise the head ends within a character
            return ""
    return "lines" if head.lstrip().startswith(b"{") else "text"


def kind_of_ending(path: str) -> str:
    """Kind of a file by the ending of its name; empty where the ending is unknown."""
    return _ending(os.path.basename(path))[0]


def _ending(name: str) -> tuple[str, str]:
    """Kind and compression by the ending of a name; empty where the ending is unknown."""
    stem, compression = os.path.splitext(name)
    if compression not in COMPRESSIONS:
        stem, compression = name, ""
    return KINDS.get(os.path.splitext(stem)[1], ""), compression


def _source(path: str, kind: str) -> Source:
    """The source at a path; an empty kind is taken from the name."""
    if path == STANDARD_INPUT:
        return Source(path=path, kind="lines", compression="", size=None, modified=0)
    if not os.access(path, os.R_OK):
        raise ConfigError(f"--input {path} cannot be read by this user; change its permissions")
    kind_by_name, compression = _ending(path)
    kind = kind or kind_by_name or "lines"
    if kind == "rows" and compression:
        raise ConfigError(
            f"--input {path} is compressed Parquet, which is read out of order; decompress the "
            "file: Parquet compresses its columns by itself"
        )
    entry = os.stat(path)
    size = entry.st_size if stat.S_ISREG(entry.st_mode) else None
    return Source(
        path=path,
        kind=kind,
        compression=compression,
        size=size,
        modified=entry.st_mtime_ns,
    )


def total_size(sources: Sequence[Source]) -> int | None:
    """Bytes on disk of all sources; None if one of them is a pipe."""
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


def open_raw(source: Source) -> BinaryIO:
    """Open a source, without decompressing it."""
    if source.path == STANDARD_INPUT:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return open(source.path, "rb")
