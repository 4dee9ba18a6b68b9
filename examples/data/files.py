"""Reads the text files of a folder as documents.

Inputs: a folder. Outputs: JSON lines with the text of each file, and its path below the folder.

Design notes:
- A file is text if it is UTF-8 without NUL, whatever its name. HTML is converted to its text.
- Hidden files and folders are skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from examples.quickstart.corpus import Document
from examples.quickstart.html_text import html_to_text
from megatron_sffn.utils.errors import ConfigError

PAGES = (".html", ".htm")


def folder_documents(root: Path, suffixes: Sequence[str]) -> Iterator[Document]:
    """The text files below a folder, sorted by path.

    Args:
        root: the folder.
        suffixes: endings of the files to read; empty: all files.

    Raises:
        ConfigError: `root` is not a folder.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; give a folder of files")
    for path in sorted(_visible_files(root)):
        if suffixes and not path.name.endswith(tuple(suffixes)):
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            text = html_to_text(text) if path.suffix in PAGES else text
            yield Document(source=path.relative_to(root).as_posix(), text=text)


def _visible_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """Write the documents that have text as JSON lines.

    Raises:
        ConfigError: no document has text.
    """
    with path.open("w", encoding="utf-8") as lines:
        for document in documents:
            if document.text.strip():
                record = {"text": document.text, "source": document.source}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not lines.tell():
            raise ConfigError("no file with text was found; give another folder or more suffixes")
