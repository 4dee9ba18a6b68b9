"""A folder of files as documents.

Enters: a folder. Leaves: JSON lines with the text of each file, and its name below the folder.
Choice: a file is text if it is UTF-8 without NUL, whatever its name; pages of HTML become the text
on them. Hidden files and folders are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from examples.quickstart.corpus import Document, html_to_text
from megatron_sffn.utils.errors import ConfigError

PAGES = (".html", ".htm")


def folder_documents(root: Path, suffixes: Sequence[str]) -> Iterator[Document]:
    """The files below a folder that are text, sorted by name.

    Args:
        root: the folder.
        suffixes: endings of the files to read; all, if none are given.

    Raises:
        ConfigError: it is no folder.
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
    """Write documents that have text as JSON lines.

    Raises:
        ConfigError: there are none.
    """
    with path.open("w", encoding="utf-8") as lines:
        for document in documents:
            if document.text.strip():
                record = {"text": document.text, "source": document.source}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not lines.tell():
            raise ConfigError("no file with text was found; give another folder or more suffixes")
