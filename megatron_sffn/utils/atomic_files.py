"""Atomic writes: files that a kill at any moment leaves readable.

Outputs: a file that is replaced as a whole, or a file of JSON lines that grows at its end and is
read without the line that a kill cut short.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_sffn.utils.errors import ConfigError

STALE_SECONDS = 3600.0
"""A partial file that nobody wrote to for so long was left by a kill."""


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path to write to, which replaces `path` when the `with` block ends without an error.

    Several processes may replace the same file at the same time.

    Args:
        path: path of the file, whose folder exists.
        durable: wait until the content and the name are on the disk, so that the file also
            survives a crash of the machine.
    """
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[IO[str]]:
    """A text file that replaces `path` when the `with` block ends; see `atomic_path`."""
    with atomic_path(path, durable=durable) as partial, partial.open("w") as file:
        yield file


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a file, and make its folder: a reader sees the former text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        partial.write_text(text)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the `with` block ends without an error.

    Args:
        path: of the folder; its parent is created if necessary.
        overwrite: replace an existing folder.

    Raises:
        FileExistsError: if `path` is a file, or a folder with files that may not be replaced.
    """
    holds_files = path.is_dir() and any(path.iterdir())
    if (path.exists() and not path.is_dir()) or (holds_files and not overwrite):
        raise FileExistsError(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if time.time() - stale.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(stale, ignore_errors=True)
    token = secrets.token_hex(4)
    partial = path.with_name(f".{path.name}.{token}.partial")
    former = path.with_name(f".{path.name}.{token}.former.partial")
    partial.mkdir()
    try:
        yield partial
        if path.is_dir():
            path.rename(former)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, without a last line that a kill cut short.

    A file that does not exist has no records.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file of a run; empty if there is no file.

    Raises:
        ConfigError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); write it again or remove it") from error
    return content


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a file of JSON lines whose last line is complete."""
    with path.open("a") as file:
        file.write(_lines(records))


def replace_records(
    path: Path, keep: Callable[[dict[str, Any]], bool], records: Iterable[dict[str, Any]]
) -> None:
    """Add records to a file of JSON lines, sorted by iteration, and drop former ones.

    Args:
        path: path of the file, which need not exist.
        keep: True for a former record that stays.
        records: the new ones.
    """
    kept_records = [record for record in read_records(path) if keep(record)]
    records = sorted([*kept_records, *records], key=lambda record: record["iteration"])
    atomic_write_text(path, _lines(records))


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
