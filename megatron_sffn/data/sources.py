"""Files of text: what `--input` names.

Enters: paths of files, folders and globs, `-` for standard input. Leaves: sources, in order, that
can be read; `blocks.py` reads them.
Choices: a name says what a file is: `.jsonl`, `.json`, `.ndjson` (a JSON object per line, as any
other file that is named outright), `.txt` (one document), `.parquet` (one per row), each but the
last also as `.gz`, `.bz2`, `.xz`, `.zst`.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

from backports import zstd

from megatron_sffn.errors import ConfigError

STANDARD_INPUT = "-"
KINDS = {
    ".jsonl": "lines",
    ".json": "lines",
    ".ndjson": "lines",
    ".txt": "text",
    ".parquet": "rows",
}
PACKINGS: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstd}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to read.

    Args:
        path: of the file, or `-` for standard input.
        kind: `lines`, `text` or `rows`.
        packing: ending of its compression, or none.
        size: bytes on disk; None for a pipe, which is read once and from its start.
        modified: nanoseconds.
    """

    path: str
    kind: str
    packing: str
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


def find_sources(inputs: Sequence[str], keys: Sequence[str]) -> list[Source]:
    """The files that `--input` names, checked before any work is done.

    Args:
        inputs: files, pipes, folders (read with those below them, sorted by name), globs, `-`.
        keys: columns that Parquet files must have.

    Raises:
        ConfigError: a name leads nowhere, twice to one file, or to one that cannot be read or
            lacks a key.
    """
    sources: dict[str, Source] = {}
    for given in inputs:
        for path in _expand(given):
            real = os.path.realpath(path) if path != STANDARD_INPUT else path
            if real in sources:
                raise ConfigError(
                    f"--input {given} leads to {path} a second time; name each file once"
                )
            sources[real] = _source(path)
    for source in sources.values():
        _check_keys(source, keys)
    return list(sources.values())


def _check_keys(source: Source, keys: Sequence[str]) -> None:
    if source.kind == "rows":
        from megatron_sffn.data.parquet import check_columns

        check_columns(source.path, keys)
    if source.kind == "text" and len(keys) > 1:
        raise ConfigError(
            f"--input {source.path} is one text, but there are {len(keys)} keys "
            f"({', '.join(keys)}); name one key, or give the texts as JSON lines"
        )


def _expand(given: str) -> list[str]:
    if given == STANDARD_INPUT:
        return [given]
    if os.path.isdir(given):
        found = sorted(str(path) for path in Path(given).rglob("*") if _is_text(path, given))
        if not found:
            raise ConfigError(
                f"--input {given} is a folder without text; it may hold files that end in "
                f"{', '.join(KINDS)}, or in these and {', '.join(PACKINGS)}"
            )
        return found
    if os.path.exists(given):
        return [given]
    if found := sorted(path for path in glob(given, recursive=True) if os.path.isfile(path)):
        return found
    raise ConfigError(
        f"--input {given} does not exist; give a file, a folder, a glob such as 'part-*.jsonl', "
        "or - for standard input"
    )


def _is_text(path: Path, folder: str) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and bool(_ending(path.name)[0]) and path.is_file()


def _ending(name: str) -> tuple[str, str]:
    """Kind by the ending of a name, or none, and the ending of its compression, or none."""
    stem, packing = os.path.splitext(name)
    if packing not in PACKINGS:
        stem, packing = name, ""
    return KINDS.get(os.path.splitext(stem)[1], ""), packing


def _source(path: str) -> Source:
    if path == STANDARD_INPUT:
        return Source(path=path, kind="lines", packing="", size=None, modified=0)
    if not os.access(path, os.R_OK):
        raise ConfigError(f"--input {path} cannot be read by this user; change its permissions")
    kind, packing = _ending(path)
    if kind == "rows" and packing:
        raise ConfigError(
            f"--input {path} is compressed Parquet, which is read out of order; decompress the "
            "file: Parquet compresses its columns by itself"
        )
    entry = os.stat(path)
    size = entry.st_size if stat.S_ISREG(entry.st_mode) else None
    return Source(
        path=path, kind=kind or "lines", packing=packing, size=size, modified=entry.st_mtime_ns
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


def unpack(raw: BinaryIO, packing: str) -> BinaryIO:
    """The same, decompressed."""
    stream: BinaryIO = PACKINGS[packing].open(raw) if packing else raw
    return stream
