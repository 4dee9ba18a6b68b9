"""Files of a run that a kill at any moment leaves readable.

Enters: text, or records to be lines of JSON. Leaves: a file that is replaced whole, or one that
grows at its end and is read without the line that a kill cut short.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the former text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of another, on the disk, when the block ends."""
    part = path.with_name(f".{path.name}.partial")
    try:
        with part.open("w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON; none if there is no file, and no half-written last one."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add lines to a file of JSON whose last line is whole."""
    with path.open("a") as file:
        file.write(_lines(records))


def replace_records(
    path: Path, keep: Callable[[dict[str, Any]], bool], records: Iterable[dict[str, Any]]
) -> None:
    """Add lines to a file of JSON, in the order of their iterations, and drop others.

    Args:
        path: of the file, which need not exist.
        keep: whether a former record stays.
        records: the new ones.
    """
    kept = [record for record in read_records(path) if keep(record)]
    write_whole(path, _lines(sorted([*kept, *records], key=lambda one: one["iteration"])))


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
