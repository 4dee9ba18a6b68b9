"""Files of text: what `--input` names.

Enters: paths of files, folders and globs, `-` for standard input. Leaves: sources, in order, that
can be read; `chunks.py` reads them.
Choices: a name says what a file is: `.jsonl`, `.json`, `.ndjson` (a JSON object per line, as any
other file that is named outright), `.txt` (one document), `.parquet` (one per row), each but the
last also as `.gz`, `.bz2`, `.xz`, `.zst`.
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


HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to read.

    Args:
        path: of the file, or `-` for standard input.
        kind: `lines`, `text` or `rows`.
        compression: ending of its compression, or none.
        size: bytes on disk; None for a pipe, which is read once and from its start.
        modified: nanoseconds.
    """

    path: str
    kind: str
    compression: str
    size: int | None
    modified: int

    @property
    def name(self) -> str:
        """How messages name it."""
        return "standard input" if self.path == STANDARD_INPUT else self.path

    @property
    def unit(self) -> str:
        """What a document of it is called; nothing if the file is one document."""
        return {"lines": "line", "rows": "row", "text": ""}[self.kind]


def find_sources(
    inputs: Sequence[str],
    keys: Sequence[str],
    say: Callable[[str], None] = lambda message: None,
) -> list[Source]:
    """The files that `--input` names, checked before any work is done.

    Args:
        inputs: files, pipes, folders (read with those below them, sorted by name), globs, `-`.
        keys: columns that Parquet files must have.
        say: told which files of a folder are left alone.

    Raises:
        ConfigError: a name leads nowhere, twice to one file, or to one that cannot be read or
            lacks a key.
    """
    sources: dict[str, Source] = {}
    for given in inputs:
        for path, kind in _expand(given, say).items():
            real = os.path.realpath(path) if path != STANDARD_INPUT else path
            if real in sources:
                raise ConfigError(
                    f"--input {given} leads to {path} a second time; name each file once"
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


def _expand(given: str, say: Callable[[str], None]) -> dict[str, str]:
    """Paths that a name leads to, and their kinds; no kind where the name says it."""
    if given == STANDARD_INPUT:
        if sys.stdin is None:
            raise ConfigError("--input - is standard input, which is closed; pipe text into it")
        return {given: ""}
    if os.path.isdir(given):
        return _files_below(given, say)
    if os.path.exists(given):
        return {given: ""}
    if matches := sorted(path for path in glob(given, recursive=True) if os.path.isfile(path)):
        return dict.fromkeys(matches, "")
    raise ConfigError(
        f"--input {given} does not exist; give a file, a folder, a glob such as 'part-*.jsonl', "
        "or - for standard input"
    )


def _files_below(folder: str, say: Callable[[str], None]) -> dict[str, str]:
    """Paths of the text in a folder, sorted, and their kinds.

    Names without an ending are text if no name has one: beside others they are markers and licenses
    more often than text.
    """
    texts: list[str] = []
    others: list[str] = []
    for path in _walk(folder):
        name = os.path.basename(path)
        (texts if os.path.isfile(path) and _ending(name)[0] else others).append(path)
    kinds = dict.fromkeys(sorted(texts), "")
    if not texts:
        bare = [path for path in sorted(others) if not os.path.splitext(path)[1]]
        kinds = {path: kind for path in bare if (kind := _kind_of_content(path))}
    if not kinds:
        raise ConfigError(
            f"--input {folder} is a folder without text; it may hold files that end in "
            f"{', '.join(KINDS)}, or in these and {', '.join(COMPRESSIONS)}, or, if there are none "
            "of these, text in files without an ending"
        )
    if left := [path for path in others if path not in kinds]:
        endings = Counter(
            (os.path.splitext(path)[1] or "no ending") if os.path.exists(path) else "broken link"
            for path in left
        )
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
        more = ", ..." if len(endings) > 5 else ""
        say(f"--input {folder}: {len(left)} files are left alone ({counts}{more}): {left[0]!a}")
    return kinds


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, also behind links, each folder once; hidden ones are left out."""
    visited = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        below = []
        # What is no link comes first, so that its own name is the one that is used.
        for name in sorted(folders, key=lambda name: (os.path.islink(f"{parent}/{name}"), name)):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in visited:
                visited.add(real)
                below.append(name)
        folders[:] = below
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _kind_of_content(path: str) -> str:
    """Kind of a file by its first bytes; none if they are no text."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if b"\0" in head or not head.strip():
        return ""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a character that is cut
            return ""
    return "lines" if head.lstrip().startswith(b"{") else "text"


def _ending(name: str) -> tuple[str, str]:
    """Kind by the ending of a name, or none, and the ending of its compression, or none."""
    stem, compression = os.path.splitext(name)
    if compression not in COMPRESSIONS:
        stem, compression = name, ""
    return KINDS.get(os.path.splitext(stem)[1], ""), compression


def _source(path: str, kind: str) -> Source:
    """A source of a path; its name says of which kind it is, unless that is given."""
    if path == STANDARD_INPUT:
        return Source(path=path, kind="lines", compression="", size=None, modified=0)
    if not os.access(path, os.R_OK):
        raise ConfigError(f"--input {path} cannot be read by this user; change its permissions")
    ending, compression = _ending(path)
    kind = kind or ending
    if kind == "rows" and compression:
        raise ConfigError(
            f"--input {path} is compressed Parquet, which is read out of order; decompress the "
            "file: Parquet compresses its columns by itself"
        )
    entry = os.stat(path)
    size = entry.st_size if stat.S_ISREG(entry.st_mode) else None
    return Source(
        path=path,
        kind=kind or "lines",
        compression=compression,
        size=size,
        modified=entry.st_mtime_ns,
    )


def total_size(sources: Sequence[Source]) -> int | None:
    """Bytes on disk; None if a pipe is among them."""
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


def open_raw(source: Source) -> BinaryIO:
    """The bytes of a source as they are on disk."""
    if source.path == STANDARD_INPUT:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return open(source.path, "rb")
